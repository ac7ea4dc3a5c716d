r"""Closed-form merge of adapted key/value projections.

For each layer minimise over W

.. math:: \|(W - W_0) C_{reg}^\top\|_F^2 + \text{ridge}\,\|W - W_0\|_F^2
          + \sum_j \mu_j |W c_j - v_j|^2

with mu_j = infinity for a hard constraint. The solution is

.. math:: A = Q^{-1} C^\top,\quad T = C A + \mathrm{diag}(1/\mu),\quad B = T^{-1} A^\top,\quad
          W = W_0 + (V - W_0 C^\top) B

with Q = C_reg^T C_reg + ridge I. A, T and B are the same for all layers: one Cholesky factor of Q
and one s x s system. What differs per layer runs in a fused kernel, csrc/cpu/merge.cpp. The
derivatives stand in ``_merge_functions``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.errors import NumericalWarning
from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.merge_derivatives import (
    FactorSolve,
    FactorSolveDual,
    Inverse,
    InverseDual,
    MergeApplyDual,
    MergeLayout,
    MergeSolve,
)
from immunize_ext.ops.merge_problem import MergeProblem, check_merge_problem, name_contradictions

# Squared sine of the angle, in the metric of Q^-1, below which a row of C counts as a combination
# of the rows before it: 1e-6 in relative distance. Token embeddings that repeat differ by nothing,
# or by the rounding of the text encoder (1e-7 in float32); distinct ones by 1e-2 and more.
REPEATED_ROW_RTOL = 1e-12


def _shared_part(
    c: Tensor,
    factor: RegularizationFactor,
    inverse_hardness: Tensor,
    average: bool,
) -> tuple[Tensor, Tensor]:
    """B (s, d) with its graph, and the defect I - E T (s, s)."""
    a, e, defect, _ = MergeSolve.apply(
        factor.chol, c.detach(), inverse_hardness.detach(), REPEATED_ROW_RTOL, average
    )
    tracing = torch.compiler.is_compiling()
    solve, inverse = (FactorSolve, Inverse) if tracing else (FactorSolveDual, InverseDual)
    source = c.new_empty(0, factor.dim) if factor.source is None else factor.source
    ridge = factor.ridge_tensor
    ridge = c.new_zeros(()) if ridge is None else ridge
    a = solve.apply(c.mT, source, ridge, factor.chol, a)
    t = c @ a + torch.diag_embed(inverse_hardness)
    return inverse.apply(t, e) @ a.mT, defect


class MergeSolution(NamedTuple):
    """A merge and what it is made of: W_l = W0_l + R_l B."""

    merged: list[Tensor]  # L x (o_l, d)
    residual: list[Tensor]  # R, L x (o_l, s), float32 or float64, without derivatives
    b: Tensor  # (s, d) float64
    problem: MergeProblem
    skipped: tuple[int, ...]  # layers left as they were, with residual 0


def solve_merge(
    base: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]] | None,
    embeddings: Sequence[Tensor],
    factor: RegularizationFactor,
    values: Sequence[Tensor] | None,
    hardness: float | Tensor,
    contradictions: str,
    names: Sequence[str] | None,
    on_error: str = "raise",
) -> MergeSolution:
    """:func:`merge_kv` with its intermediate results."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"merge_kv: on_error must be 'raise' or 'skip', got {on_error!r}")
    problem = check_merge_problem(base, concepts, embeddings, factor, values, hardness, names)
    if contradictions not in ("raise", "average"):
        raise ValueError(
            f"merge_kv: contradictions must be 'raise' or 'average', got {contradictions!r}"
        )
    average = contradictions == "average"
    with torch.autocast(base[0].device.type, enabled=False):
        b, defect = _shared_part(problem.c, factor, problem.inverse_hardness, average)
        layout = MergeLayout(
            layers=len(base),
            targets=len(problem.targets),
            rows=problem.rows,
            targets_are_values=values is not None,
            rank_rtol=REPEATED_ROW_RTOL,
            check=not average,
        )
        skipped: tuple[int, ...] = ()
        try:
            merged, residual = _apply(layout, problem, b, defect, base)
        except ValueError as error:
            named = name_contradictions(error, problem)
            if on_error == "raise":
                raise named from None
            merged, residual, skipped = _apply_one_by_one(layout, problem, b, defect, base)
    return MergeSolution(merged, residual, b, problem, skipped)


