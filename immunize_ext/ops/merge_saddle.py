r"""Derivatives of the part of a merge that all layers share: B as a function of C, Q and 1/mu.

With D = diag(1/mu), B belongs to the inverse of one symmetric saddle-point matrix,

.. math:: \begin{pmatrix} Q & C^\top \\ C & -D \end{pmatrix}^{-1}
          = \begin{pmatrix} S & B^\top \\ B & -E \end{pmatrix},\qquad
          E = T^{-1},\quad B = E C Q^{-1},\quad S = Q^{-1} - Q^{-1} C^\top B,

so dM = -M dK M gives every derivative in terms of S, B and E themselves:

- dB = E dC S - B dC^T B - B dQ S - E dD B
- dS = -S dQ S - S dC^T B - B^T dC S + B^T dD B
- dE = -E dC B^T - B dC^T E + B dQ B^T - E dD E

where :math:`dQ = dC_{reg}^\top C_{reg} + C_{reg}^\top dC_{reg} + d\,ridge\, I`. Three functions,
B, F -> S F and G -> E G, have derivatives in one another; so there are derivatives of every order,
and nothing is factorised twice. E meets a cotangent once, and only what S left of it: two inverses
of T, as in E (dB A) E, would lose twice the digits of the angle between two tokens.

They are raw operators of their own, ``merge_constraint_map``, ``merge_free_solve`` and
``merge_constraint_solve``, with these rules at the dispatcher.

E = H H^T and S = L^-T (I - Z H (Z H)^T) L^-1 with Q = L L^T and Z = L^-1 C^T, from the root H and
the orthonormal basis Z H that the forward pass found. Where T is singular, E is a generalised
inverse with dE = -E dT E, and all of this holds as it stands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from immunize_ext.ops.derivatives import Saved, primals_of

SADDLE_SCHEMA = (
    "Tensor c, Tensor inverse_hardness, Tensor source, Tensor ridge, Tensor chol, Tensor root, "
    "Tensor basis, Tensor b"
)


class Saddle(NamedTuple):
    """What B depends on, and what the forward pass found. Leading batch dimensions throughout."""

    c: Tensor  # (s, d)
    inverse_hardness: Tensor  # (s,)
    source: Tensor  # C_reg (m, d); no rows where no gradient shall reach it
    ridge: Tensor  # (), the absolute ridge
    chol: Tensor  # (d, d), L
    root: Tensor  # (s, s), H
    basis: Tensor  # (d, s), Z H
    b: Tensor  # (s, d)


_CONSTANTS = (None, None, None, None)  # chol, root, basis and b have no derivative of their own


def constraint_map(saddle: Saddle) -> Tensor:
    """B (s, d) with its derivatives."""
    found: Tensor = torch.ops.immunize_ext.merge_constraint_map(*saddle)
    return found


def _solve_free(f: Tensor, saddle: Saddle) -> Tensor:
    """S F (d, k): what of Q^-1 F meets no constraint."""
    found: Tensor = torch.ops.immunize_ext.merge_free_solve(f, *saddle)
    return found


def _solve_constraints(g: Tensor, saddle: Saddle) -> Tensor:
    """E G (s, k)."""
    found: Tensor = torch.ops.immunize_ext.merge_constraint_solve(g, *saddle)
    return found


def _outer_gradients(
    saddle: Saddle, left: Tensor, right: Tensor, sign: float, needs: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of C_reg and ridge for dL/dQ = sign sym(left right), (d, k) and (k, d).

    dL/dC_reg = 2 C_reg dL/dQ, never by way of a d x d matrix.
    """
    grad_source = grad_ridge = None
    if needs[0]:
        wide = saddle.source.to(torch.float64)
        moved = (wide @ left) @ right + (wide @ right.mT) @ left.mT
        grad_source = (sign * moved).to(saddle.source.dtype)
    if needs[1]:
        grad_ridge = sign * (left.mT * right).sum(dim=(-2, -1))
    return grad_source, grad_ridge


def _moved_q(saddle: Saddle, x: Tensor, source: Tensor | None, ridge: Tensor | None) -> Tensor:
    """DQ X (d, k) for tangents of C_reg and ridge."""
    result = torch.zeros_like(x)
    if source is not None:
        wide, moving = saddle.source.to(torch.float64), source.to(torch.float64)
        result = result + moving.mT @ (wide @ x) + wide.mT @ (moving @ x)
    if ridge is not None:
        result = result + ridge[..., None, None] * x
    return result


