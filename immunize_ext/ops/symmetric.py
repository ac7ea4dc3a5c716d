"""Algebraic extremes of a symmetric matrix, a Hessian for instance, definite or not.

``d lambda = v^T dH v`` where the eigenvalue is simple; over a cluster the mean of ``v_i v_i^T``,
the element of least norm of the subdifferential. The second derivative is refused at clusters.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops import fallback as composite
from immunize_ext.ops._dispatch import has_kernel
from immunize_ext.ops.arguments import cluster_resolution, require_floating_matrix
from immunize_ext.ops.derivatives import BatchedFunction


class SymmetricExtremes(NamedTuple):
    """Result of :func:`symmetric_extremes`; every field has the batch shape ``(*,)``."""

    lambda_max: Tensor
    lambda_min: Tensor
    multiplicity_max: Tensor
    multiplicity_min: Tensor


class _SymmetricExtremes(BatchedFunction):
    @staticmethod
    def forward(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = torch.ops.immunize_ext.symmetric_extremes(h, cluster_rtol)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, ctx.cluster_rtol = inputs
        rest = output[2:]
        ctx.save_for_backward(h, *rest)
        ctx.save_for_forward(*rest)
        ctx.mark_non_differentiable(*rest)

    @staticmethod
    def backward(ctx: Any, grad_max: Tensor, grad_min: Tensor, *_: Tensor) -> tuple[Any, ...]:
        grad = _SymmetricExtremesBackward.apply(
            grad_max, grad_min, *ctx.saved_tensors, ctx.cluster_rtol
        )
        return grad, None


class _SymmetricExtremesDual(_SymmetricExtremes):
    """The same with a rule for forward mode, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Any, ...]:
        multiplicity_max, multiplicity_min, v_max, v_min = ctx.saved_tensors
        if bool(((multiplicity_max > 1) | (multiplicity_min > 1)).any()):
            raise NotImplementedError(
                "forward-mode derivatives of an extreme eigenvalue do not exist where it is "
                "repeated (multiplicity > 1); reverse mode returns the least-norm subgradient"
            )
        tangent = tangent.to(torch.float64)
        return (_quadratic(v_max, tangent), _quadratic(v_min, tangent), *(None,) * 4)


class _SymmetricExtremesBackward(BatchedFunction):
    @staticmethod
    def forward(
        grad_max: Tensor,
        grad_min: Tensor,
        h: Tensor,
        multiplicity_max: Tensor,
        multiplicity_min: Tensor,
        v_max: Tensor,
        v_min: Tensor,
        cluster_rtol: float,
    ) -> Tensor:
        grad: Tensor = torch.ops.immunize_ext.symmetric_extremes_backward(
            grad_max, grad_min, h, multiplicity_max, multiplicity_min, v_max, v_min, cluster_rtol
        )
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.cluster_rtol = inputs
        ctx.save_for_backward(*tensors[:3])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        grads = _SymmetricExtremesDoubleBackward.apply(
            cotangent, *ctx.saved_tensors, ctx.cluster_rtol
        )
        return *grads, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        # Linear in the gradients, symmetric Jacobian in h: the tangent takes the cotangent's place.
        grad_max, grad_min, h, *rest = ctx.saved_tensors
        tangent_max, tangent_min, tangent_h = tangents[:3]
        total = torch.zeros_like(h)
        if tangent_max is not None or tangent_min is not None:
            total = total + _SymmetricExtremesBackward.apply(
                torch.zeros_like(grad_max) if tangent_max is None else tangent_max,
                torch.zeros_like(grad_min) if tangent_min is None else tangent_min,
                h,
                *rest,
                ctx.cluster_rtol,
            )
        if tangent_h is not None:
            total = (
                total
                + _SymmetricExtremesDoubleBackward.apply(
                    tangent_h, grad_max, grad_min, h, ctx.cluster_rtol
                )[-1]
            )
        return total


class _SymmetricExtremesDoubleBackward(BatchedFunction):
    @staticmethod
    def forward(
        cotangent: Tensor, grad_max: Tensor, grad_min: Tensor, h: Tensor, cluster_rtol: float
    ) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.ops.immunize_ext.symmetric_extremes_double_backward(
            cotangent, grad_max, grad_min, h, cluster_rtol
        )
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError("symmetric_extremes: third derivatives are not implemented")


def _quadratic(v: Tensor, tangent: Tensor) -> Tensor:
    return (v.unsqueeze(-2) @ tangent @ v.unsqueeze(-1))[..., 0, 0]


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


def symmetric_extremes(h: Tensor, *, cluster_rtol: float | None = None) -> SymmetricExtremes:
    r"""Largest and smallest eigenvalue of each symmetric matrix, by sign and not by magnitude.

    .. math:: \partial\lambda = \frac1m \sum_{i \in \text{cluster}} v_i v_i^\top

    Equivalent to ``numpy.linalg.eigvalsh(h)[[-1, 0]]``, to a small multiple of ``eps * |h|``.

    Args:
        h: Symmetric matrices (*, p, p), real floating point, possibly indefinite. float32 is
            computed in float64. Both triangles are read; where they differ by rounding their mean
            counts.
        cluster_rtol: Eigenvalues within ``cluster_rtol * max |lambda|`` of an extreme are one
            cluster. Default ``max(p, 16) * eps`` of h's dtype (of float32 for half types).

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
    if has_kernel(h, "symmetric_extremes", "symmetric_extremes_backward"):
        function = _SymmetricExtremes if torch.compiler.is_compiling() else _SymmetricExtremesDual
        largest, smallest, *counts = function.apply(h, tolerance)[:4]
    else:
        largest, smallest, *counts = composite.symmetric_extremes(h, tolerance)
    return SymmetricExtremes(largest.to(h.dtype), smallest.to(h.dtype), *counts)
