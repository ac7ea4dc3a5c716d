"""The raw spectral operators in ``torch`` alone.

Two jobs: serve devices and installations without a kernel, and be the baseline that the kernels
have to beat. So this is what a careful user would write: thin side, float64 inside, no
``1 / (sigma_i^2 - sigma_j^2)`` in a first derivative. The second derivatives serve every device,
kernels or not: they need a full decomposition, which LAPACK and cuSOLVER have.

The dispatcher calls these with plain tensors, below autograd. Second derivative of a simple
singular value, with Z the cotangent, x = U^T Z v, y = V^T Z^T u and i the extreme:

    d(u^T Z v)/dA = (U a + (I - U U^T) Z v / s_i) v^T + u (V b + (I - V V^T) Z^T u / s_i)^T,
    a_j = (s_i x_j + s_j y_j) / (s_i^2 - s_j^2),  b_j = (s_j x_j + s_i y_j) / (s_i^2 - s_j^2).

It follows from du = sum_{j != i} u_j (s_i u_j^T dA v + s_j u^T dA v_j) / (s_i^2 - s_j^2)
+ (I - U U^T) dA v / s_i and its mirror image for dv. Of a simple eigenvalue of a symmetric matrix:

    d(v^T Z v)/dH = v w^T + w v^T,  w = sum_{j != i} v_j (v_j^T Z v) / (lambda_i - lambda_j).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.arguments import (
    SpectrumPolicy,
    first_true,
    require_finite,
    require_floating_matrix,
)

# A Gram matrix gives sigma_min with a relative error of eps * kappa^2 / 2, so sigma itself to
# eps * sigma_max * kappa / 2. Beyond this kappa that is more than a decomposition of x itself
# loses, and the singular values are taken of x.
GRAM_SAFE_CONDITION = 16.0

_EPS = torch.finfo(torch.float64).eps


# --- shared ---------------------------------------------------------------------------------------


class _Extreme(NamedTuple):
    """One extreme of each spectrum (*, t)."""

    at: Tensor  # (*,) index of the extreme itself, 0 where there is none
    members: Tensor  # (*, t) bool, its cluster; empty where the gradient is zero
    multiplicity: Tensor  # (*,) int64, as told to the user
    exists: Tensor  # (*,) bool: it is not zero by definition


def _checked(function: str, name: str, value: Tensor) -> Tensor:
    """The argument in float64, if it is a finite matrix."""
    require_floating_matrix(function, name, value)
    require_finite(function, name, value)
    return value.to(torch.float64)


def _batch_like(function: str, name: str, grad: Tensor, value: Tensor) -> Tensor:
    if grad.shape != value.shape[:-2]:
        raise ValueError(
            f"{function}: {name} must have shape {tuple(value.shape[:-2])}, got {tuple(grad.shape)}"
        )
    return grad.to(torch.float64)


def _same_shape(function: str, cotangent: Tensor, value: Tensor) -> Tensor:
    if cotangent.shape != value.shape:
        raise ValueError(
            f"{function}: cotangent must have shape {tuple(value.shape)}, "
            f"got {tuple(cotangent.shape)}"
        )
    return cotangent.to(torch.float64)


def _scale_of(a: Tensor, dim: tuple[int, ...] = (-2, -1)) -> Tensor:
    """Power of two that brings the largest entry along dim, kept, into [1, 2), exactly.

    1 for zeros; that of infinity is no matter.
    """
    largest = a.abs().amax(dim=dim, keepdim=True)
    _, exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))
    # One less than the exponent of [0.5, 1): finite for the largest number there is.
    return torch.ldexp(torch.ones_like(largest), exponent - 1)


def _ranked(sigma: Tensor, policy: SpectrumPolicy, side: int) -> tuple[Tensor, _Extreme, _Extreme]:
    """Rank, largest and smallest of singular values (*, t) in descending order.

    ``side`` is the number of singular values that ``full_rank`` counts; it exceeds t for the p x p
    Gram matrix of n < p samples, whose other eigenvalues are exact zeros.
    """
    top = sigma[..., :1]
    # Strictly greater: the zero matrix has rank 0 although 0 >= rtol * 0.
    counted = sigma > policy.rank_rtol * top
    rank = counted.sum(-1)
    last = (rank - 1).clamp(min=0)
    near = policy.cluster_rtol * top
    above = counted & (top - sigma <= near)
    below = counted & (sigma - sigma.gather(-1, last.unsqueeze(-1)) <= near)
    nothing = rank == 0
    deficient = (rank < side) if policy.full_rank else nothing
    below = below & ~deficient.unsqueeze(-1)
    missing = side - rank if policy.full_rank else torch.full_like(rank, side)
    most = torch.where(nothing, side, above.sum(-1))
    least = torch.where(deficient, missing, below.sum(-1))
    return (
        rank,
        _Extreme(torch.zeros_like(last), above, most, ~nothing),
        _Extreme(last, below, least, ~deficient),
    )


def _pick(values: Tensor, extreme: _Extreme) -> Tensor:
    """The values (*, t) at the extreme, 0 where there is none."""
    found = values.gather(-1, extreme.at.unsqueeze(-1)).squeeze(-1)
    return torch.where(extreme.exists, found, 0.0)


def _column(vectors: Tensor, extreme: _Extreme) -> Tensor:
    """The column of vectors (*, side, t) at the extreme, 0 where the gradient is."""
    index = extreme.at[..., None, None].expand(*vectors.shape[:-1], 1)
    found = vectors.gather(-1, index).squeeze(-1)
    return torch.where(extreme.exists.unsqueeze(-1), found, 0.0).contiguous()


def _mean_weights(extreme: _Extreme) -> Tensor:
    """1 / m on the cluster (*, t)."""
    members = extreme.members.to(torch.float64)
    return members / members.sum(-1, keepdim=True).clamp(min=1)


def _require_simple(function: str, name: str, grad: Tensor, extreme: _Extreme) -> None:
    count = extreme.members.sum(-1)
    refused = ((count > 1) & (grad != 0)).flatten().nonzero()
    if len(refused):
        where = int(refused[0])
        raise NotImplementedError(
            f"{function}: the second derivative of {name} does not exist at batch index {where}, "
            f"where it is repeated (multiplicity {int(count.flatten()[where])}); use the first "
            "derivative there, or a smaller cluster_rtol"
        )


def _weighted(u: Tensor, weights: Tensor, vh: Tensor) -> Tensor:
    """Sum of w_i u_i v_i^T."""
    return (u * weights.unsqueeze(-2)) @ vh


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u.unsqueeze(-1) * v.unsqueeze(-2)


def _like(grad: Tensor, value: Tensor) -> Tensor:
    return grad.reshape(value.shape).to(value.dtype).contiguous()


# --- singular values ------------------------------------------------------------------------------


class _Decomposition(NamedTuple):
    """Singular value decomposition of a / scale, and its extremes."""

    u: Tensor  # (*, n, t)
    sigma: Tensor  # (*, t)
    vh: Tensor  # (*, t, p)
    scale: Tensor  # (*,)
    rank: Tensor
    top: _Extreme
    bottom: _Extreme


def _decompose(wide: Tensor, policy: SpectrumPolicy, side: int) -> _Decomposition:
    scale = _scale_of(wide)
    u, sigma, vh = torch.linalg.svd(wide / scale, full_matrices=False)
    return _Decomposition(u, sigma, vh, scale[..., 0, 0], *_ranked(sigma, policy, side))


def extremal_singular_values(
    a: Tensor, rank_rtol: float, cluster_rtol: float, full_rank: bool
) -> tuple[Tensor, ...]:
    """Extremes of the singular values of ``a`` (*, n, p) by a thin decomposition."""
    policy = SpectrumPolicy(rank_rtol, cluster_rtol, full_rank)
    wide = _checked("extremal_singular_values", "a", a)
    d = _decompose(wide, policy, min(a.shape[-2:]))
    return (
        _pick(d.sigma, d.top) * d.scale,
        _pick(d.sigma, d.bottom) * d.scale,
        d.rank,
        d.top.multiplicity,
        d.bottom.multiplicity,
        *(_column(x, e) for e in (d.top, d.bottom) for x in (d.u, d.vh.mT)),
    )


def _first_derivative(
    grads: tuple[Tensor, Tensor],
    a: Tensor,
    multiplicities: tuple[Tensor, Tensor],
    vectors: tuple[Tensor, ...],
    policy: SpectrumPolicy,
    *,
    gram: bool,
) -> Tensor:
    """Sum over both extremes of g mean(u v^T), for K = a^T a of g mean(2 sigma u v^T); float64."""
    u_max, v_max, u_min, v_min = vectors
    repeated = torch.zeros_like(grads[0], dtype=torch.bool)
    for grad, count, vector in zip(grads, multiplicities, (u_max, u_min), strict=True):
        repeated = repeated | ((grad != 0) & (count > 1) & (vector != 0).any(-1))
    if not bool(repeated.any()):
        first, second = (g.unsqueeze(-1) for g in grads)
        if gram:
            return _gram_pair(2.0 * first, a, u_max, v_max) + _gram_pair(
                2.0 * second, a, u_min, v_min
            )
        return _outer(first * u_max, v_max) + _outer(second * u_min, v_min)
    side = a.shape[-1] if gram else min(a.shape[-2:])
    d = _decompose(a.to(torch.float64), policy, side)
    weights = grads[0].unsqueeze(-1) * _mean_weights(d.top)
    weights = weights + grads[1].unsqueeze(-1) * _mean_weights(d.bottom)
    if gram:
        weights = 2.0 * weights * d.sigma * d.scale.unsqueeze(-1)
    return _weighted(d.u, weights, d.vh)


def extremal_singular_values_backward(
    grad_max: Tensor,
    grad_min: Tensor,
    a: Tensor,
    multiplicity_max: Tensor,
    multiplicity_min: Tensor,
    u_max: Tensor,
    v_max: Tensor,
    u_min: Tensor,
    v_min: Tensor,
    rank_rtol: float,
    cluster_rtol: float,
    full_rank: bool,
) -> Tensor:
    """Mean of u v^T over the clusters, times the incoming gradients."""
    function = "extremal_singular_values_backward"
    grad = _first_derivative(
        (
            _batch_like(function, "grad_max", grad_max, a),
            _batch_like(function, "grad_min", grad_min, a),
        ),
        a,
        (multiplicity_max, multiplicity_min),
        (u_max, v_max, u_min, v_min),
        SpectrumPolicy(rank_rtol, cluster_rtol, full_rank),
        gram=False,
    )
    return _like(grad, a)


def _gram_pair(weight: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Weight sigma u v^T without sigma, whose square alone is known and leaves the range first."""
    wide = x.to(torch.float64)
    if x.shape[-2] <= x.shape[-1]:
        return _outer(weight * u, (wide.mT @ u.unsqueeze(-1)).squeeze(-1))
    return _outer((wide @ v.unsqueeze(-1)).squeeze(-1), weight * v)


