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

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import (
    FloatArray,
    IntArray,
    as_matrices,
    map_matrices,
    matrices_and_direction,
)
from immunize_ext.reference._jets import Jet, jet
from immunize_ext.reference._policy import Policy, Tolerances, count_above

Extreme: TypeAlias = Literal["max", "min"]


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

    def one(matrix: FloatArray) -> tuple[FloatArray]:
        _, sigma, _, scale = _scaled_svd(matrix)
        return (sigma * scale,)

    values: FloatArray = map_matrices(one, matrices)[0]
    return values


def extremal_singular_values(
    a: npt.ArrayLike, **tolerances: Unpack[Tolerances]
) -> SingularExtremes:
    """Largest and smallest singular value, rank and multiplicities.

    Args:
        a: ``(*, n, p)``, any real dtype; computed in float64.
        **tolerances: rank, rank_rtol and cluster_rtol, see the conventions above.

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
    policy = Policy.of(name, a, **tolerances)
    return SingularExtremes(*map_matrices(lambda matrix: Spectrum.of(matrix, policy).all, matrices))


def extremal_singular_values_gradient(
    a: npt.ArrayLike, **tolerances: Unpack[Tolerances]
) -> SingularExtremesGradient:
    """Gradients of both extremes: the mean of u_i v_i^T over the cluster.

    Args:
        a: ``(*, n, p)``.
        **tolerances: as in :func:`extremal_singular_values`.

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
    return SingularExtremesGradient(
        *(extreme_jet(name, "a", a, which, **tolerances).gradient for which in ("max", "min"))
    )


