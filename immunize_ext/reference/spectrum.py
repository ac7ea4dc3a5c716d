"""Extremal singular values, eigenvalues and condition numbers: values and derivatives.

Everything is computed in float64 from a complete decomposition by ``scipy.linalg.svd`` with the
driver ``gesvd`` (QR iteration, an algorithm of its own beside the divide-and-conquer of
``numpy`` and ``torch``) or ``scipy.linalg.eigh``, one matrix after the other.  Slow and plain on
purpose: this is what the fast operators are judged by.

Symbols: A (n x p) with thin singular value decomposition A = sum_i sigma_i u_i v_i^T,
sigma_1 >= sigma_2 >= ... >= 0, and m = min(n, p) singular values.

Conventions (the same for every function):

* sigma_i *counts* iff sigma_i > rank_rtol sigma_1.  ``rank`` is the number of those.
* rank="numerical": sigma_min is the smallest value that counts.  rank="full": sigma_min is
  sigma_m, reported as exactly 0 with gradient 0 where it does not count.
* The cluster of an extreme sigma holds the counted values with
  |sigma_i - sigma| <= cluster_rtol sigma_1.  Its size is the multiplicity.  Where sigma_min is
  reported as 0, its multiplicity is the number of values that do not count.
* Both tolerances default to max(n, p) eps, eps of float32 for input of float32 or less.
* Zero matrix: both extremes 0, rank 0, gradients 0, both multiplicities the number of values.

Derivation of the gradient.  Differentiate A v = sigma u and multiply by u^T from the left:

    u^T dA v + u^T A dv = d sigma u^T u + sigma u^T du.

u^T A = sigma v^T, and v^T dv = u^T du = 0 since |u| = |v| = 1, so

    d sigma = u^T dA v,        that is        grad sigma = u v^T.

Where sigma has multiplicity m > 1 the generalised gradient of sigma_max is the set
{ U_c Z V_c^T : Z symmetric positive semidefinite, trace 1 } with the singular vectors of the
cluster in U_c and V_c.  Its element of least Frobenius norm is Z = I/m,

    grad sigma = (1/m) sum_{i in cluster} u_i v_i^T,

which does not change when (U_c, V_c) turns into (U_c O, V_c O): it does not depend on the basis
that a solver returned.  The same element is used for a clustered sigma_min > 0.  At sigma_min = 0
left and right null vectors turn independently, the set is { U_c Z V_c^T : nuclear norm <= 1 } and
its least element is 0.

Derivation of the second derivative at a simple sigma_k > 0.  With E the direction, write
du = sum_{j != k} a_j u_j + (part outside range U), dv = sum_{j != k} b_j v_j + (part outside
range V).  Differentiating A v_k = sigma_k u_k and A^T u_k = sigma_k v_k and multiplying by u_j^T
and v_j^T gives

    u_j^T E v_k + sigma_j b_j = sigma_k a_j,       v_j^T E^T u_k + sigma_j a_j = sigma_k b_j,

two linear equations with the solution

    a_j = (sigma_k u_j^T E v_k + sigma_j u_k^T E v_j) / (sigma_k^2 - sigma_j^2),
    b_j = (sigma_k u_k^T E v_j + sigma_j u_j^T E v_k) / (sigma_k^2 - sigma_j^2),

and outside the ranges, where A^T and A vanish, (I - U U^T) E v_k / sigma_k and
(I - V V^T) E^T u_k / sigma_k.  The Hessian-vector product is du v_k^T + u_k dv^T.  It does not
exist inside a cluster nor at sigma_k = 0; those raise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import (
    FloatArray,
    IntArray,
    as_matrices,
    map_matrices,
    require_shape,
)
from immunize_ext.reference._decomposition import (
    Extreme,
    RankPolicy,
    checked_tolerances,
    cluster_mean,
    decompose,
    multiplicity_max_of,
    reported_max,
    reported_min,
    require_extreme,
    scaled_svd,
    sigma_hvp,
    simple_index,
)


class SingularExtremes(NamedTuple):
    """Extremal singular values of A; every field has the batch shape ``(*,)``."""

    sigma_max: FloatArray
    sigma_min: FloatArray
    rank: IntArray
    multiplicity_max: IntArray
    multiplicity_min: IntArray


class SingularExtremesGradient(NamedTuple):
    """Gradients of the two extremes, each ``(*, n, p)``."""

    sigma_max: FloatArray
    sigma_min: FloatArray


def singular_values(a: npt.ArrayLike) -> FloatArray:
    """All singular values, descending, by the driver gesvd on a scaled copy.

    Equivalent to ``scipy.linalg.svd(a, compute_uv=False, lapack_driver="gesvd")``.

    Args:
        a: ``(*, n, p)``, any real dtype; computed in float64.

    Returns:
        ``(*, min(n, p))`` float64.

    Raises:
        ValueError: a is not finite, has no row or no column, or less than two dimensions.

    Example:
        >>> singular_values([[3.0, 0.0], [0.0, -4.0]])
        array([4., 3.])
    """
    matrices = as_matrices("singular_values", "a", a)

    def one(matrix: FloatArray) -> tuple[FloatArray, ...]:
        _, sigma, _, scale = scaled_svd(matrix)
        return (sigma * scale,)

    (values,) = map_matrices(one, matrices)
    return np.asarray(values, dtype=np.float64)


def extremal_singular_values(
    a: npt.ArrayLike,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> SingularExtremes:
    """Largest and smallest singular value, rank and multiplicities.

    Args:
        a: ``(*, n, p)``, any real dtype; computed in float64.
        rank: "numerical" leaves out values at or below the tolerance, "full" reports them as 0.
        rank_rtol: a value counts iff it is larger than rank_rtol times the largest.
        cluster_rtol: values closer to an extreme than this times the largest belong to it.

    Returns:
        :class:`SingularExtremes`.

    Raises:
        ValueError: a is not finite or has no entries per matrix, or an unknown rank policy.

    Note:
        Deterministic.  See :func:`extremal_singular_values_gradient` for derivatives.

    Example:
        >>> result = extremal_singular_values([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
        >>> float(result.sigma_max), int(result.rank), int(result.multiplicity_max)
        (3.0, 2, 2)
    """
    name = "extremal_singular_values"
    matrices = as_matrices(name, "a", a)
    tolerances = checked_tolerances(name, a, matrices.shape, rank, rank_rtol, cluster_rtol)

    def one(matrix: FloatArray) -> tuple[npt.NDArray[np.generic], ...]:
        spectrum = decompose(matrix, rank, *tolerances)
        return (
            np.asarray(reported_max(spectrum)),
            np.asarray(reported_min(spectrum)),
            np.asarray(spectrum.rank, dtype=np.int64),
            np.asarray(multiplicity_max_of(spectrum), dtype=np.int64),
            np.asarray(spectrum.multiplicity_min, dtype=np.int64),
        )

    parts = map_matrices(one, matrices)
    return SingularExtremes(
        np.asarray(parts[0], dtype=np.float64),
        np.asarray(parts[1], dtype=np.float64),
        np.asarray(parts[2], dtype=np.int64),
        np.asarray(parts[3], dtype=np.int64),
        np.asarray(parts[4], dtype=np.int64),
    )


def extremal_singular_values_gradient(
    a: npt.ArrayLike,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> SingularExtremesGradient:
    """Gradients of both extremes: the mean of u_i v_i^T over the cluster.

    Args:
        a: ``(*, n, p)``.
        rank: as in :func:`extremal_singular_values`.
        rank_rtol: as in :func:`extremal_singular_values`.
        cluster_rtol: as in :func:`extremal_singular_values`.

    Returns:
        :class:`SingularExtremesGradient`, each ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> extremal_singular_values_gradient([[2.0, 0.0], [0.0, 2.0]]).sigma_max
        array([[0.5, 0. ],
               [0. , 0.5]])
    """
    name = "extremal_singular_values_gradient"
    matrices = as_matrices(name, "a", a)
    tolerances = checked_tolerances(name, a, matrices.shape, rank, rank_rtol, cluster_rtol)

    def one(matrix: FloatArray) -> tuple[FloatArray, ...]:
        spectrum = decompose(matrix, rank, *tolerances)
        return cluster_mean(spectrum, spectrum.first), cluster_mean(spectrum, spectrum.last)

    parts = map_matrices(one, matrices)
    return SingularExtremesGradient(
        np.asarray(parts[0], dtype=np.float64), np.asarray(parts[1], dtype=np.float64)
    )


def extremal_singular_values_hvp(
    a: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    which: Extreme,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of one extreme applied to a direction: du v^T + u dv^T.

    Args:
        a: ``(*, n, p)``.
        direction: ``(*, n, p)``, the direction E.
        which: "max" for sigma_max, "min" for sigma_min.
        rank: as in :func:`extremal_singular_values`.
        rank_rtol: as in :func:`extremal_singular_values`.
        cluster_rtol: as in :func:`extremal_singular_values`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: the extreme is a cluster or zero, where no second derivative exists, or bad
            arguments.

    Example:
        >>> extremal_singular_values_hvp(
        ...     [[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 0.0]], which="max"
        ... )
        array([[0., 2.],
               [1., 0.]])
    """
    name = "extremal_singular_values_hvp"
    matrices = as_matrices(name, "a", a)
    directions = as_matrices(name, "direction", direction)
    require_shape(name, "direction", directions, matrices.shape)
    require_extreme(name, which)
    tolerances = checked_tolerances(name, a, matrices.shape, rank, rank_rtol, cluster_rtol)

    def one(matrix: FloatArray, along: FloatArray) -> tuple[FloatArray, ...]:
        spectrum = decompose(matrix, rank, *tolerances)
        index = simple_index(name, spectrum, which)
        # grad sigma(A) = grad sigma(A / scale), so its derivative along E is the one at A / scale
        # along E / scale.
        return (sigma_hvp(spectrum, index, along / spectrum.scale),)

    if matrices.size == 0:
        return np.zeros(matrices.shape)
    (product,) = map_matrices(one, matrices, directions)
    return np.asarray(product, dtype=np.float64)
