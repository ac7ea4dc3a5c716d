"""The merge and its gradients in fifty digits: a textbook formula and central differences.

Nothing is clever here: T is formed and solved with, which fifty digits can afford where float64
cannot.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np

STEP = mpmath.mpf(10) ** -30


def matrix(a: Any) -> mpmath.matrix:
    return mpmath.matrix(np.asarray(a, dtype=np.float64).tolist())


def merge(base: Any, values: Any, c: Any, c_reg: Any, ridge: Any, inverse_hardness: Any) -> Any:
    """W0 + (V - W0 C^T) T^-1 C Q^-1."""
    with mpmath.workdps(90):
        q = c_reg.T * c_reg + ridge * mpmath.eye(c_reg.cols)
        a = mpmath.lu_solve(q, c.T) if c.rows == 1 else _solve(q, c.T)
        t = c * a
        for j in range(c.rows):
            t[j, j] += inverse_hardness[j]
        return base + (values - base * c.T) * _solve(t, a.T)


def _solve(left: mpmath.matrix, right: mpmath.matrix) -> mpmath.matrix:
    return mpmath.inverse(left) * right


def numbers(a: mpmath.matrix) -> np.ndarray:
    return np.array(a.tolist(), dtype=np.float64)


def gradients(upstream: Any, **arguments: Any) -> dict[str, np.ndarray]:
    """d <upstream, W> / d each argument, entry by entry."""
    with mpmath.workdps(90):
        points = {name: matrix(value) for name, value in arguments.items()}
        weights = matrix(upstream)

        def loss() -> mpmath.mpf:
            points_now = {**points, "ridge": points["ridge"][0]}
            merged = merge(**points_now)
            return mpmath.fsum(a * b for a, b in zip(merged, weights, strict=True))

        found = {}
        for name, point in points.items():
            grad = np.zeros((point.rows, point.cols))
            for i in range(point.rows):
                for j in range(point.cols):
                    kept = point[i, j]
                    point[i, j] = kept + STEP
                    upper = loss()
                    point[i, j] = kept - STEP
                    lower = loss()
                    point[i, j] = kept
                    grad[i, j] = float((upper - lower) / (2 * STEP))
            found[name] = grad
        return found
