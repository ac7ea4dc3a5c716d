"""The best trade-off there is for a linear extractor, in closed form.

In the coordinates W of the pencil (W^T K_P W = I, W^T K_H W = diag(l)) take

    theta = W diag(s) Q,     s_i^2 = c^(g_i),   g_i in [0, 1] increasing in l_i,   Q a rotation.

Then kappa_P = c and kappa_H = c * l_max / l_min: RIR is at its ceiling for every c >= 1 (module
``immunize_ext.probing.metrics.pencil``). So RIR cannot rank the points of this line, and the strength c
decides the protection: c = 1 whitens the primary task, which uses no harmful data and may well
speed the harm up; a larger c slows the harmful task down, and from some c on the primary task too.

The grades are g_i = (log l_i - log l_min) / (log l_max - log l_min), or the same in l itself, or 1
for the top direction and 0 for all others. All have the same kappas and RIR. Boosting the top
direction alone stops gradient descent, but hardly slows conjugate gradients.
The rotation Q changes no kappa and keeps coordinate-wise optimizers (Adam) from undoing s.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from immunize_ext.probing.attacks.linear_probe import attack
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.metrics.pencil import Pencil, pencil
from immunize_ext.probing.metrics.rir import relative_immunization_ratio

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
        rotate: Whether to mix the features by a random rotation.
        seed: Seed of that rotation.
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
    rotation = random_rotation(coordinates.basis, seed) if rotate else None
    return _graded(coordinates, strength, rotation, grading)


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
    """
    if not max_primary_slowdown > 0.0 or not max_strength >= 1.0 or steps_per_decade < 1:
        raise ValueError(
            "calibrate_strength: max_primary_slowdown must be positive, max_strength and "
            f"steps_per_decade at least 1, got {max_primary_slowdown}, {max_strength} and "
            f"{steps_per_decade}"
        )
    grid = [
        10.0 ** (index / steps_per_decade)
        for index in range(int(math.log10(max_strength) * steps_per_decade) + 1)
    ]
    found = []
    for fold in primary.folds(folds):
        coordinates = pencil(fold.x_train, x_harmful, ridge=ridge)
        rotation = random_rotation(coordinates.basis, seed)
        base = attack(fold, attacker=attacker, budget=1000)
        target = (1.0 + _TOLERANCE) * float(base.test_loss.min())
        budget = max(1, math.floor(max_primary_slowdown * max(base.steps_to(target) or 0, 1)))
        best = 1.0
        for strength in grid:
            theta = _graded(coordinates, strength, rotation)
            curve = attack(fold, theta, attacker=attacker, budget=budget, stop_at=target)
            if curve.steps_to(target) is None:
                break
            best = strength
        found.append(best)
    return statistics.median_low(found)


@dataclass(frozen=True)
class ClosedFormImmunizer:
    """Immunize a linear extractor without training.

    Attributes:
        strength: c, the condition number that the primary Hessian gets, or ``"auto"``: the largest
            that leaves the primary task as fast as it was (:func:`calibrate_strength`).
        ridge: Ridge on each K, relative to its largest eigenvalue.
        rotate: Whether to mix the features by a random rotation.
        seed: Seed of that rotation.
        grading: As in :func:`closed_form_theta`; strength ``"auto"`` is calibrated for ``"log"``.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> immunizer = ClosedFormImmunizer(strength=30.0)
        >>> immunized = immunizer.fit(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized.method, tuple(immunized.theta.shape)
        ('closed_form', (64, 64))
    """

    strength: float | str = "auto"
    ridge: float = 1e-2
    rotate: bool = True
    seed: int = 0
    grading: Grading = "log"

    def fit(self, primary: Task, harmful: Task) -> Immunized:
        """Immunize against ``harmful`` while keeping ``primary``.

        Args:
            primary: The task to keep; training inputs and, for ``strength="auto"``, labels.
            harmful: The task to make hard; its training inputs alone are used.

        Returns:
            The immunized extractor; its history has one record before and one after.

        Raises:
            ValueError: If the tasks have different numbers of features or a setting is out of
                range.
        """
        if isinstance(self.strength, str):
            if self.strength != "auto":
                raise ValueError(
                    f"ClosedFormImmunizer: strength must be a number or 'auto', got "
                    f"{self.strength!r}"
                )
            if self.grading != "log":
                raise ValueError(
                    f"ClosedFormImmunizer: grading must be 'log' for strength='auto', got "
                    f"{self.grading!r}; give a number, 30 for instance"
                )
            strength = calibrate_strength(
                primary, harmful.x_train, ridge=self.ridge, seed=self.seed
            )
        else:
            strength = float(self.strength)
        theta = closed_form_theta(
            primary.x_train,
            harmful.x_train,
            strength=strength,
            ridge=self.ridge,
            rotate=self.rotate,
            seed=self.seed,
            grading=self.grading,
        )
        theta0 = torch.eye(theta.shape[0], dtype=theta.dtype, device=theta.device)
        history = []
        for step, extractor in enumerate((theta0, theta)):
            ratio = relative_immunization_ratio(
                primary.x_train, harmful.x_train, extractor, theta0, ridge=self.ridge
            )
            history.append(
                {
                    "step": float(step),
                    "log_kappa_primary": ratio.log_kappa_primary,
                    "log_kappa_harmful": ratio.log_kappa_harmful,
                    "log_rir": ratio.log_rir,
                }
            )
        config = {**asdict(self), "strength": strength, "calibrated": self.strength == "auto"}
        return Immunized("closed_form", theta, theta0, config, history)
