r"""A price in labelled samples: the harmful direction is made small instead of taken away.

With few samples a learner has to bet on which directions matter, and every one that starts at zero
bets on those of large variance. The extractor divides the variance of the direction that the harm
is read from by c and leaves everything else as it is:

.. math:: x \theta = x - (1 - c^{-1/2}) \frac{x^\top v}{s^\top v}\, s^\top,
          \qquad s = \mathrm{Cov}(x, y_H),\quad v = K_H^{-1} s.

For more than two classes s and v are matrices with a column for each direction that the classes are
told apart by, and the divisor is the matrix s^T v. theta is invertible: a head for the primary task
that is compensated by theta^-1 gives the very outputs it gave before, and with many samples nothing
is lost to anyone. What it costs is samples, whatever the optimizer. Who gets hold of a model of the
same features that was not immunized has the variances, and pays nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from immunize_ext.ops.equal_diagonal import equal_diagonal_rotation
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.closed_form import record_of
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.lock import label_directions
from immunize_ext.probing.immunizers.loop import LinearImmunizer, identity_or
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.seams import Progress
from immunize_ext.settings import plain


@METHODS.register
@dataclass(frozen=True)
class LabelDirectionImmunizer(LinearImmunizer):
    """The direction that the harmful labels are read from, scaled down by sqrt(c).

    Uses the labels of the harmful task.

    Attributes:
        strength: c, by which the variance of the direction is divided.
        ridge: Ridge on K_H, relative to its largest eigenvalue.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = LabelDirectionImmunizer().fit(None, problem)
        >>> int(torch.linalg.matrix_rank(immunized.theta)) == len(immunized.theta)
        True
    """

    method: ClassVar[str] = "label-direction"
    knob: ClassVar[str | None] = "strength"
    grid: ClassVar[tuple[float, ...]] = (10.0, 100.0, 1e3, 1e4)

    strength: float = 1e2
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 1.0):
            raise ValueError(
                f"LabelDirectionImmunizer: strength must be finite and at least 1, got "
                f"{self.strength}"
            )
        if not self.ridge > 0.0:
            raise ValueError(f"LabelDirectionImmunizer: ridge must be positive, got {self.ridge}")

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
            The extractor, invertible; its history has one record before and one after.
        """
        problem = self.prepared(problem)
        name = type(self).__name__
        harmful = problem.only_harm(f"{name}.fit")
        theta0 = identity_or(model, problem.primary, name)
        x = harmful.x_train.to(torch.float64) @ theta0
        centred = x - x.mean(0)
        covariance = centred.mT @ centred / len(x)
        ridge = self.ridge * torch.linalg.eigvalsh(covariance)[-1]
        s = label_directions(x, harmful.y_train)
        # Features that do not vary have no direction to solve for.
        v = s
        if float(ridge) > 0.0:
            v = torch.linalg.solve(covariance + ridge * torch.eye(len(s)).to(covariance), s)
        reach = s.mT @ v
        if not float(reach.diagonal().sum()) > 0.0:
            raise ValueError(
                f"{name}.fit: {harmful.name} must have labels that vary with its inputs, got a "
                "cross-covariance of 0; name classes against classes, 4:9 for instance"
            )
        theta = torch.eye(len(s)).to(covariance)
        share = 1.0 - self.strength**-0.5
        theta = theta - share * v @ torch.linalg.solve(reach, s.mT)
        z = x @ theta
        theta = theta0 @ theta @ equal_diagonal_rotation(z.mT @ z)
        history = [
            record_of(step, problem, extractor, theta0, self.ridge)
            for step, extractor in enumerate((theta0, theta))
        ]
        if progress is not None:
            progress(self.label, 1.0)
        return Immunized(self.method, theta, theta0, plain(self), history)
