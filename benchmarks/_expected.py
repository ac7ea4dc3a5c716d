"""Right values to check contenders against, in numpy and float64; shares no code with them.

Written out from the formulas, for well-separated spectra and consistent targets only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Expected(NamedTuple):
    """Values and gradients of a row."""

    values: list[Array]
    gradients: list[Array]


def as_float64(tensor: Tensor) -> Array:
    """A detached copy in numpy."""
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)


def relative_error(got: Sequence[Tensor], expected: Sequence[Array]) -> float:
    """Largest of |got_i - expected_i|_F / |expected_i|_F; infinite where shapes differ."""
    if len(got) != len(expected):
        raise ValueError(f"relative_error: got {len(got)} tensors, expected {len(expected)}")
    worst = 0.0
    for tensor, array in zip(got, expected, strict=True):
        found = as_float64(tensor)
        if found.shape != array.shape:
            return float("inf")
        distance = np.linalg.norm((found - array).ravel())
        scale = np.linalg.norm(array.ravel())
        error = float(distance / scale) if scale > 0 else float(distance)
        if not np.isfinite(error):
            return float("inf")
        worst = max(worst, error)
    return worst


# K = x^T x, x = U diag(s) V^T: lambda_i = s_i^2, |K|_F^2 = sum s_i^4,
# d lambda_i / dx = 2 s_i u_i v_i^T,  d|K|_F^2 / dx = 4 U diag(s^3) V^T.


def gram_r_well(x: Array) -> Expected:
    """R_well(K) = lambda_1^2/2 - |K|_F^2/(2p) of x (n, p) and its gradient."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    p = x.shape[1]
    value = s[0] ** 4 / 2 - (s**4).sum() / (2 * p)
    gradient = 2 * s[0] ** 3 * np.outer(u[:, 0], vt[0]) - 2 / p * (u * s**3) @ vt
    return Expected([np.asarray(value)], [gradient])


def gram_r_ill(
    x: Array, *, rank: int | None = None, width: int | None = None, floor_smallest: bool = False
) -> Expected:
    """R_ill(K) = 1/D, D = |K|_F^2/(2k) - lambda_k^2/2, of x (n, p) of rank k.

    Args:
        x: Features.
        rank: min(n, p) when omitted.
        width: Used in place of the k that divides, as published code does.
        floor_smallest: Take lambda_k = 0: published code finds about 1e-6 where K is singular.
    """
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    last = (rank or min(x.shape)) - 1
    k = width or last + 1
    smallest = 0.0 if floor_smallest else s[last]
    d = (s**4).sum() / (2 * k) - smallest**4 / 2
    slope = 2 / k * (u * s**3) @ vt - 2 * smallest**3 * np.outer(u[:, last], vt[last])
    return Expected([np.asarray(1 / d)], [-slope / d**2])


def stacked(items: Sequence[Expected]) -> Expected:
    """The same for a batch: value and gradient of each, stacked."""
    return Expected(
        [np.stack([item.values[0] for item in items])],
        [np.stack([item.gradients[0] for item in items])],
    )


def log_condition_number(eigenvalues: Array, vectors: Array) -> Expected:
    """Log kappa of h = V diag(eigenvalues) V^T, eigenvalues ascending and positive."""
    top, bottom = vectors[:, -1], vectors[:, 0]
    value = np.log(eigenvalues[-1]) - np.log(eigenvalues[0])
    gradient = np.outer(top, top) / eigenvalues[-1] - np.outer(bottom, bottom) / eigenvalues[0]
    return Expected([np.asarray(value)], [gradient])


