"""Derivatives of the part of a merge per layer, W_l = W0_l + R_l B.

With X_n = W_n - W0 for concept weights, or one piece X = -W0 with the offset V for given values,

    R = V + [X_1 C_1^T | ... | X_N C_N^T],        W = W0 + R B,

and for G = dL/dW

    dR = G B^T,   dX_n = dR_n C_n,   dW0 = G - sum_n dX_n,   dW_n = dX_n,   dV = dR,
    dB = R^T G,   dC_n = dR_n^T X_n.

The first derivative runs in a fused kernel; those of the derivative itself are written below in
torch operations, in float64 and layer by layer, so that derivatives of every order follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from immunize_ext.ops.derivatives import below_autograd, primals_of


class MergeLayout(NamedTuple):
    """What the per-layer part of a merge has to know besides tensors; all of it static."""

    layers: int
    targets: int
    rows: tuple[int, ...]  # tokens of each concept
    targets_are_values: bool


class ApplyRule:
    """The rule of ``merge_apply``: an ``autograd.Function`` sees no tensor inside of a list."""

    @staticmethod
    def apply(
        base: list[Tensor],
        targets: list[Tensor],
        rows: Sequence[int],
        targets_are_values: bool,
        c: Tensor,
        b: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Lists in and out."""
        layers = len(base)
        layout = MergeLayout(layers, len(targets), tuple(rows), targets_are_values)
        outputs = cast(Any, _MergeApply).apply(layout, c, b, *base, *targets)
        return list(outputs[:layers]), list(outputs[layers:-1]), outputs[-1]


