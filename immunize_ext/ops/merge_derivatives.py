"""Derivatives of the key/value merge: the shared part, and the part per layer.

Derivatives of the shared part. Q^-1 and T^-1 enter through two small functions whose derivatives
are closed forms in what the forward computed already, so nothing is factorised twice:

- X = Q^-1 Y:  dY = Q^-1 dX =: S and dQ = -sym(S X^T), hence d ridge = -<S, X> and
  dC_reg = 2 C_reg dQ = -(C_reg S) X^T - (C_reg X) S^T, never a d x d matrix;
- E = T^-1:    dT = -E^T dE E^T.

Everything else is matrix products, so derivatives of every order follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.derivatives import BatchedFunction, fold_batch


class MergeLayout(NamedTuple):
    """What the per-layer part of a merge has to know besides tensors; all of it static."""

    layers: int
    targets: int
    rows: tuple[int, ...]  # tokens of each concept
    targets_are_values: bool
    rank_rtol: float
    check: bool


class MergeSolve(BatchedFunction):
    """The solve without derivatives: FactorSolve and Inverse carry them."""

    @staticmethod
    def forward(
        chol: Tensor,
        c: Tensor,
        inverse_hardness: Tensor,
        rank_rtol: float,
        average: bool,
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = torch.ops.immunize_ext.merge_solve(
            chol, c, inverse_hardness, rank_rtol, average
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * 5


class FactorSolve(BatchedFunction):
    """X = Q^-1 Y for Q = C_reg^T C_reg + ridge I, given L and, where it is known already, X.

    c_reg has no rows where no gradient shall reach it.
    """

    @staticmethod
    def forward(
        y: Tensor, c_reg: Tensor, ridge: Tensor, chol: Tensor, known: Tensor | None
    ) -> Tensor:
        return torch.cholesky_solve(y, chol) if known is None else known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, c_reg, ridge, chol, _ = inputs
        ctx.save_for_backward(c_reg, ridge, chol, output)
        ctx.save_for_forward(c_reg, ridge, chol, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        c_reg, ridge, chol, x = ctx.saved_tensors
        s = FactorSolve.apply(grad, c_reg, ridge, chol, None)
        grad_c_reg = grad_ridge = None
        if ctx.needs_input_grad[1]:
            wide = c_reg.to(torch.float64)
            grad_c_reg = -((wide @ s) @ x.mT + (wide @ x) @ s.mT).to(c_reg.dtype)
        if ctx.needs_input_grad[2]:
            grad_ridge = -(s * x).sum(dim=(-2, -1))
        return s, grad_c_reg, grad_ridge, None, None


class FactorSolveDual(FactorSolve):
    """The same with a rule for forward mode, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent_y: Any, tangent_c: Any, tangent_ridge: Any, *_: Any) -> Tensor:
        c_reg, ridge, chol, x = ctx.saved_tensors
        right = torch.zeros_like(x) if tangent_y is None else tangent_y
        if tangent_c is not None:
            wide, moving = c_reg.to(torch.float64), tangent_c.to(torch.float64)
            right = right - (moving.mT @ (wide @ x) + wide.mT @ (moving @ x))
        if tangent_ridge is not None:
            right = right - tangent_ridge[..., None, None] * x
        solved: Tensor = FactorSolveDual.apply(right, c_reg, ridge, chol, None)
        return solved


class Inverse(BatchedFunction):
    """E = T^-1, given E. Where T is singular, E and its derivative are generalised inverses."""

    @staticmethod
    def forward(t: Tensor, e: Tensor) -> Tensor:
        return e.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (e,) = ctx.saved_tensors
        return -(e.mT @ grad @ e.mT), None


