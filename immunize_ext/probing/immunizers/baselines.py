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

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.loop import (
    FEW_STEPS,
    Advance,
    Descent,
    IterativeImmunizer,
    check_settings,
    log_kappa_of,
)
from immunize_ext.probing.immunizers.registry import METHODS

Objective = Literal["r_ill", "r_well", "kappa_difference", "kappa_log_ratio"]


_NAME = "BaselineImmunizer"


_METHODS = {
    "r_ill": "r-ill-only",
    "r_well": "r-well-only",
    "kappa_difference": "opt-kappa",
    "kappa_log_ratio": "opt-kappa",
}


@dataclass(frozen=True)
class BaselineImmunizer(IterativeImmunizer):
    """Descent on R_ill, on R_well or on the kappas themselves, by plain gradients.

    No labels are used. ``history`` has besides the ``objective``.

    Attributes:
        objective: What is minimised (module docstring).
        steps: Number of updates.
        optimizer: ``"gd"`` or ``"adam"``.
        first_change: Size of the first update relative to theta's norm. It sets the constant step
            of ``"gd"``, and the learning rate of ``"adam"``, whose entries all move alike at first.

    Raises:
        ValueError: If a setting is out of range; on fitting, if theta stops being finite.
        EqualSingularValuesError: On fitting, if all eigenvalues of H_H are equal, where R_ill is
            infinite.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = BaselineImmunizer(objective="r_well", steps=20).fit(None, problem)
        >>> first, last = immunized.history[0], immunized.history[-1]
        >>> immunized.method, last["log_kappa_primary"] < first["log_kappa_primary"]
        ('r-well-only', True)
    """

    knob = "steps"
    grid = FEW_STEPS

    objective: Objective = "r_ill"
    steps: int = 200
    optimizer: Literal["gd", "adam"] = "gd"
    first_change: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            _NAME,
            {"steps": self.steps, "first_change": self.first_change},
            {"objective": get_args(Objective), "optimizer": ("gd", "adam")},
            {"objective": self.objective, "optimizer": self.optimizer},
        )

    @property
    def method(self) -> str:  # type: ignore[override]
        """The name of the method with this objective."""
        return _METHODS[self.objective]

    @property
    def label(self) -> str:
        """The method, with the form of the objective where there are two."""
        if self.method != "opt-kappa":
            return self.method
        return f"opt-kappa, {self.objective.removeprefix('kappa_').replace('_', '-')}"

    def begin(self, descent: Descent, problem: Problem[Task]) -> tuple[int, Advance]:
        """Choose the step size by the gradient at the start."""
        theta = descent.theta.requires_grad_()
        (gradient,) = torch.autograd.grad(self._value(descent, theta), theta)
        descent.optimizer = self._optimizer(theta, gradient)

        def advance(step: int) -> None:
            value = self._value(descent, theta)
            descent.record(step, objective=float(value.detach()))
            if step < self.steps:
                (theta.grad,) = torch.autograd.grad(value, theta)
                descent.move()

        return self.steps, advance

    def _optimizer(self, theta: Tensor, gradient: Tensor) -> torch.optim.Optimizer:
        """The optimizer whose first update has the size asked for."""
        change = self.first_change * float(theta.detach().norm())
        if self.optimizer == "adam":
            return torch.optim.Adam([theta], lr=change / theta.shape[0])
        norm = float(gradient.norm())
        # No gradient (all eigenvalues equal): nothing to descend, whatever the step.
        return torch.optim.SGD([theta], lr=change / norm if norm > 0.0 else 0.0)

    def _value(self, descent: Descent, theta: Tensor) -> Tensor:
        if self.objective == "r_ill":
            return gram_r_ill(descent.harmful @ theta)
        if self.objective == "r_well":
            return gram_r_well(descent.primary @ theta)
        primary, harmful = (
            log_kappa_of(rows @ theta) for rows in (descent.primary, descent.harmful)
        )
        if self.objective == "kappa_log_ratio":
            return primary - harmful
        return primary.exp() - harmful.exp()


METHODS.register(BaselineImmunizer(objective="r_ill"))
METHODS.register(BaselineImmunizer(objective="r_well"))
METHODS.register(BaselineImmunizer(objective="kappa_log_ratio", optimizer="adam"))
