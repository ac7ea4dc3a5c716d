r"""RIR raised by changes that the features of the primary task hardly show, or not at all.

theta' = theta_0 + Delta moves the features of the primary task by X_P Delta. Allowed is

    null-space     X_P Delta = 0;
    certified      Delta = P Delta with P the projector out of the leading directions of X_P, and
                   |Delta|_2 <= c, c such that |X_P Delta|_F <= drift |X_P theta_0|_F for all of it;
    gauss-newton   that inequality itself, an ellipsoid: for features the budget is exact.

No such Delta is too large for heads on the features of the primary task: a head w answers otherwise
by no more than |w| times the drift, in root mean square over the training inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from immunize_ext.ops.local_control import InputSubspace
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.guard import Ball, Ellipsoid, Room, RuleName
from immunize_ext.probing.immunizers.loop import (
    Advance,
    Descent,
    IterativeImmunizer,
    check_settings,
    log_kappa_of,
)
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.probing.metrics.drift import Allowed

_NAME = "LocalControlImmunizer"


@METHODS.register
@dataclass(frozen=True)
class LocalControlImmunizer(IterativeImmunizer):
    """Ascent on log RIR within what the primary task's features are allowed to move; no labels.

    ``history`` has ``drift`` in each record, |X_P Delta|_F / |X_P theta_0|_F on the training part;
    ``config`` has the most that it could have been, ``drift_bound``, and what it is,
    ``drift_found``.

    Attributes:
        rule: ``"null-space"``, ``"certified"`` or ``"gauss-newton"`` (module docstring).
        drift: The largest relative drift; ``"null-space"`` has none.
        explained: Share of the mean square of X_P whose directions ``"certified"`` leaves alone.
        reach: The largest |Delta|_2 of ``"null-space"`` and ``"certified"``, in units of
            |theta_0|_2: in directions that the primary task does not have nothing else bounds it.
        steps: Number of updates.
        rate: First step, as a share of what is allowed; falls to 0 linearly.

    Raises:
        ValueError: If a setting is out of range, or there is a corridor, whose projection would
            lead out of what is allowed; on fitting, if no direction is free or all features of the
            primary task are 0.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = LocalControlImmunizer(drift=0.1, steps=40).fit(None, problem)
        >>> last = immunized.history[-1]
        >>> last["drift"] <= 0.1 + 1e-12, last["log_rir"] > 0.5
        (True, True)
    """

    method: ClassVar[str] = "local-control"
    knob: ClassVar[str | None] = "drift"
    grid: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1, 0.3)

    rule: RuleName = "gauss-newton"
    drift: float = 0.05
    explained: float = 0.9
    reach: float = 10.0
    steps: int = 200
    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = {"drift": self.drift, "reach": self.reach, "rate": self.rate}
        check_settings(
            _NAME,
            {**numbers, "steps": self.steps},
            {"rule": get_args(RuleName)},
            {"rule": self.rule},
        )
        if not 0.0 < self.explained <= 1.0:
            raise ValueError(
                f"{_NAME}: explained must be above 0 and at most 1, got {self.explained}"
            )
        if self.corridor is not None:
            raise ValueError(
                f"{_NAME}: corridor must be None, got {self.corridor}: its projection would lead "
                "out of what is allowed"
            )

    @property
    def label(self) -> str:
        """The method with its rule."""
        return f"local-control, {self.rule}"

    def begin(self, descent: Descent, problem: Problem[Task]) -> tuple[int, Advance]:
        """Find what is allowed."""
        x = problem.primary.x_train.to(torch.float64)
        start, theta = descent.start, descent.theta
        size = float((x @ start).norm()) / math.sqrt(len(x))
        if not size > 0.0:
            raise ValueError(
                f"{_NAME}.fit: primary must have features that are not all 0, got x_train theta_0 "
                "= 0, of which no share can drift; check x_train and the model"
            )
        room, bound = self._room(descent, problem)

        def drift() -> float:
            return float((x @ (theta - start)).norm()) / math.sqrt(len(x)) / size

        def advance(step: int) -> None:
            descent.record(step, drift=drift())
            if step == self.steps:
                descent.found = {"drift_bound": bound / size, "drift_found": drift()}
                return
            leaf = theta.clone().requires_grad_()
            value = log_kappa_of(descent.harmful @ leaf) - log_kappa_of(descent.primary @ leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
            # A layer W = theta^T: the room is one of what multiplies rows.
            move = room.direct(gradient.mT)
            if (extent := room.extent(move)) > 0.0:
                move = move * (self.rate * (1.0 - step / self.steps) / extent)
            change = room.keep((theta - start).mT + move)
            theta.copy_(descent.settled(start + change.mT))

        return self.steps, advance

    def _room(self, descent: Descent, problem: Problem[Task]) -> tuple[Room, float]:
        """What is allowed of Delta^T, and the most that sqrt(E |Delta^T x|^2) can be there."""
        x = problem.primary.x_train.to(torch.float64)
        outputs = descent.start.shape[1]
        allowed = self.drift * float((x @ descent.start).norm()) / math.sqrt(len(x))
        if self.rule == "gauss-newton":
            second = x.mT @ x / len(x)
            # A little of the identity: what x does not have would cost nothing without it.
            ridge = self.ridge * torch.linalg.eigvalsh(second)[-1]
            eye = torch.eye(len(second), dtype=x.dtype, device=x.device)
            other = torch.eye(outputs, dtype=x.dtype, device=x.device)
            return Ellipsoid(second + ridge * eye, other, allowed**2), allowed
        explained = 1.0 if self.rule == "null-space" else self.explained
        subspace = InputSubspace.of(x, explained=explained)
        if not len(subspace.tail):
            raise ValueError(
                f"{_NAME}.fit: primary must leave directions free for rule {self.rule!r}, got all "
                f"{len(x.mT)} in use; lower explained with rule='certified', or take "
                "rule='gauss-newton'"
            )
        limit = self.reach * float(torch.linalg.matrix_norm(descent.start, 2))
        if self.rule == "certified" and (most := subspace.drift(1.0, outputs)) > 0.0:
            limit = min(limit, allowed / most)
        return Ball(Allowed(subspace, limit)), subspace.drift(limit, outputs)