class InverseDual(Inverse):
    """The same with a rule for forward mode, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (e,) = ctx.saved_tensors
        return -(e @ tangent @ e)


class MergeApply(torch.autograd.Function):
    """W_l = W0_l + R_l B: from c, b, defect, base and targets to merged weights and residuals R."""

    @staticmethod
    def forward(layout: MergeLayout, c: Tensor, b: Tensor, defect: Tensor, *weights: Tensor) -> Any:
        base, targets = weights[: layout.layers], weights[layout.layers :]
        merged, residual = torch.ops.immunize_ext.merge_apply(
            base,
            targets,
            layout.rows,
            layout.targets_are_values,
            c,
            b,
            defect,
            layout.rank_rtol,
            layout.check,
        )
        return (*merged, *residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.layout, c, b, _, *weights = inputs
        residual = output[ctx.layout.layers :]
        ctx.save_for_backward(c, b, *weights, *residual)
        ctx.save_for_forward(c, b, *weights, *residual)
        ctx.mark_non_differentiable(*residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        layout: MergeLayout = ctx.layout
        layers = layout.layers
        c, b, *rest = ctx.saved_tensors
        _, need_c, need_b, _, *need_weights = ctx.needs_input_grad
        needs = (any(need_weights[:layers]), any(need_weights[layers:]), need_c, need_b)
        outputs = MergeApplyBackward.apply(layout, needs, c, b, *grads[:layers], *rest)
        return (None, *_unpack(outputs, needs, layout))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], layout: MergeLayout, *args: Any
    ) -> tuple[Any, Any]:
        folded = fold_batch(info.batch_size, in_dims[1:], args)
        outputs = MergeApply.apply(layout, *folded)
        return outputs, (0,) * len(outputs)


class MergeApplyDual(MergeApply):
    """The same with a rule for forward mode, which ``torch.compile`` cannot trace.

    dW = dW0 + dR B + R dB, with dR = dV - dW0 C^T - W0 dC^T for given values and
    dR_n = (dW_n - dW0) C_n^T + (W_n - W0) dC_n^T for concept weights.
    """

    @staticmethod
    def jvp(ctx: Any, _: Any, moving_c: Any, moving_b: Any, __: Any, *moving: Any) -> Any:
        layout: MergeLayout = ctx.layout
        layers = layout.layers
        c, b, *weights = ctx.saved_tensors[: 2 + layers + layout.targets]
        residual = ctx.saved_tensors[2 + layers + layout.targets :]
        dc = torch.zeros_like(c) if moving_c is None else moving_c
        db = torch.zeros_like(b) if moving_b is None else moving_b
        wide = [w.to(torch.float64) for w in weights]
        change = [
            torch.zeros_like(w) if m is None else m.to(torch.float64)
            for w, m in zip(wide, moving, strict=True)
        ]
        tangents = []
        for layer in range(layers):
            w0, dw0 = wide[layer], change[layer]
            if layout.targets_are_values:
                dr = change[layers + layer] - dw0 @ c.mT - w0 @ dc.mT
            else:
                pieces = zip(c.split(layout.rows, -2), dc.split(layout.rows, -2), strict=True)
                dr = torch.cat(
                    [
                        (change[index] - dw0) @ c_n.mT + (wide[index] - w0) @ dc_n.mT
                        for index, (c_n, dc_n) in zip(
                            range(layers + layer, len(weights), layers), pieces, strict=True
                        )
                    ],
                    -1,
                )
            tangent = dw0 + dr @ b + residual[layer].to(torch.float64) @ db
            tangents.append(tangent.to(weights[layer].dtype))
        return (*tangents, *(None,) * layers)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], layout: MergeLayout, *args: Any
    ) -> tuple[Any, Any]:
        folded = fold_batch(info.batch_size, in_dims[1:], args)
        outputs = MergeApplyDual.apply(layout, *folded)
        return outputs, (0,) * len(outputs)


def _unpack(
    outputs: tuple[Tensor, ...], needs: tuple[bool, ...], layout: MergeLayout
) -> tuple[Tensor | None, ...]:
    """Gradients of c, b, defect, base and targets from those that were asked for, in that order."""
    found = list(outputs)
    need_base, need_targets, need_c, need_b = needs
    base = [found.pop(0) if need_base else None for _ in range(layout.layers)]
    targets = [found.pop(0) if need_targets else None for _ in range(layout.targets)]
    grad_c = found.pop(0) if need_c else None
    grad_b = found.pop(0) if need_b else None
    return (grad_c, grad_b, None, *base, *targets)


class MergeApplyBackward(torch.autograd.Function):
    """Gradients of base, targets, c and b, each only if needed.

    Its own derivative. With Z the cotangents of dW0, dW_n (or dV), dB and dC, and per layer

        dR = G B^T,  dW0 = G - dR C,  dW_n = dR_n C_n,  dB = R^T G,  dC_n = dR_n^T (W_n - W0),

    collect what multiplies each input, first through dR and R:

        dR' = -Z_0 C^T + [Z_n C_n^T + (W_n - W0) Z_C,n^T]_n,      R' = G Z_B^T

        G'  = Z_0 + dR' B + R Z_B          B'  = dR'^T G
        C'_n = -dR_n^T Z_0 + dR_n^T Z_n + R'_n^T (W_n - W0)
        W_n' = R'_n C_n + dR_n Z_C,n       W0' = -sum_n W_n'

    and for given values V, where dV = dR, dC = -dR^T W0 and R = V - W0 C^T:

        dR' = Z_V - Z_0 C^T - W0 Z_C^T,    V' = R'
        C'  = -dR^T Z_0 - R'^T W0          W0' = -R' C - dR Z_C.

    Written in torch operations, so that still higher derivatives follow.
    """

    @staticmethod
    def forward(
        layout: MergeLayout, needs: tuple[bool, ...], c: Tensor, b: Tensor, *tensors: Tensor
    ) -> Any:
        layers, targets = layout.layers, layout.targets
        grads, base = tensors[:layers], tensors[layers : 2 * layers]
        given = tensors[2 * layers : 2 * layers + targets]
        residual = tensors[2 * layers + targets :]
        grad_base, grad_targets, grad_c, grad_b = torch.ops.immunize_ext.merge_apply_backward(
            grads,
            base,
            given,
            layout.rows,
            layout.targets_are_values,
            c,
            b,
            residual,
            *needs,
        )
        shared = [g for g, need in ((grad_c, needs[2]), (grad_b, needs[3])) if need]
        return (*grad_base, *grad_targets, *shared)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.layout, ctx.needs, *tensors = inputs
        # The residual is recomputed where it is needed: it depends on the other inputs.
        ctx.save_for_backward(*tensors[: 2 + 2 * ctx.layout.layers + ctx.layout.targets])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        # Autocast would round the products below to half precision.
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _merge_apply_double_backward(
                ctx.layout, ctx.needs, ctx.saved_tensors, cotangents
            )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], layout: MergeLayout, needs: Any, *args: Any
    ) -> tuple[Any, Any]:
        outputs = MergeApplyBackward.apply(
            layout, needs, *fold_batch(info.batch_size, in_dims[2:], args)
        )
        return outputs, (0,) * len(outputs)


def _merge_apply_double_backward(
    layout: MergeLayout,
    needs: tuple[bool, ...],
    saved: Sequence[Tensor],
    cotangents: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    """The formulas of :class:`MergeApplyBackward`, in float64, layer by layer."""
    layers, rows = layout.layers, list(layout.rows)
    c, b, *rest = saved
    grads, base, given = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
    z_c, z_b, _, *z_weights = _unpack(cotangents, needs, layout)
    zero = torch.zeros((), dtype=torch.float64, device=c.device)

    def wide(tensor: Tensor | None) -> Tensor:
        return zero if tensor is None else tensor.to(torch.float64)

    zc = torch.zeros_like(c) if z_c is None else z_c
    zb = torch.zeros_like(b) if z_b is None else z_b
    c_prime, b_prime = torch.zeros_like(c), torch.zeros_like(b)
    grads_prime: list[Tensor] = []
    base_prime: list[Tensor] = []
    given_prime: list[Tensor] = [zero] * layout.targets
    for layer in range(layers):
        g, w0 = wide(grads[layer]), wide(base[layer])
        z0 = wide(z_weights[layer]).expand_as(w0)
        dr = g @ b.mT
        r_prime = g @ zb.mT
        if layout.targets_are_values:
            zv = wide(z_weights[layers + layer])
            residual = wide(given[layer]) - w0 @ c.mT
            dr_prime = zv - z0 @ c.mT - w0 @ zc.mT
            c_prime = c_prime - dr.mT @ z0 - r_prime.mT @ w0
            w0_prime = -(r_prime @ c) - dr @ zc
            given_prime[layer] = r_prime.to(given[layer].dtype)
        else:
            parts, residuals, c_parts = [], [], []
            w0_prime = torch.zeros_like(w0)
            pieces = zip(
                c.split(rows, -2),
                zc.split(rows, -2),
                dr.split(rows, -1),
                r_prime.split(rows, -1),
                strict=True,
            )
            for n, (c_n, zc_n, dr_n, rp_n) in enumerate(pieces):
                index = n * layers + layer
                difference = wide(given[index]) - w0
                zn = wide(z_weights[layers + index]).expand_as(w0)
                residuals.append(difference @ c_n.mT)
                parts.append(zn @ c_n.mT + difference @ zc_n.mT)
                c_parts.append(dr_n.mT @ zn + rp_n.mT @ difference)
                moved = rp_n @ c_n + dr_n @ zc_n
                w0_prime = w0_prime - moved
                given_prime[index] = moved.to(given[index].dtype)
            residual = torch.cat(residuals, -1)
            dr_prime = torch.cat(parts, -1) - z0 @ c.mT
            c_prime = c_prime + torch.cat(c_parts, -2) - dr.mT @ z0
        grads_prime.append((z0 + dr_prime @ b + residual @ zb).to(grads[layer].dtype))
        base_prime.append(w0_prime.to(base[layer].dtype))
        b_prime = b_prime + dr_prime.mT @ g
    nothing = (None,) * layers  # the residuals, recomputed above
    return (None, None, c_prime, b_prime, *grads_prime, *base_prime, *given_prime, *nothing)
