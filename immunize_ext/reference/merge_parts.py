"""Which rows, columns and layers of a second-moment merge to keep, by trying them all; gates.

With D = W - W0 and the metric S, an update costs ``tr (Delta - D) S (Delta - D)^T``.  Every subset
is tried; columns that may change are solved for by least squares with a root of S, without S^-1.
Gates are a least squares problem with the same root.  Overlaps come from scipy's principal angles.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import FloatArray, symmetric_part


def best_rows(update: npt.ArrayLike, s: npt.ArrayLike, count: int) -> tuple[list[int], float]:
    """Rows to keep so that the objective rises least, and by how much.

    Args:
        update: ``(out, d)``, D.
        s: ``(d, d)``, positive definite.
        count: how many rows are kept.

    Returns:
        The rows, rising, and the cost of the others.

    Example:
        >>> best_rows([[1.0], [-3.0]], [[2.0]], 1)
        ([1], 2.0)
    """
    delta = np.asarray(update, dtype=np.float64)
    best: tuple[list[int], float] = ([], np.inf)
    for rows in itertools.combinations(range(len(delta)), count):
        error = delta.copy()
        error[list(rows)] = 0.0
        cost = float(np.einsum("ij,jk,ik->", error, np.asarray(s, dtype=np.float64), error))
        if cost < best[1]:
            best = (list(rows), cost)
    return best


def columns_update(
    update: npt.ArrayLike, s: npt.ArrayLike, columns: Sequence[int]
) -> tuple[FloatArray, float]:
    """The best update in some columns alone, and its cost.

    Args:
        update: ``(out, d)``, D.
        s: ``(d, d)``, positive definite.
        columns: those that may differ from zero.

    Returns:
        ``(out, d)`` float64, and the cost.

    Example:
        >>> found, cost = columns_update([[3.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]], [0])
        >>> found.round(12), round(cost, 12)
        (array([[3.5, 0. ]]), 1.5)
    """
    delta, root = np.asarray(update, dtype=np.float64), _root(s)
    found = np.zeros_like(delta)
    if len(columns):
        solved, *_ = scipy.linalg.lstsq(root[:, list(columns)], root @ delta.T)
        found[:, list(columns)] = solved.T
    return found, float(np.sum((root @ (found - delta).T) ** 2))


def best_columns(update: npt.ArrayLike, s: npt.ArrayLike, count: int) -> tuple[list[int], float]:
    """Columns that may change so that the objective rises least, and by how much.

    Args:
        update: as in :func:`columns_update`.
        s: as there.
        count: how many.

    Returns:
        The columns, rising, and the cost.

    Example:
        >>> best_columns([[3.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]], 1)[0]
        [0]
    """
    width = np.asarray(update).shape[1]
    costs = {
        columns: columns_update(update, s, columns)[1]
        for columns in itertools.combinations(range(width), count)
    }
    best = min(costs, key=lambda columns: costs[columns])
    return list(best), costs[best]


def best_layers(worths: Sequence[float], sizes: Sequence[int], budget: int) -> float:
    """The largest sum of worths within a budget of sizes.

    Args:
        worths: of each layer.
        sizes: of each layer.
        budget: for the sum of those chosen.

    Returns:
        The sum.

    Example:
        >>> best_layers([5.0, 4.0, 3.0], [4, 3, 2], 5)
        7.0
    """
    layers = range(len(worths))
    return max(
        float(sum(worths[layer] for layer in chosen))
        for count in range(len(worths) + 1)
        for chosen in itertools.combinations(layers, count)
        if sum(sizes[layer] for layer in chosen) <= budget
    )


def best_gates(
    ways: Sequence[npt.ArrayLike], update: npt.ArrayLike, s: npt.ArrayLike
) -> FloatArray:
    """Factors of several updates whose sum is nearest to D in the metric S.

    Args:
        ways: ``(out, d)`` each.
        update: ``(out, d)``, D.
        s: ``(d, d)``, positive definite.

    Returns:
        ``(ways,)`` float64.

    Example:
        >>> best_gates([[[1.0, 1.0]]], [[3.0, 1.0]], np.eye(2)).round(12)
        array([2.])
    """
    root = _root(s)
    columns = [(root @ np.asarray(way, dtype=np.float64).T).ravel() for way in ways]
    target = (root @ np.asarray(update, dtype=np.float64).T).ravel()
    return np.asarray(scipy.linalg.lstsq(np.stack(columns, 1), target)[0])


def concept_overlap(first: npt.ArrayLike, second: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """Cosine of the smallest angle between spans of rows in the metric of Q^-1.

    Args:
        first: ``(rows, d)``.
        second: ``(rows, d)``.
        q: ``(d, d)``, positive definite.

    Returns:
        The cosine.

    Example:
        >>> round(concept_overlap([[1.0, 0.0]], [[0.6, 0.8]], np.eye(2)), 12)
        0.6
    """
    values, vectors = scipy.linalg.eigh(symmetric_part(np.asarray(q, dtype=np.float64)))
    whitened = [
        (vectors.T @ np.asarray(rows, dtype=np.float64).T) / np.sqrt(values)[:, None]
        for rows in (first, second)
    ]
    return float(np.cos(scipy.linalg.subspace_angles(*whitened).min()))


def _root(s: npt.ArrayLike) -> FloatArray:
    """F with F^T F = S."""
    values, vectors = scipy.linalg.eigh(symmetric_part(np.asarray(s, dtype=np.float64)))
    return np.asarray(np.sqrt(values)[:, None] * vectors.T)
