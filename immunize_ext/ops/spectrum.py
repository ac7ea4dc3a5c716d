"""Extremal singular values, their condition number, and the extremes of a Gram matrix.

The derivative of a simple singular value is ``d sigma = u^T dA v``. At an extreme of multiplicity m
the operators return the mean of ``u_i v_i^T`` over the cluster: the element of least norm of the
Clarke subdifferential, which no choice of basis can change. No formula with
``1 / (sigma_i^2 - sigma_j^2)`` appears before the second derivative, which is refused at clusters.

Each operator is an ``autograd.Function`` over the registered kernels, with its backward another
one. That is what makes ``torch.func``, ``vmap``, ``torch.compile`` and double backward work alike;
on a device without a kernel the functions of ``composite`` are called instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops import fallback as composite
from immunize_ext.ops._dispatch import has_kernel
from immunize_ext.ops.arguments import RankPolicy, SpectrumPolicy, spectrum_policy
from immunize_ext.ops.derivatives import BatchedFunction
from immunize_ext.ops.symmetric import SymmetricExtremes, symmetric_extremes

__all__ = [
    "GramExtremes",
    "SingularExtremes",
    "SymmetricExtremes",
    "condition_number",
    "extremal_singular_values",
    "gram_extremes",
    "log_condition_number",
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


class _ExtremalSingularValues(BatchedFunction):
    @staticmethod
    def forward(
        a: Tensor, rank_rtol: float, cluster_rtol: float, full_rank: bool
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = torch.ops.immunize_ext.extremal_singular_values(
            a, rank_rtol, cluster_rtol, full_rank
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        a, *ctx.policy = inputs
        _, _, rank, *rest = output
        ctx.save_for_backward(a, *rest)
        ctx.save_for_forward(*rest)
        ctx.mark_non_differentiable(rank, *rest)

    @staticmethod
    def backward(ctx: Any, grad_max: Tensor, grad_min: Tensor, *_: Tensor) -> tuple[Any, ...]:
        grad = _ExtremalSingularValuesBackward.apply(
            grad_max, grad_min, *ctx.saved_tensors, *ctx.policy
        )
        return grad, None, None, None


class _ExtremalSingularValuesDual(_ExtremalSingularValues):
    """The same with a rule for forward mode, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Any, ...]:
        multiplicity_max, multiplicity_min, u_max, v_max, u_min, v_min = ctx.saved_tensors
        _refuse_forward_mode_at_clusters(multiplicity_max, u_max)
        _refuse_forward_mode_at_clusters(multiplicity_min, u_min)
        tangent = tangent.to(torch.float64)
        return (
            _bilinear(u_max, tangent, v_max),
            _bilinear(u_min, tangent, v_min),
            *(None,) * 7,
        )


