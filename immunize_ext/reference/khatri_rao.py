"""The kernel of per-sample gradients from the definition: every gradient as a vector, and products.

J_i = sum_t g_it a_it^T, flat, beside sum_t g_it for a bias; K_ij = J_i . J_j.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import FloatArray, as_matrices, require_shape


class KhatriRaoGradient(NamedTuple):
    """In the activations ``(*, n, t, d)`` and in the output gradients ``(*, n, t, o)``."""

    activations: FloatArray
    gradients: FloatArray


def khatri_rao_gram(
    activations: npt.ArrayLike, gradients: npt.ArrayLike, bias: bool = False
) -> FloatArray:
    """K of one layer.

    Args:
        activations: ``(*, n, t, d)``.
        gradients: ``(*, n, t, o)``.
        bias: Whether gradients in a bias count.

    Returns:
        K, ``(*, n, n)``.

    Raises:
        ValueError: shapes do not fit, or a number is not finite.

    Example:
        >>> khatri_rao_gram([[[1.0, 2.0]], [[0.0, 1.0]]], [[[1.0]], [[3.0]]], bias=True)
        array([[ 6.,  9.],
               [ 9., 18.]])
    """
    a, g = _arguments("khatri_rao_gram", activations, gradients, bias)
    j = np.einsum("...ntd,...nto->...ndo", a, g, optimize=True)
    k: FloatArray = np.einsum("...ido,...jdo->...ij", j, j, optimize=True)
    return k


def khatri_rao_gram_gradient(
    activations: npt.ArrayLike,
    gradients: npt.ArrayLike,
    weights: npt.ArrayLike,
    bias: bool = False,
) -> KhatriRaoGradient:
    """Gradients of sum weights_ij K_ij.

    Args:
        activations: ``(*, n, t, d)``.
        gradients: ``(*, n, t, o)``.
        weights: ``(*, n, n)``, of any symmetry.
        bias: Whether gradients in a bias count.

    Returns:
        :class:`KhatriRaoGradient`.

    Raises:
        ValueError: as :func:`khatri_rao_gram`.

    Example:
        >>> khatri_rao_gram_gradient([[[1.0, 2.0]]], [[[3.0]]], [[1.0]]).gradients
        array([[[30.]]])
    """
    name = "khatri_rao_gram_gradient"
    a, g = _arguments(name, activations, gradients, bias)
    w = np.asarray(weights, dtype=np.float64)
    require_shape(name, "weights", w, (*a.shape[:-2], a.shape[-3]))
    j = np.einsum("...ntd,...nto->...ndo", a, g, optimize=True)
    dj = np.einsum("...ij,...jdo->...ido", w + np.swapaxes(w, -1, -2), j, optimize=True)
    of_a = np.einsum("...ndo,...nto->...ntd", dj, g, optimize=True)
    of_g = np.einsum("...ndo,...ntd->...nto", dj, a, optimize=True)
    return KhatriRaoGradient(of_a[..., : np.shape(activations)[-1]], of_g)


def _arguments(
    function: str, activations: npt.ArrayLike, gradients: npt.ArrayLike, bias: bool
) -> tuple[FloatArray, FloatArray]:
    a = as_matrices(function, "activations", activations)
    g = as_matrices(function, "gradients", gradients)
    require_shape(function, "gradients", g, (*a.shape[:-1], g.shape[-1]))
    if bias:
        a = np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)
    return a, g
