"""Algebraic extremes of a symmetric, possibly indefinite matrix: values and derivatives.

The cluster of an extreme holds the eigenvalues with |lambda_i - lambda| <= cluster_rtol
max|lambda|; the tolerance defaults to p eps, eps of float32 for input of float32 or less.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import (
    FloatArray,
    IntArray,
    as_matrices,
    map_matrices,
    matrices_and_direction,
    symmetric_part,
)
from immunize_ext.reference._policy import Policy
from immunize_ext.reference.spectrum import Extreme, power_of_two


class SymmetricExtremes(NamedTuple):
    """Algebraic extremes of a symmetric matrix; every field ``(*,)``."""

    lambda_max: FloatArray
    lambda_min: FloatArray
    multiplicity_max: IntArray
    multiplicity_min: IntArray


class SymmetricExtremesGradient(NamedTuple):
    """Symmetric gradients of the two algebraic extremes, each ``(*, p, p)``."""

    lambda_max: FloatArray
    lambda_min: FloatArray


def symmetric_extremes(h: npt.ArrayLike, *, cluster_rtol: float | None = None) -> SymmetricExtremes:
    """Algebraically largest and smallest eigenvalue of the symmetric part of H.

    An indefinite H gives its most negative eigenvalue, not the one of least magnitude; for
    max|lambda| / min|lambda| use :func:`condition_number`.

    Args:
        h: ``(*, p, p)``; (H + H^T) / 2 is decomposed.
        cluster_rtol: in units of max|lambda|; default p eps.

    Returns:
        :class:`SymmetricExtremes`.

    Raises:
        ValueError: h is not square, not finite or empty.

    Example:
        >>> result = symmetric_extremes([[-5.0, 0.0], [0.0, 4.0]])
        >>> float(result.lambda_min), float(result.lambda_max)
        (-5.0, 4.0)
    """
    matrices, policy = _symmetric_arguments("symmetric_extremes", h, cluster_rtol)

    def one(matrix: FloatArray) -> tuple[float, float, int, int]:
        values, _, scale = _scaled_eigh(matrix)
        low, high = _symmetric_clusters(values, policy)
        return values[-1] * scale, values[0] * scale, high, low

    return SymmetricExtremes(*map_matrices(one, matrices))


# Derivation.  H q = lambda q and q^T dq = 0 give d lambda = q^T dH q; over a cluster the least
# element of the subdifferential { Q_c Z Q_c^T : Z >= 0, tr Z = 1 } is the mean of q_i q_i^T.
def symmetric_extremes_gradient(
    h: npt.ArrayLike, *, cluster_rtol: float | None = None
) -> SymmetricExtremesGradient:
    """Gradients of both algebraic extremes: the mean of q_i q_i^T over the cluster, symmetric.

    Args:
        h: ``(*, p, p)``.
        cluster_rtol: as in :func:`symmetric_extremes`.

    Returns:
        :class:`SymmetricExtremesGradient`, each ``(*, p, p)`` float64.

    Raises:
        ValueError: as :func:`symmetric_extremes`.

    Example:
        >>> symmetric_extremes_gradient([[-5.0, 0.0], [0.0, 4.0]]).lambda_min
        array([[1., 0.],
               [0., 0.]])
    """
    matrices, policy = _symmetric_arguments("symmetric_extremes_gradient", h, cluster_rtol)

    def one(matrix: FloatArray) -> tuple[FloatArray, ...]:
        values, vectors, _ = _scaled_eigh(matrix)
        low, high = _symmetric_clusters(values, policy)
        top, bottom = vectors[:, values.size - high :], vectors[:, :low]
        return top @ top.T / high, bottom @ bottom.T / low

    return SymmetricExtremesGradient(*map_matrices(one, matrices))


# Derivation.  Differentiating (H - lambda I) q = 0 and multiplying by q_j^T, j != k:
# q_j^T dq = q_j^T E q_k / (lambda_k - lambda_j).
def symmetric_extremes_hvp(
    h: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    which: Extreme,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of one algebraic extreme applied to a direction: dq q^T + q dq^T, symmetric.

    Args:
        h: ``(*, p, p)``.
        direction: ``(*, p, p)``; its symmetric part counts.
        which: "max" or "min".
        cluster_rtol: as in :func:`symmetric_extremes`.

    Returns:
        ``(*, p, p)`` float64.

    Raises:
        ValueError: the extreme is a cluster, or bad arguments.

    Example:
        >>> symmetric_extremes_hvp(
        ...     [[3.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [2.0, 0.0]], which="max"
        ... )
        array([[0., 1.],
               [1., 0.]])
    """
    name = "symmetric_extremes_hvp"
    matrices, policy = _symmetric_arguments(name, h, cluster_rtol)
    _, directions = matrices_and_direction(name, "h", h, direction)
    if which not in ("max", "min"):
        raise ValueError(f"{name}: which must be 'max' or 'min', got {which!r}; choose one")

    def one(matrix: FloatArray, along: FloatArray) -> tuple[FloatArray]:
        values, vectors, scale = _scaled_eigh(matrix)
        low, high = _symmetric_clusters(values, policy)
        multiplicity = high if which == "max" else low
        if multiplicity > 1:
            raise ValueError(
                f"{name}: lambda_{which} must be simple, got multiplicity {multiplicity}; "
                "a cluster has no second derivative"
            )
        k = values.size - 1 if which == "max" else 0
        others = np.arange(values.size) != k
        q = vectors[:, k]
        projected = vectors[:, others].T @ symmetric_part(along / scale) @ q
        dq = vectors[:, others] @ (projected / (values[k] - values[others]))
        return (np.outer(dq, q) + np.outer(q, dq),)

    if matrices.size == 0:
        return np.zeros(matrices.shape)
    product: FloatArray = map_matrices(one, matrices, directions)[0]
    return product


def _symmetric_arguments(
    function: str, h: npt.ArrayLike, cluster_rtol: float | None
) -> tuple[FloatArray, Policy]:
    matrices = as_matrices(function, "h", h)
    if matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(
            f"{function}: h must be square, got shape {matrices.shape}; "
            "use extremal_singular_values for a rectangular matrix"
        )
    return symmetric_part(matrices), Policy.of(function, h, cluster_rtol=cluster_rtol)


def _symmetric_clusters(values: FloatArray, policy: Policy) -> tuple[int, int]:
    """Sizes of the clusters at the lower and at the upper end of ascending eigenvalues."""
    largest = float(max(abs(values[0]), abs(values[-1])))
    low, high = (policy.cluster(values, float(values[end]), largest) for end in (0, -1))
    return low, high


def _scaled_eigh(matrix: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    scale = power_of_two(matrix)
    values, vectors = scipy.linalg.eigh(matrix / scale, driver="ev")
    return values, vectors, scale
