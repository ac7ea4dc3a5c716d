"""A function of matrices at a point: value, gradient and one product with its Hessian.

The rules of calculus stand here once; ``spectrum`` and ``gram`` give the extremes as jets,
``condition_numbers`` and ``regularizers`` compose them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from immunize_ext.reference._arrays import FloatArray, per_matrix


class Jet(NamedTuple):
    """Value ``(*,)`` and gradient ``(*, n, p)``; along a direction E also H E and <gradient, E>."""

    value: FloatArray
    gradient: FloatArray
    product: FloatArray | None = None
    slope: FloatArray | None = None


def jet(
    value: FloatArray,
    gradient: FloatArray,
    direction: FloatArray | None = None,
    product: FloatArray | None = None,
) -> Jet:
    """A jet with its slope along the direction."""
    if direction is None or product is None:
        return Jet(value, gradient)
    return Jet(value, gradient, product, np.sum(gradient * direction, axis=(-1, -2)))


def scaled(f: Jet, factor: FloatArray | float) -> Jet:
    """Factor times f, the factor a number or ``(*,)``."""
    wide = per_matrix(np.asarray(factor, dtype=np.float64))
    return Jet(
        f.value * factor,
        f.gradient * wide,
        None if f.product is None else f.product * wide,
        None if f.slope is None else f.slope * factor,
    )


def divided(f: Jet, by: FloatArray | float) -> Jet:
    """Quotient of f and a number or ``(*,)``, rounded once."""
    wide = per_matrix(np.asarray(by, dtype=np.float64))
    return Jet(
        f.value / by,
        f.gradient / wide,
        None if f.product is None else f.product / wide,
        None if f.slope is None else f.slope / by,
    )


def difference(f: Jet, g: Jet) -> Jet:
    """Difference f - g."""
    return Jet(
        f.value - g.value,
        f.gradient - g.gradient,
        None if f.product is None or g.product is None else f.product - g.product,
        None if f.slope is None or g.slope is None else f.slope - g.slope,
    )


def half_square(f: Jet) -> Jet:
    """f^2 / 2: gradient f grad f, product <grad f, E> grad f + f H E."""
    wide = per_matrix(f.value)
    with np.errstate(over="ignore", under="ignore"):
        value: FloatArray = f.value**2 / 2
        gradient: FloatArray = wide * f.gradient
    if f.product is None or f.slope is None:
        return Jet(value, gradient)
    product = per_matrix(f.slope) * f.gradient + wide * f.product
    return Jet(value, gradient, product, f.value * f.slope)


def reciprocal(f: Jet) -> Jet:
    """1 / f: gradient -grad f / f^2, product 2 <grad f, E> grad f / f^3 - H E / f^2."""
    square = per_matrix(f.value) ** 2
    value, gradient = 1.0 / f.value, -f.gradient / square
    if f.product is None or f.slope is None:
        return Jet(value, gradient)
    product = per_matrix(2.0 * f.slope / f.value**3) * f.gradient - f.product / square
    return Jet(value, gradient, product, -f.slope / f.value**2)


def logarithm(f: Jet) -> Jet:
    """Log f: gradient grad f / f, product (H E - <grad f, E> grad f / f) / f.

    The second factor is divided twice, since f^2 underflows at 1e-160.
    """
    wide = per_matrix(f.value)
    value, gradient = np.log(f.value), f.gradient / wide
    if f.product is None or f.slope is None:
        return Jet(value, gradient)
    relative = f.slope / f.value
    return Jet(value, gradient, (f.product - per_matrix(relative) * f.gradient) / wide, relative)


def exponential(f: Jet, value: FloatArray) -> Jet:
    """Exp f = ``value``: gradient value grad f, product value (<grad f, E> grad f + H E)."""
    wide = per_matrix(value)
    if f.product is None or f.slope is None:
        return Jet(value, wide * f.gradient)
    product = wide * (per_matrix(f.slope) * f.gradient + f.product)
    return Jet(value, wide * f.gradient, product, value * f.slope)
