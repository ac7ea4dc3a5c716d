"""What makes a merge optimal, for tests of any implementation: objective, residuals, repeats.

Symbols as in ``merge``.  The problem is convex, so W is the merge iff it satisfies the hard
constraints and the gradient of the objective is orthogonal to every direction that keeps them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import EPS, FloatArray
from immunize_ext.reference._merge_problem import (
    CONTRADICTION_RTOL,
    DEPENDENCE_RTOL,
    Contradictions,
    MergeProblem,
    require_contradictions_choice,
    row_and_null_space,
    single_candidates,
    single_problems,
)


class MergeResiduals(NamedTuple):
    """How far W is from optimal; each ``(*,)``, relative, 0 at the optimum."""

    feasibility: FloatArray
    stationarity: FloatArray


class DeduplicatedRows(NamedTuple):
    """Concept rows without repeats, the targets that stand for them, and who was joined."""

    c: FloatArray
    values: FloatArray
    inverse_hardness: FloatArray
    groups: tuple[tuple[int, ...], ...]


def merge_objective(
    w: npt.ArrayLike,
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    *,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
) -> FloatArray:
    """|(W - W0) C_reg^T|_F^2 + ridge |W - W0|_F^2 + sum over soft rows |W c_j - v_j|^2 / nu_j.

    Hard rows are constraints and not part of it; see :func:`merge_residuals`.

    Args:
        w: ``(*, out, d)`` candidate.
        base: as in ``merge.merge_null_space``.
        values: as in ``merge.merge_null_space``.
        c: as in ``merge.merge_null_space``.
        c_reg: as in ``merge.merge_null_space``.
        ridge: as in ``merge.merge_null_space``.
        relative: as in ``merge.merge_null_space``.
        inverse_hardness: as in ``merge.merge_null_space``.

    Returns:
        ``(*,)`` float64.

    Raises:
        ValueError: bad arguments.

    Example:
        >>> reg = [[1.0, 0.0], [0.0, 2.0]]
        >>> float(merge_objective([[1.0, 1.0]], [[0.0, 0.0]], [[2.0]], [[1.0, 1.0]], reg))
        5.0
    """
    lead, problems = single_problems(
        "merge_objective", base, values, c, c_reg, ridge, relative, inverse_hardness
    )
    candidates = single_candidates("merge_objective", "w", w, lead, np.shape(base)[-2:])
    totals = []
    for problem, candidate in zip(problems, candidates, strict=True):
        d = candidate - problem.base
        soft = problem.inverse_hardness > 0
        misfit = candidate @ problem.c[soft].T - problem.values[:, soft]
        totals.append(
            np.sum((d @ problem.c_reg.T) ** 2)
            + problem.ridge * np.sum(d**2)
            + np.sum(misfit**2 / problem.inverse_hardness[soft])
        )
    return np.asarray(totals, dtype=np.float64).reshape(lead)


def merge_residuals(
    w: npt.ArrayLike,
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    *,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
) -> MergeResiduals:
    """Optimality of W, from the conditions alone, without solving for the optimum.

    Feasibility is the part of the hard constraints that a better W could still remove: the
    projection of (W C_h^T - V_h) onto what C_h can reach, over |V_h| + |W| |C_h|; so it is also 0
    for the least squares answer to contradictory targets.  Stationarity is the gradient
    D Q + sum_soft (W c_j - v_j) c_j^T / nu_j, projected onto the null space of C_h, less what
    rounding of W, W0 and V explains, over the norms of the factors of its two terms.  The problem
    is convex: both zero means optimal.

    Args:
        w: ``(*, out, d)`` candidate.
        base: as in ``merge.merge_null_space``.
        values: as in ``merge.merge_null_space``.
        c: as in ``merge.merge_null_space``.
        c_reg: as in ``merge.merge_null_space``.
        ridge: as in ``merge.merge_null_space``.
        relative: as in ``merge.merge_null_space``.
        inverse_hardness: as in ``merge.merge_null_space``.

    Returns:
        :class:`MergeResiduals`.

    Raises:
        ValueError: bad arguments.

    Example:
        >>> reg = [[1.0, 0.0], [0.0, 2.0]]
        >>> found = merge_residuals([[1.6, 0.4]], [[0.0, 0.0]], [[2.0]], [[1.0, 1.0]], reg)
        >>> bool(found.feasibility < 1e-15), bool(found.stationarity < 1e-15)
        (True, True)
    """
    lead, problems = single_problems(
        "merge_residuals", base, values, c, c_reg, ridge, relative, inverse_hardness
    )
    candidates = single_candidates("merge_residuals", "w", w, lead, np.shape(base)[-2:])
    found = [
        _residuals(problem, candidate)
        for problem, candidate in zip(problems, candidates, strict=True)
    ]
    table = np.asarray(found, dtype=np.float64).reshape((*lead, 2))
    return MergeResiduals(table[..., 0], table[..., 1])


# Derivation.  A row c that occurs with targets v_1..v_r and hardness mu_1..mu_r contributes
# sum_i mu_i |W c - v_i|^2 = mu |W c - v|^2 + constant, mu = sum mu_i, v = sum mu_i v_i / mu.
# If some are hard, the soft ones are outweighed: the hard ones remain, with their mean.
def deduplicate_rows(
    c: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    inverse_hardness: npt.ArrayLike = 0.0,
    contradictions: Contradictions = "raise",
    contradiction_rtol: float = CONTRADICTION_RTOL,
) -> DeduplicatedRows:
    """Join rows of C that are equal bit for bit; the merge of the result is the merge of the input.

    Args:
        c: ``(s, d)``.
        values: ``(out, s)``.
        inverse_hardness: scalar or ``(s,)``.
        contradictions: whether different targets of equal hard rows raise or are averaged.
        contradiction_rtol: difference of such targets relative to max|V|.

    Returns:
        :class:`DeduplicatedRows`, rows in the order of their first occurrence.

    Raises:
        ValueError: contradictory hard targets, naming the rows.

    Example:
        >>> joined = deduplicate_rows([[1.0, 0.0], [1.0, 0.0]], [[2.0, 2.0]])
        >>> joined.values, joined.groups
        (array([[2.]]), ((0, 1),))
    """
    rows = np.asarray(c, dtype=np.float64)
    targets = np.asarray(values, dtype=np.float64)
    nu = np.broadcast_to(np.asarray(inverse_hardness, dtype=np.float64), rows.shape[:1])
    positions: dict[tuple[float, ...], list[int]] = {}
    for index, row in enumerate(rows):
        positions.setdefault(tuple(float(entry) for entry in row), []).append(index)
    groups = tuple(tuple(group) for group in positions.values())
    joined_values = np.empty((targets.shape[0], len(groups)))
    joined_nu = np.empty(len(groups))
    for column, group in enumerate(groups):
        members = np.asarray(group)
        hard = members[nu[members] == 0]
        if hard.size:
            _refuse_contradiction(targets, hard, contradictions, contradiction_rtol)
            joined_values[:, column] = np.mean(targets[:, hard], axis=1)
            joined_nu[column] = 0.0
        else:
            mu = 1.0 / nu[members]
            joined_values[:, column] = targets[:, members] @ mu / np.sum(mu)
            joined_nu[column] = 1.0 / np.sum(mu)
    first = [group[0] for group in groups]
    return DeduplicatedRows(rows[first], joined_values, joined_nu, groups)


def _residuals(problem: MergeProblem, w: FloatArray) -> tuple[float, float]:
    hard = problem.inverse_hardness == 0
    c_h, v_h = problem.c[hard], problem.values[:, hard]
    y, null = row_and_null_space(c_h, DEPENDENCE_RTOL)
    feasibility = 0.0
    if y.shape[1]:
        reach = scipy.linalg.orth(c_h @ y)
        scale = np.linalg.norm(v_h) + np.linalg.norm(w) * np.linalg.norm(c_h)
        misfit = np.linalg.norm((w @ c_h.T - v_h) @ reach)
        feasibility = float(misfit / scale) if scale > 0 else 0.0
    d = w - problem.base
    pull = d @ problem.c_reg.T
    gradient = pull @ problem.c_reg + problem.ridge * d
    reach_norm = float(np.linalg.norm(problem.c_reg))
    size = float(np.linalg.norm(pull)) * reach_norm + problem.ridge * float(np.linalg.norm(d))
    # What one rounding of W, W0 and V can do to the gradient; W - W0 itself may be rounding only.
    weights = float(np.linalg.norm(w) + np.linalg.norm(problem.base))
    rounding = weights * (reach_norm**2 + problem.ridge)
    soft = problem.inverse_hardness > 0
    c_s, v_s, nu = problem.c[soft], problem.values[:, soft], problem.inverse_hardness[soft]
    misfit_soft = (w @ c_s.T - v_s) / nu
    gradient = gradient + misfit_soft @ c_s
    size += float(np.linalg.norm(misfit_soft) * np.linalg.norm(c_s))
    pulls = (np.linalg.norm(w) * np.linalg.norm(c_s, axis=1) + np.linalg.norm(v_s, axis=0)) / nu
    rounding += float(np.sum(pulls * np.linalg.norm(c_s, axis=1)))
    excess = float(np.linalg.norm(gradient @ null)) - 16 * EPS * rounding
    stationarity = max(excess, 0.0) / size if size > 0 else 0.0
    return feasibility, stationarity


def _refuse_contradiction(
    targets: FloatArray, members: npt.NDArray[np.int64], contradictions: Contradictions, rtol: float
) -> None:
    require_contradictions_choice(contradictions)
    spread = np.ptp(targets[:, members], axis=1)
    worst = float(np.max(spread, initial=0.0))
    if contradictions == "raise" and worst > rtol * np.max(np.abs(targets), initial=0.0):
        raise ValueError(
            f"deduplicate_rows: targets of equal rows must agree, got a difference of {worst:.3g} "
            f"between rows {members.tolist()}; pass contradictions='average' or soften them"
        )
