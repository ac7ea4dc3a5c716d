"""Changes of one layer that a task does not see or pays a known price for, by other routes.

The operators use projectors, singular vectors and two triangular solves.  Here stand

* G N N^T with N an orthonormal basis of the null space of V^T, instead of G - (G V) V^T;
* Delta (Delta^T Delta)^(-1/2) c on the eigenspaces whose root exceeds c, instead of clipped
  singular values;
* one system with the full Kronecker product: vec(B Delta A) = (B (x) A) vec(Delta), rows first;
* an explicit inverse for each head.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import FloatArray, as_matrices


def project_out(gradient: npt.ArrayLike, basis: npt.ArrayLike) -> FloatArray:
    """The part of rows that is orthogonal to some columns.

    Args:
        gradient: ``(*, o, d)``.
        basis: ``(d, r)``, independent columns.

    Returns:
        ``(*, o, d)`` float64.

    Note:
        Deterministic.  Linear and its own adjoint in ``gradient``.

    Example:
        >>> project_out([[3.0, 4.0]], [[1.0], [0.0]])
        array([[0., 4.]])
    """
    g, v = as_matrices("project_out", "gradient", gradient), np.asarray(basis, dtype=np.float64)
    free = scipy.linalg.null_space(v.T) if v.shape[1] else np.eye(len(v))
    return np.asarray((g @ free) @ free.T)


def clip_spectral_norm(change: npt.ArrayLike, limit: float) -> FloatArray:
    """The nearest matrix with singular values of at most a limit.

    Args:
        change: ``(*, o, d)``.
        limit: not negative.

    Returns:
        ``(*, o, d)`` float64.

    Note:
        Deterministic.  Right to sqrt(eps) of the largest singular value only.

    Example:
        >>> clip_spectral_norm([[3.0, 0.0], [0.0, 1.0]], 2.0)
        array([[2., 0.],
               [0., 1.]])
    """
    delta = as_matrices("clip_spectral_norm", "change", change)
    values, vectors = np.linalg.eigh(np.swapaxes(delta, -1, -2) @ delta)
    sigma = np.sqrt(np.maximum(values, 0.0))
    factor = np.where(sigma > limit, limit / np.where(sigma > limit, sigma, 1.0), 1.0)
    scaled = (vectors * factor[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    return np.asarray(delta @ scaled)


def gauss_newton_step(
    gradient: npt.ArrayLike, inputs: npt.ArrayLike, outputs: npt.ArrayLike, budget: float
) -> tuple[FloatArray, float]:
    """The minimiser of <g, Delta> on <Delta, B Delta A> = budget, and how far it lowers it.

    Args:
        gradient: ``(o, d)``, not zero.
        inputs: A ``(d, d)``, symmetric positive definite.
        outputs: B ``(o, o)``, alike.
        budget: positive.

    Returns:
        Delta ``(o, d)`` and -<g, Delta>.

    Note:
        Deterministic.  O((o d)^3): for small matrices.

    Example:
        >>> change, worth = gauss_newton_step([[2.0, 2.0]], np.diag([1.0, 4.0]), [[1.0]], 5.0)
        >>> change, worth
        (array([[-2. , -0.5]]), 5.0)
    """
    g = as_matrices("gauss_newton_step", "gradient", gradient)
    whole = np.kron(np.asarray(outputs, dtype=np.float64), np.asarray(inputs, dtype=np.float64))
    natural = scipy.linalg.solve(whole, g.reshape(-1), assume_a="pos")
    worth = float(np.sqrt(budget * (g.reshape(-1) @ natural)))
    return -(budget / worth) * natural.reshape(g.shape), worth


def attention_gauge(
    matrices: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
    keys: npt.ArrayLike,
    values: npt.ArrayLike,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """W_Q, W_K, W_V, W_O after a change of basis in each head.

    Args:
        matrices: The four, as layers store them; each head has its own key and value.
        keys: R ``(heads, c, c)``.
        values: S ``(heads, e, e)``.

    Returns:
        R W_Q, R^-T W_K, S W_V and W_O S^-1, head by head.

    Note:
        Deterministic.

    Example:
        >>> eye = np.eye(1)
        >>> [float(m[0, 0]) for m in attention_gauge((eye,) * 4, [[[2.0]]], [[[4.0]]])]
        [2.0, 0.5, 4.0, 0.25]
    """
    r, s = np.asarray(keys, dtype=np.float64), np.asarray(values, dtype=np.float64)
    whole_r, whole_s = scipy.linalg.block_diag(*r), scipy.linalg.block_diag(*s)
    q, k, v, o = (np.asarray(one, dtype=np.float64) for one in matrices)
    inverse_r, inverse_s = np.linalg.inv(whole_r), np.linalg.inv(whole_s)
    return whole_r @ q, inverse_r.T @ k, whole_s @ v, o @ inverse_s
