"""The raw merge operators in torch operations, for devices and installations without a kernel.

Same arguments, outputs and statuses as the kernels; nothing here is differentiated, since the
derivatives of both routes stand in ``merge_saddle`` and ``merge_derivatives``. :func:`merge_kv` is
no operator but the baseline that the benchmarks have to beat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Columns of a block of the Gram matrix: wide enough for a full-speed product, narrow enough that
# little above the diagonal is computed (5/8 of the work of a full product at d = 768). No power of
# two: at 128 and 256 the columns of a row-major block fall into the same cache sets [measured].
_GRAM_BLOCK = 192
# Statuses of a layer.
NOT_FINITE, OVERFLOW = 1, 2


def merge_gram(c_reg: Tensor, chunk: int = 512) -> Tensor:
    """C_reg^T C_reg (d, d) in float64 of c_reg (m, d), symmetric to the bit.

    ``chunk``: rows that are copied to float64 at a time.
    """
    if c_reg.dim() != 2 or c_reg.shape[1] == 0:
        raise ValueError(
            f"merge_gram: c_reg must have shape [m, d] with d >= 1, got {list(c_reg.shape)}"
        )
    d = c_reg.shape[1]
    gram = c_reg.new_zeros((d, d), dtype=torch.float64)
    # One buffer for all pieces: a wide copy of each would stand beside the one before it.
    rows = 0 if c_reg.dtype == gram.dtype else min(chunk, len(c_reg))
    buffer = gram.new_empty((rows, d))
    for piece in c_reg.split(chunk):
        wide = piece if piece.dtype == gram.dtype else buffer[: len(piece)].copy_(piece)
        for begin in range(0, d, _GRAM_BLOCK):  # torch has no syrk
            end = begin + _GRAM_BLOCK
            gram[begin:, begin:end].addmm_(wide[:, begin:].mT, wide[:, begin:end])
    lower = gram.tril()
    return lower + lower.tril(-1).mT


def _pivoted_cholesky(t: Tensor, rank_rtol: float) -> tuple[Tensor, list[int], int]:
    """L (s, s), continued by the identity, the order of rows, and how many of them are kept.

    Pivots are those of t scaled to unit diagonal: the squared sine of the angle between a row and
    the span of the rows already kept.
    """
    s = t.shape[-1]
    diagonal = t.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    scaled = t / torch.outer(scale, scale)
    pivots = torch.where(diagonal > 0, 1.0, 0.0).to(t.dtype)
    factor = torch.zeros_like(t)
    kept: list[int] = []
    for step in range(s):
        best = int(pivots.argmax())
        pivot = float(pivots[best])
        if not pivot > rank_rtol:
            break
        column = (scaled[:, best] - factor[:, :step] @ factor[best, :step]) / pivot**0.5
        column[kept] = 0.0
        pivots = (pivots - column.square()).clamp(min=0.0)
        kept.append(best)
        pivots[kept] = -1.0
        factor[:, step] = column
    rank = len(kept)
    order = kept + [row for row in range(s) if row not in kept]
    triangle = torch.eye(s, dtype=t.dtype, device=t.device)
    triangle[:rank, :rank] = (scale.unsqueeze(-1) * factor)[kept, :rank].tril()
    return triangle, order, rank


def merge_solve(
    chol: Tensor, c: Tensor, inverse_hardness: Tensor, rank_rtol: float, average: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """B, a root of E, the basis Z root, I - E T, and the rank of T (-1: input not finite).

    csrc/merge_solve.h says why each of the solves below is the one it is.
    """
    op = "merge_solve"
    if c.dim() < 2:
        raise ValueError(f"{op}: c must have shape [*, s, d], got {list(c.shape)}")
    batch, (s, d) = c.shape[:-2], c.shape[-2:]
    _check(op, "chol", chol, (*batch, d, d), torch.float64)
    _check(op, "c", c, c.shape, torch.float64)
    _check(op, "inverse_hardness", inverse_hardness, (*batch, s), torch.float64)
    lower = torch.linalg.solve_triangular
    # T as a Gram matrix is positive semidefinite whatever the rounding.
    z = lower(chol, c.mT, upper=False)
    t = z.mT @ z + torch.diag_embed(inverse_hardness)
    problems = t.reshape(math.prod(batch), s, s)
    found = [_pivoted_cholesky(one, rank_rtol) for one in problems]
    triangle = torch.stack([one[0] for one in found]).reshape(t.shape) if found else t
    integers = {"dtype": torch.int64, "device": t.device}
    order = torch.tensor([one[1] for one in found], **integers).reshape(*batch, s)
    rank = torch.tensor([one[2] for one in found], **integers).reshape(batch)

    kept = (torch.arange(s, **integers) < rank.unsqueeze(-1)).to(t.dtype)  # in order
    identity = torch.eye(s, dtype=t.dtype, device=t.device)
    stacked = torch.cat([z, torch.diag_embed(inverse_hardness.sqrt())], -2)
    columns = stacked.gather(-1, order.unsqueeze(-2).expand(stacked.shape)) * kept.unsqueeze(-2)
    first = lower(triangle, columns.mT, upper=False)
    gram = first @ first.mT + torch.diag_embed(1.0 - kept)
    correction = 1.5 * identity - 0.5 * gram  # gram^(-1/2), by Newton and Schulz
    for _ in range(2):
        correction = 1.5 * correction - 0.5 * correction @ correction @ (correction @ gram)
    q = correction @ first
    inverse = correction @ lower(triangle, identity * kept.unsqueeze(-1), upper=False)
    root = torch.zeros_like(t).scatter(-2, order.unsqueeze(-1).expand(t.shape), inverse.mT)
    basis = q[..., :d].mT
    missing = torch.ones_like(kept).scatter(-1, order, 1.0 - kept).unsqueeze(-2)
    singular = (rank < s)[..., None, None]
    if average and bool(singular.any()):
        averaging = torch.linalg.pinv(t @ root).mT
        root = torch.where(singular, averaging, root)
        basis = torch.where(singular, z @ averaging, basis)
        missing = singular.to(t.dtype)
    defect = (identity - root @ (root.mT @ t)) * missing
    b = root @ lower(chol.mT, basis, upper=True).mT
    rank = torch.where(t.isfinite().flatten(-2).all(-1), rank, -1)
    return b.contiguous(), root.contiguous(), basis.contiguous(), defect.contiguous(), rank


def merge_constraint_map(c: Tensor, *saddle: Tensor) -> Tensor:
    """B, which merge_solve has found: the place where its derivatives are attached."""
    return saddle[-1].clone()


def merge_free_solve(f: Tensor, *saddle: Tensor) -> Tensor:
    """S F (*, d, k) for F (*, d, k): L^-T (I - Z H (Z H)^T) L^-1 F."""
    *_, chol, _, basis, _ = saddle
    v = torch.linalg.solve_triangular(chol, f, upper=False)
    v = v - basis @ (basis.mT @ v)
    return torch.linalg.solve_triangular(chol.mT, v, upper=True).contiguous()


def merge_constraint_solve(g: Tensor, *saddle: Tensor) -> Tensor:
    """E G (*, s, k) for G (*, s, k): H H^T G."""
    root = saddle[-3]
    return root @ (root.mT @ g)


def _check_layers(
    op: str,
    base: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[int],
    targets_are_values: bool,
    c: Tensor,
    b: Tensor,
    **others: Sequence[Tensor],
) -> None:
    """The refusals of the kernels' front function, csrc/merge_problem.h."""
    if len(base) == 0:
        raise ValueError(f"{op}: base must hold at least one layer, got an empty list")
    if c.dim() < 2:
        raise ValueError(f"{op}: c must have shape [*, s, d], got {list(c.shape)}")
    batch, (s, d) = c.shape[:-2], c.shape[-2:]
    _check(op, "b", b, c.shape, torch.float64)
    _check(op, "c", c, c.shape, torch.float64)
    if any(n < 0 for n in rows) or sum(rows) != s:
        raise ValueError(
            f"{op}: rows must add up to the rows of c, {s}, none of them negative, got {list(rows)}"
        )
    expected = len(base) * (1 if targets_are_values else len(rows))
    if len(targets) != expected:
        raise ValueError(f"{op}: targets must hold {expected} tensors, got {len(targets)}")
    for name, found in others.items():
        if len(found) != len(base):
            raise ValueError(
                f"{op}: {name} must hold one tensor a layer, {len(base)}, got {len(found)}"
            )
    dtype = base[0].dtype
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for layer, weight in enumerate(base):
        lead = (*batch, *weight.shape[-2:-1])
        _check(op, "base", weight, (*lead, d), dtype)
        for target in targets[layer :: len(base)]:
            if targets_are_values:
                _check(op, "targets", target, (*lead, s), accumulate)
            else:
                _check(op, "targets", target, (*lead, d), dtype)
        if others:
            _check(op, "grad", others["grad"][layer], (*lead, d), dtype)
            _check(op, "residual", others["residual"][layer], (*lead, s), accumulate)


