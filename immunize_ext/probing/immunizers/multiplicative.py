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

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.corridor import check_corridor
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import LinearProblem, check_settings, plain_settings

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


@dataclass(frozen=True)
class MultiplicativeImmunizer:
    """Multiplicative updates with steps that fall to 0 linearly.

    Attributes:
        steps: Number of updates.
        eta_primary: First step on log kappa_P.
        eta_harmful: First step on log kappa_H.
        ridge: Ridge on each K, relative to its largest eigenvalue.
        corridor: The least and the largest kappa_P, held exactly after each step; ``None`` leaves
            kappa_P free.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> immunizer = MultiplicativeImmunizer(steps=30)
        >>> immunized = immunizer.fit(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> len(immunized.history), immunized.history[-1]["log_rir"] > 1.0
        (31, True)
    """

    steps: int = 400
    eta_primary: float = 0.1
    eta_harmful: float = 0.1
    ridge: float = 1e-2
    corridor: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_settings(
            _NAME,
            {
                "steps": self.steps,
                "eta_primary": self.eta_primary,
                "eta_harmful": self.eta_harmful,
            },
            {},
            {},
        )
        check_corridor(_NAME, self.corridor)

    def fit(self, primary: Task, harmful: Task, theta0: Tensor | None = None) -> Immunized:
        """Immunize against ``harmful`` while keeping ``primary``; no labels are used.

        Args:
            primary: The task to keep; its training inputs are used.
            harmful: The task to make hard; its training inputs are used.
            theta0: Where to start, shape ``(p, p)``; the identity when omitted.

        Returns:
            The last iterate. ``history`` has a record for the start and for each step: ``step``,
            ``log_kappa_primary``, ``log_kappa_harmful`` and ``log_rir``.

        Raises:
            ValueError: If shapes do not fit or theta stops being finite.

        Note:
            Deterministic; computed in float64.
        """
        problem = LinearProblem.of(_NAME, primary, harmful, theta0, self.ridge, self.corridor)
        theta = problem.settled(problem.start)
        problem.record(theta)
        for step in range(self.steps):
            share = 1.0 - step / self.steps
            theta = multiplicative_step(
                theta,
                problem.primary,
                problem.harmful,
                eta_primary=share * self.eta_primary,
                eta_harmful=share * self.eta_harmful,
            )
            theta = problem.settled(theta)
            problem.record(theta)
        return Immunized(
            "multiplicative", theta, problem.start, plain_settings(asdict(self)), problem.history
        )
