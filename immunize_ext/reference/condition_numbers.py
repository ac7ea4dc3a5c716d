"""Condition number and its logarithm: values, gradients, Hessian-vector products.

Conventions as in ``spectrum``: sigma_min is the smallest value that counts, unless rank="full".
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import (
    FloatArray,
    as_matrices,
    per_matrix,
)
from immunize_ext.reference._decomposition import (
    RankPolicy,
    Tolerances,
)
from immunize_ext.reference.spectrum import (
    extremal_singular_values,
    extremal_singular_values_gradient,
    extremal_singular_values_hvp,
)


def condition_number(
    a: npt.ArrayLike,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Condition number kappa = sigma_max / sigma_min; infinity where sigma_min is 0.

    Args:
        a: ``(*, n, p)``.
        rank: as in :func:`extremal_singular_values`.
        rank_rtol: as in :func:`extremal_singular_values`.
        cluster_rtol: as in :func:`extremal_singular_values`.

    Returns:
        ``(*,)`` float64, at least 1.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> float(condition_number([[4.0, 0.0], [0.0, 0.5]]))
        8.0
    """
    extremes = extremal_singular_values(
        a, rank=rank, rank_rtol=rank_rtol, cluster_rtol=cluster_rtol
    )
    return _ratio(extremes.sigma_max, extremes.sigma_min)


# Derivation.  d kappa = d sigma_max / sigma_min - kappa d sigma_min / sigma_min.  The second factor
# is written kappa / sigma_min, since sigma_min^2 underflows at 1e-160.
def condition_number_gradient(
    a: npt.ArrayLike,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Gradient (G_max - kappa G_min) / sigma_min; 0 where kappa is infinite.

    Args:
        a: ``(*, n, p)``.
        rank: as in :func:`extremal_singular_values`.
        rank_rtol: as in :func:`extremal_singular_values`.
        cluster_rtol: as in :func:`extremal_singular_values`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> condition_number_gradient([[4.0, 0.0], [0.0, 2.0]])
        array([[ 0.5,  0. ],
               [ 0. , -1. ]])
    """
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    extremes = extremal_singular_values(a, rank=rank, **options)
    gradient = extremal_singular_values_gradient(a, rank=rank, **options)
    positive = extremes.sigma_min > 0
    sigma_min = per_matrix(np.where(positive, extremes.sigma_min, 1.0))
    kappa = per_matrix(np.where(positive, _ratio(extremes.sigma_max, extremes.sigma_min), 0.0))
    result: FloatArray = np.where(
        positive[..., None, None],
        (gradient.sigma_max - kappa * gradient.sigma_min) / sigma_min,
        0.0,
    )
    return result


def log_condition_number(
    a: npt.ArrayLike,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Logarithm log kappa = log sigma_max - log sigma_min; infinity where sigma_min is 0.

    Args:
        a: ``(*, n, p)``.
        rank: as in :func:`extremal_singular_values`.
        rank_rtol: as in :func:`extremal_singular_values`.
        cluster_rtol: as in :func:`extremal_singular_values`.

    Returns:
        ``(*,)`` float64.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> float(log_condition_number([[1.0, 0.0], [0.0, 1.0]]))
        0.0
    """
    kappa = condition_number(a, rank=rank, rank_rtol=rank_rtol, cluster_rtol=cluster_rtol)
    return np.log(kappa)


def log_condition_number_gradient(
    a: npt.ArrayLike,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Gradient G_max / sigma_max - G_min / sigma_min; 0 where kappa is infinite.

    Args:
        a: ``(*, n, p)``.
        rank: as in :func:`extremal_singular_values`.
        rank_rtol: as in :func:`extremal_singular_values`.
        cluster_rtol: as in :func:`extremal_singular_values`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> log_condition_number_gradient([[4.0, 0.0], [0.0, 2.0]])
        array([[ 0.25,  0.  ],
               [ 0.  , -0.5 ]])
    """
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    extremes = extremal_singular_values(a, rank=rank, **options)
    gradient = extremal_singular_values_gradient(a, rank=rank, **options)
    positive = extremes.sigma_min > 0
    sigma_max = per_matrix(np.where(positive, extremes.sigma_max, 1.0))
    sigma_min = per_matrix(np.where(positive, extremes.sigma_min, 1.0))
    result: FloatArray = np.where(
        positive[..., None, None],
        gradient.sigma_max / sigma_max - gradient.sigma_min / sigma_min,
        0,
    )
    return result


# Derivation.  With s = <G, E> the slope of an extreme and C its Hessian-vector product,
# D(G / sigma)[E] = C / sigma - s G / sigma^2; and kappa = exp(log kappa) gives
# D(kappa grad log kappa)[E] = kappa (<grad log kappa, E> grad log kappa + D(grad log kappa)[E]).
def log_condition_number_hvp(
    a: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of log kappa applied to a direction.

    Args:
        a: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        rank_rtol: as in :func:`extremal_singular_values`.
        cluster_rtol: as in :func:`extremal_singular_values`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: an extreme is a cluster or zero, or bad arguments.

    Example:
        >>> log_condition_number_hvp([[4.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[-0.0625,  0.    ],
               [ 0.    ,  0.    ]])
    """
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    directions = as_matrices("log_condition_number_hvp", "direction", direction)
    top = extremal_singular_values_hvp(a, direction, which="max", **options)
    bottom = extremal_singular_values_hvp(a, direction, which="min", **options)
    values = extremal_singular_values(a, **options)
    gradient = extremal_singular_values_gradient(a, **options)

    def part(sigma: FloatArray, slope: FloatArray, curvature: FloatArray) -> FloatArray:
        along = np.sum(slope * directions, axis=(-1, -2))
        piece: FloatArray = (curvature - per_matrix(along / sigma) * slope) / per_matrix(sigma)
        return piece

    result: FloatArray = part(values.sigma_max, gradient.sigma_max, top) - part(
        values.sigma_min, gradient.sigma_min, bottom
    )
    return result


def condition_number_hvp(
    a: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of kappa applied to a direction.

    Args:
        a: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        rank_rtol: as in :func:`extremal_singular_values`.
        cluster_rtol: as in :func:`extremal_singular_values`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: an extreme is a cluster or zero, or bad arguments.

    Example:
        >>> condition_number_hvp([[4.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[ 0.  ,  0.  ],
               [ 0.  , -0.25]])
    """
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    directions = as_matrices("condition_number_hvp", "direction", direction)
    kappa = per_matrix(condition_number(a, **options))
    slope = log_condition_number_gradient(a, **options)
    along = per_matrix(np.sum(slope * directions, axis=(-1, -2)))
    result: FloatArray = kappa * (along * slope + log_condition_number_hvp(a, direction, **options))
    return result


def _ratio(sigma_max: FloatArray, sigma_min: FloatArray) -> FloatArray:
    positive = sigma_min > 0
    ratio: FloatArray = np.where(positive, sigma_max / np.where(positive, sigma_min, 1.0), np.inf)
    return ratio
