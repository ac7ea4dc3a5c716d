"""Multiplicative updates of theta that move the logarithms of both condition numbers.

For theta' = theta (I + E) with E symmetric and small, an eigenvalue of H = theta^T K theta with
eigenvector v changes by d log sigma = 2 v^T E v. So log kappa has the gradient

    2 (v_1 v_1^T - v_k v_k^T)

with respect to E: its size does not depend on any scale, and no step size has to be balanced
against sizes of eigenvalues. The update is

    theta' = theta exp(E),   E = -eta_P (v_1 v_1^T - v_k v_k^T)_P + eta_H (v_1 v_1^T - v_k v_k^T)_H.

The exponential keeps theta invertible. With eta_H = 0 it takes the extremes of H_P towards each
other by exactly 4 eta_P in log kappa, until they meet their neighbours. E has rank 4 at most, so
with an orthonormal basis B of its range, exp(E) = I + B (exp(B^T E B) - I) B^T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.loop import (
    Advance,
    Descent,
    IterativeImmunizer,
    check_settings,
)
from immunize_ext.probing.immunizers.registry import METHODS

_NAME = "MultiplicativeImmunizer"


def multiplicative_step(
    theta: Tensor, primary: Tensor, harmful: Tensor, *, eta_primary: float, eta_harmful: float
) -> Tensor:
    """One multiplicative step on log kappa_P and log kappa_H.

    Args:
        theta: The extractor, shape ``(p, p)``.
        primary: Rows whose Gram matrix is K_P, shape ``(n, p)``.
        harmful: Rows whose Gram matrix is K_H, shape ``(m, p)``.
        eta_primary: Step that lowers log kappa_P.
        eta_harmful: Step that raises log kappa_H.

    Returns:
        The next extractor, invertible if ``theta`` is.

    Note:
        Deterministic; not differentiable. Repeated extremes: one eigenvector of theirs is taken.

    Example:
        >>> x = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
        >>> theta = torch.eye(3, dtype=torch.float64)
        >>> after = multiplicative_step(theta, x, x, eta_primary=0.1, eta_harmful=0.0)
        >>> sigma = torch.linalg.svdvals(x @ after).log()
        >>> round(float(2 * (sigma[0] - sigma[-1])), 6)  # log 16 - 0.4
        2.372589
    """
    columns, signs = [], []
    for rows, eta in ((primary, -eta_primary), (harmful, eta_harmful)):
        right = torch.linalg.svd(rows @ theta, full_matrices=False).Vh
        columns += [right[0], right[-1]]
        signs += [eta, -eta]
    vectors = torch.stack(columns, dim=1)
    basis = torch.linalg.qr(vectors).Q
    inside = basis.mT @ vectors
    small = torch.linalg.matrix_exp((inside * inside.new_tensor(signs)) @ inside.mT)
    change = small - torch.eye(len(small), dtype=small.dtype, device=small.device)
    return theta + (theta @ basis) @ change @ basis.mT


@METHODS.register
@dataclass(frozen=True)
class MultiplicativeImmunizer(IterativeImmunizer):
    """Multiplicative updates of both log kappas, with steps that fall to 0 linearly; no labels.

    Attributes:
        steps: Number of updates.
        eta_primary: First step on log kappa_P; 0 leaves it to a corridor.
        eta_harmful: First step on log kappa_H.

    Raises:
        ValueError: If a setting is out of range; on fitting, if theta stops being finite.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = MultiplicativeImmunizer(steps=30).fit(None, problem)
        >>> len(immunized.history), immunized.history[-1]["log_rir"] > 1.0
        (31, True)
    """

    method: ClassVar[str] = "multiplicative"
    knob: ClassVar[str | None] = "eta_harmful"
    grid: ClassVar[tuple[float, ...]] = (0.03, 0.1, 0.3)

    steps: int = 400
    eta_primary: float = 0.1
    eta_harmful: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(_NAME, {"steps": self.steps, "eta_harmful": self.eta_harmful}, {}, {})
        if not (math.isfinite(self.eta_primary) and self.eta_primary >= 0.0):
            raise ValueError(
                f"{_NAME}: eta_primary must be finite and not negative, got {self.eta_primary}"
            )

    def begin(self, descent: Descent, problem: Problem[Task]) -> tuple[int, Advance]:
        """Nothing has to be made ready."""

        def advance(step: int) -> None:
            descent.record(step)
            if step < self.steps:
                share = 1.0 - step / self.steps
                moved = multiplicative_step(
                    descent.theta,
                    descent.primary,
                    descent.harmful,
                    eta_primary=share * self.eta_primary,
                    eta_harmful=share * self.eta_harmful,
                )
                descent.theta.copy_(descent.settled(moved))

        return self.steps, advance
