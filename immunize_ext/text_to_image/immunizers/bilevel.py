"""What methods share that let an attacker adapt before the outer step: MIMA, IMMA and kin."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

from torch import Tensor

from immunize_ext.bilevel import (
    SGD,
    Adam,
    Composed,
    Hypergradient,
    HypergradientKind,
    InnerOptimizer,
    OperatorKind,
    Parameters,
    Solver,
    adapt,
    displacement_norm,
)
from immunize_ext.text_to_image.immunizers.batches import Batch
from immunize_ext.text_to_image.immunizers.loop import INNER, PROBE_STEP, Immunizer, Run

ALTERNATING = "alternating"

InnerOptimizerName = Literal["sgd", "momentum", "adam"]

_MOMENTUM = 0.9

# What the first-order condition is measured with: differences need no second derivatives, so the
# diagnosis takes neither memory nor attention that the run does not take anyway.
_BY_DIFFERENCES = Hypergradient("unrolled", operator="secant")
ALPHA_J = "alpha_j"


@dataclass(frozen=True, kw_only=True)
class BilevelImmunizer(Immunizer):
    """An outer loop around steps of adaptation.

    Attributes:
        inner_steps: Adaptation steps.
        inner_rate: alpha.
        inner_optimizer: What takes them: ``"sgd"`` as published, ``"momentum"`` (0.9) or
            ``"adam"``.
        hypergradient: How adaptation is differentiated: ``"first_order"`` (not at all),
            ``"unrolled"`` (exactly, by one Hessian-vector product a step), ``"truncated"`` (the
            last ``hypergradient_steps`` steps) or ``"implicit"`` (as if it ended at a minimum near
            theta). All but the first need plain attention, unless ``curvature`` is ``"secant"``.
        hypergradient_steps: Products with second derivatives at most, for ``"truncated"`` and
            ``"implicit"``.
        solver: Of ``"implicit"``: conjugate gradients (``"cg"``) or Neumann's series
            (``"neumann"``).
        curvature: What stands for second derivatives: ``"hessian"``, ``"gauss_newton"`` (positive
            semidefinite) or ``"secant"`` (differences of gradients: less memory).
        variant: ``"alternating"``, which keeps the adaptation as the released codes do, or the name
            of the variant that the paper states.
    """

    published: ClassVar[str]

    usual_rates: ClassVar[Mapping[str, float]] = {"learning_rate": 3e-5, "inner_rate": 5e-6}

    inner_steps: int = 1
    inner_rate: float = 10.0
    inner_optimizer: InnerOptimizerName = "sgd"
    hypergradient: HypergradientKind = "first_order"
    hypergradient_steps: int = 3
    solver: Solver = "cg"
    curvature: OperatorKind = "hessian"
    variant: str

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if self.inner_steps < 1:
            raise ValueError(
                f"{self.method}: inner_steps must be at least 1, got {self.inner_steps}"
            )
        if not (math.isfinite(self.inner_rate) and self.inner_rate > 0.0):
            raise ValueError(
                f"{self.method}: inner_rate must be positive and finite, got {self.inner_rate}"
            )
        if self.hypergradient_steps < 1:
            raise ValueError(
                f"{self.method}: hypergradient_steps must be at least 1, got "
                f"{self.hypergradient_steps}"
            )
        for name, kind in (
            ("inner_optimizer", InnerOptimizerName),
            ("hypergradient", HypergradientKind),
            ("solver", Solver),
            ("curvature", OperatorKind),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{self.method}: {name} must be one of {', '.join(get_args(kind))}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.variant not in (self.published, ALTERNATING):
            raise ValueError(
                f"{self.method}: variant must be {self.published!r} or {ALTERNATING!r}, got "
                f"{self.variant!r}"
            )
        if self.alternating and self.hypergradient != "first_order":
            raise ValueError(
                f"{self.method}: hypergradient must be 'first_order' in the alternating variant, "
                f"got {self.hypergradient!r}"
            )

    @property
    def alternating(self) -> bool:
        """Whether adaptation is kept from step to step."""
        return self.variant == ALTERNATING

    def differentiation(self) -> Hypergradient:
        """How adaptation is differentiated."""
        return Hypergradient(
            self.hypergradient,
            steps=self.hypergradient_steps,
            solver=self.solver,
            operator=self.curvature,
        )

    def double_backward(self) -> bool:
        """If gradients are differentiated."""
        return self.differentiation().differentiates_twice

    def resumable_after_failure(self) -> bool:
        """Unless adaptation is kept from step to step."""
        return not self.alternating

    def inner_draws(self, run: Run, step: int) -> list[list[Batch]]:
        """Batches of every concept for each adaptation step of one outer step."""
        return [
            run.draw(step * self.inner_steps + inner, INNER) for inner in range(self.inner_steps)
        ]

    def adapt(
        self, run: Run, parameters: Parameters, batches: Sequence[Batch], how: Hypergradient
    ) -> Parameters:
        """Adaptation steps from theta, one on each batch, as a function of theta."""
        found = adapt(
            parameters,
            [denoising_loss(run, batch) for batch in batches],
            self._optimizer(),
            how,
            scale=run.scale,
        )
        run.inner_losses.extend(found.losses)
        run.sweeps.append(found.sweeps)
        return found.parameters

    def _optimizer(self) -> InnerOptimizer:
        if self.inner_optimizer == "adam":
            return Adam(self.inner_rate)
        return SGD(self.inner_rate, _MOMENTUM if self.inner_optimizer == "momentum" else 0.0)

    @abstractmethod
    def ends(
        self, run: Run, parameters: Parameters, step: int, how: Hypergradient
    ) -> list[Parameters]:
        """What adaptation ends at, as functions of theta: one for each model that is attacked."""

    def diagnosis(self, run: Run, leaves: Parameters, step: int) -> dict[str, float]:
        r"""Norm of alpha J, from below, at the first, fourth, sixteenth, ... probe.

        Of the map from theta to what adaptation ends at, the norm of I less its derivative; the
        largest where several models are attacked. It takes 7 gradients for each that an adaptation
        takes, which is why it is not measured at every probe.
        """
        probe = -(-step // self.probe_every)
        if self.alternating or probe.bit_count() != 1 or probe.bit_length() % 2 == 0:
            return {}

        def end(parameters: Parameters, index: int) -> Parameters:
            return self.ends(run, parameters, PROBE_STEP, _BY_DIFFERENCES)[index]

        norms = [
            displacement_norm(partial(end, index=index), leaves, pairs=2)
            for index in range(self.models_attacked(run))
        ]
        return {ALPHA_J: max(norms)}

    def models_attacked(self, run: Run) -> int:
        """How many tables :meth:`ends` gives."""
        del run
        return 1

    def remarks(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """Where the first-order direction need not be one of ascent."""
        if self.hypergradient != "first_order":
            return []
        largest = max(history, key=lambda record: record.get(ALPHA_J, 0.0), default={})
        norm = largest.get(ALPHA_J, 0.0)
        if norm <= 1.0:
            return []
        return [
            f"{self.method}: alpha |J| is at least {norm:.2g} at step {largest['step']:.0f}; above "
            "1 the first-order gradient need not raise the loss after adaptation: lower "
            "inner_rate, or set hypergradient to unrolled"
        ]


def denoising_loss(run: Run, batch: Batch) -> Composed:
    """The denoising loss of one batch as a function of the parameters."""
    loss = batch.loss(run.model)

    def outputs(parameters: Mapping[str, Tensor]) -> Tensor:
        with run.inner():
            return loss.outputs(parameters)

    return Composed(outputs, loss.criterion)
