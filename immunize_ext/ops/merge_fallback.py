"""The raw merge operators in torch operations, for devices and installations without a kernel.

Same arguments, outputs and statuses as the kernels; nothing here is differentiated, since the
derivatives of both routes stand in ``merge_saddle`` and ``merge_derivatives``. :func:`merge_kv` is
no operator but the baseline that the benchmarks have to beat.
"""

from __future__ import annotations

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


def _generalised_root(t: Tensor, rank_rtol: float, average: bool) -> tuple[Tensor, list[int]]:
    """H (s, s) with E = H H^T the (generalised) inverse of t (s, s); columns beyond r are zero."""
    kept, factor = _pivoted_cholesky(t, rank_rtol)
    root = torch.zeros_like(t)
    if average and 0 < len(kept) < len(t):
        root[:, : len(kept)] = torch.linalg.pinv(factor).mT
    elif kept:
        triangle = factor[kept]
        identity = torch.eye(len(kept), dtype=t.dtype, device=t.device)
        root[kept, : len(kept)] = torch.linalg.solve_triangular(triangle.mT, identity, upper=True)
    return root, kept


def _orthonormalised(root: Tensor, z: Tensor, inverse_hardness: Tensor) -> Tensor:
    """Root with [Z; diag(1/mu)^(1/2)] root orthonormal to rounding: the second step of CholeskyQR2.

    The root of T itself, a Gram matrix, has lost twice the digits of the angles between tokens.
    """
    basis = z @ root
    gram = basis.mT @ basis + root.mT @ (inverse_hardness.unsqueeze(-1) * root)
    unused = (root == 0).all(-2)
    factor = torch.linalg.cholesky_ex(gram + torch.diag_embed(unused.to(root.dtype)))[0]
    return torch.linalg.solve_triangular(factor, root.mT, upper=False).mT


def merge_solve(
    chol: Tensor, c: Tensor, inverse_hardness: Tensor, rank_rtol: float, average: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """B, a root of E, the basis Z root, I - E T, and the rank of T (-1: input not finite)."""
    s, d = c.shape[-2:]
    for name, tensor, shape in (
        ("c", c, (*chol.shape[:-2], s, d)),
        ("chol", chol, (*c.shape[:-2], d, d)),
        ("inverse_hardness", inverse_hardness, (*c.shape[:-2], s)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            raise ValueError(
                f"merge_solve: {name} must have shape {list(shape)} and dtype torch.float64, got "
                f"{list(tensor.shape)} {tensor.dtype}"
            )
    # T as a Gram matrix is positive semidefinite whatever the rounding.
    z = torch.linalg.solve_triangular(chol, c.mT, upper=False)
    t = z.mT @ z + torch.diag_embed(inverse_hardness)
    root, missing = torch.zeros_like(t), torch.zeros_like(t)
    ranks: list[int] = []
    flat = t.reshape(-1, s, s)
    for k in range(len(flat)):
        root.view(-1, s, s)[k], kept = _generalised_root(flat[k], rank_rtol, average)
        ranks.append(len(kept) if bool(flat[k].isfinite().all()) else -1)
        if len(kept) < s:
            columns = torch.ones(s, dtype=torch.bool, device=t.device)
            columns[[] if average else kept] = False
            missing.view(-1, s, s)[k] = columns.to(t.dtype)
    root = _orthonormalised(root, z, inverse_hardness)
    basis = (z @ root).contiguous()
    b = root @ torch.linalg.solve_triangular(chol.mT, basis, upper=True).mT
    identity = torch.eye(s, dtype=t.dtype, device=t.device)
    # Exact zeros where T has full rank and, unless averaging, for the rows that were kept.
    defect = torch.where(missing != 0, identity - root @ (root.mT @ t), 0.0)
    rank = torch.tensor(ranks, dtype=torch.int64, device=t.device).reshape(c.shape[:-2])
    return b.contiguous(), root.contiguous(), basis, defect, rank


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
    **others: Sequence[Tensor],
) -> None:
    """The refusals of the kernels' front function."""
    if len(base) == 0:
        raise ValueError(f"{op}: base must hold at least one layer, got an empty list")
    if any(n < 0 for n in rows) or sum(rows) != c.shape[-2]:
        raise ValueError(
            f"{op}: rows must be non-negative and add up to the rows of c, {c.shape[-2]}, got "
            f"{list(rows)}"
        )
    expected = len(base) * (1 if targets_are_values else len(rows))
    for name, found, count in (
        ("targets", targets, expected),
        *((name, found, len(base)) for name, found in others.items()),
    ):
        if len(found) != count:
            raise ValueError(f"{op}: {name} must hold {count} tensors, got {len(found)}")
    s, d = c.shape[-2:]
    for layer, weight in enumerate(base):
        lead = (*c.shape[:-2], weight.shape[-2])
        asked = [("base", weight, d)]
        width = s if targets_are_values else d
        asked += [("targets", t, width) for t in targets[layer :: len(base)]]
        widths = {"grad": d, "residual": s}
        asked += [(name, found[layer], widths[name]) for name, found in others.items()]
        for name, tensor, columns in asked:
            if tuple(tensor.shape) != (*lead, columns):
                raise ValueError(
                    f"{op}: {name} must have shape {[*lead, columns]}, got {list(tensor.shape)}"
                )


def merge_apply(
    base: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[int],
    targets_are_values: bool,
    c: Tensor,
    b: Tensor,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Merged weights W_l = W0_l + R_l B, the residuals R_l, and a status (*, L) for each layer."""
    _check_layers("merge_apply", base, targets, rows, targets_are_values, c)
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
    _check_layers(
        "merge_apply_backward",
        base,
        targets,
        rows,
        targets_are_values,
        c,
        grad=grad,
        residual=residual,
    )
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
