"""Second-moment merge of a layer, by least squares, and its gradients from the optimality system.

The problem, with D_n = W_n - W0:

    minimise  tr((W - W0) G_reg (W - W0)^T) + rho |W - W0|_F^2
              + sum_n mu_n tr((W - W_n) G_n (W - W_n)^T).

Values.  With G = F^T F for a square root F by eigenvalues, every term is the squared norm of
(W - W_i) F_i^T: one least squares problem in W^T - W0^T with the stacked matrix
[F_reg; sqrt(rho) I; sqrt(mu_n) F_n] and right-hand sides [0; 0; sqrt(mu_n) F_n D_n^T].  S is not
formed, and nothing is factored by Cholesky.

Gradients.  The optimality system is M(W, .) = (W - W0)(G_reg + rho I) + sum_n mu_n (W - W_n) G_n
= 0.  For a cotangent Z the adjoint E solves E S = Z, and every gradient is that of -<E, M> with W
held:

    dW0   = E (G_reg + rho I)              dW_n = mu_n E G_n
    dG_reg = -sym(E^T (W - W0))            drho = -<E, W - W0>
    dG_n  = -mu_n sym(E^T (W - W_n))       dmu_n = -<E, (W - W_n) G_n>

(the sum of all dW is Z, as shifting every weight shifts W).

Source: RegMean (Jin et al., ICLR 2023) without base and ridge; the rest is derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import FloatArray, require_finite, symmetric_part


class MomentGradients(NamedTuple):
    """Gradients of the merge of one layer."""

    base: FloatArray
    copies: list[FloatArray]
    moments: list[FloatArray]
    regularization: FloatArray
    ridge: float
    hardness: FloatArray


def merge_moments(
    base: npt.ArrayLike,
    copies: Sequence[npt.ArrayLike],
    moments: Sequence[npt.ArrayLike],
    *,
    regularization: npt.ArrayLike | None = None,
    hardness: npt.ArrayLike = 1.0,
    ridge: float = 0.0,
) -> FloatArray:
    """Merged weights of one layer.

    Args:
        base: ``(out, d)``, W0.
        copies: per concept ``(out, d)``, W_n.
        moments: per concept ``(d, d)``, G_n, positive semidefinite.
        regularization: ``(d, d)``, G_reg; None for zero.
        hardness: scalar or ``(N,)``, mu.
        ridge: rho, absolute.

    Returns:
        ``(out, d)`` float64.

    Raises:
        ValueError: an argument is not finite, or S is singular.

    Example:
        >>> merge_moments([[0.0]], [[[2.0]], [[4.0]]], [[[1.0]], [[3.0]]]).round(12)
        array([[3.5]])
    """
    w0, stack, grams, held, mu = _arguments(base, copies, moments, regularization, hardness)
    d = w0.shape[1]
    blocks = [_root(held), np.sqrt(ridge) * np.eye(d)]
    targets = [np.zeros((d, w0.shape[0])), np.zeros((d, w0.shape[0]))]
    for weight, gram, one in zip(stack, grams, mu, strict=True):
        root = np.sqrt(one) * _root(gram)
        blocks.append(root)
        targets.append(root @ (weight - w0).T)
    solution, _, rank, _ = scipy.linalg.lstsq(np.concatenate(blocks), np.concatenate(targets))
    if rank < d:
        raise ValueError(f"merge_moments: S must have full rank, got {rank} of {d}; pass a ridge")
    return np.asarray(w0 + solution.T)


def merge_moments_gradient(
    cotangent: npt.ArrayLike,
    base: npt.ArrayLike,
    copies: Sequence[npt.ArrayLike],
    moments: Sequence[npt.ArrayLike],
    *,
    regularization: npt.ArrayLike | None = None,
    hardness: npt.ArrayLike = 1.0,
    ridge: float = 0.0,
) -> MomentGradients:
    """Gradients of ``<cotangent, W>`` for one layer.

    Args:
        cotangent: ``(out, d)``.
        base: as in :func:`merge_moments`.
        copies: as in :func:`merge_moments`.
        moments: as in :func:`merge_moments`.
        regularization: as in :func:`merge_moments`.
        hardness: as in :func:`merge_moments`.
        ridge: as in :func:`merge_moments`, absolute.

    Returns:
        The gradients; those of matrices G are symmetric.

    Raises:
        ValueError: as :func:`merge_moments`.

    Example:
        >>> found = merge_moments_gradient([[1.0]], [[0.0]], [[[2.0]]], [[[1.0]]], ridge=1.0)
        >>> [round(x, 9) for x in (found.base.item(), found.copies[0].item(), found.ridge)]
        [0.5, 0.5, -0.5]
    """
    merged = merge_moments(
        base, copies, moments, regularization=regularization, hardness=hardness, ridge=ridge
    )
    w0, stack, grams, held, mu = _arguments(base, copies, moments, regularization, hardness)
    d = w0.shape[1]
    kept = held + ridge * np.eye(d)
    s = kept + sum(one * gram for one, gram in zip(mu, grams, strict=True))
    e = scipy.linalg.solve(s, np.asarray(cotangent, dtype=np.float64).T, assume_a="sym").T
    terms = list(zip(stack, grams, mu, strict=True))
    return MomentGradients(
        base=np.asarray(e @ kept),
        copies=[np.asarray(one * e @ gram) for _, gram, one in terms],
        moments=[-one * symmetric_part(e.T @ (merged - weight)) for weight, _, one in terms],
        regularization=-symmetric_part(e.T @ (merged - w0)),
        ridge=-float(np.sum(e * (merged - w0))),
        hardness=np.array([-np.sum(e * ((merged - weight) @ gram)) for weight, gram, _ in terms]),
    )


def _arguments(
    base: npt.ArrayLike,
    copies: Sequence[npt.ArrayLike],
    moments: Sequence[npt.ArrayLike],
    regularization: npt.ArrayLike | None,
    hardness: npt.ArrayLike,
) -> tuple[FloatArray, list[FloatArray], list[FloatArray], FloatArray, FloatArray]:
    w0 = np.asarray(base, dtype=np.float64)
    d = w0.shape[1]
    stack = [np.asarray(copy, dtype=np.float64) for copy in copies]
    grams = [symmetric_part(np.asarray(gram, dtype=np.float64)) for gram in moments]
    held = np.zeros((d, d)) if regularization is None else np.asarray(regularization, dtype=float)
    named = [("base", w0), *(("copies", w) for w in stack), *(("moments", g) for g in grams)]
    for name, array in named:
        require_finite("merge_moments", name, array)
    mu = np.broadcast_to(np.asarray(hardness, dtype=np.float64), (len(grams),))
    return w0, stack, grams, symmetric_part(held), np.array(mu)


def _root(gram: FloatArray) -> FloatArray:
    """F with F^T F = gram."""
    values, vectors = scipy.linalg.eigh(gram)
    return np.asarray(np.sqrt(np.clip(values, 0.0, None))[:, None] * vectors.T)
