"""Extremal singular values, condition numbers, extremes of Gram and of symmetric matrices.

The derivative of a simple singular value is ``d sigma = u^T dA v``. At an extreme of multiplicity m
the operators return the mean of ``u_i v_i^T`` over the cluster: the element of least norm of the
Clarke subdifferential, which no choice of basis can change. No formula with
``1 / (sigma_i^2 - sigma_j^2)`` appears before the second derivative, which is refused at clusters.

The functions check arguments, fill in tolerances and name results. Values and derivatives are those
of the raw operators (``operators``, ``derivatives``), which know ``torch.func`` and compilation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.arguments import (
    RankPolicy,
    SpectrumPolicy,
    any_true,
    cluster_resolution,
    require_finite,
    require_floating_matrix,
    spectrum_policy,
)
from immunize_ext.ops.operators import is_fused

__all__ = [
    "GramExtremes",
    "SingularExtremes",
    "SymmetricExtremes",
    "condition_number",
    "extremal_singular_values",
    "gram_extremes",
    "gram_log_condition_number",
    "log_condition_number",
    "smallest_singular_values",
    "symmetric_extremes",
]


class SingularExtremes(NamedTuple):
    """Result of :func:`extremal_singular_values`; every field has the batch shape ``(*,)``."""

    sigma_max: Tensor
    sigma_min: Tensor
    rank: Tensor
    multiplicity_max: Tensor
    multiplicity_min: Tensor


class GramExtremes(NamedTuple):
    """Result of :func:`gram_extremes`; every field has the batch shape ``(*,)``."""

    lambda_max: Tensor
    lambda_min: Tensor
    squared_frobenius: Tensor
    rank: Tensor
    multiplicity_max: Tensor
    multiplicity_min: Tensor


class SymmetricExtremes(NamedTuple):
    """Result of :func:`symmetric_extremes`; every field has the batch shape ``(*,)``."""

    lambda_max: Tensor
    lambda_min: Tensor
    multiplicity_max: Tensor
    multiplicity_min: Tensor


def singular_extremes_float64(a: Tensor, policy: SpectrumPolicy) -> SingularExtremes:
    """:func:`extremal_singular_values` under a checked policy, before the cast to a's dtype."""
    return SingularExtremes(*torch.ops.immunize_ext.extremal_singular_values(a, *policy)[:5])


def gram_extremes_float64(x: Tensor, policy: SpectrumPolicy) -> GramExtremes:
    """:func:`gram_extremes` under a checked policy, before the cast to x's dtype."""
    return GramExtremes(*torch.ops.immunize_ext.gram_extremes(x, *policy)[:6])


def cluster_tolerance(function: str, h: Tensor, cluster_rtol: float | None) -> float:
    """Check a symmetric matrix argument and fill in the default tolerance."""
    require_floating_matrix(function, "h", h)
    if h.shape[-1] != h.shape[-2]:
        raise ValueError(f"{function}: h must have shape (*, p, p), got {tuple(h.shape)}")
    if cluster_rtol is None:
        return cluster_resolution(h.shape[-1], h.dtype)
    if not (math.isfinite(cluster_rtol) and 0.0 <= cluster_rtol < 1.0):
        raise ValueError(
            f"{function}: cluster_rtol must be in [0, 1), relative to the largest |lambda|, "
            f"got {cluster_rtol}"
        )
    return float(cluster_rtol)