class ApplyBackwardRule:
    """The rule of ``merge_apply_backward``."""

    @staticmethod
    def apply(
        grad: list[Tensor],
        base: list[Tensor],
        targets: list[Tensor],
        rows: Sequence[int],
        targets_are_values: bool,
        c: Tensor,
        b: Tensor,
        residual: list[Tensor],
        *needs: bool,
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Lists in and out."""
        # Laid out one after the other, lists of another length would be taken for each other.
        for name, tensors in (("grad", grad), ("residual", residual)):
            if base and len(tensors) != len(base):
                raise ValueError(
                    f"merge_apply_backward: {name} must hold one tensor a layer, {len(base)}, got "
                    f"{len(tensors)}"
                )
        layout = MergeLayout(len(base), len(targets), tuple(rows), targets_are_values)
        outputs = cast(Any, _MergeApplyBackward).apply(
            layout, needs, c, b, *grad, *base, *targets, *residual
        )
        of_c, of_b, *weights = cast(Any, _unpack(outputs, needs, layout))
        empty = c.new_empty(0)
        return (
            weights[: layout.layers] if needs[0] else [],
            weights[layout.layers :] if needs[1] else [],
            empty if of_c is None else of_c,
            empty if of_b is None else of_b,
        )


class _MergeApply(_SingleLevelFunction):
    """From c, b, base and targets to merged weights, residuals and the status."""

    @staticmethod
    def forward(layout: MergeLayout, c: Tensor, b: Tensor, *weights: Tensor) -> Any:
        merged, residual, status = below_autograd(
            torch.ops.immunize_ext.merge_apply,
            list(weights[: layout.layers]),
            list(weights[layout.layers :]),
            layout.rows,
            layout.targets_are_values,
            c,
            b,
        )
        return (*merged, *residual, status)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # R and the status have no gradient: zeros for them would be a launch a layer on a device.
        ctx.set_materialize_grads(False)
        ctx.layout, *tensors = inputs
        *residual, status = output[ctx.layout.layers :]
        ctx.save_for_backward(*tensors, *residual)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*residual, status)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        layout: MergeLayout = ctx.layout
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        c, b, *rest = ctx.saved_tensors
        base, targets, residual = _split(layout, rest)
        _, need_c, need_b, *need_weights = ctx.needs_input_grad
        need_base, need_targets = need_weights[: layout.layers], need_weights[layout.layers :]
        needs = (any(need_base), any(need_targets), need_c, need_b)
        of_base, of_targets, of_c, of_b = torch.ops.immunize_ext.merge_apply_backward(
            # A layer that the loss does not depend on has no gradient.
            [torch.zeros_like(w) if g is None else g for g, w in zip(grads, base, strict=False)],
            base,
            targets,
            layout.rows,
            layout.targets_are_values,
            c,
            b,
            residual,
            *needs,
        )
        return (
            None,
            of_c if need_c else None,
            of_b if need_b else None,
            *(of_base if needs[0] else (None,) * layout.layers),
            *(of_targets if needs[1] else (None,) * layout.targets),
        )

    @staticmethod
    def jvp(ctx: Any, _: Any, dc: Any, db: Any, *moving: Any) -> Any:
        with _set_fwd_grad_enabled(True):
            c, b, *weights = primals_of(ctx.saved_tensors)
            tangents = []
            for layer in _layers_of(ctx.layout, c, weights):
                change = layer.change(moving)
                tangent = change.base + layer.residual_tangent(change, dc) @ b
                if db is not None:
                    tangent = tangent + layer.residual() @ db
                tangents.append(tangent.to(weights[layer.index].dtype))
        return (*tangents, *(None,) * (ctx.layout.layers + 1))


class _MergeApplyBackward(_SingleLevelFunction):
    """Gradients of base, targets, c and b, each only if needed; of c, b, dL/dW, base, targets, R.

    With Z the cotangents of its results, Zx_n = Z_n - Z_0 that of dX_n (-Z_0 for values):

        dR' = Z_V + [Zx_n C_n^T + X_n Z_C,n^T]_n        R' = G Z_B^T
        G'  = Z_0 + dR' B + R Z_B                       B' = dR'^T G
        C'_n = dR_n^T Zx_n + R'_n^T X_n                 X'_n = R'_n C_n + dR_n Z_C,n
        W0' = -sum_n X'_n                               W_n' = X'_n,  V' = R'
    """

    @staticmethod
    def forward(
        layout: MergeLayout, needs: tuple[bool, ...], c: Tensor, b: Tensor, *tensors: Tensor
    ) -> Any:
        layers = layout.layers
        base, targets, residual = _split(layout, tensors[layers:])
        grad_base, grad_targets, grad_c, grad_b = below_autograd(
            torch.ops.immunize_ext.merge_apply_backward,
            list(tensors[:layers]),
            base,
            targets,
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
        # R is computed again where it is needed: it depends on the other inputs.
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.needs, *tensors = inputs
        kept = tensors[: len(tensors) - ctx.layout.layers]
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        # Autocast would round the products to half precision.
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _double_backward(ctx.layout, ctx.needs, ctx.saved_tensors, cotangents)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, dc: Any, db: Any, *moving: Any) -> Any:
        with _set_fwd_grad_enabled(True):
            saved = primals_of(ctx.saved_tensors)
            return _backward_tangents(ctx.layout, ctx.needs, saved, dc, db, moving)


def _split(layout: MergeLayout, tensors: Sequence[Any]) -> tuple[list[Any], ...]:
    """Base, targets and what follows them."""
    base, end = layout.layers, layout.layers + layout.targets
    return list(tensors[:base]), list(tensors[base:end]), list(tensors[end:])


class _Change(NamedTuple):
    """What the kernel's inputs are of one layer, or their tangents: W0, X_n and V."""

    base: Tensor
    pieces: list[Tensor]
    offset: Tensor | float


class _Layer:
    """One layer in float64."""

    def __init__(
        self, layout: MergeLayout, index: int, c: Tensor, weights: Sequence[Tensor]
    ) -> None:
        self.layout, self.index, self.c = layout, index, c
        # Given values are one piece, W0 C^T.
        self.rows = [c.shape[-2]] if layout.targets_are_values else list(layout.rows)
        self.shape = weights[index].shape
        self.base, self.pieces, self.offset = self.change(weights)

    def change(self, weights: Sequence[Tensor | None]) -> _Change:
        """W0, X_n and V from base and targets of all layers; linear, so for tangents as well."""
        base, *targets = (
            self.c.new_zeros(()) if w is None else w.to(torch.float64)
            for w in (weights[self.index], *weights[self.layout.layers + self.index :: self.step])
        )
        base = base.expand(self.shape)
        if self.layout.targets_are_values:
            return _Change(base, [-base], targets[0])
        return _Change(base, [w - base for w in targets], 0.0)

    @property
    def step(self) -> int:
        """From a target of this layer to the next concept's."""
        return self.layout.layers

    def products(self, pieces: Sequence[Tensor], c: Tensor) -> Tensor:
        """[X_1 C_1^T | ... | X_N C_N^T]."""
        parts = zip(pieces, c.split(self.rows, -2), strict=True)
        return torch.cat([x @ c_n.mT for x, c_n in parts], -1)

    def residual(self) -> Tensor:
        """R."""
        return self.offset + self.products(self.pieces, self.c)

    def residual_tangent(self, change: _Change, dc: Tensor | None) -> Tensor:
        """DR for tangents of W0, X_n, V and C."""
        r = change.offset + self.products(change.pieces, self.c)
        return r if dc is None else r + self.products(self.pieces, dc)

    def to_pieces(self, dr: Tensor, c: Tensor) -> list[Tensor]:
        """DR_n C_n for each piece."""
        parts = zip(dr.split(self.rows, -1), c.split(self.rows, -2), strict=True)
        return [dr_n @ c_n for dr_n, c_n in parts]

    def to_tokens(self, dr: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """[dR_1^T X_1; ...; dR_N^T X_N] (s, d)."""
        parts = zip(dr.split(self.rows, -1), pieces, strict=True)
        return torch.cat([dr_n.mT @ x for dr_n, x in parts], -2)

    def place(
        self, into: list[Tensor | None], like: Sequence[Tensor], pieces: list[Tensor], dv: Tensor
    ) -> None:
        """Write the gradients of targets, those of X_n or of V, in the dtype of ``like``."""
        found = [dv] if self.layout.targets_are_values else pieces
        places = range(self.index, self.layout.targets, self.step)
        for place, gradient in zip(places, found, strict=True):
            into[place] = gradient.to(like[place].dtype)


def _layers_of(layout: MergeLayout, c: Tensor, weights: Sequence[Tensor]) -> list[_Layer]:
    return [_Layer(layout, index, c, weights) for index in range(layout.layers)]


def _double_backward(
    layout: MergeLayout,
    needs: tuple[bool, ...],
    saved: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """The formulas of :class:`_MergeApplyBackward`."""
    c, b, *rest = saved
    grads, (base, targets, _) = rest[: layout.layers], _split(layout, rest[layout.layers :])
    z_c, z_b, *z_weights = _unpack(cotangents, needs, layout)
    zc = torch.zeros_like(c) if z_c is None else z_c
    zb = torch.zeros_like(b) if z_b is None else z_b
    c_prime, b_prime = torch.zeros_like(c), torch.zeros_like(b)
    grads_prime: list[Tensor] = []
    base_prime: list[Tensor] = []
    targets_prime: list[Tensor | None] = [None] * layout.targets
    for layer in _layers_of(layout, c, [*base, *targets]):
        g = grads[layer.index].to(torch.float64)
        z = layer.change(z_weights)
        dr, r_prime = g @ b.mT, g @ zb.mT
        dr_prime = layer.residual_tangent(z, zc)
        moved = [
            x + y for x, y in zip(layer.to_pieces(r_prime, c), layer.to_pieces(dr, zc), strict=True)
        ]
        c_prime = c_prime + layer.to_tokens(dr, z.pieces) + layer.to_tokens(r_prime, layer.pieces)
        b_prime = b_prime + dr_prime.mT @ g
        g_prime = z.base + dr_prime @ b + layer.residual() @ zb
        grads_prime.append(g_prime.to(grads[layer.index].dtype))
        base_prime.append(-sum(moved[1:], moved[0]).to(base[layer.index].dtype))
        layer.place(targets_prime, targets, moved, r_prime)
    nothing = (None,) * layout.layers  # the residuals
    return (None, None, c_prime, b_prime, *grads_prime, *base_prime, *targets_prime, *nothing)


def _backward_tangents(
    layout: MergeLayout,
    needs: tuple[bool, ...],
    saved: Sequence[Tensor],
    dc: Tensor | None,
    db: Tensor | None,
    moving: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Tangents of what :class:`_MergeApplyBackward` returns: the product rule, term by term."""
    c, b, *rest = saved
    layers = layout.layers
    grads, (base, targets, _) = rest[:layers], _split(layout, rest[layers:])
    d_grads, (d_base, d_targets, _) = moving[:layers], _split(layout, moving[layers:])
    need_base, need_targets, need_c, need_b = needs
    of_c, of_b = torch.zeros_like(c), torch.zeros_like(b)
    of_base: list[Tensor] = []
    of_targets: list[Tensor | None] = [None] * layout.targets
    for layer in _layers_of(layout, c, [*base, *targets]):
        g, dg = grads[layer.index].to(torch.float64), d_grads[layer.index]
        change = layer.change([*d_base, *d_targets])
        dr = g @ b.mT
        ddr = torch.zeros_like(dr) if db is None else g @ db.mT
        of_b = of_b + layer.residual_tangent(change, dc).mT @ g
        plain = torch.zeros_like(g)
        if dg is not None:
            plain = dg.to(torch.float64)
            ddr = ddr + plain @ b.mT
            of_b = of_b + layer.residual().mT @ plain
        moved = layer.to_pieces(ddr, c)
        if dc is not None:
            moved = [x + y for x, y in zip(moved, layer.to_pieces(dr, dc), strict=True)]
        of_base.append((plain - sum(moved[1:], moved[0])).to(base[layer.index].dtype))
        layer.place(of_targets, targets, moved, ddr)
        of_c = of_c + layer.to_tokens(ddr, layer.pieces) + layer.to_tokens(dr, change.pieces)
    found: list[Any] = [*of_base] if need_base else []
    found += of_targets if need_targets else []
    return (*found, *([of_c] if need_c else []), *([of_b] if need_b else []))


def _unpack(
    outputs: Sequence[Tensor | None], needs: tuple[bool, ...], layout: MergeLayout
) -> tuple[Tensor | None, ...]:
    """Gradients of c, b, base and targets from those that were asked for, in that order."""
    found = iter(outputs)
    need_base, need_targets, need_c, need_b = needs
    weights = [next(found) if need_base else None for _ in range(layout.layers)]
    weights += [next(found) if need_targets else None for _ in range(layout.targets)]
    grad_c = next(found) if need_c else None
    grad_b = next(found) if need_b else None
    return (grad_c, grad_b, *weights)
