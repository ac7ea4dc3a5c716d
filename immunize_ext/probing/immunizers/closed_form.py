"""The best trade-off there is for a linear extractor, in closed form.

In the coordinates W of the pencil (W^T K_P W = I, W^T K_H W = diag(l)) take

    theta = W diag(s) Q,     s_i^2 = c^(g_i),   g_i in [0, 1] increasing in l_i,   Q a rotation.

Then kappa_P = c and kappa_H = c * l_max / l_min: RIR is at its ceiling for every c >= 1 (module
``immunize_ext.probing.metrics.pencil``). So RIR cannot rank the points of this line, and the
strength c decides the protection: c = 1 whitens the primary task, which uses no harmful data and
may well speed the harm up; a larger c slows the harmful task down, and from some c on the primary
task too.

The grades are g_i = (log l_i - log l_min) / (log l_max - log l_min), or the same in l itself, or 1
for the top direction and 0 for all others. All have the same kappas and RIR. Boosting the top
direction alone stops gradient descent, but hardly slows conjugate gradients.
The rotation Q changes no kappa. In the coordinates of the pencil both Hessians are diagonal, so
that Adam, Adagrad or standardising would undo s whole; Q makes all diagonal entries of H_H equal,
and then no scaling of coordinates leaves less than kappa_H / p (module
``immunize_ext.ops.equal_diagonal``).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from immunize_ext.ops.equal_diagonal import equal_diagonal_rotation
from immunize_ext.probing.attacks.registry import ATTACKS
from immunize_ext.probing.data.gram_equivalent import gram_rows
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import LinearImmunizer, identity_or
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.probing.metrics.hessian import with_ridge
from immunize_ext.probing.metrics.pencil import Pencil, pencil
from immunize_ext.probing.metrics.rir import relative_immunization_ratio
from immunize_ext.seams import Progress
from immunize_ext.settings import plain

# How close to its lowest test loss a probe has to come, as attackers are measured.
_TOLERANCE = 0.1


Grading = Literal["log", "linear", "top"]


def closed_form_theta(
    x_primary: Tensor,
    x_harmful: Tensor,
    *,
    strength: float,
    ridge: float = 1e-2,
    rotate: bool = True,
    seed: int = 0,
    grading: Grading = "log",
) -> Tensor:
    """Build the extractor with kappa_P = strength and RIR at its ceiling.

    Args:
        x_primary: Inputs of the primary task, shape ``(n, p)``.
        x_harmful: Inputs of the harmful task, shape ``(m, p)``; no labels are needed.
        strength: c, the condition number that the primary Hessian gets; at least 1.
        ridge: Ridge on each K, relative to its largest eigenvalue. A larger one stays closer to
            what the data supports; with few samples it keeps the primary task's test error.
        rotate: Whether to mix the features so that every coordinate of H_H has the same curvature.
        seed: Seed of the rotation that goes before.
        grading: How s^2 rises from 1 to c: with log l, with l, or at the top direction alone.

    Returns:
        theta, shape ``(p, p)``, float64, invertible, of Frobenius norm sqrt(p).

    Raises:
        ValueError: If ``strength`` is below 1 or another argument is out of range.
        NotPositiveDefiniteError: If K_P is singular at this ridge.

    Note:
        Deterministic given ``seed``; torch's global random state is neither read nor changed.

    Example:
        >>> x_primary = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
        >>> x_harmful = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> theta = closed_form_theta(x_primary, x_harmful, strength=9.0, ridge=0.0)
        >>> ratio = relative_immunization_ratio(x_primary, x_harmful, theta, policy="rank_aware")
        >>> round(math.exp(ratio.log_kappa_primary), 9), round(ratio.rir, 9)
        (9.0, 16.0)
    """
    if not (math.isfinite(strength) and strength >= 1.0):
        raise ValueError(
            f"closed_form_theta: strength must be finite and at least 1, got {strength}; "
            "1 whitens the primary task, 30 is a usual value"
        )
    if grading not in get_args(Grading):
        raise ValueError(
            f"closed_form_theta: grading must be one of {', '.join(get_args(Grading))}, got "
            f"{grading!r}"
        )
    coordinates = pencil(x_primary, x_harmful, ridge=ridge)
    if not rotate:
        return _graded(coordinates, strength, None, grading)
    rotation = random_rotation(coordinates.basis, seed)
    theta = _graded(coordinates, strength, rotation, grading)
    return theta @ equal_curvature(with_ridge(x_harmful.detach().to(torch.float64), ridge) @ theta)


def equal_curvature(features: Tensor) -> Tensor:
    """A rotation of features after which each has the same sum of squares, shape ``(p, p)``.

    Example:
        >>> z = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> [round(v, 9) for v in (z @ equal_curvature(z)).square().sum(0).tolist()]
        [5.0, 5.0]
    """
    return equal_diagonal_rotation(features.mT @ features)


def random_rotation(like: Tensor, seed: int) -> Tensor:
    """A random orthogonal matrix of the size of ``like``, on its device, float64.

    Args:
        like: A square matrix, shape ``(p, p)``.
        seed: Seed of the draw; torch's global random state is neither read nor changed.

    Returns:
        The matrix, shape ``(p, p)``.

    Example:
        >>> q = random_rotation(torch.eye(3), 0)
        >>> torch.allclose(q @ q.mT, torch.eye(3, dtype=torch.float64))
        True
    """
    p = like.shape[0]
    square = torch.randn(p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(square).Q.to(like.device)


def grades(values: Tensor, grading: Grading = "log") -> Tensor:
    """Grades g in [0, 1] of generalized eigenvalues: 1 for the largest, 0 for the smallest.

    Args:
        values: Generalized eigenvalues l, shape ``(p,)``, descending.
        grading: ``"log"``, ``"linear"`` or ``"top"`` (the largest alone, and its equals).

    Returns:
        Grades, shape ``(p,)``; zeros if all values are equal.

    Example:
        >>> values = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
        >>> grades(values).tolist(), grades(values, "top").tolist()
        ([1.0, 0.5, 0.0], [1.0, 0.0, 0.0])
    """
    # Directions that the harmful data does not have at all (l = 0, ridge 0) share the lowest grade.
    floored = values.clamp(min=float(values[0]) * torch.finfo(torch.float64).eps)
    scale = floored if grading == "linear" else floored.log()
    spread = float(scale[0] - scale[-1])
    # All l equal: the tasks look alike, there is nothing to grade by.
    if not spread > 0.0:
        return torch.zeros_like(scale)
    if grading == "top":
        equal = len(values) * torch.finfo(torch.float64).eps
        return (values >= float(values[0]) * (1.0 - equal)).to(scale.dtype)
    return (scale - scale[-1]) / spread


def _graded(
    coordinates: Pencil, strength: float, rotation: Tensor | None, grading: Grading = "log"
) -> Tensor:
    """The extractor W diag(s) Q with s^2 graded from 1 to strength."""
    values, basis = coordinates
    theta = basis * (strength ** (grades(values, grading) / 2.0))
    if rotation is not None:
        theta = theta @ rotation
    return theta * (math.sqrt(basis.shape[0]) / torch.linalg.matrix_norm(theta))


def calibrate_strength(
    primary: Task,
    x_harmful: Tensor,
    *,
    max_primary_slowdown: float = 1.0,
    attacker: str = "gradient_descent",
    ridge: float = 1e-2,
    folds: int = 3,
    max_strength: float = 1e4,
    steps_per_decade: int = 8,
    seed: int = 0,
) -> float:
    """Find the largest strength that the primary task's owner pays nothing for.

    For each fold of the primary task's training part: the largest c on a grid up to which a probe
    trained on the other folds needs at most ``max_primary_slowdown`` times the steps it needs
    without immunization. The test part stays unseen, harmful labels are not used.

    Args:
        primary: The primary task; its training part is used alone.
        x_harmful: Inputs of the harmful task, shape ``(m, p)``.
        max_primary_slowdown: What the primary task may cost, in ratio of steps.
        attacker: The probe whose steps count.
        ridge: As in :func:`closed_form_theta`.
        folds: Number of folds.
        max_strength: End of the grid.
        steps_per_decade: Its resolution.
        seed: Seed of the rotation.

    Returns:
        The median over the folds; 1 if no larger strength qualifies.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(60, 3, dtype=torch.float64, generator=generator)
        >>> harmful = x * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
        >>> task = Task.of((x, x[:, 0]), "keep")
        >>> 1.0 <= calibrate_strength(task, harmful, max_strength=10.0, steps_per_decade=2) <= 10.0
        True
    """
    if not max_primary_slowdown > 0.0 or not max_strength >= 1.0 or steps_per_decade < 1:
        raise ValueError(
            "calibrate_strength: max_primary_slowdown must be positive, max_strength and "
            f"steps_per_decade at least 1, got {max_primary_slowdown}, {max_strength} and "
            f"{steps_per_decade}"
        )
    probe = ATTACKS.find(attacker, "calibrate_strength")
    grid = [
        10.0 ** (index / steps_per_decade)
        for index in range(int(math.log10(max_strength) * steps_per_decade) + 1)
    ]
    found = []
    for fold in primary.folds(folds):
        coordinates = pencil(fold.x_train, x_harmful, ridge=ridge)
        rotation = random_rotation(coordinates.basis, seed)
        base = probe.run(None, fold, steps=1000)
        losses = base.score("test_loss")
        if not all(map(math.isfinite, losses)):
            raise ValueError(
                f"calibrate_strength: {attacker} must keep its loss finite on every fold of the "
                "primary task, got NaN or infinity; scale the features"
            )
        lowest = min(losses)
        target = (1.0 + _TOLERANCE) * lowest
        needed = base.steps_to("test_loss", target, below=True) or 0
        budget = max(1, math.floor(max_primary_slowdown * max(needed, 1)))
        best = 1.0
        for strength in grid:
            theta = _graded(coordinates, strength, rotation)
            curve = probe.run(theta, fold, steps=budget)
            if curve.steps_to("test_loss", target, below=True) is None:
                break
            best = strength
        found.append(best)
    return statistics.median_low(found)


STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class ClosedFormImmunizer(LinearImmunizer):
    """The best trade-off there is, without training; the strength decides the protection.

    Attributes:
        strength: c, the condition number that the primary Hessian gets, or ``"auto"``: the largest
            that leaves the primary task as fast as it was (:func:`calibrate_strength`).
        ridge: Ridge on each K, relative to its largest eigenvalue.
        rotate: Whether to mix the features so that every coordinate of H_H has the same curvature.
        seed: Seed of the random rotation that goes before.
        grading: How s^2 rises from 1 to c: with ``"log"`` l, ``"linear"`` in l, or at the ``"top"``
            direction alone; strength ``"auto"`` is calibrated for ``"log"``.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = ClosedFormImmunizer(strength=30.0).fit(None, problem)
        >>> immunized.method, tuple(immunized.theta.shape)
        ('closed-form', (64, 64))
    """

    method: ClassVar[str] = "closed-form"
    knob: ClassVar[str | None] = "strength"
    grid: ClassVar[tuple[float, ...]] = STRENGTHS

    strength: float | Literal["auto"] = "auto"
    ridge: float = 1e-2
    rotate: bool = True
    seed: int = 0
    grading: Grading = "log"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.strength, str):
            if self.strength != "auto":
                raise ValueError(
                    f"{name}: strength must be a number or 'auto', got {self.strength!r}"
                )
            if self.grading != "log":
                raise ValueError(
                    f"{name}: grading must be 'log' for strength='auto', got {self.grading!r}; "
                    "give a number, 30 for instance"
                )

    @property
    def label(self) -> str:
        """The method, with a grading that is not the usual one."""
        usual = type(self).grading
        return self.method if self.grading == usual else f"{self.method}, grading {self.grading}"

    def fit(
        self,
        model: Tensor | None,
        problem: Problem[Task],
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> Immunized:
        """Immunize; arguments and errors as in the base class.

        Labels of the primary task are used for ``strength="auto"``, those of the harmful one never.

        Returns:
            The immunized extractor; its history has one record before and one after. A ``model``
            is absorbed: theta is that of the composition, model times what was found for its
            features.
        """
        problem = self.prepared(problem)
        primary, harmful = problem.primary, problem.only_harm(f"{type(self).__name__}.fit")
        theta0 = identity_or(model, primary, type(self).__name__)
        strength = self.strength
        # Equal Gram matrices in fewer rows; the folds of "auto" need the samples themselves.
        rows = [gram_rows(task.x_train) for task in (primary, harmful)]
        if model is not None:
            rows = [x.to(torch.float64) @ theta0 for x in rows]
        if isinstance(strength, str):
            strength = calibrate_strength(
                primary if model is None else _through(primary, theta0),
                rows[1],
                ridge=self.ridge,
                seed=self.seed,
            )
        theta = closed_form_theta(
            *rows,
            strength=float(strength),
            ridge=self.ridge,
            rotate=self.rotate,
            seed=self.seed,
            grading=self.grading,
        )
        theta = theta if model is None else theta0 @ theta
        history = [
            record_of(step, problem, extractor, theta0, self.ridge)
            for step, extractor in enumerate((theta0, theta))
        ]
        calibrated = isinstance(self.strength, str)
        config = {**plain(self), "strength": strength, "calibrated": calibrated}
        if progress is not None:
            progress(self.label, 1.0)
        return Immunized(self.method, theta, theta0, config, history)


def _through(task: Task, theta: Tensor) -> Task:
    """A task on the features of an extractor."""
    x_train, x_test = (x.to(torch.float64) @ theta for x in (task.x_train, task.x_test))
    y_train, y_test = (y.to(torch.float64) for y in (task.y_train, task.y_test))
    return Task(task.name, x_train, y_train, x_test, y_test, task.classes)


def record_of(
    step: int, problem: Problem[Task], theta: Tensor, theta0: Tensor, ridge: float
) -> dict[str, float]:
    """The record of an extractor against the one harmful task."""
    ratio = relative_immunization_ratio(
        gram_rows(problem.primary.x_train),
        gram_rows(problem.harmful[0].x_train),
        theta,
        theta0,
        ridge=ridge,
    )
    return {
        "step": float(step),
        "log_kappa_primary": ratio.log_kappa_primary,
        "log_kappa_harmful": ratio.log_kappa_harmful,
        "log_rir": ratio.log_rir,
    }


@METHODS.register
@dataclass(frozen=True)
class GradedImmunizer(ClosedFormImmunizer):
    """The closed form graded in l itself."""

    method: ClassVar[str] = "graded"

    strength: float | Literal["auto"] = 30.0
    grading: Grading = "linear"


@METHODS.register
@dataclass(frozen=True)
class WhiteningImmunizer(ClosedFormImmunizer):
    """Whiten the primary task: the closed form at strength 1, which uses no harmful data."""

    method: ClassVar[str] = "whitening"
    knob: ClassVar[str | None] = None
    grid: ClassVar[tuple[float, ...]] = ()

    strength: float | Literal["auto"] = 1.0


METHODS.register(ClosedFormImmunizer(strength=30.0))
