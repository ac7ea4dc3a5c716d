"""What the operators are compared with, each written from its description.

- ``published_*``: A, the procedures of the published systems, costs included: the p x p Gram matrix
  whatever the number of samples, its full spectrum in float64 with autograd, a factorisation per
  layer.
- ``bare_*``: what a careful user would write in a few lines of torch, without the argument checks,
  the scaling and the clusters of ``immunize_ext.ops.fallback`` (which is B).
- ``*_floor``: matrix products and memory traffic that no implementation avoids.
- ``lobpcg_extremes`` and so on: what else one might reach for.

Symbols: x (*, n, p) features; K = x^T x; h (p, p) a symmetric Hessian; for the merge see
``immunize_ext.ops.merge``: L layers W_l (out_l, d), N concepts, C (s, d), C_reg (m, d).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import eigsh, svds
from torch import Tensor

PUBLISHED_RIDGE = 1e-6
"""Added to K, and at the same time the threshold above which an eigenvalue counts."""

Method = Literal["eigvalsh", "svd"]


# --- spectrum ---------------------------------------------------------------------------------


class GramValues(NamedTuple):
    """What R_well and R_ill of K are made of; every field has the batch shape ``(*,)``."""

    lambda_max: Tensor
    lambda_min: Tensor
    squared_frobenius: Tensor
    rank: Tensor


def published_extremes(symmetric: Tensor, method: Method = "eigvalsh") -> tuple[Tensor, Tensor]:
    """Largest and smallest eigenvalue of one matrix as the published code finds them.

    The whole spectrum of S + 1e-6 I in float64 under autograd; the smallest is the smallest above
    1e-6. For a singular S that is rounding noise near 1e-6, not the smallest non-zero eigenvalue.

    Args:
        symmetric: S (p, p).
        method: ``"svd"`` takes singular values in place of eigenvalues.
    """
    shifted = symmetric.to(torch.float64)
    shifted = shifted + PUBLISHED_RIDGE * torch.eye(
        shifted.shape[-1], dtype=shifted.dtype, device=shifted.device
    )
    solver = torch.linalg.eigvalsh if method == "eigvalsh" else torch.linalg.svdvals
    spectrum = solver(shifted)
    kept = spectrum[spectrum > PUBLISHED_RIDGE]
    return kept.max(), kept.min()


def _one_by_one(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of one matrix to each matrix of a batch, as the published loops do."""
    if x.dim() == 2:
        return function(x)
    flat = x.reshape(-1, *x.shape[-2:])
    return torch.stack([function(matrix) for matrix in flat]).reshape(x.shape[:-2])


def published_r_well(x: Tensor, *, width: int | None = None, method: Method = "eigvalsh") -> Tensor:
    """R_well of K = x^T x the published way, one matrix at a time. ``width`` is p by default."""

    def one(features: Tensor) -> Tensor:
        k = features.mT @ features
        largest, _ = published_extremes(k, method)
        return largest.square() / 2 - k.square().sum() / (2 * (width or features.shape[-1]))

    return _one_by_one(one, x)


def published_r_ill(x: Tensor, *, width: int | None = None, method: Method = "eigvalsh") -> Tensor:
    """R_ill of K = x^T x the published way: normalised by p, not by the rank."""

    def one(features: Tensor) -> Tensor:
        k = features.mT @ features
        _, smallest = published_extremes(k, method)
        denominator = k.square().sum() / (2 * (width or features.shape[-1]))
        return 1 / (denominator - smallest.square() / 2)

    return _one_by_one(one, x)


def published_log_condition_number(h: Tensor, method: Method = "eigvalsh") -> Tensor:
    """Log kappa of one Hessian h (p, p) the published way."""
    largest, smallest = published_extremes(h, method)
    return largest.log() - smallest.log()


def bare_gram_values(x: Tensor) -> GramValues:
    """Extremes of K = x^T x by ``eigh`` of the thin Gram matrix; no checks, no clusters."""
    n, p = x.shape[-2:]
    thin = x @ x.mT if n <= p else x.mT @ x
    spectrum = torch.linalg.eigvalsh(thin)
    threshold = (max(n, p) * torch.finfo(x.dtype).eps) ** 2 * spectrum[..., -1:]
    rank = (spectrum > threshold).sum(-1)
    smallest = spectrum.gather(-1, (spectrum.shape[-1] - rank).unsqueeze(-1)).squeeze(-1)
    return GramValues(spectrum[..., -1], smallest, thin.square().sum(dim=(-2, -1)), rank)


def svd_gram_values(x: Tensor) -> GramValues:
    """Extremes of K = x^T x from ``torch.linalg.svdvals`` of x under autograd."""
    sigma = torch.linalg.svdvals(x)
    threshold = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * sigma[..., :1]
    rank = (sigma > threshold).sum(-1)
    smallest = sigma.gather(-1, (rank - 1).unsqueeze(-1)).squeeze(-1)
    return GramValues(
        sigma[..., 0].square(), smallest.square(), sigma.square().square().sum(-1), rank
    )


def r_well_of(values: GramValues, width: int) -> Tensor:
    """R_well(K) = lambda_max^2/2 - |K|_F^2/(2p)."""
    return values.lambda_max.square() / 2 - values.squared_frobenius / (2 * width)


