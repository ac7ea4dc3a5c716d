r"""The condition number that the attacker's own optimizer pays for, made large.

The closed form makes kappa(H_H) as large as it can be, which is what gradient descent pays for. A
low-rank preconditioner takes the leading directions away and pays for lambda_{r+1} / lambda_p, and
Adam-like scaling for the kappa that is left when all diagonal entries are 1. In the basis W of the
pencil (K_H, K_P), with generalized eigenvalues l,

.. math:: \theta = W \operatorname{diag}(e^{s})\, Q, \qquad 0 \le s_i \le \tfrac12 \log c,
          \qquad \max_{s, Q} \sum_a w_a\, e_a \log \kappa_a(\theta^\top K_H \theta),

has kappa_P <= c for every s and every rotation Q, so that the primary task keeps its bound while
both are climbed. kappa_a is :func:`~immunize_ext.probing.metrics.kappa_under` and e_a the power by
which its steps grow. For whoever whitens kappa_a is 1 whatever theta is, and is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from immunize_ext.ops.equal_diagonal import equal_diagonal_rotation
from immunize_ext.probing.data.gram_equivalent import gram_rows
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.closed_form import STRENGTHS, grades, record_of
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import LinearImmunizer, identity_or
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.probing.metrics.hessian import with_ridge
from immunize_ext.probing.metrics.optimizers import EXPONENT, check_optimizer, kappa_under
from immunize_ext.probing.metrics.pencil import pencil
from immunize_ext.seams import Progress
from immunize_ext.settings import plain


@METHODS.register
@dataclass(frozen=True)
class OptimizerAwareImmunizer(LinearImmunizer):
    """The closed form for chosen optimizers: what each of them pays for is made large.

    Attributes:
        attackers: Optimizers: gradient_descent, momentum, conjugate_gradients,
            full_matrix_adagrad, diagonal (Adam, Adagrad, standardising), nystrom.
        weights: One for each; all 1 when omitted.
        strength: c, the largest condition number that the primary Hessian may get.
        nystrom_share: Share of the directions that the low-rank preconditioner takes away.
        ridge: Ridge on each K, relative to its largest eigenvalue.
        steps: Steps of the ascent.
        learning_rate: Of Adam, in units of log scale and of angle.

    Raises:
        ValueError: If a setting is out of range; for an optimizer that whitens, with the theorem.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> aware = OptimizerAwareImmunizer(attackers=("nystrom",), steps=20).fit(None, problem)
        >>> before, after = (record["log_kappa_nystrom"] for record in aware.history)
        >>> after > before + 1.0
        True
    """

    method: ClassVar[str] = "optimizer-aware"
    knob: ClassVar[str | None] = "strength"
    grid: ClassVar[tuple[float, ...]] = STRENGTHS

    attackers: tuple[str, ...] = ("gradient_descent", "diagonal", "nystrom")
    weights: tuple[float, ...] = ()
    strength: float = 30.0
    nystrom_share: float = 0.1
    ridge: float = 1e-2
    steps: int = 60
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.attackers:
            raise ValueError(f"{name}: attackers must name at least one optimizer, got none")
        for attacker in self.attackers:
            check_optimizer(name, attacker)
        if self.weights and (
            len(self.weights) != len(self.attackers)
            or not all(math.isfinite(w) and w >= 0.0 for w in self.weights)
            or not any(self.weights)
        ):
            raise ValueError(
                f"{name}: weights must be one number for each of {len(self.attackers)} attackers, "
                f"none negative and not all 0, got {list(self.weights)}"
            )
        if not (math.isfinite(self.strength) and self.strength >= 1.0):
            raise ValueError(f"{name}: strength must be finite and at least 1, got {self.strength}")
        if not 0.0 <= self.nystrom_share < 1.0:
            raise ValueError(
                f"{name}: nystrom_share must be at least 0 and below 1, got {self.nystrom_share}"
            )
        if self.steps < 0 or not self.learning_rate > 0.0:
            raise ValueError(
                f"{name}: steps must be at least 0 and learning_rate positive, got {self.steps} "
                f"and {self.learning_rate}"
            )

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
            The best iterate; its history has one record before and one after: condition numbers as
            of every method, and ``log_kappa_ATTACKER`` of the harmful task for each attacker.

        Raises:
            NotPositiveDefiniteError: If K_P is singular at this ridge.
        """
        name = type(self).__name__
        problem = self.prepared(problem)
        harm = problem.only_harm(f"{name}.fit")
        theta0 = identity_or(model, problem.primary, name)
        rows = [
            gram_rows(task.x_train).to(torch.float64) @ theta0 for task in (problem.primary, harm)
        ]
        values, basis = pencil(*rows, ridge=self.ridge)
        widest = math.log(self.strength) / 2.0
        # The start is the closed form, in coordinates of equal curvature.
        scale = (widest * grades(values)).requires_grad_()
        start = torch.diag((2.0 * scale.detach()).exp() * values)
        turn = equal_diagonal_rotation(start)
        angles = torch.zeros_like(basis, requires_grad=True)
        adam = torch.optim.Adam([scale, angles], lr=self.learning_rate)
        best, kept = -math.inf, (scale.detach(), turn)
        for step in range(self.steps + 1):
            with torch.enable_grad():
                rotation = turn @ torch.linalg.matrix_exp(angles - angles.mT)
                hessian = (rotation.mT * ((2.0 * scale).exp() * values)) @ rotation
                found = self._objective((hessian + hessian.mT) / 2.0)
                adam.zero_grad()
                (-found).backward()
            if float(found.detach()) > best:
                best = float(found.detach())
                kept = scale.detach().clone(), rotation.detach()
            adam.step()
            with torch.no_grad():
                scale.clamp_(0.0, widest)
            if progress is not None and step % 10 == 9:
                progress(f"{self.label}, step {step} of {self.steps}", step / (self.steps + 1))
        theta = basis * kept[0].exp() @ kept[1]
        theta = theta * math.sqrt(len(theta)) / torch.linalg.matrix_norm(theta)
        history = []
        for step, inner in enumerate((torch.eye(len(theta)).to(theta), theta)):
            seen = with_ridge(rows[1], self.ridge) @ inner
            record = record_of(step, problem, theta0 @ inner, theta0, self.ridge)
            for attacker in self.attackers:
                kappa = kappa_under(attacker, seen.mT @ seen, rank=self._rank(attacker, len(theta)))
                record[f"log_kappa_{attacker}"] = math.log(float(kappa))
            history.append(record)
        if progress is not None:
            progress(self.label, 1.0)
        return Immunized(self.method, theta0 @ theta, theta0, plain(self), history)

    def _rank(self, attacker: str, side: int) -> int:
        return round(self.nystrom_share * side) if attacker == "nystrom" else 0

    def _objective(self, hessian: Tensor) -> Tensor:
        weights = self.weights or (1.0,) * len(self.attackers)
        logs = [
            weight
            * EXPONENT[attacker]
            * kappa_under(attacker, hessian, rank=self._rank(attacker, len(hessian))).log()
            for attacker, weight in zip(self.attackers, weights, strict=True)
            if weight > 0.0
        ]
        return torch.stack(logs).sum()
