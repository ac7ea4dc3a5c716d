"""IMMA: immunization against one concept, a bad start for whoever adapts to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from immunize_ext.data.concepts import ConceptSet
from immunize_ext.immunizers.text_to_image.batches import join
from immunize_ext.immunizers.text_to_image.loop import INNER, Immunizer, Run
from immunize_ext.immunizers.text_to_image.mima import denoising_loss
from immunize_ext.immunizers.text_to_image.parameters import Parameters, descend, gradient


@dataclass(frozen=True, kw_only=True)
class DiffusionIMMA(Immunizer):
    r"""Bi-level immunization of one concept.

    .. math:: \max_\theta L(x^u, c; \theta'(\theta)), \qquad
              \theta' = \theta - \alpha \nabla L(x^l, c; \theta)

    Attributes:
        inner_steps: Adaptation steps, 1 to 5.
        inner_rate: alpha.
        second_order: Whether adaptation is differentiated through (variant ``"unrolled"`` only).
        variant: ``"unrolled"``: adaptation starts from theta in every step and is discarded.
            ``"alternating"``, as the released code does it: the adaptation is a displacement of
            its own that goes on from step to step, and theta is moved with it in place.

    Source:
        IMMA (ECCV 2024); its released code for the alternating variant.

    Example:
        >>> from immunize_ext.immunizers.text_to_image import DiffusionIMMA
        >>> DiffusionIMMA(variant="alternating").method
        'imma'
    """

    method: ClassVar[str] = "imma"

    inner_steps: int = 1
    inner_rate: float = 10.0
    second_order: bool = False
    variant: Literal["unrolled", "alternating"] = "unrolled"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if not 1 <= self.inner_steps <= 5:
            raise ValueError(f"{self.method}: inner_steps must be 1 to 5, got {self.inner_steps}")
        if not (math.isfinite(self.inner_rate) and self.inner_rate > 0.0):
            raise ValueError(
                f"{self.method}: inner_rate must be positive and finite, got {self.inner_rate}"
            )
        if self.variant not in ("unrolled", "alternating"):
            raise ValueError(
                f"{self.method}: variant must be 'unrolled' or 'alternating', got {self.variant!r}"
            )
        if self.variant == "alternating" and self.second_order:
            raise ValueError(f"{self.method}: the alternating variant must not be second order")

    def check(self, concepts: ConceptSet) -> None:
        """One concept only: several are what joint training and MIMA are for."""
        if len(concepts.concepts) != 1:
            raise ValueError(
                f"imma: concepts must hold exactly one, got {len(concepts.concepts)}; choose one "
                "with concepts.select([name]), or use JointTraining or MIMA"
            )

    def double_backward(self) -> bool:
        """If second order."""
        return self.second_order

    def resumable_after_failure(self) -> bool:
        """Unless the displacement goes on from step to step."""
        return self.variant == "unrolled"

    def prepare(self, run: Run, leaves: Parameters, step: int) -> None:
        """In the alternating variant: move the attacker's displacement on."""
        if self.variant == "unrolled":
            return
        moved = run.memory or {n: torch.zeros_like(p) for n, p in leaves.items()}
        for inner in range(self.inner_steps):
            batch = join(run.draw(step * self.inner_steps + inner, INNER))
            here = {
                name: (leaf.detach() + moved[name]).requires_grad_()
                for name, leaf in leaves.items()
            }
            with torch.enable_grad(), run.autocast():
                loss = denoising_loss(run, batch)(here)
            run.inner_losses.append(float(loss.detach()))
            found = gradient(loss * run.scale, here)
            rate = self.inner_rate / run.scale
            moved = {name: value - rate * found[name] for name, value in moved.items()}
        run.memory = moved

    def adapted(self, run: Run, parameters: Parameters, step: int) -> Parameters:
        """Adapt to all concepts in one batch."""
        if self.variant == "alternating":
            if not run.memory:  # a probe before the first step
                return parameters
            return {name: value + run.memory[name] for name, value in parameters.items()}
        losses = [
            denoising_loss(run, join(run.draw(step * self.inner_steps + inner, INNER)))
            for inner in range(self.inner_steps)
        ]
        result, met = descend(
            parameters,
            losses,
            rate=self.inner_rate,
            create_graph=self.second_order,
            scale=run.scale,
        )
        run.inner_losses.extend(met)
        return result
