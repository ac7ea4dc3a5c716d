r"""Closed-form merge of adapted key/value projections.

For each layer minimise over W

.. math:: \|(W - W_0) C_{reg}^\top\|_F^2 + \text{ridge}\,\|W - W_0\|_F^2
          + \sum_j \mu_j |W c_j - v_j|^2

with mu_j = infinity for a hard constraint. The solution is

.. math:: A = Q^{-1} C^\top,\quad T = C A + \mathrm{diag}(1/\mu),\quad B = T^{-1} A^\top,\quad
          W = W_0 + (V - W_0 C^\top) B

with Q = C_reg^T C_reg + ridge I. A, T and B are the same for all layers: one Cholesky factor of Q
and one s x s system. What differs per layer runs in a fused kernel, csrc/cpu/merge.cpp, which also
has the derivatives of that part.

Derivatives of the shared part. Q^-1 and T^-1 enter through two small functions whose derivatives
are closed forms in what the forward computed already, so nothing is factorised twice:

- X = Q^-1 Y:  dY = Q^-1 dX =: S and dQ = -sym(S X^T), hence d ridge = -<S, X> and
  dC_reg = 2 C_reg dQ = -(C_reg S) X^T - (C_reg X) S^T, never a d x d matrix;
- E = T^-1:    dT = -E^T dE E^T.

Everything else is matrix products, so derivatives of every order follow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.errors import ContradictoryTargetsError
from immunize_ext.ops import composite
from immunize_ext.ops._arguments import (
    require_floating_matrix,
    require_same_device,
)
from immunize_ext.ops._dispatch import has_kernel
from immunize_ext.ops._transforms import BatchedFunction, fold_batch
from immunize_ext.ops.composite import MergeLayout
from immunize_ext.ops.factor import RegularizationFactor

# Squared sine of the angle, in the metric of Q^-1, below which a row of C counts as a combination
# of the rows before it: 1e-6 in relative distance. Token embeddings that repeat differ by nothing,
# or by the rounding of the text encoder (1e-7 in float32); distinct ones by 1e-2 and more.
REPEATED_ROW_RTOL = 1e-12


class _MergeSolve(BatchedFunction):
    """The raw solve, without derivatives: _FactorSolve and _Inverse carry them."""

    @staticmethod
    def forward(
        chol: Tensor, c: Tensor, inverse_hardness: Tensor, rank_rtol: float, average: bool
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


class _FactorSolve(BatchedFunction):
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
        s = _FactorSolve.apply(grad, c_reg, ridge, chol, None)
        grad_c_reg = grad_ridge = None
        if ctx.needs_input_grad[1]:
            wide = c_reg.to(torch.float64)
            grad_c_reg = -((wide @ s) @ x.mT + (wide @ x) @ s.mT).to(c_reg.dtype)
        if ctx.needs_input_grad[2]:
            grad_ridge = -(s * x).sum(dim=(-2, -1))
        return s, grad_c_reg, grad_ridge, None, None


class _FactorSolveDual(_FactorSolve):
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
        solved: Tensor = _FactorSolveDual.apply(right, c_reg, ridge, chol, None)
        return solved


class _Inverse(BatchedFunction):
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


class _InverseDual(_Inverse):
    """The same with a rule for forward mode, which ``torch.compile`` cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (e,) = ctx.saved_tensors
        return -(e @ tangent @ e)


class _MergeApply(torch.autograd.Function):
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
        outputs = _MergeApplyBackward.apply(layout, needs, c, b, *grads[:layers], *rest)
        return (None, *_unpack(outputs, needs, layout))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], layout: MergeLayout, *args: Any
    ) -> tuple[Any, Any]:
        folded = fold_batch(info.batch_size, in_dims[1:], args)
        outputs = _MergeApply.apply(layout, *folded)
        return outputs, (0,) * len(outputs)


class _MergeApplyDual(_MergeApply):
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
        outputs = _MergeApplyDual.apply(layout, *folded)
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


class _MergeApplyBackward(torch.autograd.Function):
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
        outputs = _MergeApplyBackward.apply(
            layout, needs, *fold_batch(info.batch_size, in_dims[2:], args)
        )
        return outputs, (0,) * len(outputs)


