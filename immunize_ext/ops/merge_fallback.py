"""The raw operators of the key/value merge in ``torch`` alone.

For devices and installations without a kernel, and the baseline that the kernels have to beat: one
float64 factorisation for all layers. The dispatcher calls these with plain tensors, below autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from immunize_ext.ops.arguments import require_finite


def merge_gram(c_reg: Tensor) -> Tensor:
    """Q without ridge: c_reg^T c_reg (d, d) in float64, symmetric to the bit."""
    wide = c_reg.to(torch.float64)
    lower = (wide.mT @ wide).tril()
    return lower + lower.tril(-1).mT


def _pivoted_cholesky(t: Tensor, rank_rtol: float) -> tuple[list[int], Tensor]:
    """Rows of t (s, s) that are kept, and H (s, r) with t = H H^T up to what was dropped.

    Pivots are those of t scaled to unit diagonal: the squared sine of the angle between a row and
    the span of the rows already kept.
    """
    s = t.shape[-1]
    diagonal = t.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    scaled = t / torch.outer(scale, scale)
    pivots = torch.where(diagonal > 0, 1.0, 0.0).to(t.dtype)
    columns: list[Tensor] = []
    kept: list[int] = []
    for _ in range(s):
        best = int(pivots.argmax())
        pivot = float(pivots[best])
        if not pivot > rank_rtol:
            break
        column = scaled[:, best].clone()
        for previous in columns:
            column -= previous * previous[best]
        column = column / pivot**0.5
        column[kept] = 0.0
        pivots = (pivots - column.square()).clamp(min=0.0)
        kept.append(best)
        pivots[kept] = -1.0
        columns.append(column)
    factor = torch.stack(columns, -1) if columns else t.new_zeros(s, 0)
    return kept, factor * scale.unsqueeze(-1)


def _generalised_inverse(
    t: Tensor, rank_rtol: float, average: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """E, I - E T and the rank of one symmetric positive semidefinite t (s, s)."""
    s = t.shape[-1]
    kept, factor = _pivoted_cholesky(t, rank_rtol)
    e, defect = torch.zeros_like(t), torch.zeros_like(t)
    if len(kept) < s and average:
        pinv = torch.linalg.pinv(factor)
        e = pinv.mT @ pinv
    elif kept:
        index = torch.tensor(kept, device=t.device)
        e[index.unsqueeze(1), index] = torch.cholesky_inverse(factor[index])
    if len(kept) < s:
        defect = torch.eye(s, dtype=t.dtype, device=t.device) - e @ t
        if not average:
            defect[:, kept] = 0.0
    return e, defect, torch.tensor(len(kept), device=t.device)


def merge_solve(
    chol: Tensor, c: Tensor, inverse_hardness: Tensor, rank_rtol: float, average: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A = Q^-1 C^T, E the (generalised) inverse of T, I - E T, and the rank of T.

    With leading batch dimensions, which all three tensors share.
    """
    require_finite("merge_kv", "embeddings", c)
    # T as a Gram matrix is positive semidefinite whatever the rounding.
    z = torch.linalg.solve_triangular(chol, c.mT, upper=False)
    t = z.mT @ z + torch.diag_embed(inverse_hardness)
    a = torch.linalg.solve_triangular(chol.mT, z, upper=True)
    batch, s = t.shape[:-2], t.shape[-1]
    solved = [_generalised_inverse(one, rank_rtol, average) for one in t.reshape(-1, s, s)]
    if not solved:  # an empty batch
        return a.contiguous(), t, t.clone(), t.new_zeros(batch, dtype=torch.int64)
    e, defect, rank = (torch.stack(parts) for parts in zip(*solved, strict=True))
    return a.contiguous(), e.reshape(t.shape), defect.reshape(t.shape), rank.reshape(batch)