def extremal_singular_values_hvp(
    a: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    which: Extreme,
    **tolerances: Unpack[Tolerances],
) -> FloatArray:
    """Hessian of one extreme applied to a direction: du v^T + u dv^T.

    Args:
        a: ``(*, n, p)``.
        direction: ``(*, n, p)``, the direction E.
        which: "max" for sigma_max, "min" for sigma_min.
        **tolerances: as in :func:`extremal_singular_values`.

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
    product = extreme_jet(name, "a", a, which, direction, **tolerances).product
    assert product is not None
    return product


def extreme_jet(
    function: str,
    argument: str,
    array: npt.ArrayLike,
    which: Extreme,
    direction: npt.ArrayLike | None = None,
    *,
    gram: bool = False,
    **tolerances: Unpack[Tolerances],
) -> Jet:
    """One extreme with its gradient and, along a direction, its second derivative.

    Args:
        function: the name for errors.
        argument: the name of ``array`` for errors.
        array: ``(*, n, p)``.
        which: "max" or "min".
        direction: ``(*, n, p)``; with it a cluster or a zero is refused.
        gram: of the p singular values that sqrt(X^T X) has, min(n, p) of which are those of X.
        **tolerances: as in :func:`extremal_singular_values`.
    """
    if which not in ("max", "min"):
        raise ValueError(f"{function}: which must be 'max' or 'min', got {which!r}; choose one")
    policy = Policy.of(function, array, **tolerances)

    def first(matrix: FloatArray) -> tuple[float, FloatArray]:
        spectrum = Spectrum.of(matrix, policy, gram=gram)
        return spectrum.value(which), spectrum.mean(which)

    if direction is None:
        return jet(*map_matrices(first, as_matrices(function, argument, array)))
    matrices, along = matrices_and_direction(function, argument, array, direction)
    if matrices.size == 0:
        return jet(np.zeros(matrices.shape[:-2]), matrices, along, matrices)

    def second(matrix: FloatArray, e: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        spectrum = Spectrum.of(matrix, policy, gram=gram)
        index = spectrum.simple_index(function, which)
        # grad sigma(A) = grad sigma(A / scale), so its derivative along E is the one at A / scale
        # along E / scale.
        product = _sigma_hvp(spectrum, index, e / spectrum.scale)
        return spectrum.value(which), spectrum.mean(which), product

    value, gradient, product = map_matrices(second, matrices, along)
    return jet(value, gradient, along, product)


@dataclass(frozen=True)
class Spectrum:
    """One matrix: thin decomposition of A / scale, and what the policy says about it."""

    u: FloatArray  # (n, m)
    sigma: FloatArray  # (m,), of A / scale, descending
    vt: FloatArray  # (m, p)
    scale: float  # power of two, so that dividing by it is exact
    rank: int
    first: slice  # cluster of sigma_max
    last: slice  # cluster of sigma_min; empty where sigma_min is reported as 0
    multiplicity_min: int

    @classmethod
    def of(cls, matrix: FloatArray, policy: Policy, *, gram: bool = False) -> Spectrum:
        """The decomposition; ``gram`` counts the p - min(n, p) zeros of K = A^T A too."""
        u, sigma, vt, scale = _scaled_svd(matrix)
        rank = count_above(sigma, policy.rank_rtol)
        live, largest = sigma[:rank], float(sigma[0])
        nothing = slice(0, 0)
        zeros = (matrix.shape[1] if gram else sigma.size) - rank
        if rank == 0:
            return cls(u, sigma, vt, scale, 0, nothing, nothing, zeros)
        first = slice(0, policy.cluster(live, largest, largest))
        if policy.rank == "full" and zeros:
            return cls(u, sigma, vt, scale, rank, first, nothing, zeros)
        last = slice(rank - policy.cluster(live, float(live[-1]), largest), rank)
        return cls(u, sigma, vt, scale, rank, first, last, last.stop - last.start)

    @property
    def all(self) -> tuple[float, float, int, int, int]:
        """Both extremes, the rank and both multiplicities."""
        most = int(self.first.stop) if self.rank else self.multiplicity_min
        return self.value("max"), self.value("min"), self.rank, most, self.multiplicity_min

    def cluster(self, which: Extreme) -> slice:
        """Positions of an extreme; empty where it is reported as 0."""
        return self.first if which == "max" else self.last

    def value(self, which: Extreme) -> float:
        """An extreme of the matrix itself."""
        cluster = self.cluster(which)
        if cluster.stop == 0:
            return 0.0
        position = cluster.start if which == "max" else cluster.stop - 1
        return float(self.sigma[position] * self.scale)

    def mean(self, which: Extreme) -> FloatArray:
        """Mean of u_i v_i^T over the cluster; zeros for an empty one."""
        cluster = self.cluster(which)
        size = max(cluster.stop - cluster.start, 1)
        mean: FloatArray = self.u[:, cluster] @ self.vt[cluster] / size
        return mean

    def simple_index(self, function: str, which: Extreme) -> int:
        """Position of a simple, positive extreme; anything else has no second derivative."""
        cluster = self.cluster(which)
        size = cluster.stop - cluster.start
        if size != 1:
            found = "0" if size == 0 else f"a cluster of {size} equal values"
            raise ValueError(
                f"{function}: sigma_{which} must be simple and positive, got {found}; "
                "no second derivative exists there"
            )
        return int(cluster.start)


def power_of_two(matrix: FloatArray) -> float:
    """Largest power of two not above max|entry|, 1 for a zero matrix."""
    largest = float(np.max(np.abs(matrix)))
    if largest == 0.0:
        return 1.0
    _, exponent = np.frexp(largest)
    return float(np.ldexp(1.0, int(exponent) - 1))


def _scaled_svd(matrix: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """U, sigma and V^T of matrix / scale, and the scale, a power of two."""
    scale = power_of_two(matrix)
    u, sigma, vt = scipy.linalg.svd(matrix / scale, full_matrices=False, lapack_driver="gesvd")
    return u, sigma, vt, scale


def _sigma_hvp(spectrum: Spectrum, k: int, direction: FloatArray) -> FloatArray:
    """Product du v^T + u dv^T of the k-th singular value along a direction."""
    u, sigma, v = spectrum.u, spectrum.sigma, spectrum.vt.T
    left, right = u.T @ direction @ v[:, k], v.T @ direction.T @ u[:, k]
    others = np.arange(sigma.size) != k
    gap = np.where(others, (sigma[k] - sigma) * (sigma[k] + sigma), 1.0)
    along_u = np.where(others, (sigma[k] * left + sigma * right) / gap, 0.0)
    along_v = np.where(others, (sigma[k] * right + sigma * left) / gap, 0.0)
    du, dv = u @ along_u, v @ along_v
    # Only where there is an outside: for a square U the difference is rounding, times 1 / sigma_k.
    if u.shape[0] > u.shape[1]:
        du = du + (direction @ v[:, k] - u @ left) / sigma[k]
    if v.shape[0] > v.shape[1]:
        dv = dv + (direction.T @ u[:, k] - v @ right) / sigma[k]
    return np.outer(du, v[:, k]) + np.outer(u[:, k], dv)
