"""IMMA for linear probes: make the harmful probe bad after a few steps of its own training.

Bi-level, with Z = X_H theta and Y the harmful targets:

    lower   w_0 = 0,  w_{j+1} = w_j - (1/L) Z^T (Z w_j - Y),   L = lambda_max(Z^T Z),  j < J
    upper   min over theta, omega of   loss_P(omega, theta) - weight * loss_H(w_J(theta), theta)

where losses are mean squared residuals relative to the mean square of the targets. The step 1/L
belongs to the attacker and follows theta, so scaling theta down gains nothing. The lower level is
unrolled and differentiated through, or held constant (first order) as the published code does.
Unlike condition-number immunization this needs the harmful labels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.corridor import check_corridor
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import LinearProblem, check_settings, plain_settings

_NAME = "ImmaImmunizer"


def probe_after_steps(features: Tensor, targets: Tensor, steps: int) -> Tensor:
    """The head after some steps of gradient descent with step 1/L from 0.

    Args:
        features: Z, shape ``(n, q)``.
        targets: Y, shape ``(n,)`` or ``(n, c)``.
        steps: Number of steps J.

    Returns:
        The head, shape ``(q,)`` or ``(q, c)``; differentiable in ``features``, also through L.

    Example:
        >>> z = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> probe_after_steps(z, torch.ones(2, dtype=torch.float64), 1).tolist()
        [0.25, 0.5]
    """
    step = 1.0 / gram_extremes(features).lambda_max
    head = features.new_zeros((features.shape[1], *targets.shape[1:]))
    for _ in range(steps):
        head = head - step * (features.mT @ (features @ head - targets))
    return head


@dataclass(frozen=True)
class ImmaImmunizer:
    """Bi-level immunization against a linear probe by gradient descent.

    Attributes:
        steps: Number of updates of theta, by Adam.
        inner_steps: Steps J of the probe.
        weight: Weight of the harmful loss.
        unrolled: Whether to differentiate through the probe's steps.
        first_change: Size of the first update relative to theta's norm; sets the learning rate.
        ridge: Ridge of the condition numbers in the history, relative to the largest eigenvalue.
        corridor: The least and the largest kappa_P, held exactly after each step; ``None`` leaves
            kappa_P free.
        seed: Seed of the primary head omega.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> immunizer = ImmaImmunizer(steps=20)
        >>> immunized = immunizer.fit(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> first, last = immunized.history[0], immunized.history[-1]
        >>> last["harmful_loss"] > first["harmful_loss"]
        True
    """

    steps: int = 200
    inner_steps: int = 5
    weight: float = 1.0
    unrolled: bool = True
    first_change: float = 0.05
    ridge: float = 1e-2
    corridor: tuple[float, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(
            _NAME,
            {
                "steps": self.steps,
                "inner_steps": self.inner_steps,
                "weight": self.weight,
                "first_change": self.first_change,
            },
            {},
            {},
        )
        check_corridor(_NAME, self.corridor)

    def fit(self, primary: Task, harmful: Task, theta0: Tensor | None = None) -> Immunized:
        """Immunize against ``harmful`` while keeping ``primary``.

        Args:
            primary: The task to keep; its training part is used.
            harmful: The task to make hard; its training part is used, labels included.
            theta0: Where to start, shape ``(p, p)``; the identity when omitted.

        Returns:
            The last iterate. ``history`` has a record for the start and for each step: ``step``,
            ``log_kappa_primary``, ``log_kappa_harmful``, ``log_rir``, ``primary_loss`` and
            ``harmful_loss`` (of the probe after its steps; 1 is the loss of the head 0).

        Raises:
            ValueError: If shapes do not fit, all targets of a task are 0, or theta stops being
                finite.

        Note:
            Deterministic given ``seed``; computed in float64; torch's global random state is
            neither read nor changed.

        Source:
            Zheng and Yeh, "IMMA", ECCV 2024, as a baseline for linear probes in Zheng et al., ICML
            2025.
        """
        problem = LinearProblem.of(_NAME, primary, harmful, theta0, self.ridge, self.corridor)
        (x, y), (x_h, y_h) = (
            (task.x_train.to(torch.float64), task.y_train.to(torch.float64))
            for task in (primary, harmful)
        )
        scales = [float(targets.square().mean()) for targets in (y, y_h)]
        if min(scales) == 0.0:
            raise ValueError(f"{_NAME}.fit: targets must not all be 0, got a task with none")
        theta = problem.settled(problem.start).clone().requires_grad_()
        p = theta.shape[0]
        generator = torch.Generator().manual_seed(self.seed)
        head = torch.randn(p, dtype=torch.float64, generator=generator) / math.sqrt(p)
        omega = head.to(y.device).requires_grad_()
        rate = self.first_change * float(theta.detach().norm()) / p
        optimizer = torch.optim.Adam([theta, omega], lr=rate)
        for step in range(self.steps + 1):
            primary_loss = (x @ theta @ omega - y).square().mean() / scales[0]
            features = x_h @ theta
            probe = probe_after_steps(
                features if self.unrolled else features.detach(), y_h, self.inner_steps
            )
            harmful_loss = (features @ probe - y_h).square().mean() / scales[1]
            problem.record(
                theta,
                primary_loss=float(primary_loss.detach()),
                harmful_loss=float(harmful_loss.detach()),
            )
            if step == self.steps:
                break
            optimizer.zero_grad()
            (primary_loss - self.weight * harmful_loss).backward()
            optimizer.step()
            with torch.no_grad():
                theta.copy_(problem.settled(theta.detach()))
        return Immunized(
            "imma", theta.detach(), problem.start, plain_settings(asdict(self)), problem.history
        )
