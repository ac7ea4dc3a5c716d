r"""Whitening half of the way: between the features as they are and those of unit variances.

.. math:: \theta = (K_P + r \lambda_{\max}(K_P) I)^{-\rho / 2} Q

rho = 0 changes nothing, rho = 1 whitens the primary task. What whitening protects by is the loss of
what the variances told a learner with few samples; a part of it costs the owner a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.closed_form import equal_curvature, record_of
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import LinearImmunizer, identity_or
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.probing.metrics.hessian import with_ridge
from immunize_ext.seams import Progress
from immunize_ext.settings import plain


@METHODS.register
@dataclass(frozen=True)
class PartialWhiteningImmunizer(LinearImmunizer):
    """The primary task whitened in part; no harmful labels are used.

    Attributes:
        power: rho, between 0 and 1.
        ridge: Ridge on K_P, relative to its largest eigenvalue.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> record = PartialWhiteningImmunizer(power=0.5).fit(None, problem).history
        >>> round(record[1]["log_kappa_primary"] / record[0]["log_kappa_primary"], 6)
        0.5
    """

    method: ClassVar[str] = "partial-whitening"
    knob: ClassVar[str | None] = "power"
    grid: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0)

    power: float = 0.5
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        if not 0.0 <= self.power <= 1.0:
            raise ValueError(
                f"PartialWhiteningImmunizer: power must be between 0 and 1, got {self.power}"
            )
        if not self.ridge > 0.0:
            raise ValueError(f"PartialWhiteningImmunizer: ridge must be positive, got {self.ridge}")

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
        x = with_ridge(problem.primary.x_train.to(torch.float64), self.ridge) @ theta0
        _, sigma, right = torch.linalg.svd(x, full_matrices=False)
        # Shares of the largest: no size of the features enters the rounding.
        theta = right.mT @ (right * (sigma[:, None] / sigma[0]).pow(-self.power))
        theta = theta * (math.sqrt(len(theta)) / torch.linalg.matrix_norm(theta))
        theta = theta0 @ theta
        rows = with_ridge(harmful.x_train.to(torch.float64), self.ridge)
        theta = theta @ equal_curvature(rows @ theta)
        history = [
            record_of(step, problem, extractor, theta0, self.ridge)
            for step, extractor in enumerate((theta0, theta))
        ]
        if progress is not None:
            progress(self.label, 1.0)
        return Immunized(self.method, theta, theta0, plain(self), history)
