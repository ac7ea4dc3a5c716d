"""Preconditioned gradient: right multiplication by K^-1, K = X^T X + ridge I, by two routes.

Derivation.  With features X (n x p), K acts on the input side.  A linear map is stored as
W (out, p) with y = W x, so a step in the metric of K is  W -= eta G K^-1: every row of G is solved
with K.  With the thin decomposition X = U diag(sigma) V^T,

    K^-1 = V diag(1 / (sigma^2 + ridge)) V^T + (I - V V^T) / ridge,

the second part only where n < p (rank below p), which needs ridge > 0.  It is what
the Woodbury identity gives on the n x n side, (I - X^T (X X^T + ridge I)^-1 X) / ridge.

The other route never forms K either: K = F^T F with the triangular factor F of a QR of
[X; sqrt(ridge) I], and K^-1 G^T by two triangular solves.

The map G -> G K^-1 is linear and self-adjoint: <G K^-1, H> = <G, H K^-1>.  It is its own gradient.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import EPS, FloatArray, as_matrices, require_finite
from immunize_ext.reference._merge_problem import absolute_ridge
from immunize_ext.reference._policy import numerical_rank


def preconditioned_gradient(
    grad: npt.ArrayLike, x: npt.ArrayLike, *, ridge: float = 0.0, relative: bool = True
) -> FloatArray:
    """G K^-1 from the singular value decomposition of X.

    Args:
        grad: ``(*, out, p)``.
        x: ``(*, n, p)`` features, or ``(n, p)`` shared by the batch.
        ridge: added to the diagonal of K.
        relative: whether ridge counts in units of the mean diagonal of X^T X.

    Returns:
        ``(*, out, p)`` float64.

    Raises:
        ValueError: K is singular, shapes do not fit, or an argument is not finite.

    Note:
        Deterministic.  Linear in ``grad`` and its own adjoint.

    Example:
        >>> preconditioned_gradient([[4.0, 4.0]], [[2.0, 0.0], [0.0, 1.0]])
        array([[1., 4.]])
    """
    gradient, features = _arguments("preconditioned_gradient", grad, x)
    rows = []
    for g, matrix in zip(gradient.reshape(-1, *gradient.shape[-2:]), features, strict=True):
        mu = absolute_ridge(matrix, ridge, relative=relative)
        _, sigma, vt = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
        _require_definite("preconditioned_gradient", sigma, matrix.shape, mu)
        inside = g @ vt.T
        solved = (inside / (sigma**2 + mu)) @ vt
        if matrix.shape[0] < matrix.shape[1]:
            solved = solved + (g - inside @ vt) / mu
        rows.append(solved)
    return _restored(rows, gradient.shape)


def preconditioned_gradient_by_qr(
    grad: npt.ArrayLike, x: npt.ArrayLike, *, ridge: float = 0.0, relative: bool = True
) -> FloatArray:
    """G K^-1 from a triangular factor of [X; sqrt(ridge) I].

    Args:
        grad: as in :func:`preconditioned_gradient`.
        x: as in :func:`preconditioned_gradient`.
        ridge: as in :func:`preconditioned_gradient`.
        relative: as in :func:`preconditioned_gradient`.

    Returns:
        ``(*, out, p)`` float64.

    Raises:
        ValueError: as :func:`preconditioned_gradient`.

    Example:
        >>> preconditioned_gradient_by_qr([[4.0, 4.0]], [[2.0, 0.0], [0.0, 1.0]])
        array([[1., 4.]])
    """
    gradient, features = _arguments("preconditioned_gradient_by_qr", grad, x)
    rows = []
    for g, matrix in zip(gradient.reshape(-1, *gradient.shape[-2:]), features, strict=True):
        mu = absolute_ridge(matrix, ridge, relative=relative)
        p = matrix.shape[1]
        stacked = np.concatenate([matrix, np.sqrt(mu) * np.eye(p)], axis=0)
        root = scipy.linalg.qr(stacked, mode="r")[0][:p]
        _require_definite(
            "preconditioned_gradient_by_qr", scipy.linalg.svdvals(matrix), matrix.shape, mu
        )
        half = scipy.linalg.solve_triangular(root, g.T, trans="T")
        rows.append(np.asarray(scipy.linalg.solve_triangular(root, half)).T)
    return _restored(rows, gradient.shape)


def _arguments(
    function: str, grad: npt.ArrayLike, x: npt.ArrayLike
) -> tuple[FloatArray, list[FloatArray]]:
    features = as_matrices(function, "x", x)
    gradient = np.asarray(grad, dtype=np.float64)
    require_finite(function, "grad", gradient)
    if gradient.ndim < 2 or gradient.shape[-1] != features.shape[-1]:
        raise ValueError(
            f"{function}: grad must have shape (*, out, {features.shape[-1]}) to fit x "
            f"{features.shape}, got {gradient.shape}; K acts on the input side"
        )
    lead = gradient.shape[:-2]
    full = np.broadcast_to(features, (*lead, *features.shape[-2:]))
    return gradient, [np.array(full[index]) for index in np.ndindex(*lead)]


def _require_definite(
    function: str, sigma: FloatArray, shape: tuple[int, ...], ridge: float
) -> None:
    n, p = shape
    smallest = float(sigma[-1]) ** 2 if n >= p else 0.0
    largest = float(sigma[0]) ** 2
    if smallest + ridge <= (max(n, p) * EPS) ** 2 * (largest + ridge):
        rank = numerical_rank(sigma, shape)
        raise ValueError(
            f"{function}: K = x^T x + ridge I must be positive definite, got rank {rank} of {p} "
            f"with ridge {ridge:g}; pass ridge > 0"
        )


def _restored(rows: list[FloatArray], shape: tuple[int, ...]) -> FloatArray:
    if not rows:
        return np.empty(shape)
    return np.stack(rows).reshape(shape)
