r"""A linear layer with fewer samples than features whose weight gradients are multiplied by K^-1.

.. math:: Y = X W^\top + b, \qquad K = X_0^\top X_0 + \text{ridge}\, I, \quad X_0 = X
          \text{ as a constant}

For a cotangent G of Y the gradients are dX = G W, db = sum of G, and

    dW = (G^T X) K^-1 = G^T (X K^-1),     X K^-1 = S^-1 X,  S = X X^T + ridge I,

where S^-1 is on the side of the samples and nothing cancels. That is an identity of numbers, not of
functions of X, since K is a constant: what moves X moves X K^-1 by K^-1 itself. So the operator
``few_rows_solve`` gives S^-1 X and has K^-1 as its derivative, and ``few_rows_weight`` is W with
K^-1 as its derivative. ``few_rows_product`` is G^T S^-1 X in the cheaper of two orders. With these
three, derivatives of every order are products of matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from immunize_ext.ops.derivatives import below_autograd, carries_tangent, primals_of
from immunize_ext.ops.fallback import precondition_rows


def few_rows_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor, ridge: float
) -> Tensor:
    """X W^T + b."""
    if weight.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    product = x @ weight.mT
    return product if bias is None else product + bias.unsqueeze(-2)


def few_rows_solve(x: Tensor, factor: Tensor, samples: Tensor, ridge: float) -> Tensor:
    """S^-1 x in float64 from the lower Cholesky factor of S, for x = samples: x K^-1."""
    return torch.cholesky_solve(x.to(torch.float64), factor).contiguous()


def few_rows_product(
    grad: Tensor, x: Tensor, factor: Tensor, samples: Tensor, ridge: float
) -> Tensor:
    """grad^T S^-1 x, which is grad^T x K^-1 for x = samples.

    With few outputs S^-1 grad is less work; it is kept in float64, as the product takes back most
    of its size where x is ill conditioned. S^-1 x has the size of the result, and may be rounded.
    """
    if grad.shape[-1] < grad.shape[-2]:
        solved = torch.cholesky_solve(grad.to(torch.float64), factor)
        product = solved.mT @ x.to(torch.float64)
    else:
        working = torch.promote_types(grad.dtype, torch.float32)
        solved = torch.cholesky_solve(x.to(torch.float64), factor).to(working)
        product = grad.to(working).mT @ solved
    return product.to(x.dtype).contiguous()


def few_rows_weight(weight: Tensor, samples: Tensor, ridge: float) -> Tensor:
    """The weight itself; its derivative is :func:`few_rows_precondition`."""
    return weight.contiguous().clone()


def few_rows_precondition(grad: Tensor, samples: Tensor, ridge: float) -> Tensor:
    """Grad K^-1 for any grad, K of the samples; only second derivatives ask for it."""
    q, r = torch.linalg.qr(samples.to(torch.float64).mT)
    k = r @ r.mT
    k.diagonal(dim1=-2, dim2=-1).add_(ridge)
    solved = precondition_rows(grad, torch.linalg.cholesky(k), q.mT, ridge)
    return solved.to(grad.dtype).contiguous()


class _FewRowsLinear(_SingleLevelFunction):
    """``few_rows_linear``: the derivatives on top of the file."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        output: Tensor = below_autograd(torch.ops.immunize_ext.few_rows_linear, *args)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        x, weight, _, factor, ctx.ridge = inputs
        ctx.save_for_backward(x, weight, factor)
        ctx.save_for_forward(x, weight, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, weight, factor = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        return (
            grad @ _held(weight, x, ctx.ridge) if need_x else None,
            _product(grad, x, factor, ctx.ridge) if need_weight else None,
            grad.sum(-2) if need_bias else None,
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        of_x: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
        *_: Any,
    ) -> Tensor:
        with _set_fwd_grad_enabled(True):
            x, weight, factor = primals_of(ctx.saved_tensors)
            total = x.new_zeros(*x.shape[:-1], weight.shape[-2])
            if of_x is not None:
                total = total + of_x @ _held(weight, x, ctx.ridge).mT
            if of_weight is not None:
                moved = _solved(x, factor, ctx.ridge) @ of_weight.to(torch.float64).mT
                total = total + moved.to(x.dtype)
            return total if of_bias is None else total + of_bias.unsqueeze(-2)


class _FewRowsProduct(_SingleLevelFunction):
    """``few_rows_product``: linear in the cotangent G and, with K a constant, in X."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        output: Tensor = below_autograd(torch.ops.immunize_ext.few_rows_product, *args)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        *tensors, ctx.ridge = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        if cotangent is None:
            return None, None, None, None, None
        grad, x, factor, samples = ctx.saved_tensors
        need_grad, need_x, *_ = ctx.needs_input_grad
        of_grad = of_x = None
        if need_grad:
            of_grad = _solved(x, factor, ctx.ridge) @ cotangent.to(torch.float64).mT
            of_grad = of_grad.to(grad.dtype)
        if need_x:
            of_x = grad @ torch.ops.immunize_ext.few_rows_precondition(
                cotangent, samples, ctx.ridge
            )
        return of_grad, of_x, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_grad: Tensor | None, of_x: Tensor | None, *_: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            grad, x, factor, samples = primals_of(ctx.saved_tensors)
            total = x.new_zeros(*x.shape[:-2], grad.shape[-1], x.shape[-1])
            if of_grad is not None:
                total = total + _product(of_grad, x, factor, ctx.ridge)
            if of_x is not None:
                total = total + grad.mT @ torch.ops.immunize_ext.few_rows_precondition(
                    of_x, samples, ctx.ridge
                )
        return total


def _product(grad: Tensor, x: Tensor, factor: Tensor, ridge: float) -> Tensor:
    product: Tensor = torch.ops.immunize_ext.few_rows_product(grad, x, factor, x.detach(), ridge)
    return product


def _held(weight: Tensor, x: Tensor, ridge: float) -> Tensor:
    differentiated = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    if not differentiated and not carries_tangent(weight):
        return weight  # a copy would be for its derivative alone
    held: Tensor = torch.ops.immunize_ext.few_rows_weight(weight, x.detach(), ridge)
    return held


def _solved(x: Tensor, factor: Tensor, ridge: float) -> Tensor:
    solved: Tensor = torch.ops.immunize_ext.few_rows_solve(x, factor, x.detach(), ridge)
    return solved


LINEAR_RULE, PRODUCT_RULE = _FewRowsLinear, _FewRowsProduct
