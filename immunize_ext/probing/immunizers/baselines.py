"""The baselines of the papers: descent on one objective of the two Hessians, nothing else.

    r_ill               R_ill(H_H): raise kappa_H, whatever happens to the primary task
    r_well              R_well(H_P): lower kappa_P, whatever happens to the harmful task
    kappa_difference    kappa(H_P) - kappa(H_H)
    kappa_log_ratio     log kappa(H_P) - log kappa(H_H), which is -log RIR up to a constant

"R_ill Only" and "Opt kappa" of "Model Immunization from a Condition Number Perspective"; the paper
describes the difference form of the latter. The difference is ruled by whichever kappa is larger,
the log ratio treats both alike. Gradients are plain ones; with K^{-1} and its step bounds, R_well
or R_ill alone is ``ConditionNumberImmunizer(lambda_ill=0.0)`` or ``(lambda_well=0.0)``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well
from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.corridor import check_corridor
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import LinearProblem, check_settings, plain_settings

Objective = Literal["r_ill", "r_well", "kappa_difference", "kappa_log_ratio"]


_NAME = "BaselineImmunizer"


@dataclass(frozen=True)
class BaselineImmunizer:
    """Descent on one objective, by plain gradients.

    Attributes:
        objective: What is minimised (module docstring).
        steps: Number of updates.
        optimizer: ``"gd"`` or ``"adam"``.
        first_change: Size of the first update relative to theta's norm. It sets the constant step
            of ``"gd"``, and the learning rate of ``"adam"``, whose entries all move alike at first.
        ridge: Ridge on each K, relative to its largest eigenvalue.
        corridor: The least and the largest kappa_P, held exactly after each step; ``None`` leaves
            kappa_P free.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> immunizer = BaselineImmunizer("r_well", steps=20)
        >>> immunized = immunizer.fit(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> first, last = immunized.history[0], immunized.history[-1]
        >>> immunized.method, last["log_kappa_primary"] < first["log_kappa_primary"]
        ('r_well', True)
    """

    objective: Objective = "r_ill"
    steps: int = 200
    optimizer: Literal["gd", "adam"] = "gd"
    first_change: float = 0.02
    ridge: float = 1e-2
    corridor: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_settings(
            _NAME,
            {"steps": self.steps, "first_change": self.first_change},
            {"objective": get_args(Objective), "optimizer": ("gd", "adam")},
            {"objective": self.objective, "optimizer": self.optimizer},
        )
        check_corridor(_NAME, self.corridor)

    def fit(self, primary: Task, harmful: Task, theta0: Tensor | None = None) -> Immunized:
        """Immunize against ``harmful``; no labels of either task are used.

        Args:
            primary: The task to keep; its training inputs are used.
            harmful: The task to make hard; its training inputs are used.
            theta0: Where to start, shape ``(p, p)``; the identity when omitted.

        Returns:
            The last iterate; ``method`` is the objective. ``history`` has a record for the start
            and for each step: ``step``, ``log_kappa_primary``, ``log_kappa_harmful``, ``log_rir``
            and ``objective``.

        Raises:
            ValueError: If shapes do not fit or theta stops being finite.
            EqualSingularValuesError: If all eigenvalues of H_H are equal, where R_ill is infinite.

        Note:
            Deterministic; computed in float64.
        """
        problem = LinearProblem.of(_NAME, primary, harmful, theta0, self.ridge, self.corridor)
        theta = problem.settled(problem.start).clone().requires_grad_()
        optimizer: torch.optim.Optimizer | None = None
        for step in range(self.steps + 1):
            value = self._value(problem, theta)
            problem.record(theta, objective=float(value.detach()))
            if step == self.steps:
                break
            (gradient,) = torch.autograd.grad(value, theta)
            if optimizer is None:
                optimizer = self._optimizer(theta, gradient)
            theta.grad = gradient
            optimizer.step()
            with torch.no_grad():
                theta.copy_(problem.settled(theta.detach()))
        return Immunized(
            self.objective,
            theta.detach(),
            problem.start,
            plain_settings(asdict(self)),
            problem.history,
        )

    def _optimizer(self, theta: Tensor, gradient: Tensor) -> torch.optim.Optimizer:
        """The optimizer whose first update has the size asked for."""
        change = self.first_change * float(theta.detach().norm())
        if self.optimizer == "adam":
            return torch.optim.Adam([theta], lr=change / theta.shape[0])
        norm = float(gradient.norm())
        # No gradient (all eigenvalues equal): nothing to descend, whatever the step.
        return torch.optim.SGD([theta], lr=change / norm if norm > 0.0 else 0.0)

    def _value(self, problem: LinearProblem, theta: Tensor) -> Tensor:
        if self.objective == "r_ill":
            return gram_r_ill(problem.harmful @ theta)
        if self.objective == "r_well":
            return gram_r_well(problem.primary @ theta)
        logs = []
        for rows in (problem.primary, problem.harmful):
            extremes = gram_extremes(rows @ theta)
            logs.append(extremes.lambda_max.log() - extremes.lambda_min.log())
        if self.objective == "kappa_log_ratio":
            return logs[0] - logs[1]
        return logs[0].exp() - logs[1].exp()
