"""Extremal eigenvalues of K = X^T X and |K|_F^2, from the singular values of X.

lambda_i(K) = sigma_i(X)^2 and |K|_F^2 = sum_i sigma_i^4.  K itself is never formed, so sigma_min
keeps its accuracy for kappa(X) beyond 1e8.  Conventions as in ``spectrum``; tolerances are in units
of the singular values of X.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import (
    FloatArray,
    IntArray,
    as_matrices,
    map_matrices,
    matrices_and_direction,
)
from immunize_ext.reference._jets import Jet, half_square, jet, scaled
from immunize_ext.reference._policy import Policy, Tolerances
from immunize_ext.reference.spectrum import Extreme, Spectrum, extreme_jet


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


def gram_extremes(x: npt.ArrayLike, **tolerances: Unpack[Tolerances]) -> GramExtremes:
    """Extremal eigenvalues of K = X^T X and |K|_F^2 from the singular values of X.

    lambda_i(K) = sigma_i(X)^2 and |K|_F^2 = sum_i sigma_i^4; K itself is never formed, so
    sigma_min keeps its accuracy for kappa(X) beyond 1e8.

    Args:
        x: ``(*, n, p)`` features.
        **tolerances: rank ("full" counts all p eigenvalues: with n < p, lambda_min is 0), and
            rank_rtol and cluster_rtol in units of the singular values of X.

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
    policy = Policy.of(name, x, **tolerances)

    def one(matrix: FloatArray) -> tuple[float, float, float, int, int, int]:
        spectrum = Spectrum.of(matrix, policy, gram=True)
        largest, smallest, *counts = spectrum.all
        fourth = np.sum(spectrum.sigma**4) * spectrum.scale**2 * spectrum.scale**2
        return np.square(largest), np.square(smallest), fourth, *counts

    with np.errstate(over="ignore", under="ignore"):
        return GramExtremes(*map_matrices(one, matrices))


def gram_extremes_gradient(
    x: npt.ArrayLike, **tolerances: Unpack[Tolerances]
) -> GramExtremesGradient:
    """Gradients with respect to X: 2 sigma mean(u v^T) for both extremes, 4 X K for |K|_F^2.

    Args:
        x: ``(*, n, p)``.
        **tolerances: as in :func:`gram_extremes`.

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
    return GramExtremesGradient(
        gram_jet(name, x, "max", **tolerances).gradient,
        gram_jet(name, x, "min", **tolerances).gradient,
        squared_frobenius_jet(name, x).gradient,
    )


def gram_extremes_hvp(
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    which: Literal["max", "min", "squared_frobenius"],
    **tolerances: Unpack[Tolerances],
) -> FloatArray:
    """Hessian of lambda_max, lambda_min or |K|_F^2 with respect to X, applied to a direction.

    Args:
        x: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        which: "max", "min" (the smallest counted eigenvalue) or "squared_frobenius".
        **tolerances: as in :func:`gram_extremes`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: the extreme is a cluster or zero, or bad arguments.

    Example:
        >>> gram_extremes_hvp([[2.0]], [[1.0]], which="squared_frobenius")
        array([[48.]])
    """
    name = "gram_extremes_hvp"
    found = (
        squared_frobenius_jet(name, x, direction)
        if which == "squared_frobenius"
        else gram_jet(name, x, which, direction, **tolerances)
    )
    assert found.product is not None
    return found.product


# Derivation.  lambda = sigma(X)^2 is twice the half square of sigma, so d lambda = 2 sigma u^T dX v
# and D(2 sigma u v^T)[E] = 2 (u^T E v) u v^T + 2 sigma D(u v^T)[E].
def gram_jet(
    function: str,
    x: npt.ArrayLike,
    which: Extreme,
    direction: npt.ArrayLike | None = None,
    **tolerances: Unpack[Tolerances],
) -> Jet:
    """An extreme eigenvalue of K as a function of X."""
    sigma = extreme_jet(function, "x", x, which, direction, gram=True, **tolerances)
    return scaled(half_square(sigma), 2.0)


# Derivation.  dK = dX^T X + X^T dX gives d|K|_F^2 = 2 tr(K dK) = 4 tr(K X^T dX), gradient
# 4 X K = 4 (X X^T) X, and D(4 X X^T X)[E] = 4 (E X^T X + X E^T X + X X^T E).
def squared_frobenius_jet(
    function: str, x: npt.ArrayLike, direction: npt.ArrayLike | None = None
) -> Jet:
    """|K|_F^2 as a function of X; |X X^T|_F^2 is the same number."""
    matrices = as_matrices(function, "x", x)
    xt = np.swapaxes(matrices, -1, -2)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        gram = matrices @ xt
        value, gradient = np.sum(gram**2, axis=(-1, -2)), 4.0 * gram @ matrices
    if direction is None:
        return jet(value, gradient)
    _, along = matrices_and_direction(function, "x", x, direction)
    et = np.swapaxes(along, -1, -2)
    product = 4.0 * (along @ (xt @ matrices) + matrices @ (et @ matrices) + gram @ along)
    return jet(value, gradient, along, product)
