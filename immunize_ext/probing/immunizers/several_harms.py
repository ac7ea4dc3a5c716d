"""The closed form against several harmful tasks at once.

Whitening the primary task, theta = R^{-1} with K_P = R^T R, is at the ceiling of RIR for every
harmful task. In these coordinates the h-th harmful Hessian is V_h diag(l_h) V_h^T, and

    theta = R^{-1} S Q,    S symmetric with eigenvalues from 1 to sqrt(c),    Q a rotation

has kappa_P = c whatever S is. Two choices of S:

- ``"top"``: S = I + (sqrt(c) - 1) Pi, Pi the projection on the span of all top eigenvectors. Each
  largest eigenvalue grows by c at least; each smallest stays close to what it was.
- ``"log"``: S = exp(log(c)/2 A), A the mean over harms of V_h diag(g_h) V_h^T with the grades g of
  ``closed_form``, stretched to eigenvalues from 0 to 1. With one harm this is the closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from immunize_ext.probing.data.gram_equivalent import gram_rows
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.closed_form import (
    STRENGTHS,
    equal_curvature,
    grades,
    random_rotation,
)
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import LinearImmunizer, identity_or
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.probing.metrics.hessian import with_ridge
from immunize_ext.probing.metrics.pencil import log_rir_ceiling, pencil
from immunize_ext.probing.metrics.rir import relative_immunization_ratio
from immunize_ext.seams import Progress
from immunize_ext.settings import plain

SeveralGrading = Literal["top", "log"]


def several_harms_theta(
    x_primary: Tensor,
    x_harmful: Sequence[Tensor],
    *,
    strength: float,
    ridge: float = 1e-2,
    grading: SeveralGrading = "top",
    rotate: bool = True,
    seed: int = 0,
) -> Tensor:
    """Build the extractor with kappa_P = strength that protects against several tasks.

    Args:
        x_primary: Inputs of the primary task, shape ``(n, p)``.
        x_harmful: Inputs of each harmful task, shapes ``(m_h, p)``; at least one.
        strength: c, the condition number that the primary Hessian gets; at least 1.
        ridge: Ridge on each K, relative to its largest eigenvalue.
        grading: ``"top"`` or ``"log"`` (module docstring).
        rotate: Whether to mix the features so that coordinates have the same curvature, over all
            harmful tasks together.
        seed: Seed of that rotation.

    Returns:
        theta, shape ``(p, p)``, float64, invertible, of Frobenius norm sqrt(p).

    Raises:
        ValueError: If ``strength`` is below 1, there is no harmful task, the top eigenvectors of
            all span the whole space, or another argument is out of range.
        NotPositiveDefiniteError: If K_P is singular at this ridge.

    Note:
        Deterministic given ``seed``; torch's global random state is neither read nor changed.

    Example:
        >>> primary = torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))
        >>> harms = [primary.flip(0, 1), primary.roll(1, 0).roll(1, 1)]
        >>> theta = several_harms_theta(primary, harms, strength=9.0, ridge=0.0)
        >>> sigma = torch.linalg.svdvals(primary @ theta)
        >>> round(float(sigma[0] / sigma[-1]) ** 2, 9)
        9.0
    """
    if not (math.isfinite(strength) and strength >= 1.0):
        raise ValueError(
            f"several_harms_theta: strength must be finite and at least 1, got {strength}; "
            "1 whitens the primary task, 30 is a usual value"
        )
    if grading not in get_args(SeveralGrading):
        raise ValueError(f"several_harms_theta: grading must be 'top' or 'log', got {grading!r}")
    if len(x_harmful) == 0:
        raise ValueError("several_harms_theta: x_harmful must hold at least one task, got none")
    pencils = [pencil(x_primary, x, ridge=ridge) for x in x_harmful]
    primary = with_ridge(x_primary.detach().to(torch.float64), ridge)
    triangle = torch.linalg.qr(primary, mode="r").R
    bases = [triangle @ coordinates.basis for coordinates in pencils]
    if grading == "top":
        exponents, directions = _top(bases)
    else:
        mean = torch.stack(
            [
                (basis * grades(coordinates.values)) @ basis.mT
                for basis, coordinates in zip(bases, pencils, strict=True)
            ]
        ).mean(0)
        values, directions = torch.linalg.eigh((mean + mean.mT) / 2.0)
        spread = values[-1] - values[0]
        # All grades equal: nothing tells the tasks apart, and S = I.
        exponents = torch.where(spread > 1e-12, (values - values[0]) / spread, 0.0)
    stretched = (directions * strength ** (exponents / 2.0)) @ directions.mT
    theta = torch.linalg.solve_triangular(triangle, stretched, upper=True)
    if rotate:
        theta = theta @ random_rotation(theta, seed)
        # Of all harms together: with one for each of them no rotation could be equal.
        rows = [with_ridge(x.detach().to(torch.float64), ridge) for x in x_harmful]
        scaled = [x / torch.linalg.matrix_norm(x @ theta) for x in rows]
        theta = theta @ equal_curvature(torch.cat(scaled) @ theta)
    return theta * (math.sqrt(len(theta)) / torch.linalg.matrix_norm(theta))


def _top(bases: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Exponents 1 on the span of all top eigenvectors and 0 beside it, and an eigenbasis."""
    tops = torch.stack([basis[:, 0] for basis in bases], dim=1)
    left, sigma, _ = torch.linalg.svd(tops, full_matrices=True)
    # Equal top eigenvectors of two harms are one direction.
    dimension = int((sigma > 1e-9 * sigma[0]).sum())
    if dimension == left.shape[0]:
        raise ValueError(
            f"several_harms_theta: x_harmful must leave a direction to the primary task, got "
            f"{len(bases)} tasks whose top directions span all {dimension}; use grading='log'"
        )
    exponents = torch.zeros(left.shape[0], dtype=left.dtype, device=left.device)
    exponents[:dimension] = 1.0
    return exponents, left


