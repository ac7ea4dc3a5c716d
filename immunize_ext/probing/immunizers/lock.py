r"""Locks: extractors without the direction that a harmful task is read from.

A linear probe learns a task from the cross-covariance d = Cov(x, y) of its features with its
labels: for two classes, the difference of their means. Features z = theta^T x with theta^T d = 0
have Cov(z, y) = 0. Then, for every convex loss, the best linear probe is the constant, the
population gradient at it is zero, and no optimizer, preconditioner or amount of data changes that.
theta is singular, and stored as what it is: a matrix with fewer columns, not one with a zero that
rounding fills.

The guarantee is one of losses, not of the share of right signs: a direction of tiny variance and
heavy tails can tell the classes apart with no R^2 at all. So directions below a share of the
largest variance are cut first. It is a guarantee for linear probes of these features; a probe that
is not linear, or one of an earlier layer, gets round it.

What it costs the primary task, exactly. Let X be its centred features, K = X^T X, omega its best
head and Delta the null space (p, r). The best head among those with Delta^T w = 0 has a squared
loss that is larger, summed over samples, by

.. math:: a^\top (\Delta^\top K^{-1} \Delta)^{-1} a, \qquad a = \Delta^\top \omega .
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.equal_diagonal import equal_diagonal_rotation
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.closed_form import record_of
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import LinearImmunizer, identity_or
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.probing.metrics.hessian import with_ridge
from immunize_ext.probing.metrics.pencil import pencil
from immunize_ext.seams import Progress
from immunize_ext.settings import plain

# Of the condition numbers in the history, relative to the largest eigenvalue.
_RIDGE = 1e-2


def cross_covariance(x: Tensor, y: Tensor) -> Tensor:
    """Cov(x, y), ``(p,)`` or ``(p, k)``, float64: where a linear probe learns the task from."""
    x, y = x.to(torch.float64), y.to(torch.float64)
    return (x - x.mean(0)).mT @ (y - y.mean(0)) / len(y)


def label_directions(x: Tensor, y: Tensor) -> Tensor:
    """A basis of what :func:`cross_covariance` spans, ``(p, r)``: r = 1, at most k - 1 of classes.

    Of one output it is the vector itself; of several, left singular vectors times their values.
    """
    found = cross_covariance(x, y)
    if found.dim() == 1:
        return found[:, None]
    left, sigma, _ = torch.linalg.svd(found, full_matrices=False)
    # Columns of classes add up to 0, but for rounding of the size of the features.
    size = float(torch.linalg.vector_norm(x)) / len(x) ** 0.5
    rounding = max(x.shape) * torch.finfo(torch.float64).eps * size
    return (left * sigma)[:, sigma > rounding]


class Head(NamedTuple):
    """A linear head: ``z @ weight + bias``."""

    weight: Tensor
    bias: Tensor

    def loss(self, z: Tensor, y: Tensor) -> float:
        """Mean squared error, over outputs as well."""
        return float((z.to(torch.float64) @ self.weight + self.bias - y).square().mean())


def best_head(z: Tensor, y: Tensor) -> Head:
    """The head of least squared error on features, of least norm where there are several.

    Args:
        z: Features, shape ``(n, q)``.
        y: Targets, shape ``(n,)`` or ``(n, k)``.

    Example:
        >>> head = best_head(torch.eye(2, dtype=torch.float64), torch.tensor([1.0, -1.0]).double())
        >>> [round(value, 6) for value in head.weight.tolist()]
        [1.0, -1.0]
    """
    z, y = z.to(torch.float64), y.to(torch.float64)
    middle, mean = z.mean(0), y.mean(0)
    left, sigma, right = torch.linalg.svd(z - middle, full_matrices=False)
    kept = sigma > max(z.shape) * torch.finfo(torch.float64).eps * sigma[:1]
    weight = (right[kept].mT / sigma[kept]) @ (left[:, kept].mT @ (y - mean))
    return Head(weight, mean - middle @ weight)


def lock_price(x: Tensor, y: Tensor, null: Tensor) -> float:
    r"""By how much the mean squared error of a task's best head grows when directions are locked.

    .. math:: a^\top (\Delta^\top K^{-1} \Delta)^{-1} a / n, \qquad a = \Delta^\top \omega

    Args:
        x: Its features, shape ``(n, p)``; centred here.
        y: Its targets, shape ``(n,)`` or ``(n, k)``; the price is a mean over outputs.
        null: Delta, shape ``(p, r)``, of rank r: heads w must have Delta^T w = 0.

    Returns:
        The price; 0 for a direction that the features do not have.

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
        >>> price = lock_price(x, 2 * x[:, 0] + x[:, 1], torch.tensor([[1.0], [0.0]]).double())
        >>> round(price, 9)  # all that the first coordinate explained
        4.0
    """
    x = x.to(torch.float64)
    x = x - x.mean(0)
    head = best_head(x, y).weight
    _, sigma, right = torch.linalg.svd(x, full_matrices=False)
    kept = sigma > max(x.shape) * torch.finfo(torch.float64).eps * sigma[:1]
    # Delta^T K^+ Delta over the directions that the features have: heads are free in all others.
    seen = (right[kept] @ null.to(torch.float64)) / sigma[kept, None]
    missed = null.to(torch.float64).mT @ head
    inverse = torch.linalg.pinv(seen.mT @ seen, hermitian=True)
    return float((missed * (inverse @ missed)).sum()) / y.numel()


def _pooled_whitening(parts: list[Tensor], floor: float) -> Tensor:
    """A map to coordinates of unit pooled variance, without those below the floor, (p, k)."""
    rows = torch.cat([x - x.mean(0) for x in parts])
    _, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    variance = sigma.square() / len(rows)
    kept = variance > max(floor, 1e-14) * variance[0]
    return right[kept].mT / variance[kept].sqrt()


@dataclass(frozen=True)
class _Lock(LinearImmunizer):
    """What locks share: a map to kept coordinates, and what is taken away there."""

    takes_several: ClassVar[bool] = True

    def _extractor(self, seen: list[Tensor], problem: Problem[Task]) -> tuple[Tensor, Tensor]:
        """The map to kept coordinates (p, k), and the null space there (k, r)."""
        raise NotImplementedError

    def fit(
        self,
        model: Tensor | None,
        problem: Problem[Task],
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> Immunized:
        """Lock; arguments and errors as in the base class.

        Returns:
            The extractor, shape ``(p, k - r)``; r directions are gone for good. Its history has one
            record before and one after: condition numbers as of every method (against the first
            harmful task), the mean squared error of the primary task's best head on its training
            part, ``loss_primary``, the parts of its rise ``price_of_cut`` (small variances) and
            ``price_of_lock``, and ``dimensions``.
        """
        problem = self.prepared(problem)
        name = type(self).__name__
        theta0 = identity_or(model, problem.primary, name)
        tasks = (problem.primary, *problem.harmful)
        seen = [t.x_train.to(torch.float64) @ theta0 for t in tasks]
        y = problem.primary.y_train.to(torch.float64)
        kept, null = self._extractor(seen, problem)
        basis, sigma, _ = torch.linalg.svd(null, full_matrices=True)
        # Harms that are read from one direction lock it once.
        rank = int((sigma > 1e-9 * sigma[:1]).sum())
        if rank >= kept.shape[1]:
            raise ValueError(
                f"{name}.fit: problem must leave a direction to the primary task, got "
                f"{rank} to lock of the {kept.shape[1]} above the variance floor; lower it"
            )
        theta = kept @ basis[:, rank:]
        theta = theta @ equal_diagonal_rotation(_second_moment(seen[1] @ theta))
        theta = theta * math.sqrt(theta.shape[1]) / torch.linalg.matrix_norm(theta)
        losses = [best_head(z, y).loss(z, y) for z in (seen[0], seen[0] @ kept, seen[0] @ theta)]
        records = [
            record_of(step, problem, extractor, theta0, _RIDGE)
            for step, extractor in enumerate((theta0, theta0 @ theta))
        ]
        start = {**records[0], "loss_primary": losses[0], "dimensions": float(len(theta))}
        end = {
            **records[1],
            "loss_primary": losses[2],
            "dimensions": float(theta.shape[1]),
            "price_of_cut": losses[1] - losses[0],
            "price_of_lock": lock_price(seen[0] @ kept, y, null),
        }
        if progress is not None:
            progress(self.label, 1.0)
        return Immunized(self.method, theta0 @ theta, theta0, plain(self), [start, end])


def _second_moment(z: Tensor) -> Tensor:
    return z.mT @ z / len(z)


def _check_floor(name: str, floor: float) -> None:
    if not 0.0 <= floor < 1.0:
        raise ValueError(f"{name}: variance_floor must be at least 0 and below 1, got {floor}")


@METHODS.register
@dataclass(frozen=True)
class LinearLock(_Lock):
    """No linear probe learns the harmful tasks: their directions are taken out of the features.

    Uses the labels of the harmful tasks.

    Attributes:
        variance_floor: Directions below this share of the largest variance (of all tasks together)
            are cut. At 0 an attacker with a tiny ridge reads the labels from what is left.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> harm = digits_task((4,), (9,))
        >>> locked = LinearLock().fit(None, Problem.of(digits_task((3,), (8,)), harm))
        >>> left = cross_covariance(harm.x_train.double() @ locked.theta, harm.y_train)
        >>> bool(left.abs().max() < 1e-12), locked.theta.shape[1] < locked.theta.shape[0]
        (True, True)
    """

    method: ClassVar[str] = "lock"
    knob: ClassVar[str | None] = "variance_floor"
    grid: ClassVar[tuple[float, ...]] = (1e-4, 1e-3, 1e-2, 1e-1)

    variance_floor: float = 1e-2

    def __post_init__(self) -> None:
        _check_floor("LinearLock", self.variance_floor)

    def _extractor(self, seen: list[Tensor], problem: Problem[Task]) -> tuple[Tensor, Tensor]:
        kept = _pooled_whitening(seen, self.variance_floor)
        directions = [
            label_directions(x @ kept, task.y_train)
            for x, task in zip(seen[1:], problem.harmful, strict=True)
        ]
        for task, direction in zip(problem.harmful, directions, strict=True):
            if not float(torch.linalg.vector_norm(direction)) > 0.0:
                raise ValueError(
                    f"LinearLock.fit: {task.name} must have labels that vary with its inputs, got "
                    "a cross-covariance of 0; name classes against classes, 4:9 for instance"
                )
        return kept, torch.cat(directions, dim=1)


@METHODS.register
@dataclass(frozen=True)
class PencilLock(_Lock):
    """The directions that the harm has most of and the primary task least of are taken away.

    Needs no labels. Those are the top generalized eigenvectors of (K_H, K_P); one harm at a time
    gives its share of them in turn.

    Attributes:
        directions: How many are taken away.
        variance_floor: Directions below this share of the largest variance are cut.
        ridge: Ridge on each K, relative to its largest eigenvalue.
    """

    method: ClassVar[str] = "pencil-lock"
    knob: ClassVar[str | None] = "directions"
    grid: ClassVar[tuple[float, ...]] = (5.0, 10.0, 20.0, 40.0, 80.0)

    directions: int = 40
    variance_floor: float = 1e-2
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        _check_floor("PencilLock", self.variance_floor)
        if self.directions < 1:
            raise ValueError(f"PencilLock: directions must be at least 1, got {self.directions}")

    def _extractor(self, seen: list[Tensor], problem: Problem[Task]) -> tuple[Tensor, Tensor]:
        kept = _pooled_whitening(seen, self.variance_floor)
        primary, *harms = ((x - x.mean(0)) @ kept for x in seen)
        count = min(self.directions, kept.shape[1] - 1)
        shares = [count // len(harms) + (k < count % len(harms)) for k in range(len(harms))]
        # The null space is spanned by K_P w: a head avoids it iff its functional has no part there.
        gram = with_ridge(primary, self.ridge)
        found = [
            gram.mT @ (gram @ pencil(primary, x, ridge=self.ridge).basis[:, :share])
            for x, share in zip(harms, shares, strict=True)
        ]
        return kept, torch.cat(found, dim=1)