def _apply_one_by_one(
    layout: MergeLayout,
    problem: MergeProblem,
    b: Tensor,
    defect: Tensor,
    base: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], tuple[int, ...]]:
    """The part per layer for each layer alone; those that fail stay as they are, with a warning.

    Layers are independent and sums run in a fixed order, so the others get the bits they would
    have got in one call.
    """
    merged: list[Tensor] = []
    residual: list[Tensor] = []
    reasons: dict[int, str] = {}
    accumulate = torch.float64 if base[0].dtype == torch.float64 else torch.float32
    for layer, weight in enumerate(base):
        alone = problem._replace(targets=problem.targets[layer :: layout.layers])
        single = layout._replace(layers=1, targets=len(alone.targets))
        try:
            (w,), (r,) = _apply(single, alone, b, defect, [weight])
        except ValueError as error:
            # The kernel saw one layer and calls it number 0.
            reasons[layer] = str(name_contradictions(error, alone)).removeprefix("merge_kv: ")
            w = weight.clone()
            r = weight.new_zeros(weight.shape[0], problem.c.shape[0], dtype=accumulate)
        merged.append(w)
        residual.append(r)
    told = "; ".join(f"layer {layer} (alone: {reason})" for layer, reason in reasons.items())
    warnings.warn(
        f"merge_kv: {len(reasons)} of {len(base)} layers were left as they are: {told}",
        NumericalWarning,
        stacklevel=4,
    )
    return merged, residual, tuple(reasons)


def _apply(
    layout: MergeLayout,
    problem: MergeProblem,
    b: Tensor,
    defect: Tensor,
    base: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    if torch.compiler.is_compiling():
        merged, residual = torch.ops.immunize_ext.merge_apply(
            base,
            problem.targets,
            layout.rows,
            layout.targets_are_values,
            problem.c,
            b,
            defect,
            layout.rank_rtol,
            layout.check,
        )
        return list(merged), list(residual)
    outputs = MergeApplyDual.apply(layout, problem.c, b, defect, *base, *problem.targets)
    return list(outputs[: layout.layers]), list(outputs[layout.layers :])


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
    on_error: Literal["raise", "skip"] = "raise",
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
        on_error: What to do where a layer cannot be merged (a weight that is not finite, targets
            that contradict each other there, a result its dtype cannot hold): raise, or return that
            layer as it is, with a :class:`~immunize_ext.errors.NumericalWarning` that names it and
            says why. The other layers get the same bits either way. What concerns all layers
            (embeddings, shapes, the factor) raises always.

    Returns:
        The merged weights, one (o_l, d) tensor a layer, dtype of base. A layer whose concepts equal
        base is returned bit for bit.

    Raises:
        ContradictoryTargetsError: If repeated rows ask for different outputs and contradictions is
            ``"raise"``. Rows that repeat and agree are dropped.
        ValueError: If shapes, dtypes or devices do not fit, an argument is not finite, or the dtype
            of base cannot hold the result.

    Note:
        Deterministic: sums over rows run in a fixed order. With compiled operators on a CPU, and
        without averaging of contradictions, no bit of the result or of the gradients of weights
        depends on the number of threads, given the factor; gradients of embeddings, C_reg, ridge
        and hardness pass through LAPACK and may differ in the last ones. Arguments are not
        changed. Derivatives
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
    return solve_merge(
        base, concepts, embeddings, factor, values, hardness, contradictions, names, on_error
    ).merged