def _merge_apply_double_backward(
    layout: MergeLayout,
    needs: tuple[bool, ...],
    saved: Sequence[Tensor],
    cotangents: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    """The formulas of :class:`_MergeApplyBackward`, in float64, layer by layer."""
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


def _shared_part(
    c: Tensor,
    factor: RegularizationFactor,
    inverse_hardness: Tensor,
    average: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """B (s, d) with its graph, and the defect I - E T (s, s)."""
    raw = (factor.chol, c.detach(), inverse_hardness.detach(), REPEATED_ROW_RTOL, average)
    a, e, defect, _ = _MergeSolve.apply(*raw) if compiled else composite.merge_solve(*raw)
    tracing = torch.compiler.is_compiling()
    solve, inverse = (_FactorSolve, _Inverse) if tracing else (_FactorSolveDual, _InverseDual)
    source = c.new_empty(0, factor.dim) if factor.source is None else factor.source
    ridge = c.new_zeros(()) if factor.ridge_tensor is None else factor.ridge_tensor
    a = solve.apply(c.mT, source, ridge, factor.chol, a)
    t = c @ a + torch.diag_embed(inverse_hardness)
    return inverse.apply(t, e) @ a.mT, defect


def merge_kv(
    base: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]] | None,
    embeddings: Sequence[Tensor],
    factor: RegularizationFactor,
    *,
    values: Sequence[Tensor] | None = None,
    hardness: float | Tensor = torch.inf,
    contradictions: Literal["raise", "average"] = "raise",
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    r"""Merge adapted key/value projections in closed form, all layers in one call.

    .. math:: W_l = W_{0,l} + (V_l - W_{0,l} C^\top)\,(C Q^{-1} C^\top + \mathrm{diag}(1/\mu))^{-1}
              \, C Q^{-1}

    With hard constraints the merged layer maps every concept token to what the weights adapted to
    that concept map it to, and moves as little as possible on the regularisation captions.

    Equivalent to, for one layer with hard constraints and float64 throughout::

        D = C @ inv(C_reg.T @ C_reg + ridge * eye(d))
        W = W0 + (V - W0 @ C.T) @ inv(D @ C.T) @ D

    Args:
        base: W0, one (o_l, d) tensor a layer; widths o_l may differ. float16, bfloat16, float32 or
            float64; the shared part is computed in float64 whatever they are, the part per layer in
            float32 or, for float64 weights, in float64.
        concepts: ``concepts[n][l]`` (o_l, d), layer l adapted to concept n, dtype of base. None if
            values are given.
        embeddings: ``embeddings[n]`` (s_n, d), text features of concept n's prompt tokens.
        factor: Of Q, over the same width d. Gradients reach its C_reg and ridge.
        values: Instead of concepts: V_l (o_l, s), the outputs asked for, s the sum of s_n.
        hardness: mu, one number or one a row (s,). Infinite: hard constraint. Finite: soft, the
            form of UCE, TIME and MEMIT.
        contradictions: What to do with rows of C that repeat earlier ones but ask for something
            else: raise, or meet them in the least-squares sense (the mean, for exact repeats).
        names: Names of the concepts for error messages; default ``concept 0``, ``concept 1``, ...

    Returns:
        The merged weights, one (o_l, d) tensor a layer, dtype of base. A layer whose concepts equal
        base is returned bit for bit.

    Raises:
        ContradictoryTargetsError: If repeated rows ask for different outputs and contradictions is
            ``"raise"``. Rows that repeat and agree are dropped.
        ValueError: If shapes, dtypes or devices do not fit, or an argument is not finite.

    Note:
        Deterministic: sums over rows run in a fixed order. Arguments are not changed. Derivatives
        of every order, for base, concepts, values, embeddings, hardness and the factor's C_reg and
        ridge; those nobody asks for cost nothing. Where repeated rows were dropped, the gradient
        reaches the rows that were kept.

    Source:
        MIMA (AAAI 2025) and Custom Diffusion (CVPR 2023) for hard constraints, UCE (WACV 2024) for
        soft ones.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import RegularizationFactor, merge_kv
        >>> captions = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> factor = RegularizationFactor.from_embeddings(captions)
        >>> base = torch.zeros(1, 2, dtype=torch.float64)
        >>> token = torch.ones(1, 2, dtype=torch.float64)
        >>> target = torch.full((1, 1), 2.0, dtype=torch.float64)
        >>> merge_kv([base], None, [token], factor, values=[target])
        [tensor([[1.6000, 0.4000]], dtype=torch.float64)]
    """
    problem = _check_problem(base, concepts, embeddings, factor, values, hardness, names)
    if contradictions not in ("raise", "average"):
        raise ValueError(
            f"merge_kv: contradictions must be 'raise' or 'average', got {contradictions!r}"
        )
    compiled = has_kernel(base[0])
    average = contradictions == "average"
    with torch.autocast(base[0].device.type, enabled=False):
        b, defect = _shared_part(problem.c, factor, problem.inverse_hardness, average, compiled)
        layout = MergeLayout(
            layers=len(base),
            targets=len(problem.targets),
            rows=problem.rows,
            targets_are_values=values is not None,
            rank_rtol=REPEATED_ROW_RTOL,
            check=not average,
        )
        weights = (*base, *problem.targets)
        try:
            if not compiled:
                outputs = composite.merge_apply(layout, problem.c, b, defect, *weights)
            elif torch.compiler.is_compiling():
                outputs = torch.ops.immunize_ext.merge_apply(
                    base,
                    problem.targets,
                    layout.rows,
                    layout.targets_are_values,
                    problem.c,
                    b,
                    defect,
                    layout.rank_rtol,
                    layout.check,
                )[0]
            else:
                outputs = _MergeApplyDual.apply(layout, problem.c, b, defect, *weights)
        except ValueError as error:
            raise _name_contradictions(error, problem) from None
    return list(outputs[: len(base)])


class _Problem(NamedTuple):
    targets: tuple[Tensor, ...]
    rows: tuple[int, ...]
    c: Tensor  # (s, d) float64
    inverse_hardness: Tensor  # (s,) float64
    names: tuple[str, ...]


def _name_contradictions(error: ValueError, problem: _Problem) -> ValueError:
    """The kernel's error about contradictory rows, told in terms of concepts."""
    found = re.search(r"contradictory targets at rows \[([\d, ]+)\]", str(error))
    if found is None:
        return error
    rows = [int(row) for row in found.group(1).split(",")]
    owners = [
        name for name, count in zip(problem.names, problem.rows, strict=True) for _ in range(count)
    ]
    return ContradictoryTargetsError.for_rows(
        "merge_kv", rows=rows, names=[owners[row] for row in rows]
    )


def _check_problem(
    base: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]] | None,
    embeddings: Sequence[Tensor],
    factor: RegularizationFactor,
    values: Sequence[Tensor] | None,
    hardness: float | Tensor,
    names: Sequence[str] | None,
) -> _Problem:
    """Check the arguments of :func:`merge_kv` and bring them into the form of the kernels."""
    if (concepts is None) == (values is None):
        raise ValueError(
            "merge_kv: exactly one of concepts and values must be given, got "
            + ("both" if concepts is not None else "neither")
        )
    for name, sequence in (("base", base), ("embeddings", embeddings)):
        if len(sequence) == 0:
            raise ValueError(f"merge_kv: {name} must not be empty")
    dim, dtype = factor.dim, base[0].dtype
    named = [(f"base[{layer}]", w) for layer, w in enumerate(base)]
    named += [(f"embeddings[{n}]", e) for n, e in enumerate(embeddings)]
    for name, tensor in named:
        require_floating_matrix("merge_kv", name, tensor)
        if tensor.dim() != 2 or tensor.shape[1] != dim:
            raise ValueError(
                f"merge_kv: {name} must have shape (rows, {dim}), the width of the factor, got "
                f"{tuple(tensor.shape)}"
            )
    if concepts is not None:
        if len(concepts) != len(embeddings):
            raise ValueError(
                f"merge_kv: concepts and embeddings must have the same length, got {len(concepts)} "
                f"and {len(embeddings)}"
            )
        for n, layers in enumerate(concepts):
            if len(layers) != len(base):
                raise ValueError(
                    f"merge_kv: concepts[{n}] must hold one weight a layer, {len(base)}, got "
                    f"{len(layers)}"
                )
            for layer, weight in enumerate(layers):
                _check_like(f"concepts[{n}][{layer}]", weight, f"base[{layer}]", base[layer])
                named.append((f"concepts[{n}][{layer}]", weight))
    for layer, weight in enumerate(base):
        if weight.dtype != dtype:
            raise ValueError(
                f"merge_kv: base[{layer}] must have the dtype of base[0], {dtype}, got "
                f"{weight.dtype}; cast all layers alike"
            )
    c = torch.cat([e.to(torch.float64) for e in embeddings], 0)
    s = c.shape[0]
    if values is not None:
        if len(values) != len(base):
            raise ValueError(
                f"merge_kv: values must hold one tensor a layer, {len(base)}, got {len(values)}"
            )
        for layer, value in enumerate(values):
            expected = (base[layer].shape[0], s)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"merge_kv: values[{layer}] must have shape {expected}, (outputs, tokens), got "
                    f"{tuple(value.shape)}"
                )
            named.append((f"values[{layer}]", value))
    require_same_device("merge_kv", [*named, ("factor", factor.chol)])
    if concepts is not None:
        targets = tuple(weight for layers in concepts for weight in layers)
    else:
        assert values is not None
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        targets = tuple(value.to(accumulate) for value in values)
    return _Problem(
        targets=targets,
        rows=tuple(e.shape[0] for e in embeddings),
        c=c,
        inverse_hardness=_inverse_hardness(hardness, s, c),
        names=_concept_names(names, len(embeddings)),
    )


