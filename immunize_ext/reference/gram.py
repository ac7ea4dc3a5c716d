"""Extremal eigenvalues of K = X^T X and |K|_F^2, from the singular values of X.

lambda_i(K) = sigma_i(X)^2 and |K|_F^2 = sum_i sigma_i^4.  K itself is never formed, so sigma_min
keeps its accuracy for kappa(X) beyond 1e8.  Conventions as in ``spectrum``; tolerances are in units
of the singular values of X.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import (
    FloatArray,
    IntArray,
    as_matrices,
    map_matrices,
    per_matrix,
    require_shape,
)
from immunize_ext.reference._decomposition import (
    RankPolicy,
    Spectrum,
    Tolerances,
    checked_tolerances,
    cluster_mean,
    decompose,
    multiplicity_max_of,
    reported_max,
    reported_min,
)
from immunize_ext.reference.spectrum import (
    extremal_singular_values,
    extremal_singular_values_gradient,
    extremal_singular_values_hvp,
)


class GramExtremes(NamedTuple):
    """Extremal eigenvalues of K = X^T X and |K|_F^2; every field ``(*,)``."""

    lambda_max: FloatArray
    lambda_min: FloatArray
    squared_frobenius: FloatArray
    rank: IntArray
    multiplicity_max: IntArray
    multiplicity_min: IntArray


class GramExtremesGradient(NamedTuple):
    """Gradients with respect to X, each ``(*, n, p)``."""

    lambda_max: FloatArray
    lambda_min: FloatArray
    squared_frobenius: FloatArray


def gram_extremes(
    x: npt.ArrayLike,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> GramExtremes:
    """Extremal eigenvalues of K = X^T X and |K|_F^2 from the singular values of X.

    lambda_i(K) = sigma_i(X)^2 and |K|_F^2 = sum_i sigma_i^4; K itself is never formed, so
    sigma_min keeps its accuracy for kappa(X) beyond 1e8.

    Args:
        x: ``(*, n, p)`` features.
        rank: "full" counts all p eigenvalues: with n < p, lambda_min is 0.
        rank_rtol: in units of the singular values of X.
        cluster_rtol: in units of the singular values of X.

    Returns:
        :class:`GramExtremes`.  With rank="full" and a zero eigenvalue, multiplicity_min is
        p - rank.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Note:
        |K|_F^2 overflows to infinity, or vanishes, where it is outside the range of float64.

    Example:
        >>> result = gram_extremes([[3.0, 0.0], [0.0, 2.0]])
        >>> float(result.lambda_max), float(result.lambda_min), float(result.squared_frobenius)
        (9.0, 4.0, 97.0)
    """
    name = "gram_extremes"
    matrices = as_matrices(name, "x", x)
    tolerances = checked_tolerances(name, x, matrices.shape, rank, rank_rtol, cluster_rtol)

    def one(matrix: FloatArray) -> tuple[npt.NDArray[np.generic], ...]:
        spectrum = _decompose_gram(matrix, rank, *tolerances)
        with np.errstate(over="ignore", under="ignore"):
            fourth = np.sum(spectrum.sigma**4) * spectrum.scale**2 * spectrum.scale**2
            return (
                np.asarray(reported_max(spectrum) ** 2),
                np.asarray(reported_min(spectrum) ** 2),
                np.asarray(fourth),
                np.asarray(spectrum.rank, dtype=np.int64),
                np.asarray(multiplicity_max_of(spectrum), dtype=np.int64),
                np.asarray(spectrum.multiplicity_min, dtype=np.int64),
            )

    parts = map_matrices(one, matrices)
    return GramExtremes(
        np.asarray(parts[0], dtype=np.float64),
        np.asarray(parts[1], dtype=np.float64),
        np.asarray(parts[2], dtype=np.float64),
        np.asarray(parts[3], dtype=np.int64),
        np.asarray(parts[4], dtype=np.int64),
        np.asarray(parts[5], dtype=np.int64),
    )


# Derivation.  lambda = sigma(X)^2, so d lambda = 2 sigma u^T dX v.  |K|_F^2 = tr(K K) and
# dK = dX^T X + X^T dX give d|K|_F^2 = 2 tr(K dK) = 4 tr(K X^T dX), gradient 4 X K = 4 (X X^T) X.
def gram_extremes_gradient(
    x: npt.ArrayLike,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> GramExtremesGradient:
    """Gradients with respect to X: 2 sigma mean(u v^T) for both extremes, 4 X K for |K|_F^2.

    Args:
        x: ``(*, n, p)``.
        rank: as in :func:`gram_extremes`.
        rank_rtol: as in :func:`gram_extremes`.
        cluster_rtol: as in :func:`gram_extremes`.

    Returns:
        :class:`GramExtremesGradient`, each ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> gram_extremes_gradient([[3.0, 0.0], [0.0, 2.0]]).lambda_min
        array([[0., 0.],
               [0., 4.]])
    """
    name = "gram_extremes_gradient"
    matrices = as_matrices(name, "x", x)
    tolerances = checked_tolerances(name, x, matrices.shape, rank, rank_rtol, cluster_rtol)

    def one(matrix: FloatArray) -> tuple[FloatArray, ...]:
        spectrum = _decompose_gram(matrix, rank, *tolerances)
        return (
            2.0 * reported_max(spectrum) * cluster_mean(spectrum, spectrum.first),
            2.0 * reported_min(spectrum) * cluster_mean(spectrum, spectrum.last),
        )

    parts = map_matrices(one, matrices)
    transposed = np.swapaxes(matrices, -1, -2)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        frobenius = 4.0 * (matrices @ transposed) @ matrices
    return GramExtremesGradient(
        np.asarray(parts[0], dtype=np.float64), np.asarray(parts[1], dtype=np.float64), frobenius
    )


# Derivation.  D(2 sigma u v^T)[E] = 2 (u^T E v) u v^T + 2 sigma D(u v^T)[E], and
# D(4 X X^T X)[E] = 4 (E X^T X + X E^T X + X X^T E).
def gram_extremes_hvp(
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    which: Literal["max", "min", "squared_frobenius"],
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of lambda_max, lambda_min or |K|_F^2 with respect to X, applied to a direction.

    Args:
        x: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        which: "max", "min" (the smallest counted eigenvalue) or "squared_frobenius".
        rank_rtol: as in :func:`gram_extremes`.
        cluster_rtol: as in :func:`gram_extremes`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: the extreme is a cluster or zero, or bad arguments.

    Example:
        >>> gram_extremes_hvp([[2.0]], [[1.0]], which="squared_frobenius")
        array([[48.]])
    """
    name = "gram_extremes_hvp"
    matrices = as_matrices(name, "x", x)
    directions = as_matrices(name, "direction", direction)
    require_shape(name, "direction", directions, matrices.shape)
    if which == "squared_frobenius":
        xt = np.swapaxes(matrices, -1, -2)
        et = np.swapaxes(directions, -1, -2)
        product: FloatArray = 4.0 * (
            directions @ (xt @ matrices) + matrices @ (et @ matrices) + matrices @ (xt @ directions)
        )
        return product
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    curvature = extremal_singular_values_hvp(x, direction, which=which, **options)
    values = extremal_singular_values(x, **options)
    gradients = extremal_singular_values_gradient(x, **options)
    sigma = values.sigma_max if which == "max" else values.sigma_min
    gradient = gradients.sigma_max if which == "max" else gradients.sigma_min
    slope = np.sum(gradient * directions, axis=(-1, -2))
    result: FloatArray = 2.0 * per_matrix(slope) * gradient + 2.0 * per_matrix(sigma) * curvature
    return result


def _decompose_gram(
    matrix: FloatArray, rank: RankPolicy, rank_rtol: float, cluster_rtol: float
) -> Spectrum:
    """As :func:`decompose`, with the p - min(n, p) zero eigenvalues of K counted for "full"."""
    spectrum = decompose(matrix, rank, rank_rtol, cluster_rtol)
    missing = matrix.shape[1] - spectrum.rank
    if spectrum.rank == 0 or (rank == "full" and missing):
        return spectrum._replace(last=slice(0, 0), multiplicity_min=missing)
    return spectrum
