"""Derivatives of an extreme singular value for the torch-only route.

``torch.linalg.svd`` differentiates singular values well once. Twice, it divides by every gap of the
matrix, also between values that nothing depends on, and turns zero times infinity into NaN. So the
first derivative is written out here, g mean(u v^T) over the cluster, and the second one too:

    d(u v^T) of a simple singular value s_i, contracted with a cotangent Z, is
    (U a + (I - U U^T) Z v / s_i) v^T + u (V b + (I - V V^T) Z^T u / s_i)^T,
    a_j = (s_i x_j + s_j y_j) / (s_i^2 - s_j^2),  b_j = (s_j x_j + s_i y_j) / (s_i^2 - s_j^2),
    x = U^T Z v,  y = V^T Z^T u,  with a_i = b_i = 0,

whose gaps are those of the one extreme. Derived in csrc/cpu/spectrum_double_backward.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from immunize_ext.ops._host import any_true
from immunize_ext.ops._transforms import BatchedFunction

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