def merge_apply(
    base: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[int],
    targets_are_values: bool,
    c: Tensor,
    b: Tensor,
    defect: Tensor,
    rank_rtol: float,
    check: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Merged weights W_l = W0_l + R_l B of every layer, and the residuals R_l."""
    accumulate = torch.float64 if base[0].dtype == torch.float64 else torch.float32
    norms = c.norm(dim=-1)
    layers = len(base)
    merged, residuals = [], []
    for layer, weight in enumerate(base):
        w0 = weight.to(torch.float64)
        if targets_are_values:
            r = targets[layer].to(torch.float64) - w0 @ c.mT
            # What W0 gives already, up to the rounding of a dot product, is no edit.
            unit = 2.0 * torch.finfo(accumulate).eps * w0.norm(dim=-1, keepdim=True)
            rounding = unit * norms.unsqueeze(-2)
            # A row of W0 that is not finite has an infinite norm: nothing about it is rounding.
            r = torch.where(torch.isfinite(rounding) & (r.abs() <= rounding), 0.0, r)
        else:
            parts = c.split(list(rows), -2)
            r = torch.cat(
                [
                    (targets[n * layers + layer].to(torch.float64) - w0) @ part.mT
                    for n, part in enumerate(parts)
                ],
                -1,
            )
        if not bool(torch.isfinite(r).all()):
            raise ValueError(f"merge_kv: base, concepts or values of layer {layer} must be finite")
        narrow = (w0 + r @ b).to(weight.dtype).contiguous()
        if not bool(torch.isfinite(narrow).all()):
            raise ValueError(
                f"merge_kv: the merged weights of layer {layer} overflow {weight.dtype}; raise the "
                "ridge, soften the targets with a finite hardness, or use weights of a wider dtype"
            )
        merged.append(narrow)
        residuals.append(r.to(accumulate).contiguous())
    if check and bool((defect != 0).any()):
        _refuse_contradictions(rank_rtol, defect, residuals, targets if targets_are_values else ())
    return merged, residuals


def _refuse_contradictions(
    rank_rtol: float, defect: Tensor, residuals: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Raise if constraints that were dropped are missed by more than near-repeats explain."""
    tolerance = 10.0 * rank_rtol**0.5 + 1e4 * torch.finfo(residuals[0].dtype).eps
    # Each layer by its own size: a large edit of one must not hide the contradiction of another.
    missed = torch.zeros_like(defect[..., 0, :], dtype=torch.bool)
    for layer, r in enumerate(residuals):
        scale = r.abs().amax(dim=(-2, -1)).to(defect.dtype)
        if values:
            largest = values[layer].abs().amax(dim=(-2, -1)).to(defect.dtype)
            scale = torch.maximum(scale, 1e-3 * largest)
        violation = (r.to(defect.dtype) @ defect).abs().amax(-2)
        missed = missed | (violation > tolerance * scale.unsqueeze(-1))
    rows = missed.reshape(-1, missed.shape[-1]).any(0).nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"merge_kv: contradictory targets at rows {rows} of the embeddings")


def merge_apply_backward(
    grad: Sequence[Tensor],
    base: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[int],
    targets_are_values: bool,
    c: Tensor,
    b: Tensor,
    residual: Sequence[Tensor],
    need_base: bool,
    need_targets: bool,
    need_c: bool,
    need_b: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Gradients of base, targets, c and b, each only if needed.

    dR = G B^T;  dW0 = G - dR C;  dW_n = dR_n C_n or dV = dR;  dB = R^T G;
    dC_n = dR_n^T (W_n - W0), or -dR^T W0 for given values.
    """
    layers = len(base)
    grad_base: list[Tensor] = []
    grad_targets = list(targets) if need_targets else []
    grad_c = torch.zeros_like(c) if need_c else c.new_empty(0)
    grad_b = torch.zeros_like(b) if need_b else c.new_empty(0)
    for layer, (g, w0, r) in enumerate(zip(grad, base, residual, strict=True)):
        wide, before = g.to(torch.float64), w0.to(torch.float64)
        dr = wide @ b.mT
        if need_base:
            grad_base.append((wide - dr @ c).to(w0.dtype).contiguous())
        if need_b:
            grad_b = grad_b + r.to(torch.float64).mT @ wide
        if targets_are_values:
            if need_targets:
                grad_targets[layer] = dr.to(targets[layer].dtype).contiguous()
            if need_c:
                grad_c = grad_c - dr.mT @ before
            continue
        pieces = zip(c.split(list(rows), -2), dr.split(list(rows), -1), strict=True)
        moved = []
        for n, (c_n, dr_n) in enumerate(pieces):
            target = targets[n * layers + layer]
            if need_targets:
                grad_targets[n * layers + layer] = (dr_n @ c_n).to(target.dtype).contiguous()
            moved.append(dr_n.mT @ (target.to(torch.float64) - before) if need_c else dr_n)
        if need_c:
            grad_c = grad_c + torch.cat(moved, -2)
    return grad_base, grad_targets, grad_c.contiguous(), grad_b.contiguous()


def merge_kv(
    base: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]],
    embeddings: Sequence[Tensor],
    c_reg: Tensor,
    ridge: float | Tensor = 0.0,
) -> list[Tensor]:
    """Hard-constraint merge by torch operations and their autograd alone: the baseline to beat.

    One float64 Cholesky factor of Q = C_reg^T C_reg + ridge I (absolute) and one s x s system serve
    all layers; autograd differentiates through both.
    """
    wide = c_reg.to(torch.float64)
    q = wide.mT @ wide + ridge * torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    c = torch.cat([e.to(torch.float64) for e in embeddings], 0)
    a = torch.cholesky_solve(c.mT, torch.linalg.cholesky(q))
    b = torch.cholesky_solve(a.mT, torch.linalg.cholesky(c @ a)).to(base[0].dtype)
    b_parts = b.split([e.shape[0] for e in embeddings], 0)
    merged = []
    for layer, w0 in enumerate(base):
        delta = torch.zeros_like(w0)
        for n, embedding in enumerate(embeddings):
            r = (concepts[n][layer] - w0) @ embedding.to(w0.dtype).mT
            delta = delta + r @ b_parts[n]
        merged.append(w0 + delta)
    return merged
