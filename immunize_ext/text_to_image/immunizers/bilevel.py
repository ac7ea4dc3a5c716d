"""What methods share that let an attacker adapt before the outer step: MIMA, IMMA and kin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from immunize_ext.text_to_image.immunizers.batches import Batch
from immunize_ext.text_to_image.immunizers.loop import INNER, Immunizer, Run
from immunize_ext.text_to_image.immunizers.parameters import Loss, Parameters, descend

ALTERNATING = "alternating"


@dataclass(frozen=True, kw_only=True)
class BilevelImmunizer(Immunizer):
    """An outer loop around steps of adaptation.

    Attributes:
        inner_steps: Adaptation steps, 1 to 5.
        inner_rate: alpha.
        second_order: Whether adaptation is differentiated through (``create_graph``), which needs
            plain attention and a variant that discards it.
        variant: ``"alternating"``, which keeps the adaptation as the released codes do, or the name
            of the variant that the paper states.
    """

    published: ClassVar[str]

    usual_rates: ClassVar[Mapping[str, float]] = {"learning_rate": 3e-5, "inner_rate": 5e-6}

    inner_steps: int = 1
    inner_rate: float = 10.0
    second_order: bool = False
    variant: str

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if not 1 <= self.inner_steps <= 5:
            raise ValueError(f"{self.method}: inner_steps must be 1 to 5, got {self.inner_steps}")
        if not (math.isfinite(self.inner_rate) and self.inner_rate > 0.0):
            raise ValueError(
                f"{self.method}: inner_rate must be positive and finite, got {self.inner_rate}"
            )
        if self.variant not in (self.published, ALTERNATING):
            raise ValueError(
                f"{self.method}: variant must be {self.published!r} or {ALTERNATING!r}, got "
                f"{self.variant!r}"
            )
        if self.alternating and self.second_order:
            raise ValueError(f"{self.method}: the alternating variant must not be second order")

    @property
    def alternating(self) -> bool:
        """Whether adaptation is kept from step to step."""
        return self.variant == ALTERNATING

    def double_backward(self) -> bool:
        """If second order."""
        return self.second_order

    def resumable_after_failure(self) -> bool:
        """Unless adaptation is kept from step to step."""
        return not self.alternating

    def inner_draws(self, run: Run, step: int) -> list[list[Batch]]:
        """Batches of every concept for each adaptation step of one outer step."""
        return [
            run.draw(step * self.inner_steps + inner, INNER) for inner in range(self.inner_steps)
        ]

    def adapt(self, run: Run, parameters: Parameters, batches: Sequence[Batch]) -> Parameters:
        """Adaptation steps from theta, one on each batch, as a function of theta."""
        adapted, met = descend(
            parameters,
            [denoising_loss(run, batch) for batch in batches],
            rate=self.inner_rate,
            create_graph=self.second_order,
            scale=run.scale,
        )
        run.inner_losses.extend(met)
        return adapted


def denoising_loss(run: Run, batch: Batch) -> Loss:
    """The denoising loss of one batch as a function of the parameters."""

    def loss(parameters: Mapping[str, Tensor]) -> Tensor:
        return batch.losses(run.model, parameters).mean()

    return loss
