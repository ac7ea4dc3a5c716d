r"""Derivatives of the second-moment merge, closed in themselves: two operators and their rules.

With X = N S^-1 for a symmetric S, and E = Xbar S^-1 for a cotangent Xbar of X,

.. math:: dX = (dN - X\, dS)\, S^{-1}, \qquad \bar N = E, \qquad
          \bar S = -\tfrac12 (X^\top E + E^\top X),

so the first derivative of ``moment_solve`` is the operator itself and products, and there are
derivatives of every order and direction from the one Cholesky factor of the forward pass.

``moment_product`` is a matrix product with its own rule for one reason: what torch differentiates
by itself is computed again under the caller's autocast, and would be rounded to half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from immunize_ext.ops.derivatives import Saved, primals_of


def solve(n: Tensor, s: Tensor, chol: Tensor) -> Tensor:
    """N S^-1 (*, o, d) from the lower Cholesky factor of S, with derivatives in N and S."""
    found: Tensor = torch.ops.immunize_ext.moment_solve(n, s, chol)
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B in the dtype of both, whatever autocast says."""
    found: Tensor = torch.ops.immunize_ext.moment_product(a, b)
    return found


class _Solve(Saved):
    """X = N S^-1."""

    operator = "moment_solve"

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _, s, chol, x = ctx.saved_tensors
        e = solve(grad, s, chol)
        of_s = None
        if ctx.needs_input_grad[1]:
            half = -0.5 * (x.mT @ e)
            of_s = half + half.mT
        return e, of_s, None

    @staticmethod
    def jvp(ctx: Any, dn: Any, ds: Any, _: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            _, s, chol, x = primals_of(ctx.saved_tensors)
            moved = torch.zeros_like(x) if dn is None else dn
            if ds is not None:
                moved = moved - x @ (0.5 * (ds + ds.mT))
            return solve(moved, s, chol)


class _Product(Saved):
    """A B."""

    operator = "moment_product"

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        a, b, _ = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return (
            product(grad, b.mT) if need_a else None,
            product(a.mT, grad) if need_b else None,
        )

    @staticmethod
    def jvp(ctx: Any, da: Any, db: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            a, b, c = primals_of(ctx.saved_tensors)
            moved = torch.zeros_like(c)
            if da is not None:
                moved = moved + product(da, b)
            if db is not None:
                moved = moved + product(a, db)
            return moved


RULES = {rule.operator: rule for rule in (_Solve, _Product)}