class _ExtremalSingularValuesBackward(BatchedFunction):
    @staticmethod
    def forward(
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
        grad: Tensor = torch.ops.immunize_ext.extremal_singular_values_backward(
            grad_max,
            grad_min,
            a,
            multiplicity_max,
            multiplicity_min,
            u_max,
            v_max,
            u_min,
            v_min,
            rank_rtol,
            cluster_rtol,
            full_rank,
        )
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, rank_rtol, cluster_rtol, full_rank = inputs
        ctx.policy = (rank_rtol, cluster_rtol, full_rank)
        ctx.save_for_backward(*tensors[:3])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        grads = _ExtremalSingularValuesDoubleBackward.apply(
            cotangent, *ctx.saved_tensors, *ctx.policy
        )
        return *grads, *(None,) * 9

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        # grad_a is linear in the incoming gradients and, as a gradient, has a symmetric Jacobian in
        # a: the tangent takes the place of the cotangent of the double backward.
        grad_max, grad_min, a, *rest = ctx.saved_tensors
        tangent_max, tangent_min, tangent_a = tangents[:3]
        total = torch.zeros_like(a)
        if tangent_max is not None or tangent_min is not None:
            total = total + _ExtremalSingularValuesBackward.apply(
                torch.zeros_like(grad_max) if tangent_max is None else tangent_max,
                torch.zeros_like(grad_min) if tangent_min is None else tangent_min,
                a,
                *rest,
                *ctx.policy,
            )
        if tangent_a is not None:
            total = (
                total
                + _ExtremalSingularValuesDoubleBackward.apply(
                    tangent_a, grad_max, grad_min, a, *ctx.policy
                )[-1]
            )
        return total


class _ExtremalSingularValuesDoubleBackward(BatchedFunction):
    @staticmethod
    def forward(
        cotangent: Tensor,
        grad_max: Tensor,
        grad_min: Tensor,
        a: Tensor,
        rank_rtol: float,
        cluster_rtol: float,
        full_rank: bool,
    ) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.ops.immunize_ext.extremal_singular_values_double_backward(
            cotangent, grad_max, grad_min, a, rank_rtol, cluster_rtol, full_rank
        )
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError("extremal_singular_values: third derivatives are not implemented")


class _GramExtremes(BatchedFunction):
    @staticmethod
    def forward(
        x: Tensor, rank_rtol: float, cluster_rtol: float, full_rank: bool
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = torch.ops.immunize_ext.gram_extremes(
            x, rank_rtol, cluster_rtol, full_rank
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *ctx.policy = inputs
        lambda_max, lambda_min, _, rank, *rest = output
        ctx.save_for_backward(x, lambda_max, lambda_min, *rest)
        ctx.save_for_forward(x, lambda_max, lambda_min, *rest)
        ctx.mark_non_differentiable(rank, *rest)

    @staticmethod
    def backward(
        ctx: Any, grad_max: Tensor, grad_min: Tensor, grad_frobenius: Tensor, *_: Tensor
    ) -> tuple[Any, ...]:
        grad = _GramExtremesBackward.apply(
            grad_max, grad_min, grad_frobenius, *ctx.saved_tensors, *ctx.policy
        )
        return grad, None, None, None


class _GramExtremesDual(_GramExtremes):
    """The same with a rule for forward mode, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Any, ...]:
        x, lambda_max, lambda_min, multiplicity_max, multiplicity_min, *vectors, thin = (
            ctx.saved_tensors
        )
        u_max, v_max, u_min, v_min = vectors
        _refuse_forward_mode_at_clusters(multiplicity_max, u_max)
        _refuse_forward_mode_at_clusters(multiplicity_min, u_min)
        x, tangent = x.to(torch.float64), tangent.to(torch.float64)
        cubic = thin @ x if x.shape[-2] <= x.shape[-1] else x @ thin  # x x^T x
        return (
            2.0 * lambda_max.sqrt() * _bilinear(u_max, tangent, v_max),
            2.0 * lambda_min.sqrt() * _bilinear(u_min, tangent, v_min),
            4.0 * (cubic * tangent).sum(dim=(-2, -1)),
            *(None,) * 8,
        )


class _GramExtremesBackward(BatchedFunction):
    @staticmethod
    def forward(
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
        grad: Tensor = torch.ops.immunize_ext.gram_extremes_backward(
            grad_max,
            grad_min,
            grad_squared_frobenius,
            x,
            lambda_max,
            lambda_min,
            multiplicity_max,
            multiplicity_min,
            u_max,
            v_max,
            u_min,
            v_min,
            thin_gram,
            rank_rtol,
            cluster_rtol,
            full_rank,
        )
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, rank_rtol, cluster_rtol, full_rank = inputs
        ctx.policy = (rank_rtol, cluster_rtol, full_rank)
        ctx.save_for_backward(*tensors[:4])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        grads = _GramExtremesDoubleBackward.apply(cotangent, *ctx.saved_tensors, *ctx.policy)
        return *grads, *(None,) * 12

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        # As for singular values: linear in the gradients, symmetric in x.
        *grads, x = ctx.saved_tensors[:4]
        *tangent_grads, tangent_x = tangents[:4]
        total = torch.zeros_like(x)
        if any(tangent is not None for tangent in tangent_grads):
            filled = [
                torch.zeros_like(grad) if tangent is None else tangent
                for grad, tangent in zip(grads, tangent_grads, strict=True)
            ]
            total = total + _GramExtremesBackward.apply(
                *filled, *ctx.saved_tensors[3:], *ctx.policy
            )
        if tangent_x is not None:
            total = total + _GramExtremesDoubleBackward.apply(tangent_x, *grads, x, *ctx.policy)[-1]
        return total


class _GramExtremesDoubleBackward(BatchedFunction):
    @staticmethod
    def forward(
        cotangent: Tensor,
        grad_max: Tensor,
        grad_min: Tensor,
        grad_squared_frobenius: Tensor,
        x: Tensor,
        rank_rtol: float,
        cluster_rtol: float,
        full_rank: bool,
    ) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.ops.immunize_ext.gram_extremes_double_backward(
            cotangent,
            grad_max,
            grad_min,
            grad_squared_frobenius,
            x,
            rank_rtol,
            cluster_rtol,
            full_rank,
        )
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError("gram_extremes: third derivatives are not implemented")


def _bilinear(u: Tensor, tangent: Tensor, v: Tensor) -> Tensor:
    return (u.unsqueeze(-2) @ tangent @ v.unsqueeze(-1))[..., 0, 0]


def _refuse_forward_mode_at_clusters(multiplicity: Tensor, u: Tensor) -> None:
    # A zero vector marks an extreme whose derivative is zero, however many values coincide there.
    if bool(((multiplicity > 1) & (u != 0).any(-1)).any()):
        raise NotImplementedError(
            "forward-mode derivatives of an extreme singular value do not exist where it is "
            "repeated (multiplicity > 1); reverse mode returns the least-norm subgradient"
        )


def _function(plain: Any, dual: Any) -> Any:
    return plain if torch.compiler.is_compiling() else dual


def singular_extremes_float64(a: Tensor, policy: SpectrumPolicy) -> SingularExtremes:
    """:func:`extremal_singular_values` under a checked policy, before the cast to a's dtype."""
    if has_kernel(a, "extremal_singular_values", "extremal_singular_values_backward"):
        sigma_max, sigma_min, *counts = _function(
            _ExtremalSingularValues, _ExtremalSingularValuesDual
        ).apply(a, *policy)[:5]
        return SingularExtremes(sigma_max, sigma_min, *counts)
    return SingularExtremes(*composite.extremal_singular_values(a, policy))


def gram_extremes_float64(x: Tensor, policy: SpectrumPolicy) -> GramExtremes:
    """:func:`gram_extremes` under a checked policy, before the cast to x's dtype."""
    if has_kernel(x, "gram_extremes", "gram_extremes_backward"):
        largest, smallest, frobenius, *counts = _function(_GramExtremes, _GramExtremesDual).apply(
            x, *policy
        )[:6]
        return GramExtremes(largest, smallest, frobenius, *counts)
    (largest, smallest, *counts), frobenius = composite.gram_extremes(x, policy)
    return GramExtremes(largest, smallest, frobenius, *counts)


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
            cluster. Default ``max(n, p, 16) * eps``; widen it to smooth the gradient.

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
        cluster_rtol: In the same units. Default ``max(n, p, 16) * eps``.

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


def _condition(extremes: SingularExtremes, logarithm: bool) -> Tensor:
    # Where sigma_min is 0 the condition number is infinite and, by the least-norm rule, has
    # gradient 0; the stand-in 1 keeps 0 / 0 out of the backward pass.
    singular = extremes.sigma_min == 0
    denominator = torch.where(singular, 1.0, extremes.sigma_min)
    numerator = torch.where(singular, 1.0, extremes.sigma_max)
    kappa = numerator.log() - denominator.log() if logarithm else numerator / denominator
    return torch.where(singular, torch.inf, kappa)


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
    return _condition(singular_extremes_float64(a, policy), logarithm=False).to(a.dtype)


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
    return _condition(singular_extremes_float64(a, policy), logarithm=True).to(a.dtype)
