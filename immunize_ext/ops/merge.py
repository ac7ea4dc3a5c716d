r"""Closed-form merge of adapted key/value projections.

For each layer minimise over W

.. math:: \|(W - W_0) C_{reg}^\top\|_F^2 + \text{ridge}\,\|W - W_0\|_F^2
          + \sum_j \mu_j |W c_j - v_j|^2

with mu_j = infinity for a hard constraint. The solution is

.. math:: A = Q^{-1} C^\top,\quad T = C A + \mathrm{diag}(1/\mu),\quad B = T^{-1} A^\top,\quad
          W = W_0 + (V - W_0 C^\top) B

with Q = C_reg^T C_reg + ridge I. A, T and B are the same for all layers: one Cholesky factor of Q
and one s x s system. What differs per layer runs in a fused kernel, csrc/cpu/merge.cpp. The
derivatives stand in ``merge_saddle`` and ``merge_derivatives``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.errors import ContradictoryTargetsError, NumericalWarning
from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.merge_problem import (
    REPEATED_ROW_RTOL,
    MergeProblem,
    check_merge_problem,
    contradiction,
    faults_of_layers,
)
from immunize_ext.ops.merge_saddle import Saddle, constraint_map


class MergeSolution(NamedTuple):
    """A merge and what it is made of: W_l = W0_l + R_l B."""

    merged: list[Tensor]  # L x (o_l, d)
    residual: list[Tensor]  # R, L x (o_l, s), float32 or float64, without derivatives
    b: Tensor  # (s, d) float64
    problem: MergeProblem
    skipped: tuple[int, ...] = ()  # layers left as they were, with residual 0


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
        b, defect, rank = shared_part(problem, factor, average)
        merged, residual, status = _apply(problem, b)
        faults = faults_of_layers(problem, factor, (defect, rank), residual, status, average)
        if not faults:
            return MergeSolution(merged, residual, b, problem)
        if on_error == "raise":
            raise _first_of(problem, faults)
        return _without(problem, b, faults)


def shared_part(
    problem: MergeProblem, factor: RegularizationFactor, average: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """B (s, d) with its derivatives, the defect I - E T (s, s) and the rank of T."""
    c = problem.c
    b, root, basis, defect, rank = torch.ops.immunize_ext.merge_solve(
        factor.chol, c.detach(), problem.inverse_hardness.detach(), REPEATED_ROW_RTOL, average
    )
    source = c.new_empty(0, factor.dim) if factor.source is None else factor.source
    ridge = factor.ridge_tensor
    ridge = c.new_zeros(()) if ridge is None else ridge
    saddle = Saddle(c, problem.inverse_hardness, source, ridge, factor.chol, root, basis, b)
    return constraint_map(saddle), defect, rank


def _apply(problem: MergeProblem, b: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    base, targets = list(problem.base), list(problem.targets)
    outputs: tuple[list[Tensor], list[Tensor], Tensor] = torch.ops.immunize_ext.merge_apply(
        base, targets, problem.rows, problem.targets_are_values, problem.c, b
    )
    return outputs


def _first_of(problem: MergeProblem, faults: dict[int, ValueError]) -> ValueError:
    """The error to raise: the first layer's, or all contradictions in one."""
    first = faults[min(faults)]
    if not isinstance(first, ContradictoryTargetsError):
        return first
    found = [fault for fault in faults.values() if isinstance(fault, ContradictoryTargetsError)]
    return contradiction(problem, sorted({row for fault in found for row in fault.rows}))


def _without(problem: MergeProblem, b: Tensor, faults: dict[int, ValueError]) -> MergeSolution:
    """The merge of the other layers; those at fault stay as they are, with a warning.

    Layers are independent and sums run in a fixed order, so the others get the bits they would
    have got in one call, and their gradients meet nothing that is not finite.
    """
    layers = len(problem.base)
    good = [layer for layer in range(layers) if layer not in faults]
    wide = torch.float64 if problem.base[0].dtype == torch.float64 else torch.float32
    merged = [w.clone() for w in problem.base]
    residual = [w.new_zeros((*w.shape[:-1], len(problem.c)), dtype=wide) for w in problem.base]
    if good:
        outputs = _apply(problem.of_layers(good), b)
        for layer, w, r in zip(good, *outputs[:2], strict=True):
            merged[layer], residual[layer] = w, r
    told = "; ".join(
        f"layer {layer} ({str(fault).removeprefix('merge_kv: ')})"
        for layer, fault in sorted(faults.items())
    )
    warnings.warn(
        f"merge_kv: {len(faults)} of {layers} layers were left as they are: {told}",
        NumericalWarning,
        stacklevel=4,
    )
    return MergeSolution(merged, residual, b, problem, tuple(sorted(faults)))


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
        embeddings: ``embeddings[n]`` (s_n, d), text features of concept n's prompt tokens. A
            concept without tokens asks for nothing.
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
        ValueError: If shapes, dtypes or devices do not fit, an argument is not finite, the dtype of
            base cannot hold the result, or the factor's C_reg has changed in place since. Inside
            ``torch.compile`` what depends on the numbers is a RuntimeError without a name.

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
