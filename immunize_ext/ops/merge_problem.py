"""Arguments of the key/value merge: checked, and in the form the kernels take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.errors import ContradictoryTargetsError
from immunize_ext.ops.arguments import (
    require_floating_matrix,
    require_positive,
    require_same_device,
)
from immunize_ext.ops.factor import RegularizationFactor


class MergeProblem(NamedTuple):
    """A merge as the kernels see it: targets flattened, tokens stacked in float64."""

    targets: tuple[Tensor, ...]
    rows: tuple[int, ...]
    c: Tensor  # (s, d) float64
    inverse_hardness: Tensor  # (s,) float64
    names: tuple[str, ...]


def name_contradictions(error: ValueError, problem: MergeProblem) -> ValueError:
    """The kernel's error about contradictory rows, told in terms of concepts."""
    found = re.search(r"contradictory targets at rows \[([\d, ]+)\]", str(error))
    if found is None:
        return error
    rows = [int(row) for row in found.group(1).split(",")]
    owners = [
        name for name, count in zip(problem.names, problem.rows, strict=True) for _ in range(count)
    ]
    names = [owners[row] for row in rows]
    named = ContradictoryTargetsError.for_rows("merge_kv", rows=rows, names=names)
    tokens, width = problem.c.shape
    if tokens <= width:
        return named
    more = f"{named}; {tokens} tokens cannot all be independent in {width} columns"
    return ContradictoryTargetsError(more, rows=rows, names=names)


def check_merge_problem(
    base: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]] | None,
    embeddings: Sequence[Tensor],
    factor: RegularizationFactor,
    values: Sequence[Tensor] | None,
    hardness: float | Tensor,
    names: Sequence[str] | None,
) -> MergeProblem:
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
            require_floating_matrix("merge_kv", f"values[{layer}]", value)
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
    return MergeProblem(
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
    if not torch.compiler.is_compiling():
        require_positive("merge_kv", "hardness", mu, "positive (infinite for a hard constraint)")
    return mu.reciprocal().expand(s)


def _concept_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"concept {n}" for n in range(count))
    if len(names) != count:
        raise ValueError(f"merge_kv: names must hold {count} names, got {len(names)}")
    return tuple(names)