def log_condition_numbers(x: Array) -> Expected:
    """Log kappa of each of x (*, n, p) from its singular values, and its gradient."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    top, bottom = s[..., 0, None, None], s[..., -1, None, None]
    gradient = u[..., :, :1] * vt[..., :1, :] / top - u[..., :, -1:] * vt[..., -1:, :] / bottom
    return Expected([np.asarray(np.log(s[..., 0]) - np.log(s[..., -1]))], [gradient])


def r_well(x: Array) -> Expected:
    """R_well(S) = sigma_1^2/2 - |S|_F^2/(2 min(n, p)) of S = x (n, p) itself."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    p = min(x.shape)
    value = s[0] ** 2 / 2 - (s**2).sum() / (2 * p)
    return Expected([np.asarray(value)], [s[0] * np.outer(u[:, 0], vt[0]) - x / p])


def spread(h: Array) -> Expected:
    """lambda_max - lambda_min of a symmetric h (p, p)."""
    eigenvalues, vectors = np.linalg.eigh(h)
    top, bottom = vectors[:, -1], vectors[:, 0]
    gradient = np.outer(top, top) - np.outer(bottom, bottom)
    return Expected([np.asarray(eigenvalues[-1] - eigenvalues[0])], [gradient])


class Merge(NamedTuple):
    """The merge and the gradients of sum_l <G_l, W_l>."""

    merged: list[Array]  # L x (out_l, d)
    grad_base: list[Array]  # L x (out_l, d)
    grad_concepts: list[list[Array]]  # N x L x (out_l, d)
    grad_embeddings: list[Array]  # N x (s_n, d)
    grad_c_reg: Array  # (m, d)


def merge(
    base: Sequence[Array],
    concepts: Sequence[Sequence[Array]],
    embeddings: Sequence[Array],
    c_reg: Array,
    grads: Sequence[Array],  # G_l (out_l, d)
) -> Merge:
    """The closed form of the merge with hard constraints and no ridge, and its gradients.

    With Z = Q^-1 (symmetric), A = Z C^T, T = C A, B = T^-1 A^T and R_l = [(W_n - W0) C_n^T]:
    dB = sum R^T G, and from B = T^-1 C Z with P = T^-1 dB, S = P B^T:
    dC += P Z (through the C of A^T), dT = -S, so that dC += -(S + S^T) A^T;
    dZ = C^T P - C^T S C, and from Z = Q^-1 with Q = C_reg^T C_reg:
    dQ = -Z dZ Z, dC_reg = C_reg (dQ + dQ^T).
    """
    c = np.concatenate(list(embeddings))
    ends = np.cumsum([rows.shape[0] for rows in embeddings])
    slices = [slice(end - rows.shape[0], end) for end, rows in zip(ends, embeddings, strict=True)]
    z = np.linalg.inv(c_reg.T @ c_reg)
    z = (z + z.T) / 2
    a = z @ c.T
    t = c @ a
    b = np.linalg.solve(t, a.T)
    merged, grad_base = [], []
    grad_concepts: list[list[Array]] = [[] for _ in concepts]
    grad_c = np.zeros_like(c)
    grad_b = np.zeros_like(b)
    for layer, (weight, grad) in enumerate(zip(base, grads, strict=True)):
        moved = [weights[layer] - weight for weights in concepts]
        residual = np.concatenate(
            [delta @ rows.T for delta, rows in zip(moved, embeddings, strict=True)], axis=1
        )
        merged.append(weight + residual @ b)
        grad_residual = grad @ b.T
        grad_base.append(grad - grad_residual @ c)
        for concept, part in enumerate(slices):
            grad_concepts[concept].append(grad_residual[:, part] @ c[part])
            grad_c[part] += grad_residual[:, part].T @ moved[concept]
        grad_b += residual.T @ grad
    p = np.linalg.solve(t, grad_b)
    s = p @ b.T
    grad_c += p @ z - (s + s.T) @ a.T
    grad_z = c.T @ p - c.T @ s @ c
    grad_q = -z @ grad_z @ z
    return Merge(
        merged,
        grad_base,
        grad_concepts,
        [grad_c[part] for part in slices],
        c_reg @ (grad_q + grad_q.T),
    )
