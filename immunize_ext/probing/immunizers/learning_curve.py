r"""The harm's learning curve raised as far as the task to keep, and others that are listed, allow.

With few samples the risk of whoever stays in the row span of the features depends on the extractor
through M = theta theta^T alone, whatever the optimizer (module ``metrics.sample_risk``). So M is
what is chosen:

.. math:: \max_M\ \operatorname{mean}_{n}\ \log E_H(n; M)
          \quad \text{subject to} \quad
          \operatorname{mean}_n \log \frac{E_t(n; M)}{E_t(n; M_0)} \le \log(1 + \text{tolerance})

for the primary task and every benign one, E the risk at the learner's best ridge. Of several harms
no closed form has the least protected one: the objective is then the minimum that exponentiated
weights belong to, or the conditional value at risk (module ``worst_case``). theta is
invertible: a head compensated by theta^-1 gives the outputs it gave before.

The ascent starts at ``label-direction`` of one harm after the other, made milder until it meets the
constraints, and goes on in
theta exp(S), S symmetric: every M can be reached, and none that is singular. Constraints are held
by an exact penalty; of all iterates that meet them the best is kept, the start among them. Whoever
whitens with unlabelled inputs takes M away, and the price with it, but does not get the variances
back that the features had before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from immunize_ext.ops.equal_diagonal import equal_diagonal_rotation
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.closed_form import record_of
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.label_direction import LabelDirectionImmunizer
from immunize_ext.probing.immunizers.loop import LinearImmunizer, identity_or
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.probing.metrics.sample_risk import Moments, tuned_risk
from immunize_ext.seams import Progress
from immunize_ext.settings import plain
from immunize_ext.worst_case import conditional_value_at_risk, soft_minimum

# Of a constraint that is missed by a unit of log risk, in units of the objective: above the
# multiplier at which a small step pays, as an exact penalty has to be.
_PENALTY = 10.0


Objective = Literal["exponentiated", "cvar", "mean"]


@METHODS.register
@dataclass(frozen=True)
class LearningCurveImmunizer(LinearImmunizer):
    """The harms need more labelled samples; the task to keep and benign tasks do not.

    Uses the labels of all tasks. Benign tasks are listed in the problem.

    Attributes:
        strength: c, by which the variance of the harm's direction is divided at most at the start,
            and by which directions are scaled against each other at most after it.
        samples: Numbers of labelled samples at which the risks count.
        tolerance: By which share the risk of a task that is kept may rise, mean of logarithms.
        objective: Of several harms: ``exponentiated`` weights, ``cvar`` (mean of the least), or
            the ``mean``.
        eta: Of the exponentiated weights; 0 is the mean, large the least harm alone.
        share: Of the harms that ``cvar`` looks at.
        steps: Steps of the ascent.
        learning_rate: Of Adam, in units of log scale.
        ridge: Ridge on K_H, relative to its largest eigenvalue, of the start.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> start, end = LearningCurveImmunizer(steps=5).fit(None, problem).history
        >>> harm, kept = "risk_harmful", "risk_primary"
        >>> end[harm] > 1.2 * start[harm], end[kept] <= 1.0001 * start[kept]
        (True, True)
    """

    method: ClassVar[str] = "learning-curve"
    takes_several: ClassVar[bool] = True
    knob: ClassVar[str | None] = "strength"
    grid: ClassVar[tuple[float, ...]] = (10.0, 100.0, 1e3)

    strength: float = 1e2
    samples: tuple[int, ...] = (40, 80, 160)
    tolerance: float = 0.0
    objective: Objective = "exponentiated"
    eta: float = 10.0
    share: float = 0.5
    steps: int = 150
    learning_rate: float = 0.03
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        # The start checks strength and ridge.
        self._start(self.strength)
        name = type(self).__name__
        if not self.samples or min(self.samples) < 1:
            raise ValueError(
                f"{name}: samples must be numbers of at least 1, got {list(self.samples)}"
            )
        if not self.tolerance >= 0.0:
            raise ValueError(f"{name}: tolerance must be at least 0, got {self.tolerance}")
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"{name}: objective must be one of {', '.join(get_args(Objective))}, got "
                f"{self.objective!r}"
            )
        self._of_harms(torch.zeros(1))
        if self.steps < 0 or not self.learning_rate > 0.0:
            raise ValueError(
                f"{name}: steps must be at least 0 and learning_rate positive, got {self.steps} "
                f"and {self.learning_rate}"
            )

    def _start(self, strength: float) -> LabelDirectionImmunizer:
        return LabelDirectionImmunizer(strength=strength, ridge=self.ridge)

    def fit(
        self,
        model: Tensor | None,
        problem: Problem[Task],
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> Immunized:
        """Immunize; arguments and errors as in the base class.

        Returns:
            The extractor; its history has one record before and one after: condition numbers as of
            every method (against the first harmful task), and ``risk_harmful``, ``risk_harmful_1``
            and so on, ``risk_primary``, ``risk_benign_0``, ...: geometric means over ``samples``
            of the risks of the formula.
        """
        name = type(self).__name__
        problem = self.prepared(problem)
        theta0 = identity_or(model, problem.primary, name)
        harms = len(problem.harmful)
        tasks = (*problem.harmful, problem.primary, *problem.benign)
        identity = torch.eye(theta0.shape[1]).to(theta0)
        moments = [Moments.of(task, theta0) for task in tasks]
        before = self._log_risks(moments, identity)
        allowed = before[harms:] + math.log1p(self.tolerance)

        def excess(risks: Tensor) -> Tensor:
            # Rounding of risks that are equal is no excess.
            return (risks[harms:] - allowed - 1e-9).clamp(min=0.0)

        # Strength 1 changes nothing, so one of these meets the constraints.
        for halvings in range(8):
            strength = self.strength ** (0.5**halvings) if halvings < 7 else 1.0
            start = theta0
            for harm in problem.harmful:
                one = replace(problem, harmful=(harm,), benign=())
                start = self._start(strength).fit(start, one).theta.to(theta0)
            start = torch.linalg.solve(theta0, start)
            risks = self._log_risks(moments, start @ start.mT)
            if not bool(excess(risks).any()):
                break
        best, inner = float(self._of_harms(risks[:harms])), start
        seen = [m._replace(root=m.root @ start) for m in moments]
        scale = torch.zeros_like(identity, requires_grad=True)
        adam = torch.optim.Adam([scale], lr=self.learning_rate)
        bound = math.log(self.strength) / 4.0
        for step in range(self.steps):
            with torch.enable_grad():
                half = (scale + scale.mT) / 2.0
                risks = self._log_risks(seen, torch.linalg.matrix_exp(2.0 * half))
                missed, found = excess(risks), self._of_harms(risks[:harms])
                adam.zero_grad()
                (_PENALTY * missed.sum() - found).backward()
            if float(found.detach()) > best and not bool(missed.any()):
                best, inner = float(found.detach()), start @ _exp(half.detach())
            adam.step()
            with torch.no_grad():
                values, vectors = torch.linalg.eigh((scale + scale.mT) / 2.0)
                values = values - (values[0] + values[-1]) / 2.0
                scale.copy_((vectors * values.clamp(-bound, bound)) @ vectors.mT)
            if progress is not None and step % 10 == 9:
                progress(f"{self.label}, step {step + 1} of {self.steps}", (step + 1) / self.steps)
        theta = theta0 @ inner
        hessian = torch.zeros_like(theta)
        for task in problem.harmful:
            rows = task.x_train.to(torch.float64) @ theta
            hessian = hessian + rows.mT @ rows
        theta = theta @ equal_diagonal_rotation(hessian)
        history = [
            record_of(step, problem, extractor, theta0, self.ridge)
            | self._record(moments, metric, harms)
            for step, (extractor, metric) in enumerate(
                ((theta0, identity), (theta, inner @ inner.mT))
            )
        ]
        if progress is not None:
            progress(self.label, 1.0)
        return Immunized(self.method, theta, theta0, plain(self), history)

    def _log_risks(self, moments: Sequence[Moments], metric: Tensor) -> Tensor:
        """Mean over samples of log risk, by task."""
        # A task that is learnt exactly has a risk of rounding, and no logarithm.
        tiny = torch.finfo(torch.float64).tiny
        return torch.stack(
            [tuned_risk(m, metric, self.samples).clamp(min=tiny).log().mean() for m in moments]
        )

    def _of_harms(self, logs: Tensor) -> Tensor:
        """What is climbed, of the log risks of the harms."""
        if self.objective == "cvar":
            return conditional_value_at_risk(logs, self.share)
        return soft_minimum(logs, self.eta if self.objective == "exponentiated" else 0.0)

    def _record(self, moments: Sequence[Moments], metric: Tensor, harms: int) -> dict[str, float]:
        names = ["harmful", *(f"harmful_{k}" for k in range(1, harms)), "primary"]
        names += [f"benign_{k}" for k in range(len(moments) - harms - 1)]
        risks = self._log_risks(moments, metric).exp().tolist()
        return {f"risk_{name}": risk for name, risk in zip(names, risks, strict=True)}


def _exp(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.exp()) @ vectors.mT
