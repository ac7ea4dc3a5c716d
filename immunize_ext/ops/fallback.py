"""The operators in ``torch.linalg`` alone.

Two jobs: serve devices and installations without a kernel, and be the baseline that the kernels
have to beat. So this is what a careful user would write: thin side, float64 inside, one
factorisation for all layers, no ``1 / (sigma_i^2 - sigma_j^2)`` in a first derivative. Values are
float64; the public functions in the sibling modules check arguments, cast and name the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.arguments import SpectrumPolicy, any_true, require_finite
from immunize_ext.ops.derivatives import BatchedFunction

# A Gram matrix gives sigma_min with a relative error of eps * kappa^2 / 2, so sigma itself to
# eps * sigma_max * kappa / 2. Beyond this kappa the singular values of x are taken directly.
GRAM_SAFE_CONDITION = 1e4


class MergeLayout(NamedTuple):
    """What the per-layer part of a merge has to know besides tensors; all of it static."""

    layers: int
    targets: int
    rows: tuple[int, ...]  # tokens of each concept
    targets_are_values: bool
    rank_rtol: float
    check: bool


class Extremes(NamedTuple):
    """Extremes of a spectrum, each of the batch shape ``(*,)``; values float64, counts int64."""

    largest: Tensor
    smallest: Tensor
    rank: Tensor
    multiplicity_max: Tensor
    multiplicity_min: Tensor


def _power_of_two_scale(a: Tensor) -> Tensor:
    """Power of two (*, 1, 1) that brings the largest entry of each matrix into [1, 2), exactly."""
    largest = a.detach().abs().amax(dim=(-2, -1), keepdim=True)
    _, exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))
    # One less than the exponent of [0.5, 1): finite for the largest number there is.
    return torch.ldexp(torch.ones_like(largest), exponent - 1)


def _cluster_mean(spectrum: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """``value`` with the derivative of the mean over ``mask``: the least-norm subgradient."""
    count = mask.sum(-1).clamp(min=1)
    mean = (spectrum * mask).sum(-1) / count
    attached = value.detach() + (mean - mean.detach())
    if attached.requires_grad:
        attached = RefuseSecondDerivativeAtClusters.apply(attached, mask.sum(-1))
    return attached


def _extremes_of(
    values: Tensor, sigma: Tensor, policy: SpectrumPolicy, full_side: int
) -> tuple[Extremes, Tensor, Tensor]:
    """Extremes of a spectrum without derivatives, and the masks (*, t) of their clusters.

    ``values`` (*, t) is what is returned, in descending order (singular values or eigenvalues of a
    Gram matrix); ``sigma`` (*, t) the singular values that tolerances speak of. ``full_side`` is
    the number of singular values that the policy ``full_rank`` counts; it exceeds t for the p x p
    Gram matrix of n < p samples, whose other eigenvalues are exact zeros.
    """
    top = sigma[..., :1]
    # Strictly greater: the zero matrix has rank 0 although 0 >= rtol * 0.
    counted = sigma > policy.rank_rtol * top
    rank = counted.sum(-1)
    last_index = (rank - 1).clamp(min=0).unsqueeze(-1)
    near = policy.cluster_rtol * top
    cluster_max = counted & (top - sigma <= near)
    cluster_min = counted & (sigma - sigma.gather(-1, last_index) <= near)
    multiplicity_max = torch.where(rank > 0, cluster_max.sum(-1), full_side)
    multiplicity_min = torch.where(rank > 0, cluster_min.sum(-1), full_side)
    smallest = torch.where(rank > 0, values.gather(-1, last_index).squeeze(-1), 0.0)
    if policy.full_rank:
        deficient = rank < full_side
        cluster_min = cluster_min & ~deficient.unsqueeze(-1)
        multiplicity_min = torch.where(deficient, full_side - rank, multiplicity_min)
        smallest = torch.where(deficient, 0.0, smallest)
    found = Extremes(values[..., 0], smallest, rank, multiplicity_max, multiplicity_min)
    return found, cluster_max, cluster_min


def extremal_singular_values(a: Tensor, policy: SpectrumPolicy) -> Extremes:
    """Extremes of the singular values of ``a`` (*, n, p) by a thin SVD."""
    require_finite("extremal_singular_values", "a", a)
    a = a.to(torch.float64)
    scale = _power_of_two_scale(a)
    u, sigma, vh = torch.linalg.svd((a / scale).detach(), full_matrices=False)
    sigma = sigma * scale.squeeze(-1)
    found, cluster_max, cluster_min = _extremes_of(sigma, sigma, policy, min(a.shape[-2:]))
    return found._replace(
        largest=ExtremeValue.apply(a, found.largest, u, sigma, vh, cluster_max),
        smallest=ExtremeValue.apply(a, found.smallest, u, sigma, vh, cluster_min),
    )


def gram_extremes(x: Tensor, policy: SpectrumPolicy) -> tuple[Extremes, Tensor]:
    """Extremes of K = x^T x from the thin Gram matrix, and |K|_F^2."""
    require_finite("gram_extremes", "x", x)
    x = x.to(torch.float64)
    n, p = x.shape[-2:]
    scale = _power_of_two_scale(x)
    scaled = x / scale
    thin = scaled @ scaled.mT if n <= p else scaled.mT @ scaled
    # .flip: eigh sorts ascending. Rounding may leave an eigenvalue of a singular Gram below 0.
    eigenvalues = torch.linalg.eigh(thin)[0].flip(-1).clamp(min=0.0)
    detached = eigenvalues.detach()
    if any_true(detached[..., -1] * GRAM_SAFE_CONDITION**2 <= detached[..., 0]):
        eigenvalues = torch.linalg.svd(scaled, full_matrices=False)[1].square()
    squared_scale = scale.square()[..., 0]
    eigenvalues = eigenvalues * squared_scale
    detached = eigenvalues.detach()
    found, cluster_max, cluster_min = _extremes_of(detached, detached.sqrt(), policy, p)
    extremes = found._replace(
        largest=_cluster_mean(eigenvalues, cluster_max, found.largest),
        smallest=_cluster_mean(eigenvalues, cluster_min, found.smallest),
    )
    squared_frobenius = thin.square().sum(dim=(-2, -1)) * squared_scale[..., 0].square()
    return extremes, squared_frobenius


def symmetric_extremes(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    """Algebraic extremes of symmetric h (*, p, p), float64, and their multiplicities."""
    require_finite("symmetric_extremes", "h", h)
    wide = h.to(torch.float64)
    p = wide.shape[-1]
    scale = _power_of_two_scale(wide)
    scaled = wide.detach() / scale
    difference = (scaled - scaled.mT).abs().amax(dim=(-2, -1))
    largest_entry = scaled.abs().amax(dim=(-2, -1))
    if any_true(difference > 8.0 * p**0.5 * torch.finfo(h.dtype).eps * largest_entry):
        raise ValueError(
            "symmetric_extremes: h must be symmetric, got entries that differ from their mirror "
            "image; pass (h + h.mT) / 2 if the difference has no meaning"
        )
    wide = wide / scale
    spectrum = torch.linalg.eigh((wide + wide.mT) / 2)[0].flip(-1)
    detached = spectrum.detach()
    near = cluster_rtol * detached[..., (0, -1)].abs().amax(-1, keepdim=True)
    most = detached[..., :1] - detached <= near
    least = detached - detached[..., -1:] <= near
    factor = scale[..., 0, 0]
    return (
        _cluster_mean(spectrum, most, detached[..., 0]) * factor,
        _cluster_mean(spectrum, least, detached[..., -1]) * factor,
        most.sum(-1),
        least.sum(-1),
    )


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
        return a, t, t.clone(), t.new_zeros(batch, dtype=torch.int64)
    e, defect, rank = (torch.stack(parts) for parts in zip(*solved, strict=True))
    return a, e.reshape(t.shape), defect.reshape(t.shape), rank.reshape(batch)


def merge_apply(
    layout: MergeLayout, c: Tensor, b: Tensor, defect: Tensor, *weights: Tensor
) -> list[Tensor]:
    """Merged weights W_l = W0_l + R_l B of every layer, then the residuals R_l."""
    base, targets = weights[: layout.layers], weights[layout.layers :]
    # float64 whatever the weights are, also because autocast leaves it alone: the backward pass of
    # float32 products would be rounded to half precision where it runs inside autocast.
    accumulate = torch.float64 if base[0].dtype == torch.float64 else torch.float32
    norms = c.detach().norm(dim=-1)
    merged, residuals = [], []
    for layer, weight in enumerate(base):
        w0 = weight.to(torch.float64)
        if layout.targets_are_values:
            r = targets[layer].to(torch.float64) - w0 @ c.mT
            # What W0 gives already, up to the rounding of a dot product, is no edit.
            unit = 2.0 * torch.finfo(accumulate).eps * w0.detach().norm(dim=-1, keepdim=True)
            rounding = unit * norms
            # A row of W0 that is not finite has an infinite norm: nothing about it is rounding.
            none = torch.isfinite(rounding) & (r.detach().abs() <= rounding)
            r = torch.where(none, 0.0, r)
        else:
            parts = c.split(layout.rows, -2)
            r = torch.cat(
                [
                    (targets[n * layout.layers + layer].to(torch.float64) - w0) @ part.mT
                    for n, part in enumerate(parts)
                ],
                -1,
            )
        if any_true(~torch.isfinite(r.detach())):
            raise ValueError(f"merge_kv: base, concepts or values of layer {layer} must be finite")
        narrow = (w0 + r @ b).to(weight.dtype).contiguous()
        if any_true(~torch.isfinite(narrow.detach())):
            raise ValueError(
                f"merge_kv: the merged weights of layer {layer} overflow {weight.dtype}; raise the "
                "ridge, soften the targets with a finite hardness, or use weights of a wider dtype"
            )
        merged.append(narrow)
        residuals.append(r.detach().to(accumulate))
    if layout.check and any_true(defect != 0):
        _refuse_contradictions(layout, defect, residuals, targets)
    return [*merged, *residuals]


class _RefuseRows(BatchedFunction):
    """Raise where the mask (*, s) is set. A function, so that it sees plain tensors under vmap."""

    @staticmethod
    def forward(missed: Tensor, message: str) -> Tensor:
        rows = missed.reshape(-1, missed.shape[-1]).any(0).nonzero().flatten().tolist()
        if rows:
            raise ValueError(message.format(rows=rows))
        return missed.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def _refuse_contradictions(
    layout: MergeLayout, defect: Tensor, residuals: list[Tensor], targets: Sequence[Tensor]
) -> None:
    """Raise if constraints that were dropped are missed by more than near-repeats explain."""
    tolerance = 10.0 * layout.rank_rtol**0.5 + 1e4 * torch.finfo(residuals[0].dtype).eps
    # Each layer by its own size: a large edit of one must not hide the contradiction of another.
    missed = torch.zeros_like(defect[..., 0, :], dtype=torch.bool)
    for layer, r in enumerate(residuals):
        scale = r.abs().amax(dim=(-2, -1))
        if layout.targets_are_values:
            values = targets[layer].detach().abs()
            scale = torch.maximum(scale, 1e-3 * values.amax(dim=(-2, -1)))
        violation = (r.to(defect.dtype) @ defect).abs().amax(-2)
        missed = missed | (violation > tolerance * scale.unsqueeze(-1))
    _RefuseRows.apply(missed, "merge_kv: contradictory targets at rows {rows} of the embeddings")


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


def precondition(grad: Tensor, factor: Tensor, x: Tensor, ridge: float, woodbury: bool) -> Tensor:
    """Grad K^-1 on the input side, K = x^T x + ridge I, from the Cholesky factor given."""
    flat = grad.to(torch.float64).reshape(-1, grad.shape[-1])
    if woodbury:
        inner = torch.cholesky_solve(x @ flat.mT, factor)
        result = (flat - inner.mT @ x) / ridge
    else:
        result = torch.cholesky_solve(flat.mT, factor).mT
    return result.reshape(grad.shape).to(grad.dtype).contiguous()


_REFUSAL = (
    "the second derivative of an extreme singular value does not exist where it is repeated "
    "(multiplicity > 1)"
)


class RaiseWhenDifferentiated(BatchedFunction):
    """Identity whose derivative is an error with a given text."""

    @staticmethod
    def forward(value: Tensor, text: str) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.text = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError(ctx.text)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(ctx.text)


class RefuseSecondDerivativeAtClusters(BatchedFunction):
    """Identity that refuses to be differentiated twice where the extreme is a cluster.

    For eigenvalues by ``torch.linalg.eigh``, whose second derivative there is divided by a gap of
    zero.
    """

    @staticmethod
    def forward(value: Tensor, multiplicity: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (multiplicity,) = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled() and any_true((multiplicity > 1) & (grad.detach() != 0)):
            grad = RaiseWhenDifferentiated.apply(grad, _REFUSAL)
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.clone()


def _mean_outer(u: Tensor, vh: Tensor, mask: Tensor) -> Tensor:
    """Mean of u_i v_i^T over the cluster (*, n, p); zero where the cluster is empty."""
    weights = mask.to(u.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (u * weights.unsqueeze(-2)) @ vh


def _second_derivative(u: Tensor, sigma: Tensor, vh: Tensor, mask: Tensor, z: Tensor) -> Tensor:
    """The formula on top of the file, zero where the extreme is not simple."""
    simple = (mask.sum(-1) == 1)[..., None]
    chosen = (mask & simple).to(u.dtype)
    u_i, v_i = u @ chosen.unsqueeze(-1), vh.mT @ chosen.unsqueeze(-1)  # (*, n, 1), (*, p, 1)
    s_i = (sigma * chosen).sum(-1, keepdim=True)
    zv, ztu = z @ v_i, z.mT @ u_i
    x, y = (u.mT @ zv).squeeze(-1), (vh @ ztu).squeeze(-1)
    # The product neither cancels nor overflows where the difference of squares would.
    gap = torch.where(mask | ~simple, 1.0, (s_i - sigma) * (s_i + sigma))
    others = (~mask & simple).to(u.dtype)
    a = others * (s_i * x + sigma * y) / gap
    b = others * (sigma * x + s_i * y) / gap
    safe = torch.where(s_i > 0, s_i, 1.0).unsqueeze(-1)
    left, right = u @ a.unsqueeze(-1), vh.mT @ b.unsqueeze(-1)
    # A square U or V has no complement: what the difference leaves is rounding over s_i.
    if u.shape[-2] > sigma.shape[-1]:
        left = left + (zv - u @ x.unsqueeze(-1)) / safe
    if vh.shape[-1] > sigma.shape[-1]:
        right = right + (ztu - vh.mT @ y.unsqueeze(-1)) / safe
    return left @ v_i.mT + u_i @ right.mT


class ExtremeValue(BatchedFunction):
    """An extreme singular value, given with the decomposition of ``a`` and the cluster's mask."""

    @staticmethod
    def forward(
        a: Tensor, value: Tensor, u: Tensor, sigma: Tensor, vh: Tensor, mask: Tensor
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a, _, u, sigma, vh, mask = inputs
        ctx.save_for_backward(a, u, sigma, vh, mask)
        ctx.save_for_forward(a, u, sigma, vh, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        a, u, sigma, vh, mask = ctx.saved_tensors
        return ExtremeGradient.apply(grad, a, u, sigma, vh, mask), *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        _, u, _, vh, mask = ctx.saved_tensors
        if any_true(mask.sum(-1) > 1):
            raise NotImplementedError(
                "forward-mode derivatives of an extreme singular value do not exist where it is "
                "repeated (multiplicity > 1); reverse mode returns the least-norm subgradient"
            )
        return (_mean_outer(u, vh, mask) * tangent).sum(dim=(-2, -1))


class ExtremeGradient(BatchedFunction):
    """Its gradient g mean(u v^T), linear in g and with a symmetric derivative in ``a``."""

    @staticmethod
    def forward(
        grad: Tensor, a: Tensor, u: Tensor, sigma: Tensor, vh: Tensor, mask: Tensor
    ) -> Tensor:
        return grad[..., None, None] * _mean_outer(u, vh, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        grad, _, u, sigma, vh, mask = inputs
        ctx.save_for_backward(grad, u, sigma, vh, mask)
        ctx.save_for_forward(grad, u, sigma, vh, mask)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        grad, u, sigma, vh, mask = ctx.saved_tensors
        if any_true((mask.sum(-1) > 1) & (grad.detach() != 0)):
            raise NotImplementedError(_REFUSAL)
        grad_grad = (_mean_outer(u, vh, mask) * cotangent).sum(dim=(-2, -1))
        grad_a = grad[..., None, None] * _second_derivative(u, sigma, vh, mask, cotangent)
        if torch.is_grad_enabled():
            text = "extremal_singular_values: third derivatives are not implemented"
            grad_grad, grad_a = (
                RaiseWhenDifferentiated.apply(g, text) for g in (grad_grad, grad_a)
            )
        return grad_grad, grad_a, *(None,) * 4

    @staticmethod
    def jvp(ctx: Any, tangent_grad: Any, tangent_a: Any, *_: Any) -> Tensor:
        grad, u, sigma, vh, mask = ctx.saved_tensors
        outer = _mean_outer(u, vh, mask)
        total = torch.zeros_like(outer)
        if tangent_grad is not None:
            total = total + tangent_grad[..., None, None] * outer
        if tangent_a is not None:
            if any_true((mask.sum(-1) > 1) & (grad.detach() != 0)):
                raise NotImplementedError(_REFUSAL)
            second = _second_derivative(u, sigma, vh, mask, tangent_a)
            total = total + grad[..., None, None] * second
        return total