@METHODS.register
@dataclass(frozen=True)
class SeveralHarmsImmunizer(LinearImmunizer):
    """The closed form against several harmful tasks at once.

    Attributes:
        strength: c, the condition number that the primary Hessian gets.
        ridge: Ridge on each K, relative to its largest eigenvalue.
        grading: ``"top"`` or ``"log"`` (module docstring).
        rotate: Whether to mix the features so that coordinates have the same curvature, over all
            harmful tasks together.
        seed: Seed of that rotation.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> harms = [digits_task((4,), (9,)), digits_task((1,), (7,))]
        >>> problem = Problem.of(digits_task((3,), (8,)), *harms)
        >>> immunized = SeveralHarmsImmunizer().fit(None, problem)
        >>> immunized.history[1]["share_of_log_ceiling_2"] > 0.98
        True
    """

    method: ClassVar[str] = "several-harms"
    knob: ClassVar[str | None] = "strength"
    grid: ClassVar[tuple[float, ...]] = STRENGTHS
    takes_several: ClassVar[bool] = True

    strength: float = 30.0
    ridge: float = 1e-2
    grading: SeveralGrading = "top"
    rotate: bool = True
    seed: int = 0

    @property
    def label(self) -> str:
        """The method, with a grading that is not the usual one."""
        return self.method if self.grading == "top" else f"{self.method}, grading {self.grading}"

    def fit(
        self,
        model: Tensor | None,
        problem: Problem[Task],
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> Immunized:
        """Immunize; arguments and errors as in the base class. No labels are used.

        Returns:
            The immunized extractor. Its history has one record before and one after, with ``step``,
            ``log_kappa_primary``, the smallest ``log_rir``, and for each harmful task h, counted
            from 1, ``log_kappa_harmful_h``, ``log_rir_h`` and ``share_of_log_ceiling_h`` (log RIR
            over the log of its ceiling; 1 where both are 0).
        """
        problem = self.prepared(problem)
        theta0 = identity_or(model, problem.primary, "SeveralHarmsImmunizer")
        primary, *harms = (gram_rows(t.x_train) for t in (problem.primary, *problem.harmful))
        seen = [x if model is None else x.to(torch.float64) @ theta0 for x in (primary, *harms)]
        theta = several_harms_theta(
            seen[0],
            seen[1:],
            strength=self.strength,
            ridge=self.ridge,
            grading=self.grading,
            rotate=self.rotate,
            seed=self.seed,
        )
        theta = theta if model is None else theta0 @ theta
        ceilings = [log_rir_ceiling(primary, x, theta0, ridge=self.ridge) for x in harms]
        history = []
        for step, extractor in enumerate((theta0, theta)):
            record = {"step": float(step), "log_rir": math.inf}
            for number, (x, ceiling) in enumerate(zip(harms, ceilings, strict=True), start=1):
                ratio = relative_immunization_ratio(primary, x, extractor, theta0, ridge=self.ridge)
                record["log_kappa_primary"] = ratio.log_kappa_primary
                record["log_rir"] = min(record["log_rir"], ratio.log_rir)
                record[f"log_kappa_harmful_{number}"] = ratio.log_kappa_harmful
                record[f"log_rir_{number}"] = ratio.log_rir
                share = ratio.log_rir / ceiling if ceiling > 0.0 else 1.0
                record[f"share_of_log_ceiling_{number}"] = share
            history.append(record)
        if progress is not None:
            progress(self.label, 1.0)
        return Immunized(self.method, theta, theta0, plain(self), history)
