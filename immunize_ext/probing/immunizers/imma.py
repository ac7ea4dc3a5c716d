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
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.loop import (
    Advance,
    Descent,
    IterativeImmunizer,
    check_settings,
)
from immunize_ext.probing.immunizers.registry import METHODS

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


@METHODS.register
@dataclass(frozen=True)
class ImmaImmunizer(IterativeImmunizer):
    """Bi-level immunization against a linear probe by gradient descent; uses harmful labels.

    ``history`` has besides ``primary_loss`` and ``harmful_loss`` (of the probe after its steps; 1
    is the loss of the head 0).

    Attributes:
        steps: Number of updates of theta, by Adam.
        inner_steps: Steps J of the probe.
        weight: Weight of the harmful loss.
        unrolled: Whether to differentiate through the probe's steps.
        first_change: Size of the first update relative to theta's norm; sets the learning rate.
        seed: Seed of the primary head omega.

    Raises:
        ValueError: If a setting is out of range; on fitting, if all targets of a task are 0, or
            theta stops being finite.

    Source:
        Zheng and Yeh, "IMMA", ECCV 2024, as a baseline for linear probes in Zheng et al., ICML
        2025.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = ImmaImmunizer(steps=20).fit(None, problem)
        >>> first, last = immunized.history[0], immunized.history[-1]
        >>> last["harmful_loss"] > first["harmful_loss"]
        True
    """

    method: ClassVar[str] = "imma"
    sees_scale: ClassVar[bool] = True
    knob: ClassVar[str | None] = "weight"
    grid: ClassVar[tuple[float, ...]] = (0.3, 1.0, 3.0)

    steps: int = 200
    inner_steps: int = 5
    weight: float = 1.0
    unrolled: bool = True
    first_change: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("steps", "inner_steps", "weight", "first_change")
        check_settings(_NAME, {name: getattr(self, name) for name in names}, {}, {})

    def begin(self, descent: Descent, problem: Problem[Task]) -> tuple[int, Advance]:
        """Put a random head beside theta."""
        (x, y), (x_h, y_h) = (
            (task.x_train.to(torch.float64), task.y_train.to(torch.float64))
            for task in (problem.primary, problem.only_harm(_NAME))
        )
        scales = [float(targets.square().mean()) for targets in (y, y_h)]
        if min(scales) == 0.0:
            raise ValueError(f"{_NAME}.fit: targets must not all be 0, got a task with none")
        theta = descent.theta.requires_grad_()
        p = theta.shape[0]
        generator = torch.Generator().manual_seed(self.seed)
        shape = (p, *y.shape[1:])
        head = torch.randn(shape, dtype=torch.float64, generator=generator) / math.sqrt(p)
        omega = head.to(y.device).requires_grad_()
        rate = self.first_change * float(theta.detach().norm()) / p
        descent.optimizer = torch.optim.Adam([theta, omega], lr=rate)
        descent.tensors = {"omega": omega}

        def advance(step: int) -> None:
            primary_loss = (x @ theta @ omega - y).square().mean() / scales[0]
            features = x_h @ theta
            probe = probe_after_steps(
                features if self.unrolled else features.detach(), y_h, self.inner_steps
            )
            harmful_loss = (features @ probe - y_h).square().mean() / scales[1]
            descent.record(
                step,
                primary_loss=float(primary_loss.detach()),
                harmful_loss=float(harmful_loss.detach()),
            )
            if step < self.steps:
                assert descent.optimizer is not None  # made above
                descent.optimizer.zero_grad()
                (primary_loss - self.weight * harmful_loss).backward()
                descent.move()

        return self.steps, advance