def r_ill_of(values: GramValues) -> Tensor:
    """R_ill(K) = 1/(|K|_F^2/(2k) - lambda_min^2/2), k = rank."""
    return 1 / (values.squared_frobenius / (2 * values.rank) - values.lambda_min.square() / 2)


def gram_floor(x: Tensor) -> Tensor:
    """The thin Gram matrix of x: one product that every route has to form."""
    return x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x


def gram_floor_backward(x: Tensor, thin: Tensor) -> Tensor:
    """The gradient product (thin Gram) x or x (thin Gram): d|K|_F^2/dx up to a factor."""
    return thin @ x if x.shape[-2] <= x.shape[-1] else x @ thin


HESSIAN_FLOOR_PRODUCTS = 8


def hessian_floor(h: Tensor) -> tuple[Tensor, Tensor]:
    """One Cholesky factorisation, eight products with h and eight solves with the factor."""
    factor = torch.linalg.cholesky(h)
    top = bottom = torch.ones(h.shape[-1], 1, dtype=h.dtype, device=h.device)
    for _ in range(HESSIAN_FLOOR_PRODUCTS):
        top = h @ top
        top = top / top.norm()
        bottom = torch.cholesky_solve(bottom, factor)
        bottom = bottom / bottom.norm()
    return top, bottom


def hessian_floor_backward(top: Tensor, bottom: Tensor) -> Tensor:
    """The gradient of two extremes: a matrix of rank two, written once."""
    vectors = torch.cat([top, bottom], dim=1)
    return vectors @ vectors.mT


def lobpcg_extremes(h: Tensor, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Largest and smallest eigenvalue of h (p, p) by ``torch.lobpcg``, from a fixed start."""
    start = torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype, device=h.device).cos().unsqueeze(1)
    largest, _ = torch.lobpcg(h, X=start, niter=iterations, largest=True)
    smallest, _ = torch.lobpcg(h, X=start, niter=iterations, largest=False)
    return largest[0], smallest[0]


def eigsh_extremes(h: np.ndarray) -> tuple[float, float]:
    """Largest and smallest eigenvalue of h (p, p) by ARPACK, the smallest by shift-invert at 0."""
    start = np.cos(np.linspace(-1, 1, h.shape[0]))
    largest = eigsh(h, k=1, which="LA", v0=start, return_eigenvectors=False)
    smallest = eigsh(h, k=1, sigma=0.0, which="LM", v0=start, return_eigenvectors=False)
    return float(largest[0]), float(smallest[0])


def svds_extremes(x: np.ndarray) -> tuple[float, float]:
    """Largest and smallest singular value of x (n, p) by ARPACK."""
    start = np.cos(np.linspace(-1, 1, min(x.shape)))
    largest = svds(x, k=1, which="LM", v0=start, return_singular_vectors=False)
    smallest = svds(x, k=1, which="SM", v0=start, return_singular_vectors=False)
    return float(largest[0]), float(smallest[0])


# --- merge ------------------------------------------------------------------------------------


def published_merge(
    base: Sequence[Tensor],  # L x (out_l, d)
    concepts: Sequence[Sequence[Tensor]],  # N x L x (out_l, d)
    embeddings: Sequence[Tensor],  # N x (s_n, d)
    c_reg: Tensor,  # (m, d)
) -> list[Tensor]:
    """W_l = W0_l + (V_l - W0_l C^T)(D C^T)^-1 D, D = C Q^-1, the published way.

    Every layer forms Q = C_reg^T C_reg again, factorises it by LU, solves for all rows of C, and
    inverts D C^T, all in the dtype of the weights and under autograd. (The published code solves
    row by row; one solve for all rows is kinder to it.)
    """
    c = torch.cat(list(embeddings))
    merged = []
    for layer, weight in enumerate(base):
        lu, pivots = torch.linalg.lu_factor(c_reg.mT @ c_reg)
        d = torch.linalg.lu_solve(lu, pivots, c.mT).mT
        v = torch.cat(
            [weights[layer] @ rows.mT for weights, rows in zip(concepts, embeddings, strict=True)],
            dim=1,
        )
        merged.append(weight + (v - weight @ c.mT) @ torch.linalg.inv(d @ c.mT) @ d)
    return merged


def bare_factor(c_reg: Tensor) -> Tensor:
    """Cholesky factor of Q = C_reg^T C_reg in the dtype of C_reg."""
    return torch.linalg.cholesky(c_reg.mT @ c_reg)


def bare_merge(
    base: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]],
    embeddings: Sequence[Tensor],
    factor: Tensor,  # (d, d), lower
) -> list[Tensor]:
    """The merge with one factor for all layers, in the dtype of the factor and of the weights.

    A = Q^-1 C^T, T = C A, B = T^-1 A^T once; then R_l = [(W_n - W0) C_n^T] and W_l = W0 + R_l B.
    """
    c = torch.cat(list(embeddings)).to(factor.dtype)
    a = torch.cholesky_solve(c.mT, factor)
    b = torch.cholesky_solve(a.mT, torch.linalg.cholesky(c @ a))
    b = b.to(base[0].dtype)
    merged = []
    for layer, weight in enumerate(base):
        residual = torch.cat(
            [
                (weights[layer] - weight) @ rows.mT
                for weights, rows in zip(concepts, embeddings, strict=True)
            ],
            dim=1,
        )
        merged.append(torch.addmm(weight, residual, b))
    return merged