def _second_derivative(d: _Decomposition, extreme: _Extreme, grad: Tensor, z: Tensor) -> Tensor:
    """The formula on top of the file times grad, zero where grad is or the extreme is a cluster."""
    active = (extreme.members.sum(-1) == 1) & (grad != 0)
    u_all, v_all = d.u, d.vh.mT
    u, v = _column(u_all, extreme), _column(v_all, extreme)
    zv = (z @ v.unsqueeze(-1)).squeeze(-1)
    ztu = (z.mT @ u.unsqueeze(-1)).squeeze(-1)
    x = (u_all.mT @ zv.unsqueeze(-1)).squeeze(-1)
    y = (d.vh @ ztu.unsqueeze(-1)).squeeze(-1)
    s_i = d.sigma.gather(-1, extreme.at.unsqueeze(-1))
    # The product neither cancels nor overflows where the difference of squares would.
    skip = (extreme.at.unsqueeze(-1) == torch.arange(d.sigma.shape[-1], device=z.device)) | (
        ~active.unsqueeze(-1)
    )
    gap = ((s_i - d.sigma) * (s_i + d.sigma)).masked_fill(skip, torch.inf)
    left = (u_all @ ((s_i * x + d.sigma * y) / gap).unsqueeze(-1)).squeeze(-1)
    right = (v_all @ ((d.sigma * x + s_i * y) / gap).unsqueeze(-1)).squeeze(-1)
    safe = s_i.masked_fill(~active.unsqueeze(-1), torch.inf)
    # A square U or V has no complement: what the difference leaves is rounding over s_i.
    if u_all.shape[-2] > u_all.shape[-1]:
        left = left + (zv - (u_all @ x.unsqueeze(-1)).squeeze(-1)) / safe
    if v_all.shape[-2] > v_all.shape[-1]:
        right = right + (ztu - (v_all @ y.unsqueeze(-1)).squeeze(-1)) / safe
    weight = torch.where(active, grad, 0.0)[..., None, None]
    return weight * (_outer(left, v) + _outer(u, right))