class _ConstraintMap(Saved):
    """B, given B."""

    operator = "merge_constraint_map"

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *inputs, b = ctx.saved_tensors
        saddle = Saddle(*inputs)._replace(b=b)
        need_c, need_d, *need_q = ctx.needs_input_grad[:4]
        grad_c = grad_d = None
        u = grad
        if need_c or any(need_q):
            u = _solve_free(grad.mT, saddle).mT
        if need_c:
            grad_c = _solve_constraints(u, saddle) - (b @ grad.mT) @ b
        if need_d:
            grad_d = -(_solve_constraints(grad, saddle) * b).sum(-1)
        of_q = _outer_gradients(saddle, b.mT, u, -1.0, need_q)
        return (grad_c, grad_d, *of_q, *_CONSTANTS)

    @staticmethod
    def jvp(ctx: Any, dc: Any, dd: Any, source: Any, ridge: Any, *_: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            *inputs, b = primals_of(ctx.saved_tensors)
            saddle = Saddle(*inputs)._replace(b=b)
            right = _moved_q(saddle, b.mT, source, ridge)  # dQ B^T
            pulled = torch.zeros_like(b)
            moved = torch.zeros_like(b)
            if dc is not None:
                pulled = pulled + _solve_free(dc.mT, saddle).mT
                moved = moved - (b @ dc.mT) @ b
            if dd is not None:
                pulled = pulled - dd.unsqueeze(-1) * b
            if source is not None or ridge is not None:
                moved = moved - _solve_free(right, saddle).mT
            return moved + _solve_constraints(pulled, saddle)


class _FreeSolve(Saved):
    """X = S F."""

    operator = "merge_free_solve"

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        f, *inputs, x = ctx.saved_tensors
        saddle = Saddle(*inputs)
        _, need_c, need_d, *need_q = ctx.needs_input_grad[:5]
        h = _solve_free(grad, saddle)
        grad_c = grad_d = None
        if need_c or need_d:
            bf, bg = saddle.b @ f, saddle.b @ grad
            grad_c = -(bf @ h.mT) - bg @ x.mT
            grad_d = (bf * bg).sum(-1)
        of_q = _outer_gradients(saddle, h, x.mT, -1.0, need_q)
        return (h, grad_c, grad_d, *of_q, *_CONSTANTS)

    @staticmethod
    def jvp(ctx: Any, df: Any, dc: Any, dd: Any, source: Any, ridge: Any, *_: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            f, *inputs, x = primals_of(ctx.saved_tensors)
            saddle = Saddle(*inputs)
            bf = saddle.b @ f
            free = -_moved_q(saddle, x, source, ridge)
            met = torch.zeros_like(bf)
            if df is not None:
                free = free + df
            if dc is not None:
                free = free - dc.mT @ bf
                met = met - dc @ x
            if dd is not None:
                met = met + dd.unsqueeze(-1) * bf
            return _solve_free(free, saddle) + saddle.b.mT @ met


class _ConstraintSolve(Saved):
    """Y = E G."""

    operator = "merge_constraint_solve"

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        g, *inputs, y = ctx.saved_tensors
        saddle = Saddle(*inputs)
        _, need_c, need_d, *need_q = ctx.needs_input_grad[:5]
        k = _solve_constraints(grad, saddle)
        grad_c = grad_d = None
        p, q = g, grad
        if need_c or any(need_q):
            p, q = saddle.b.mT @ g, saddle.b.mT @ grad
        if need_c:
            grad_c = -(k @ p.mT) - y @ q.mT
        if need_d:
            grad_d = -(k * y).sum(-1)
        of_q = _outer_gradients(saddle, q, p.mT, 1.0, need_q)
        return (k, grad_c, grad_d, *of_q, *_CONSTANTS)

    @staticmethod
    def jvp(ctx: Any, dg: Any, dc: Any, dd: Any, source: Any, ridge: Any, *_: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            g, *inputs, y = primals_of(ctx.saved_tensors)
            saddle = Saddle(*inputs)
            p = saddle.b.mT @ g
            free = _moved_q(saddle, p, source, ridge)
            met = torch.zeros_like(y)
            if dg is not None:
                met = met + dg
            if dc is not None:
                free = free - dc.mT @ y
                met = met - dc @ p
            if dd is not None:
                met = met - dd.unsqueeze(-1) * y
            return _solve_constraints(met, saddle) + saddle.b @ free


RULES = {rule.operator: rule for rule in (_ConstraintMap, _FreeSolve, _ConstraintSolve)}