def _check(op: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != tuple(shape):
        if tuple(tensor.shape[-2:]) == tuple(shape[-2:]):
            raise ValueError(
                f"{op}: {name} must have the leading dimensions {list(shape[:-2])}, got shape "
                f"{list(tensor.shape)}"
            )
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: {name} must have dtype {dtype}, got {tensor.dtype}")


def merge_apply(
    base: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[int],
    targets_are_values: bool,
    c: Tensor,
    b: Tensor,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Merged weights W_l = W0_l + R_l B, the residuals R_l, and a status (*, L) for each layer."""
    _check_layers("merge_apply", base, targets, rows, targets_are_values, c, b)
    accumulate = torch.float64 if base[0].dtype == torch.float64 else torch.float32
    norms = c.norm(dim=-1).unsqueeze(-2)
    merged, residuals, status = [], [], []
    for layer, weight in enumerate(base):
        w0 = weight.to(torch.float64)
        if targets_are_values:
            r = targets[layer].to(torch.float64) - w0 @ c.mT
            # What W0 gives already, up to the rounding of a dot product, is no edit.
            rounding = 2.0 * torch.finfo(accumulate).eps * w0.norm(dim=-1, keepdim=True) * norms
            # A row of W0 that is not finite has an infinite norm: nothing about it is rounding.
            r = torch.where(torch.isfinite(rounding) & (r.abs() <= rounding), 0.0, r)
        else:
            parts = zip(targets[layer :: len(base)], c.split(list(rows), -2), strict=True)
            r = torch.cat([(w.to(torch.float64) - w0) @ part.mT for w, part in parts], -1)
        narrow = (w0 + r @ b).to(weight.dtype).contiguous()
        found = torch.where(narrow.isfinite().all(-1).all(-1), 0, OVERFLOW)
        status.append(torch.where(r.isfinite().all(-1).all(-1), found, NOT_FINITE))
        merged.append(narrow)
        residuals.append(r.to(accumulate).contiguous())
    return merged, residuals, torch.stack(status, -1).to(torch.int32)


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
    """Gradients of base, targets, c and b, each only if needed."""
    op = "merge_apply_backward"
    _check_layers(op, base, targets, rows, targets_are_values, c, b, grad=grad, residual=residual)
    pieces = [c.shape[-2]] if targets_are_values else list(rows)
    parts = c.split(pieces, -2)
    grad_base: list[Tensor] = []
    grad_targets = [targets[0]] * len(targets) if need_targets else []
    grad_c = torch.zeros_like(c) if need_c else c.new_empty(0)
    grad_b = torch.zeros_like(b) if need_b else b.new_empty(0)
    for layer, weight in enumerate(base):
        g, w0 = grad[layer].to(torch.float64), weight.to(torch.float64)
        dr = g @ b.mT
        if need_base:
            grad_base.append((g - dr @ c).to(weight.dtype).contiguous())
        if need_targets and targets_are_values:
            grad_targets[layer] = dr.to(targets[layer].dtype).contiguous()
        elif need_targets:
            for n, (dr_n, c_n) in enumerate(zip(dr.split(pieces, -1), parts, strict=True)):
                index = n * len(base) + layer
                grad_targets[index] = (dr_n @ c_n).to(targets[index].dtype).contiguous()
        if need_b:
            grad_b = grad_b + residual[layer].to(torch.float64).mT @ g
        if need_c and targets_are_values:
            grad_c = grad_c - dr.mT @ w0
        elif need_c:
            moved = [t.to(torch.float64) - w0 for t in targets[layer :: len(base)]]
            sums = zip(dr.split(pieces, -1), moved, strict=True)
            grad_c = grad_c + torch.cat([dr_n.mT @ x for dr_n, x in sums], -2)
    return grad_base, grad_targets, grad_c, grad_b


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
