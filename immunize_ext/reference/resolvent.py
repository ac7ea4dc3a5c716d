"""Traces and energies of B = (A + k I)^-1 from the definition: one inverse a shift, and products.

Values and gradients of tr A B, tr A^2 B^2 and b^T B^2 b. The derivative of B along dA is -B dA B,
along dk it is -B^2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import (
    FloatArray,
    as_matrices,
    map_matrices,
    require_finite,
    require_shape,
    symmetric_part,
)


class ResolventTraces(NamedTuple):
    """``(*, s)``, ``(*, s)`` and ``(*, s, m)``."""

    first: FloatArray
    second: FloatArray
    energies: FloatArray


class ResolventTracesGradient(NamedTuple):
    """In A ``(*, p, p)``, symmetric, in the shifts ``(*, s)`` and in the vectors ``(*, p, m)``."""

    a: FloatArray
    shifts: FloatArray
    vectors: FloatArray


def resolvent_traces(
    a: npt.ArrayLike, shifts: npt.ArrayLike, vectors: npt.ArrayLike
) -> ResolventTraces:
    """Tr A B, tr A^2 B^2 and b^T B^2 b for every shift.

    Args:
        a: ``(*, p, p)``; its symmetric part counts.
        shifts: ``(*, s)``.
        vectors: ``(*, p, m)``, b as columns.

    Returns:
        :class:`ResolventTraces`.

    Raises:
        ValueError: shapes do not fit, a number is not finite, or A + k I is singular.

    Example:
        >>> found = resolvent_traces([[3.0, 0.0], [0.0, 1.0]], [1.0], [[2.0], [0.0]])
        >>> [round(float(part.item()), 9) for part in found]
        [1.25, 0.8125, 0.25]
    """
    matrices, k, columns = _arguments("resolvent_traces", a, shifts, vectors)

    def one(matrix: FloatArray, ridges: FloatArray, b: FloatArray) -> tuple[FloatArray, ...]:
        found = []
        for ridge in ridges[:, 0]:
            inverse = _inverse(matrix, ridge)
            share = matrix @ inverse
            solved = inverse @ b
            found.append((np.trace(share), np.trace(share @ share), (solved**2).sum(0)))
        first, second, energies = zip(*found, strict=True)
        return np.array(first), np.array(second), np.array(energies)

    return ResolventTraces(*map_matrices(one, matrices, k, columns))


def resolvent_traces_gradient(
    a: npt.ArrayLike,
    shifts: npt.ArrayLike,
    vectors: npt.ArrayLike,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    energies: npt.ArrayLike,
) -> ResolventTracesGradient:
    """Gradients of sum first tr A B + second tr A^2 B^2 + energies b^T B^2 b over all shifts.

    Args:
        a: ``(*, p, p)``.
        shifts: ``(*, s)``.
        vectors: ``(*, p, m)``.
        first: Weights ``(*, s)``.
        second: Weights ``(*, s)``.
        energies: Weights ``(*, s, m)``.

    Returns:
        :class:`ResolventTracesGradient`.

    Raises:
        ValueError: as :func:`resolvent_traces`.

    Example:
        >>> found = resolvent_traces_gradient(
        ...     [[3.0, 0.0], [0.0, 1.0]], [1.0], [[2.0], [0.0]], [1.0], [0.0], [[0.0]]
        ... )
        >>> found.a
        array([[0.0625, 0.    ],
               [0.    , 0.25  ]])
    """
    name = "resolvent_traces_gradient"
    matrices, k, columns = _arguments(name, a, shifts, vectors)
    weights = [np.asarray(w, dtype=np.float64) for w in (first, second, energies)]
    shape = (*k.shape[:-1], columns.shape[-1])
    for argument, weight, expected in zip(
        ("first", "second", "energies"), weights, (k.shape[:-1], k.shape[:-1], shape), strict=True
    ):
        require_shape(name, argument, weight, expected)

    def one(
        matrix: FloatArray,
        ridges: FloatArray,
        b: FloatArray,
        f: FloatArray,
        h: FloatArray,
        g: FloatArray,
    ) -> tuple[FloatArray, ...]:
        of_a, of_b = np.zeros_like(matrix), np.zeros_like(b)
        of_ridges = np.zeros(len(ridges))
        for index, ridge in enumerate(ridges[:, 0]):
            inverse = _inverse(matrix, ridge)
            share = matrix @ inverse
            solved = inverse @ b
            # d (A B) = (I - A B) dA B = k B dA B, of dk -A B^2; tr (A B)^2 takes 2 A B times that.
            of_a += f[index, 0] * ridge * inverse @ inverse
            of_a += 2.0 * h[index, 0] * ridge * inverse @ share @ inverse
            of_ridges[index] = -f[index, 0] * np.trace(share @ inverse)
            of_ridges[index] -= 2.0 * h[index, 0] * np.trace(share @ share @ inverse)
            for column in range(b.shape[1]):
                x, weight = solved[:, column], g[index, column]
                y = inverse @ x
                of_a -= weight * (np.outer(x, y) + np.outer(y, x))
                of_ridges[index] -= 2.0 * weight * x @ y
                of_b[:, column] += 2.0 * weight * y
        return symmetric_part(of_a), of_ridges, of_b

    f, h = (weight[..., None] for weight in weights[:2])
    return ResolventTracesGradient(*map_matrices(one, matrices, k, columns, f, h, weights[2]))


def _arguments(
    function: str, a: npt.ArrayLike, shifts: npt.ArrayLike, vectors: npt.ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    matrices = as_matrices(function, "a", a)
    if matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{function}: a must be square, got shape {matrices.shape}; give K")
    k, columns = (np.asarray(part, dtype=np.float64) for part in (shifts, vectors))
    batch = matrices.shape[:-2]
    require_shape(function, "shifts", k, (*batch, k.shape[-1] if k.ndim else 0))
    width = columns.shape[-1] if columns.ndim else 0
    require_shape(function, "vectors", columns, (*batch, matrices.shape[-1], width))
    require_finite(function, "shifts", k)
    require_finite(function, "vectors", columns)
    return symmetric_part(matrices), k[..., None], columns


def _inverse(matrix: FloatArray, ridge: float) -> FloatArray:
    shifted = matrix + ridge * np.eye(len(matrix))
    inverse: FloatArray = scipy.linalg.cho_solve(
        scipy.linalg.cho_factor(shifted, lower=True), np.eye(len(matrix))
    )
    return inverse
