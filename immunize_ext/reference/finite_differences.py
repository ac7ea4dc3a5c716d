"""Directional central differences, with an estimate of their own error.

For a function f, a point x, a direction d and a step h,

    D(h) = (f(x + h d) - f(x - h d)) / (2 h) = f'(x) d + h^2 f'''(x)[d, d, d] / 6 + O(h^4).

Two errors compete.  Truncation is h^2 |f'''| / 6; D(2h) - D(h) = h^2 f''' / 2 + O(h^4) is three
times as large and serves as the estimate.  Rounding is at most eps |f| / h, for a function value
with relative error eps.  Their sum is least near h = (3 eps |f| / |f'''|)^(1/3), about 6e-6 for
f, f''' and x of order one.

At a kink of f the central difference converges to the mean of the two one-sided slopes.  For the
largest singular value with multiplicity two, that mean is the slope of the least-norm
subgradient; with multiplicity three or more it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import FloatArray

_EPS = float(np.finfo(np.float64).eps)
DEFAULT_RELATIVE_STEP = float(np.cbrt(_EPS))


class Difference(NamedTuple):
    """A central difference and what is known about its error; each of the shape of f."""

    value: FloatArray
    truncation: FloatArray
    rounding: FloatArray


def default_step(x: npt.ArrayLike, direction: npt.ArrayLike) -> float:
    """A step that moves the largest entry of x by about eps^(1/3) of its size.

    Args:
        x: the point.
        direction: of the same shape.

    Returns:
        eps^(1/3) max|x| / max|d|, with max|x| replaced by 1 where x is zero.

    Raises:
        ValueError: the direction is zero.

    Example:
        >>> bool(abs(default_step([2.0], [4.0]) * 2 / DEFAULT_RELATIVE_STEP - 1) < 1e-12)
        True
    """
    size = float(np.max(np.abs(np.asarray(x, dtype=np.float64)), initial=0.0))
    length = float(np.max(np.abs(np.asarray(direction, dtype=np.float64)), initial=0.0))
    if length == 0.0:
        raise ValueError(
            "default_step: direction must have a nonzero entry, got zeros; draw another direction"
        )
    return float(DEFAULT_RELATIVE_STEP * (size if size > 0 else 1.0) / length)


def directional_derivative(
    f: Callable[[FloatArray], npt.ArrayLike],
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    step: float | None = None,
) -> FloatArray:
    """(f(x + h d) - f(x - h d)) / (2 h).

    Args:
        f: function of one float64 array; scalar or array valued.
        x: the point.
        direction: the direction d, of the shape of x.
        step: h; default :func:`default_step`.

    Returns:
        float64 array of the shape of f.

    Raises:
        ValueError: a zero direction without a step, or a step that is not positive.

    Example:
        >>> float(np.round(directional_derivative(lambda x: x**3, 2.0, 1.0), 6))
        12.0
    """
    point = np.asarray(x, dtype=np.float64)
    along = np.asarray(direction, dtype=np.float64)
    h = default_step(point, along) if step is None else float(step)
    if not h > 0:
        raise ValueError(
            f"directional_derivative: step must be positive, got {step}; leave it out for a default"
        )
    forward = np.asarray(f(point + h * along), dtype=np.float64)
    backward = np.asarray(f(point - h * along), dtype=np.float64)
    difference: FloatArray = np.asarray((forward - backward) / (2.0 * h), dtype=np.float64)
    return difference


def estimate(
    f: Callable[[FloatArray], npt.ArrayLike],
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    step: float | None = None,
    value_rtol: float = 16 * _EPS,
) -> Difference:
    """A central difference together with estimates of its truncation and rounding errors.

    Args:
        f: function of one float64 array.
        x: the point.
        direction: the direction.
        step: h; default :func:`default_step`.
        value_rtol: relative error of f, including its conditioning.

    Returns:
        :class:`Difference` with truncation |D(2h) - D(h)| and rounding value_rtol max|f| / h.

    Raises:
        ValueError: as :func:`directional_derivative`.

    Example:
        >>> result = estimate(lambda x: np.sin(x), 1.0, 1.0)
        >>> bool(abs(result.value - np.cos(1.0)) <= result.truncation + result.rounding)
        True
    """
    point = np.asarray(x, dtype=np.float64)
    along = np.asarray(direction, dtype=np.float64)
    h = default_step(point, along) if step is None else float(step)
    value = directional_derivative(f, point, along, step=h)
    wide = directional_derivative(f, point, along, step=2.0 * h)
    size = np.abs(np.asarray(f(point), dtype=np.float64))
    return Difference(value, np.abs(wide - value), value_rtol * size / h)


def gradient(
    f: Callable[[FloatArray], npt.ArrayLike], x: npt.ArrayLike, *, step: float | None = None
) -> FloatArray:
    """Gradient of a scalar function, one central difference per entry of x.

    Args:
        f: scalar function of one float64 array.
        x: the point.
        step: h for every entry; default eps^(1/3) max|x|.

    Returns:
        float64 array of the shape of x.

    Raises:
        ValueError: f is not scalar.

    Example:
        >>> np.round(gradient(lambda x: float(np.sum(x**2)), [1.0, -3.0]), 6)
        array([ 2., -6.])
    """
    point = np.asarray(x, dtype=np.float64)
    result = np.empty(point.shape)
    for index in np.ndindex(*point.shape):
        along = np.zeros(point.shape)
        along[index] = 1.0
        slope = directional_derivative(f, point, along, step=step)
        if slope.size != 1:
            raise ValueError(
                f"gradient: f must be scalar, got shape {slope.shape}; "
                "sum it or use directional_derivative"
            )
        result[index] = float(slope.reshape(()))
    return result


def hessian_vector_product(
    gradient_of_f: Callable[[FloatArray], npt.ArrayLike],
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    step: float | None = None,
) -> FloatArray:
    """Hessian times direction, as the central difference of a closed-form gradient.

    Args:
        gradient_of_f: the gradient, a function of one float64 array.
        x: the point.
        direction: the direction.
        step: h; default :func:`default_step`.

    Returns:
        float64 array of the shape of x.

    Raises:
        ValueError: as :func:`directional_derivative`.

    Example:
        >>> np.round(hessian_vector_product(lambda x: x**2, [1.0, 2.0], [1.0, 1.0]), 6)
        array([2., 4.])
    """
    return directional_derivative(gradient_of_f, x, direction, step=step)
