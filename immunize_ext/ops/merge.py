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

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.errors import ContradictoryTargetsError
from immunize_ext.ops import composite
from immunize_ext.ops._arguments import (
    require_floating_matrix,
    require_same_device,
)
from immunize_ext.ops._dispatch import has_kernel
from immunize_ext.ops._merge_functions import (
    FactorSolve,
    FactorSolveDual,
    Inverse,
    InverseDual,
    MergeApplyDual,
    MergeSolve,
)
from immunize_ext.ops.composite import MergeLayout
from immunize_ext.ops.factor import RegularizationFactor

# Squared sine of the angle, in the metric of Q^-1, below which a row of C counts as a combination
# of the rows before it: 1e-6 in relative distance. Token embeddings that repeat differ by nothing,
# or by the rounding of the text encoder (1e-7 in float32); distinct ones by 1e-2 and more.
REPEATED_ROW_RTOL = 1e-12


def _shared_part(
    c: Tensor,
    factor: RegularizationFactor,
    inverse_hardness: Tensor,
    average: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """B (s, d) with its graph, and the defect I - E T (s, s)."""
    raw = (factor.chol, c.detach(), inverse_hardness.detach(), REPEATED_ROW_RTOL, average)
    a, e, defect, _ = MergeSolve.apply(*raw) if compiled else composite.merge_solve(*raw)
    tracing = torch.compiler.is_compiling()
    solve, inverse = (FactorSolve, Inverse) if tracing else (FactorSolveDual, InverseDual)
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
                outputs = MergeApplyDual.apply(layout, problem.c, b, defect, *weights)
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