def _check_like(name: str, weight: Tensor, other_name: str, other: Tensor) -> None:
    if weight.shape != other.shape or weight.dtype != other.dtype:
        raise ValueError(
            f"merge_kv: {name} must have the shape and dtype of {other_name}, "
            f"{tuple(other.shape)} {other.dtype}, got {tuple(weight.shape)} {weight.dtype}"
        )


def _inverse_hardness(hardness: float | Tensor, s: int, c: Tensor) -> Tensor:
    mu = torch.as_tensor(hardness, dtype=torch.float64, device=c.device)
    if mu.dim() > 1 or (mu.dim() == 1 and mu.shape[0] != s):
        raise ValueError(
            f"merge_kv: hardness must be a number or have shape ({s},), one a row of the "
            f"embeddings, got {tuple(mu.shape)}"
        )
    # NaN fails every comparison, so the test is for what is allowed.
    if not torch.compiler.is_compiling() and not bool((mu.detach() > 0).all()):
        raise ValueError(
            f"merge_kv: hardness must be positive (infinite for a hard constraint), got {hardness}"
        )
    return mu.reciprocal().expand(s)


def _concept_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"concept {n}" for n in range(count))
    if len(names) != count:
        raise ValueError(f"merge_kv: names must hold {count} names, got {len(names)}")
    return tuple(names)
