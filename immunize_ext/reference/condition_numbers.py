"""Condition number and its logarithm: values, gradients, Hessian-vector products.

Conventions as in ``spectrum``: sigma_min is the smallest value that counts, unless rank="full".
"""

from __future__ import annotations

from typing import Unpack

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import FloatArray
from immunize_ext.reference._jets import Jet, difference, exponential, logarithm
from immunize_ext.reference._policy import Tolerances
from immunize_ext.reference.spectrum import extremal_singular_values, extreme_jet


def condition_number(a: npt.ArrayLike, **tolerances: Unpack[Tolerances]) -> FloatArray:
    """Condition number kappa = sigma_max / sigma_min; infinity where sigma_min is 0.

    Args:
        a: ``(*, n, p)``.
        **tolerances: rank, rank_rtol and cluster_rtol, as in
            :func:`extremal_singular_values`.

    Returns:
        ``(*,)`` float64, at least 1.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> float(condition_number([[4.0, 0.0], [0.0, 0.5]]))
        8.0
    """
    extremes = extremal_singular_values(a, **tolerances)
    return _ratio(extremes.sigma_max, extremes.sigma_min)


def condition_number_gradient(a: npt.ArrayLike, **tolerances: Unpack[Tolerances]) -> FloatArray:
    """Gradient (G_max - kappa G_min) / sigma_min; 0 where kappa is infinite.

    Args:
        a: ``(*, n, p)``.
        **tolerances: as in :func:`condition_number`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> condition_number_gradient([[4.0, 0.0], [0.0, 2.0]])
        array([[ 0.5,  0. ],
               [ 0. , -1. ]])
    """
    return _kappa("condition_number_gradient", a, **tolerances).gradient


def condition_number_hvp(
    a: npt.ArrayLike, direction: npt.ArrayLike, **tolerances: Unpack[Tolerances]
) -> FloatArray:
    """Hessian of kappa applied to a direction.

    Args:
        a: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        **tolerances: as in :func:`condition_number`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: an extreme is a cluster or zero, or bad arguments.

    Example:
        >>> condition_number_hvp([[4.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[ 0.  ,  0.  ],
               [ 0.  , -0.25]])
    """
    product = _kappa("condition_number_hvp", a, direction, **tolerances).product
    assert product is not None
    return product


def log_condition_number(a: npt.ArrayLike, **tolerances: Unpack[Tolerances]) -> FloatArray:
    """Logarithm log kappa = log sigma_max - log sigma_min; infinity where sigma_min is 0.

    Args:
        a: ``(*, n, p)``.
        **tolerances: as in :func:`condition_number`.

    Returns:
        ``(*,)`` float64.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> float(log_condition_number([[1.0, 0.0], [0.0, 1.0]]))
        0.0
    """
    return np.log(condition_number(a, **tolerances))


def log_condition_number_gradient(a: npt.ArrayLike, **tolerances: Unpack[Tolerances]) -> FloatArray:
    """Gradient G_max / sigma_max - G_min / sigma_min; 0 where kappa is infinite.

    Args:
        a: ``(*, n, p)``.
        **tolerances: as in :func:`condition_number`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`extremal_singular_values`.

    Example:
        >>> log_condition_number_gradient([[4.0, 0.0], [0.0, 2.0]])
        array([[ 0.25,  0.  ],
               [ 0.  , -0.5 ]])
    """
    return _log_kappa("log_condition_number_gradient", a, **tolerances).gradient


def log_condition_number_hvp(
    a: npt.ArrayLike, direction: npt.ArrayLike, **tolerances: Unpack[Tolerances]
) -> FloatArray:
    """Hessian of log kappa applied to a direction.

    Args:
        a: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        **tolerances: as in :func:`condition_number`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: an extreme is a cluster or zero, or bad arguments.

    Example:
        >>> log_condition_number_hvp([[4.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[-0.0625,  0.    ],
               [ 0.    ,  0.    ]])
    """
    product = _log_kappa("log_condition_number_hvp", a, direction, **tolerances).product
    assert product is not None
    return product


def _log_kappa(
    function: str,
    a: npt.ArrayLike,
    direction: npt.ArrayLike | None = None,
    **tolerances: Unpack[Tolerances],
) -> Jet:
    """The jet log sigma_max - log sigma_min; gradient 0 where sigma_min is 0."""
    top, bottom = (
        extreme_jet(function, "a", a, which, direction, **tolerances) for which in ("max", "min")
    )
    positive = bottom.value > 0
    held = [
        logarithm(part._replace(value=np.where(positive, part.value, 1.0)))
        for part in (top, bottom)
    ]
    found = difference(*held)
    return found._replace(gradient=np.where(positive[..., None, None], found.gradient, 0.0))


def _kappa(
    function: str,
    a: npt.ArrayLike,
    direction: npt.ArrayLike | None = None,
    **tolerances: Unpack[Tolerances],
) -> Jet:
    """The jet exp log kappa, with kappa as a quotient."""
    kappa = condition_number(a, **tolerances)
    finite = np.where(np.isfinite(kappa), kappa, 0.0)
    return exponential(_log_kappa(function, a, direction, **tolerances), finite)


def _ratio(sigma_max: FloatArray, sigma_min: FloatArray) -> FloatArray:
    positive = sigma_min > 0
    ratio: FloatArray = np.where(positive, sigma_max / np.where(positive, sigma_min, 1.0), np.inf)
    return ratio