def extremal_singular_values(
    a: Tensor,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> SingularExtremes:
    r"""Largest and smallest singular value of each matrix, with gradients right at repeated values.

    .. math:: \partial\sigma = \frac1m \sum_{i \in \text{cluster}} u_i v_i^\top

    Values equal ``scipy.linalg.svdvals(a)[[0, r - 1]]`` to a small multiple of
    ``eps * sigma_max``, with r the numerical rank.

    Args:
        a: Matrices (*, n, p), real floating point. float32 is computed in float64.
        rank: ``"numerical"``: sigma_min is the smallest singular value that counts, which is the
            pseudo-inverse definition of the condition number. ``"full"``: the min(n, p)-th, exactly
            0 with gradient 0 where it does not count.
        rank_rtol: sigma_i counts iff ``sigma_i > rank_rtol * sigma_max``. Default
            ``max(n, p) * eps`` of a's dtype (of float32 for half types).
        cluster_rtol: Singular values within ``cluster_rtol * sigma_max`` of an extreme are one
            cluster. Default ``max(n, p, 64) * eps``; widen it to smooth the gradient.

    Returns:
        ``sigma_max`` and ``sigma_min`` (*,) in a's dtype; ``rank`` (*,) int64, how many singular
        values count; ``multiplicity_max`` and ``multiplicity_min`` (*,) int64, the cluster sizes.
        The zero matrix has rank 0, both extremes 0 and gradient 0.

    Raises:
        ValueError: If ``a`` is no (*, n, p) floating-point tensor with n, p >= 1, is not finite, or
            a tolerance is outside [0, 1).
        NotImplementedError: From double backward or forward mode where an extreme is a cluster, and
            from third derivatives.

    Note:
        Deterministic. Double backward is right where the extreme is simple. The finiteness check
        reads the input on the host.

    Source:
        Clarke subdifferential of singular values: Lewis (1995), The convex analysis of unitarily
        invariant matrix functions. Use in immunization: Zheng et al., ICML 2025, eq. 1.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import extremal_singular_values
        >>> a = torch.diag(torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0], dtype=torch.float64))
        >>> a.requires_grad_()  # doctest: +ELLIPSIS
        tensor(...
        >>> extremes = extremal_singular_values(a)
        >>> extremes.sigma_max.backward()
        >>> a.grad.diagonal().tolist()  # the mean over the cluster, not one of its two vectors
        [0.0, 0.0, 0.0, 0.5, 0.5]
    """
    policy = spectrum_policy("extremal_singular_values", "a", a, rank, rank_rtol, cluster_rtol)
    extremes = singular_extremes_float64(a, policy)
    return extremes._replace(
        sigma_max=extremes.sigma_max.to(a.dtype), sigma_min=extremes.sigma_min.to(a.dtype)
    )


def gram_extremes(
    x: Tensor,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> GramExtremes:
    r"""Extreme eigenvalues and squared Frobenius norm of K = x^T x, without forming K.

    .. math:: \lambda_i(K) = \sigma_i(x)^2, \quad
              \partial\lambda_i = 2\sigma_i u_i v_i^\top, \quad
              \partial |K|_F^2 = 4 x x^\top x

    Equivalent to ``numpy.linalg.eigvalsh(x.T @ x)[[-1, -r]]``, but on the thin side and with the
    accuracy of the singular values of x: K squares the condition number, this does not.

    Args:
        x: Features (*, n, p): n samples, p features; real floating point.
        rank: As in :func:`extremal_singular_values`. K is p x p, so with ``"full"`` and n < p
            lambda_min is 0.
        rank_rtol: In units of the singular values of x, not of K. Default ``max(n, p) * eps``.
        cluster_rtol: In the same units. Default ``max(n, p, 64) * eps``.

    Returns:
        ``lambda_max``, ``lambda_min`` and ``squared_frobenius`` (*,) in x's dtype; ``rank``,
        ``multiplicity_max`` and ``multiplicity_min`` (*,) int64. ``squared_frobenius`` is of degree
        4 in x and overflows to infinity where the dtype cannot hold it.

    Raises:
        ValueError: As :func:`extremal_singular_values`.
        NotImplementedError: As :func:`extremal_singular_values`.

    Note:
        Deterministic. Double backward is right where the extreme is simple.

    Source:
        Zheng et al., ICML 2025, eq. 9 (K = X^T X, not normalised).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import gram_extremes
        >>> x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
        >>> extremes = gram_extremes(x)
        >>> extremes.lambda_max.item(), extremes.lambda_min.item(), extremes.rank.item()
        (16.0, 9.0, 2)
        >>> extremes.squared_frobenius.item()
        337.0
    """
    policy = spectrum_policy("gram_extremes", "x", x, rank, rank_rtol, cluster_rtol)
    extremes = gram_extremes_float64(x, policy)
    return extremes._replace(
        lambda_max=extremes.lambda_max.to(x.dtype),
        lambda_min=extremes.lambda_min.to(x.dtype),
        squared_frobenius=extremes.squared_frobenius.to(x.dtype),
    )


def smallest_singular_values(
    a: Tensor, count: int, *, rank: RankPolicy = "full", rank_rtol: float | None = None
) -> Tensor:
    r"""The smallest singular values of each matrix, ascending.

    .. math:: \sigma_t \le \sigma_{t-1} \le \dots \le \sigma_{t-k+1}, \quad
              \partial\sigma_i = u_i^\top\, \partial A\, v_i

    Equivalent to ``scipy.linalg.svdvals(a)[::-1][:count]``, a full decomposition.

    Args:
        a: Matrices (*, n, p), real floating point. float32 is computed in float64.
        count: How many, at most min(n, p).
        rank: ``"full"``: of all min(n, p), those that do not count exactly 0 with gradient 0.
            ``"numerical"``: of those that count.
        rank_rtol: As in :func:`extremal_singular_values`.

    Returns:
        The values (*, count) in a's dtype.

    Raises:
        ValueError: As :func:`extremal_singular_values`, if count is out of range, or if fewer than
            count values count under ``"numerical"``.

    Note:
        Deterministic. Among equal values a single one has no derivative, and gets that of one
        basis of its cluster; symmetric functions of a whole cluster, its sum for instance, have the
        right one. Second derivatives where all values are distinct.

    Source:
        Stewart and Sun 1990, theorem IV.2.3 (derivative of simple singular values).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import smallest_singular_values
        >>> smallest_singular_values(torch.diag(torch.tensor([3.0, 0.0, 1.0, 2.0])), 3)
        tensor([0., 1., 2.])
    """
    function = "smallest_singular_values"
    policy = spectrum_policy(function, "a", a, rank, rank_rtol, None)
    side = min(a.shape[-2:])
    if not 1 <= count <= side:
        raise ValueError(f"{function}: count must be between 1 and {side}, got {count}")
    require_finite(function, "a", a)
    sigma = torch.linalg.svdvals(a.to(torch.float64))
    counts = sigma.detach() > policy.rank_rtol * sigma.detach()[..., :1]
    if policy.full_rank:
        ascending = torch.where(counts, sigma, 0.0).flip(-1)
        return ascending[..., :count].to(a.dtype)
    found = counts.sum(-1, keepdim=True)
    if any_true(found < count):
        raise ValueError(
            f"{function}: count must be at most the numerical rank, got {count}; use rank='full' "
            "for zeros in the place of what does not count"
        )
    places = found - 1 - torch.arange(count, device=a.device)
    return sigma.gather(-1, places.clamp(min=0)).to(a.dtype)


def symmetric_extremes(h: Tensor, *, cluster_rtol: float | None = None) -> SymmetricExtremes:
    r"""Largest and smallest eigenvalue of each symmetric matrix, by sign and not by magnitude.

    .. math:: \partial\lambda = \frac1m \sum_{i \in \text{cluster}} v_i v_i^\top

    Equivalent to ``numpy.linalg.eigvalsh(h)[[-1, 0]]``, to a small multiple of ``eps * |h|``.

    Args:
        h: Symmetric matrices (*, p, p), real floating point, possibly indefinite. float32 is
            computed in float64. Both triangles are read; where they differ by rounding their mean
            counts.
        cluster_rtol: Eigenvalues within ``cluster_rtol * max |lambda|`` of an extreme are one
            cluster. Default ``max(p, 64) * eps`` of h's dtype (of float32 for half types).

    Returns:
        ``lambda_max`` and ``lambda_min`` (*,) in h's dtype; ``multiplicity_max`` and
        ``multiplicity_min`` (*,) int64, the cluster sizes.

    Raises:
        ValueError: If ``h`` is no (*, p, p) floating-point tensor, is not finite, or differs from
            its transpose by more than ``8 sqrt(p) eps max |h|``; or if the tolerance is outside
            [0, 1).
        NotImplementedError: On the second derivative where an extreme is repeated.

    Note:
        Deterministic, for any number of threads. The gradient is symmetric: with respect to h as a
        symmetric matrix. Double backward is right where the extreme is simple.

    Source:
        Overton 1992 (subdifferential of extreme eigenvalues); Golub and Van Loan, 8.3 and 8.4.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import symmetric_extremes
        >>> h = torch.diag(torch.tensor([-5.0, 0.1, 4.0]))
        >>> extremes = symmetric_extremes(h)
        >>> extremes.lambda_max.item(), extremes.lambda_min.item()
        (4.0, -5.0)
    """
    tolerance = cluster_tolerance("symmetric_extremes", h, cluster_rtol)
    if is_fused("symmetric_pair", h):
        largest, smallest, most, least, _, _ = torch.ops.immunize_ext.symmetric_pair(h, tolerance)
        # Autocast may have widened them.
        return SymmetricExtremes(largest.to(h.dtype), smallest.to(h.dtype), most, least)
    largest, smallest, *counts = torch.ops.immunize_ext.symmetric_extremes(h, tolerance)[:4]
    return SymmetricExtremes(largest.to(h.dtype), smallest.to(h.dtype), *counts)


def _out_of_range(sigma_max: Tensor) -> Tensor:
    """Where float64 cannot hold sigma_max, or cannot hold digits of sigma_min beside it."""
    return torch.isinf(sigma_max) | ((sigma_max > 0) & (sigma_max < 2.0**-800))


def _inverse_scale(a: Tensor) -> Tensor:
    """Power of two (*, 1, 1) that brings the largest entry of each matrix near 1; a constant."""
    _, exponent = torch.frexp(a.detach().abs().amax(dim=(-2, -1), keepdim=True))
    # Within the range of normal numbers, where products with it are exact.
    return torch.ldexp(torch.ones_like(exponent, dtype=a.dtype), (-exponent).clamp(-1000, 1000))


def _condition(a: Tensor, policy: SpectrumPolicy, logarithm: bool) -> Tensor:
    if is_fused("condition_number", a):
        fused: Tensor = torch.ops.immunize_ext.condition_number(a, logarithm, *policy)[0]
        return fused.to(a.dtype)  # autocast may have widened it
    extremes = singular_extremes_float64(a, policy)
    if a.dtype == torch.float64 and any_true(_out_of_range(extremes.sigma_max)):
        # kappa has no scale. The factor is exact, the singular values are then in range.
        extremes = singular_extremes_float64(a * _inverse_scale(a), policy)
    # Where sigma_min is 0 the condition number is infinite and, by the least-norm rule, has
    # gradient 0; the stand-in 1 keeps 0 / 0 out of the backward pass.
    singular = extremes.sigma_min == 0
    denominator = torch.where(singular, 1.0, extremes.sigma_min)
    numerator = torch.where(singular, 1.0, extremes.sigma_max)
    kappa = numerator.log() - denominator.log() if logarithm else numerator / denominator
    return torch.where(singular, torch.inf, kappa).to(a.dtype)


def condition_number(
    a: Tensor,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> Tensor:
    r"""Condition number kappa = sigma_max / sigma_min of each matrix.

    .. math:: \kappa(A) = \|A\|_2 \, \|A^+\|_2

    Equivalent to ``numpy.linalg.cond(a)`` where ``a`` has full rank.

    Args:
        a: Matrices (*, n, p), real floating point.
        rank: ``"numerical"`` leaves out singular values that do not count; ``"full"`` returns
            infinity with gradient 0 where some do not.
        rank_rtol: As in :func:`extremal_singular_values`.
        cluster_rtol: As in :func:`extremal_singular_values`.

    Returns:
        kappa (*,) in a's dtype; infinity with gradient 0 for the zero matrix.

    Raises:
        ValueError: As :func:`extremal_singular_values`.

    Note:
        Deterministic. The quotient is formed in float64, so it neither overflows nor vanishes
        before the cast. Derivatives as in :func:`extremal_singular_values`.

    Source:
        Zheng et al., ICML 2025, eq. 1.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import condition_number
        >>> condition_number(torch.tensor([[4.0, 1, 0], [1, 3, 1], [0, 1, 2]]) * 1e-25)
        tensor(3.7321)
    """
    policy = spectrum_policy("condition_number", "a", a, rank, rank_rtol, cluster_rtol)
    return _condition(a, policy, logarithm=False)


def log_condition_number(
    a: Tensor,
    *,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> Tensor:
    r"""Natural logarithm of the condition number of each matrix.

    .. math:: \log\kappa(A) = \log\sigma_{\max} - \log\sigma_{\min}

    Args:
        a: Matrices (*, n, p), real floating point.
        rank: As in :func:`condition_number`.
        rank_rtol: As in :func:`extremal_singular_values`.
        cluster_rtol: As in :func:`extremal_singular_values`.

    Returns:
        log kappa (*,) in a's dtype; infinity with gradient 0 where kappa is infinite.

    Raises:
        ValueError: As :func:`extremal_singular_values`.

    Note:
        Deterministic. The gradient does not depend on the scale of kappa, which makes this the
        better objective of the two. Derivatives as in :func:`extremal_singular_values`.

    Source:
        Zheng et al., ICML 2025, eq. 1; log form as in the metric RIR.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import log_condition_number
        >>> log_condition_number(torch.diag(torch.tensor([1.0, 10.0])))
        tensor(2.3026)
    """
    policy = spectrum_policy("log_condition_number", "a", a, rank, rank_rtol, cluster_rtol)
    return _condition(a, policy, logarithm=True)


def gram_log_condition_number(
    x: Tensor, *, floor: float = 1e-6, cluster_rtol: float | None = None
) -> Tensor:
    r"""Natural logarithm of the condition number of x^T x + floor I, without forming it.

    .. math:: \log\kappa = \log(\lambda_{\max} + \varepsilon) - \log(\lambda_{\min} + \varepsilon)

    The condition number of the published code, whose floor is 1e-6 whatever the scale of x. It is
    finite at every rank: with n < p samples lambda_min is 0, and the gradient is that of lambda_max
    alone.

    Args:
        x: Features (*, n, p), real floating point. The cost is that of the smaller side.
        floor: What is added to every eigenvalue, in units of x^T x; positive.
        cluster_rtol: As in :func:`gram_extremes`.

    Returns:
        log kappa (*,) in x's dtype; 0 for features that are all 0.

    Raises:
        ValueError: As :func:`extremal_singular_values`, or if floor is not positive.

    Note:
        Deterministic. Derivatives as in :func:`extremal_singular_values`; an eigenvalue that
        counts as 0 has gradient 0.

    Source:
        Zheng et al., ICML 2025, eq. 1, with the floor of the released code.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import gram_log_condition_number
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
        >>> round(gram_log_condition_number(x).item(), 6)  # log(4.000001 / 0.000001)
        15.201805
    """
    function = "gram_log_condition_number"
    if not (math.isfinite(floor) and floor > 0.0):
        raise ValueError(f"{function}: floor must be finite and positive, got {floor}")
    policy = spectrum_policy(function, "x", x, "full", None, cluster_rtol)
    extremes = singular_extremes_float64(x, policy)
    root = torch.full_like(extremes.sigma_max.detach(), math.sqrt(floor))
    if x.dtype == torch.float64 and any_true(torch.isinf(extremes.sigma_max)):
        scale = _inverse_scale(x)
        extremes, root = singular_extremes_float64(x * scale, policy), root * scale[..., 0, 0]
    # Of K, which has more eigenvalues than x has singular values.
    bottom = torch.zeros_like(root) if x.shape[-2] < x.shape[-1] else extremes.sigma_min
    # log(lambda + floor) = 2 log hypot(sigma, sqrt(floor)): lambda leaves the range before sigma.
    value = torch.hypot(extremes.sigma_max, root).log() - torch.hypot(bottom, root).log()
    return (2 * value).to(x.dtype)