def _mean_along(d: _Decomposition, extreme: _Extreme, z: Tensor, sigmas: Tensor | float) -> Tensor:
    """Mean over the cluster of sigma_i <Z, u_i v_i^T>."""
    along = ((d.u.mT @ z) * d.vh).sum(-1)
    return (_mean_weights(extreme) * sigmas * along).sum(-1)


def extremal_singular_values_double_backward(
    cotangent: Tensor,
    grad_max: Tensor,
    grad_min: Tensor,
    a: Tensor,
    rank_rtol: float,
    cluster_rtol: float,
    full_rank: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of <cotangent, gradient> by the incoming gradients and by ``a``."""
    function = "extremal_singular_values_double_backward"
    wide = _checked(function, "a", a)
    z = _same_shape(function, cotangent, a)
    grads = (
        _batch_like(function, "grad_max", grad_max, a),
        _batch_like(function, "grad_min", grad_min, a),
    )
    policy = SpectrumPolicy(rank_rtol, cluster_rtol, full_rank)
    d = _decompose(wide, policy, min(a.shape[-2:]))
    total = torch.zeros_like(wide)
    for name, grad, extreme in zip(
        ("sigma_max", "sigma_min"), grads, (d.top, d.bottom), strict=True
    ):
        _require_simple(function, name, grad, extreme)
        # u and v are of degree 0 in a: their derivative scales with the inverse of a's scale.
        total = total + _second_derivative(d, extreme, grad / d.scale, z)
    return (
        _mean_along(d, d.top, z, 1.0),
        _mean_along(d, d.bottom, z, 1.0),
        _like(total, a),
    )


# --- Gram matrices --------------------------------------------------------------------------------


def _thin_gram(x: Tensor) -> Tensor:
    return x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x


def gram_extremes(
    x: Tensor, rank_rtol: float, cluster_rtol: float, full_rank: bool
) -> tuple[Tensor, ...]:
    """Extremes of K = x^T x from the thin Gram matrix, and |K|_F^2."""
    policy = SpectrumPolicy(rank_rtol, cluster_rtol, full_rank)
    wide = _checked("gram_extremes", "x", x)
    n, p = x.shape[-2:]
    scale = _scale_of(wide)
    scaled = wide / scale
    thin = _thin_gram(scaled)
    # .flip: eigh sorts ascending. Rounding may leave an eigenvalue of a singular Gram below 0.
    eigenvalues, vectors = torch.linalg.eigh(thin)
    eigenvalues, vectors = eigenvalues.flip(-1).clamp(min=0.0), vectors.flip(-1)
    risky = bool((eigenvalues[..., -1] * GRAM_SAFE_CONDITION**2 <= eigenvalues[..., 0]).any())
    if risky:
        u, sigma, vh = torch.linalg.svd(scaled, full_matrices=False)
        eigenvalues = sigma.square()
    sigma = eigenvalues.sqrt()
    rank, top, bottom = _ranked(sigma, policy, p)
    pairs: list[Tensor] = []
    for extreme in (top, bottom):
        if risky:
            pairs += _column(u, extreme), _column(vh.mT, extreme)
            continue
        near = _column(vectors, extreme)
        far = ((scaled.mT if n <= p else scaled) @ near.unsqueeze(-1)).squeeze(-1)
        # Its own length: the root of an eigenvalue has an error of eps kappa^2.
        length = torch.linalg.vector_norm(far, dim=-1, keepdim=True)
        far = far / torch.where(length > 0, length, 1.0)
        pairs += (near, far) if n <= p else (far, near)
    squared = scale[..., 0, 0].square()
    largest, smallest = _pick(eigenvalues, top), _pick(eigenvalues, bottom)
    return (
        *(torch.where(x == 0, 0.0, x * squared) for x in (largest, smallest)),  # 0 of infinity
        thin.square().sum(dim=(-2, -1)) * squared.square(),
        rank,
        top.multiplicity,
        bottom.multiplicity,
        *pairs,
        (thin * scale * scale).contiguous(),  # the square may be infinite, and an entry 0
    )


def gram_extremes_backward(
    grad_max: Tensor,
    grad_min: Tensor,
    grad_squared_frobenius: Tensor,
    x: Tensor,
    lambda_max: Tensor,
    lambda_min: Tensor,
    multiplicity_max: Tensor,
    multiplicity_min: Tensor,
    u_max: Tensor,
    v_max: Tensor,
    u_min: Tensor,
    v_min: Tensor,
    thin_gram: Tensor,
    rank_rtol: float,
    cluster_rtol: float,
    full_rank: bool,
) -> Tensor:
    """Means of 2 sigma u v^T over the clusters and 4 x x^T x, times the incoming gradients."""
    function = "gram_extremes_backward"
    g_max, g_min, g_f = (
        _batch_like(function, name, grad, x)
        for name, grad in (
            ("grad_max", grad_max),
            ("grad_min", grad_min),
            ("grad_squared_frobenius", grad_squared_frobenius),
        )
    )
    grad = _first_derivative(
        (g_max, g_min),
        x,
        (multiplicity_max, multiplicity_min),
        (u_max, v_max, u_min, v_min),
        SpectrumPolicy(rank_rtol, cluster_rtol, full_rank),
        gram=True,
    )
    return _like(grad + _frobenius_gradient(g_f, x, thin_gram), x)


def _frobenius_gradient(grad: Tensor, x: Tensor, thin: Tensor) -> Tensor:
    """4 g x x^T x, of x / scale and back: its sums may overflow where they cancel."""
    wide = x.to(torch.float64)
    scale = _scale_of(wide)
    scaled = wide / scale
    # Of huge x the Gram matrix itself has left the range.
    thin = thin / scale / scale if bool(thin.isfinite().all()) else _thin_gram(scaled)
    weighted = 4.0 * grad[..., None, None] * thin
    product = weighted @ scaled if x.shape[-2] <= x.shape[-1] else scaled @ weighted
    return product * scale * scale * scale


def gram_extremes_double_backward(
    cotangent: Tensor,
    grad_max: Tensor,
    grad_min: Tensor,
    grad_squared_frobenius: Tensor,
    x: Tensor,
    rank_rtol: float,
    cluster_rtol: float,
    full_rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of <cotangent, gradient> by the incoming gradients and by ``x``.

    The gradient is 2 g s u v^T for either extreme and 4 g_F x x^T x. The product rule adds
    2 g <Z, u v^T> u v^T to 2 g s times the second derivative of s; the last term gives
    4 g_F (Z x^T x + x Z^T x + x x^T Z).
    """
    function = "gram_extremes_double_backward"
    wide = _checked(function, "x", x)
    z = _same_shape(function, cotangent, x)
    grads = (
        _batch_like(function, "grad_max", grad_max, x),
        _batch_like(function, "grad_min", grad_min, x),
    )
    g_f = _batch_like(function, "grad_squared_frobenius", grad_squared_frobenius, x)
    n, p = x.shape[-2:]
    d = _decompose(wide, SpectrumPolicy(rank_rtol, cluster_rtol, full_rank), p)
    total = torch.zeros_like(wide)
    for name, grad, extreme in zip(
        ("lambda_max", "lambda_min"), grads, (d.top, d.bottom), strict=True
    ):
        _require_simple(function, name, grad, extreme)
        sigma = _pick(d.sigma, extreme)
        u, v = _column(d.u, extreme), _column(d.vh.mT, extreme)
        along = ((u.unsqueeze(-2) @ z).squeeze(-2) * v).sum(-1)
        simple = torch.where(extreme.members.sum(-1) == 1, grad, 0.0)
        total = total + _second_derivative(d, extreme, 2.0 * grad * sigma, z)
        total = total + _outer((2.0 * simple * along).unsqueeze(-1) * u, v)
    scaled = wide / d.scale[..., None, None]
    thin = _thin_gram(scaled)
    # The thin side in the middle.
    if n <= p:
        cubic, mixed = thin @ scaled, scaled @ z.mT @ scaled
        others = z @ scaled.mT @ scaled + thin @ z
    else:
        cubic, mixed = scaled @ thin, scaled @ (z.mT @ scaled)
        others = z @ thin + scaled @ (scaled.mT @ z)
    total = total + 4.0 * (g_f * d.scale.square())[..., None, None] * (mixed + others)
    return (
        2.0 * d.scale * _mean_along(d, d.top, z, d.sigma),
        2.0 * d.scale * _mean_along(d, d.bottom, z, d.sigma),
        4.0 * d.scale.pow(3) * (z * cubic).sum(dim=(-2, -1)),
        _like(total, x),
    )


# --- regularizers of Gram matrices ----------------------------------------------------------------


def regularizer(
    x: Tensor,
    gram: bool,
    ill: bool,
    normaliser: float | None,
    floor: float | None,
    rank_rtol: float,
    cluster_rtol: float,
    full_rank: bool,
) -> tuple[Tensor, ...]:
    """R_well or R_ill of x or of K = x^T x, and what its gradient is made of."""
    n, p = x.shape[-2:]
    policy = (rank_rtol, cluster_rtol, full_rank)
    parts = _regularizer_parts(x, gram, ill, policy)
    factor = torch.ones_like(parts.frobenius)
    outside = (parts.frobenius < 2.0**-256) | ~(parts.frobenius <= 2.0**256)
    if bool(outside.any()):
        # Of y = f x, as the kernel does: csrc/regularizer.cpp has the formulas.
        wide = x.to(torch.float64)
        near = (1.0 / _scale_of(wide)).clamp(2.0**-1000, 2.0**1000)[..., 0, 0]
        factor = torch.where(outside, near, factor)
        parts = _regularizer_parts(wide * factor[..., None, None], gram, ill, policy)
    zero = torch.zeros_like(factor)
    multiplicity = parts.multiplicity.clone()
    if ill:
        counted = parts.rank.clamp(min=1).to(factor.dtype)
        width = 2.0 * (counted if normaliser is None else torch.full_like(counted, normaliser))
        mean_square = parts.frobenius / width
        denominator = mean_square - parts.extreme.square() / 2
        vanishing = (8 if gram else 4) * _EPS * max(n, p)
        least = mean_square * (vanishing if floor is None else floor)
        held = denominator <= least
        if normaliser is None and floor is None:
            # Zeros that full rank counts are no cluster.
            held = held | ((parts.extreme > 0) & (multiplicity >= parts.rank))
        if floor is None:
            multiplicity = multiplicity.masked_fill(held, 0)  # D vanishes: tells the caller
        value = torch.where(held, least, denominator).reciprocal()
        free = torch.where(held, 0.0, value.square())
        coefficients = [zero, free * parts.extreme, -free / width]
    else:
        side = p if gram else min(n, p)
        width = torch.full_like(factor, 2.0 * (side if normaliser is None else normaliser))
        value = parts.extreme.square() / 2 - parts.frobenius / width
        coefficients = [parts.extreme, zero, -1.0 / width]
    return (
        _times_powers(value, factor, -_degree(gram, ill)).to(x.dtype),
        torch.stack([*coefficients, factor], -1),
        multiplicity,
        parts.near,
        parts.companion,
    )


class _RegularizerParts(NamedTuple):
    """What a regularizer of x or x^T x is made of; flat over the batch as the operators have it."""

    extreme: Tensor  # (*,) the smallest value for R_ill, else the largest
    frobenius: Tensor  # (*,) |S|_F^2
    rank: Tensor
    multiplicity: Tensor
    near: Tensor  # (*, t) the vector of the extreme on the thin side
    companion: Tensor  # (*, t, t) the thin Gram matrix, or the vector on the other side


def _regularizer_parts(
    x: Tensor, gram: bool, ill: bool, policy: tuple[float, float, bool]
) -> _RegularizerParts:
    if gram:
        largest, smallest, frobenius, rank, m_max, m_min, *vectors, companion = (
            torch.ops.immunize_ext.gram_extremes(x, *policy)
        )
    else:
        largest, smallest, rank, m_max, m_min, *vectors = (
            torch.ops.immunize_ext.extremal_singular_values(x, *policy)
        )
        frobenius = x.to(torch.float64).square().sum(-1).sum(-1)
    u, v = vectors[2:] if ill else vectors[:2]
    near, far = (u, v) if x.shape[-2] <= x.shape[-1] else (v, u)
    extreme, multiplicity = (smallest, m_min) if ill else (largest, m_max)
    companion = companion if gram else far.clone()
    return _RegularizerParts(extreme, frobenius, rank, multiplicity, near.clone(), companion)


def _degree(gram: bool, ill: bool) -> int:
    """Of R in the entries of x."""
    return (-2 if ill else 2) * (2 if gram else 1)


def _times_powers(value: Tensor, factor: Tensor, exponent: int) -> Tensor:
    """Value * factor^exponent for powers of two, in steps: the power itself may be infinite."""
    for _ in range(abs(exponent)):
        value = value * factor if exponent > 0 else value / factor
    return value


def regularizer_backward(
    grad: Tensor,
    x: Tensor,
    coefficients: Tensor,
    multiplicity: Tensor,
    thin_vector: Tensor,
    companion: Tensor,
    gram: bool,
    ill: bool,
    normaliser: float | None,
    rank_rtol: float,
    cluster_rtol: float,
    full_rank: bool,
) -> Tensor:
    """Gradient from the coefficients of the largest and smallest value and of |S|_F^2."""
    g = _batch_like("regularizer_backward", "grad", grad, x)
    *shares, factor = coefficients.unbind(-1)
    of_max, of_min, of_norm = (share * g for share in shares)
    sides = factor[..., None, None]
    y = x.to(torch.float64) * sides
    wider = x.shape[-2] <= x.shape[-1]
    far = thin_vector if gram else companion  # of gram the one on the thin side is all it takes
    u, v = (thin_vector, far) if wider else (far, thin_vector)
    total = _first_derivative(
        (of_max, of_min),
        y,
        (multiplicity, multiplicity),
        (u, v, u, v),
        SpectrumPolicy(rank_rtol, cluster_rtol, full_rank),
        gram=gram,
    )
    if gram:
        total = total + _frobenius_gradient(of_norm, y, companion)
    else:
        total = total + 2.0 * of_norm[..., None, None] * y
    return _like(_times_powers(total, sides, 1 - _degree(gram, ill)), x)


# --- condition numbers ----------------------------------------------------------------------------


def condition_number(
    a: Tensor, logarithm: bool, rank_rtol: float, cluster_rtol: float, full_rank: bool
) -> tuple[Tensor, ...]:
    """Condition number or its logarithm, and what its gradient is made of."""
    wide, scale = a, None
    if a.dtype == torch.float64:
        # kappa has no scale; singular values near the ends of the range have lost their digits.
        scale = (1.0 / _scale_of(a)).clamp(2.0**-1000, 2.0**1000)
        wide = a * scale
    largest, smallest, _, *saved = torch.ops.immunize_ext.extremal_singular_values(
        wide, rank_rtol, cluster_rtol, full_rank
    )
    singular = smallest == 0
    below, above = torch.where(singular, 1.0, smallest), torch.where(singular, 1.0, largest)
    if logarithm:
        value, first, second = above.log() - below.log(), 1.0 / above, -1.0 / below
    else:
        value, first, second = above / below, 1.0 / below, -above / below / below
    coefficients = torch.stack([first, second], -1)
    if scale is not None:
        coefficients = coefficients * scale[..., 0]
    return (
        torch.where(singular, torch.inf, value).to(a.dtype),
        torch.where(singular.unsqueeze(-1), 0.0, coefficients),
        *saved,
    )


def condition_number_backward(
    grad: Tensor,
    a: Tensor,
    coefficients: Tensor,
    multiplicity_max: Tensor,
    multiplicity_min: Tensor,
    u_max: Tensor,
    v_max: Tensor,
    u_min: Tensor,
    v_min: Tensor,
    rank_rtol: float,
    cluster_rtol: float,
    full_rank: bool,
) -> Tensor:
    """Gradient from the coefficients of d sigma_max and d sigma_min."""
    g = _batch_like("condition_number_backward", "grad", grad, a)
    of_max, of_min = (coefficients * g.unsqueeze(-1)).unbind(-1)
    vectors = (multiplicity_max, multiplicity_min, u_max, v_max, u_min, v_min)
    return extremal_singular_values_backward(
        of_max, of_min, a, *vectors, rank_rtol, cluster_rtol, full_rank
    )


# --- symmetric matrices ---------------------------------------------------------------------------


class _Eigen(NamedTuple):
    """Eigenvalues (*, p) of h / scale, descending, their vectors, and the clusters."""

    values: Tensor
    vectors: Tensor
    scale: Tensor
    top: _Extreme
    bottom: _Extreme


def _eigen(h: Tensor, cluster_rtol: float) -> _Eigen:
    scale = _scale_of(h)
    scaled = h / scale
    values, vectors = torch.linalg.eigh((scaled + scaled.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    near = cluster_rtol * values[..., (0, -1)].abs().amax(-1, keepdim=True)
    index = torch.zeros(values.shape[:-1], dtype=torch.int64, device=h.device)
    extremes = []
    for members, at in (
        (values[..., :1] - values <= near, 0),
        (values - values[..., -1:] <= near, values.shape[-1] - 1),
    ):
        every = torch.ones_like(index, dtype=torch.bool)
        extremes.append(_Extreme(index + at, members, members.sum(-1), every))
    return _Eigen(values, vectors, scale[..., 0, 0], *extremes)


def _symmetric(function: str, h: Tensor, *, one: bool = False) -> Tensor:
    """The argument in float64, if it is finite and symmetric; one matrix, if that is asked."""
    wide = _checked(function, "h", h)
    if h.shape[-1] != h.shape[-2] or (one and h.dim() != 2):
        shape = "(p, p)" if one else "(*, p, p)"
        raise ValueError(f"{function}: h must have shape {shape}, got {tuple(h.shape)}")
    scaled = wide / _scale_of(wide)
    difference = (scaled - scaled.mT).abs().amax(dim=(-2, -1))
    allowed = 8.0 * h.shape[-1] ** 0.5 * torch.finfo(h.dtype).eps
    wrong = difference > allowed * scaled.abs().amax(dim=(-2, -1))
    if bool(wrong.any()):
        place = first_true(wrong)
        apart = float((wide - wide.mT).abs().amax(dim=(-2, -1)).flatten()[place])
        raise ValueError(
            f"{function}: h must be symmetric, got entries that differ by {apart:.6g} from their "
            f"mirror image at batch index {place}; pass (h + h.mT) / 2 if the difference has no "
            "meaning"
        )
    return wide


def symmetric_extremes(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    """Algebraic extremes of symmetric h (*, p, p), their multiplicities and vectors."""
    wide = _symmetric("symmetric_extremes", h)
    e = _eigen(wide, cluster_rtol)
    return (
        _pick(e.values, e.top) * e.scale,
        _pick(e.values, e.bottom) * e.scale,
        e.top.multiplicity,
        e.bottom.multiplicity,
        _column(e.vectors, e.top),
        _column(e.vectors, e.bottom),
    )


def symmetric_pair(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    """:func:`symmetric_extremes` with values in the dtype of h."""
    largest, smallest, *rest = torch.ops.immunize_ext.symmetric_extremes(h, cluster_rtol)
    return (largest.to(h.dtype), smallest.to(h.dtype), *rest)


def symmetric_extremes_backward(
    grad_max: Tensor,
    grad_min: Tensor,
    h: Tensor,
    multiplicity_max: Tensor,
    multiplicity_min: Tensor,
    v_max: Tensor,
    v_min: Tensor,
    cluster_rtol: float,
) -> Tensor:
    """Mean of v v^T over the clusters, times the incoming gradients."""
    function = "symmetric_extremes_backward"
    first = _batch_like(function, "grad_max", grad_max, h).unsqueeze(-1)
    second = _batch_like(function, "grad_min", grad_min, h).unsqueeze(-1)
    repeated = (multiplicity_max.unsqueeze(-1) > 1) & (first != 0)
    repeated = repeated | ((multiplicity_min.unsqueeze(-1) > 1) & (second != 0))
    if not bool(repeated.any()):
        return _like(_outer(first * v_max, v_max) + _outer(second * v_min, v_min), h)
    e = _eigen(h.to(torch.float64), cluster_rtol)
    weights = first * _mean_weights(e.top) + second * _mean_weights(e.bottom)
    grad = _weighted(e.vectors, weights, e.vectors.mT)
    return _like((grad + grad.mT) / 2, h)


def symmetric_extremes_double_backward(
    cotangent: Tensor, grad_max: Tensor, grad_min: Tensor, h: Tensor, cluster_rtol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of <cotangent, gradient> by the incoming gradients and by ``h``."""
    function = "symmetric_extremes_double_backward"
    wide = _checked(function, "h", h)
    z = _same_shape(function, cotangent, h)
    z = (z + z.mT) / 2
    e = _eigen(wide, cluster_rtol)
    inner = e.vectors.mT @ z @ e.vectors
    along = inner.diagonal(dim1=-2, dim2=-1)
    total = torch.zeros_like(wide)
    found = []
    for name, grad, extreme in (
        ("lambda_max", grad_max, e.top),
        ("lambda_min", grad_min, e.bottom),
    ):
        weight = _batch_like(function, name.replace("lambda", "grad"), grad, h)
        _require_simple(function, name, weight, extreme)
        found.append((_mean_weights(extreme) * along).sum(-1))
        active = ((extreme.multiplicity == 1) & (weight != 0)).unsqueeze(-1)
        at = extreme.at.unsqueeze(-1)
        gap = e.values.gather(-1, at) - e.values
        skip = (at == torch.arange(h.shape[-1], device=h.device)) | ~active
        row = inner.gather(-1, at.unsqueeze(-2).expand(*inner.shape[:-1], 1)).squeeze(-1)
        w = (e.vectors @ (row / gap.masked_fill(skip, torch.inf)).unsqueeze(-1)).squeeze(-1)
        half = _outer(w, _column(e.vectors, extreme))
        scaled = torch.where(active, (weight / e.scale).unsqueeze(-1), 0.0).unsqueeze(-1)
        total = total + scaled * (half + half.mT)
    return found[0], found[1], _like(total, h)


def symmetric_reference(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    """Extremes of one matrix, and a state from which no warm call is served."""
    _symmetric("symmetric_reference", h, one=True)
    largest, smallest, *counts, v_max, v_min = torch.ops.immunize_ext.symmetric_extremes(
        h, cluster_rtol
    )
    p = h.shape[-1]
    width = padded_width(p)
    empty = [h.new_zeros(s, dtype=torch.float64) for s in ((p, p), (p, width), (3, width), (5,))]
    vectors = torch.stack([v_max, v_min])
    return torch.stack([largest, smallest]), torch.stack(counts), vectors, *empty


def padded_width(p: int) -> int:
    """Columns of the reflectors of a p x p matrix: whole panels of twelve."""
    return (p + 11) // 12 * 12


def symmetric_track(
    h: Tensor,
    cluster_rtol: float,
    vectors: Tensor,
    matrix: Tensor,
    reflectors: Tensor,
    tridiagonal: Tensor,
    ends: Tensor,
) -> tuple[Tensor, Tensor, bool]:
    """Not proven: the caller decomposes the matrix anew."""
    _symmetric("symmetric_track", h, one=True)
    return vectors.new_zeros(2), vectors.clone(), False


# --- precondition ---------------------------------------------------------------------------------


def precondition(grad: Tensor, factor: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """Grad K^-1 on the input side, from the Cholesky factor of K or of what K is within a basis.

    K = basis^T (L L^T - ridge I) basis + ridge I for n < p samples, so within the row space the
    solve is n x n, and beside it K is the ridge. What rounding to the dtype of grad left there is
    dropped: divided by the ridge it would drown the rest. In float64 whatever the dtype of grad.
    """
    function = "precondition"
    require_floating_matrix(function, "grad", grad)
    n, p = basis.shape[0], grad.shape[-1]
    side = n or p
    for name, value, shape in (("basis", basis, (n, p)), ("factor", factor, (side, side))):
        if value.dtype != torch.float64:
            raise ValueError(f"{function}: {name} must have dtype float64, got {value.dtype}")
        if value.shape != shape:
            raise ValueError(
                f"{function}: {name} must have shape {shape}, got {tuple(value.shape)}"
            )
    flat = grad.to(torch.float64).reshape(-1, p)
    if n == 0:
        return _like(torch.cholesky_solve(flat.mT, factor).mT, grad)
    if not ridge > 0.0:
        raise ValueError(
            f"{function}: ridge must be positive with fewer samples than features, got {ridge}"
        )
    return _like(precondition_rows(flat, factor, basis, ridge, rounding_beside(grad)), grad)


def precondition_rows(
    rows: Tensor, factor: Tensor, basis: Tensor, ridge: float, share: float | None = None
) -> Tensor:
    """Rows (*, r, p) times K^-1 in float64, beside the basis without what is a share or less."""
    wide = rows.to(torch.float64)
    within = wide @ basis.mT
    beside = wide - within @ basis
    # Squares of rows of any scale; a power of two changes no bit.
    scale = _scale_of(wide, (-1,))
    outside, size = ((part / scale).norm(dim=-1, keepdim=True) for part in (beside, wide))
    rounding = outside <= (rounding_beside(rows) if share is None else share) * size
    solved = torch.cholesky_solve(within.mT, factor).mT @ basis
    return solved + beside.masked_fill(rounding, 0.0) / ridge


def rounding_beside(grad: Tensor) -> float:
    """Share of a row that rounding may put beside the row space it was computed in."""
    return 8.0 * grad.shape[-1] ** 0.5 * torch.finfo(grad.dtype).eps


def precondition_gradient(weight: Tensor, factor: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """The weight itself; its derivative is :func:`precondition`."""
    return weight.contiguous().clone()
