"""Arguments of the key/value merge, checked and in the form the kernels take; and their faults.

The operators return statuses; this is the one place that finds words for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from immunize_ext.errors import ContradictoryTargetsError
from immunize_ext.ops.arguments import any_true, require_positive, require_same_device
from immunize_ext.ops.derivatives import payload
from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.merge_fallback import NOT_FINITE

# Squared sine of the angle, in the metric of Q^-1, below which a row of C counts as a combination
# of the rows before it: 1e-6 in relative distance. Token embeddings that repeat differ by nothing,
# or by the rounding of the text encoder (1e-7 in float32); distinct ones by 1e-2 and more.
REPEATED_ROW_RTOL = 1e-12


class MergeProblem(NamedTuple):
    """A merge as the kernels see it: targets flattened, tokens stacked in float64."""

    base: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]  # concept-major
    rows: tuple[int, ...]
    c: Tensor  # (s, d) float64
    inverse_hardness: Tensor  # (s,) float64
    names: tuple[str, ...]
    targets_are_values: bool

    def of_layers(self, layers: Sequence[int]) -> MergeProblem:
        """The same merge of some layers alone."""
        count = len(self.base)
        starts = range(0, len(self.targets), count)
        return self._replace(
            base=tuple(self.base[layer] for layer in layers),
            targets=tuple(self.targets[start + layer] for start in starts for layer in layers),
        )


def faults_of_layers(
    problem: MergeProblem,
    factor: RegularizationFactor,
    solved: tuple[Tensor, Tensor],
    residual: Sequence[Tensor],
    status: Tensor,
    average: bool,
) -> dict[int, ValueError]:
    """What is wrong with which layer, from the statuses of the operators: one read of the device.

    Raises for what concerns all layers. ``solved``: defect and rank of the shared part; ``average``
    accepts contradictions.
    """
    defect, rank = solved
    if torch.compiler.is_compiling():
        missed = [rows.any() for rows in missed_rows(problem, defect, residual)]
        bad = (rank < 0).any() | (status != 0).any() | (torch.stack(missed).any() & (not average))
        torch._assert_async(
            ~bad,
            "merge_kv: a layer cannot be merged: an argument is not finite, targets contradict "
            "each other or a result overflows; the same call without torch.compile says which",
        )
        return {}
    # One tensor and one copy: on a GPU every operation here is waited for.
    found = _largest(torch.cat([-rank.unsqueeze(-1).to(status.dtype), status], -1))
    if found is None:  # nothing to read: meta tensors, or a graph that is being traced
        return {}
    least_rank, *statuses = -found[0], *found[1:]
    if least_rank < 0:
        raise fault_of_shared_part(problem, factor)
    faults = {
        layer: _fault_of_layer(problem, layer, one) for layer, one in enumerate(statuses) if one
    }
    if least_rank == 0 and any_true((rank == 0) & (problem.c != 0).any(-1).any(-1)):
        raise ValueError(
            "merge_kv: C Q^-1 C^T must be larger than zero, got a product that float64 rounds to "
            "zero; scale the embeddings up or C_reg down"
        )
    if least_rank < len(problem.c) and not average:
        for layer, missed_here in enumerate(missed_rows(problem, defect, residual)):
            rows = [row for row, missed in enumerate(_largest(missed_here) or []) if missed]
            if rows and layer not in faults:
                faults[layer] = contradiction(problem, rows)
    return faults


def _largest(status: Tensor) -> list[int] | None:
    """The largest status of each column over a vmapped batch, on the host."""
    numbers = payload(status)
    if numbers is None:
        return None
    columns = numbers.reshape(-1, status.shape[-1])
    if len(columns) > 1:
        columns = columns.amax(0, keepdim=True)
    return columns[0].tolist() if len(columns) else [0] * status.shape[-1]


def fault_of_shared_part(
    problem: MergeProblem, factor: RegularizationFactor, function: str = "merge_kv"
) -> ValueError:
    """The error about what no layer can be merged with: tokens or a factor that is not finite."""
    if not any_true(~torch.isfinite(problem.c)):
        if any_true(~torch.isfinite(factor.chol)):
            return ValueError(
                f"{function}: factor must be finite, got NaN or infinity; build it again with "
                "RegularizationFactor.from_embeddings"
            )
        return ValueError(
            f"{function}: C Q^-1 C^T must be finite, got a product that overflows float64; scale "
            "the embeddings down or C_reg up"
        )
    return ValueError(
        f"{function}: embeddings must be finite, got NaN or infinity; look for an overflow "
        "upstream, float16 features for instance"
    )


def _fault_of_layer(problem: MergeProblem, layer: int, status: int) -> ValueError:
    layers = len(problem.base)
    dtype = problem.base[layer].dtype
    if not status & NOT_FINITE:
        return ValueError(
            f"merge_kv: the merged weights of layer {layer} overflow {dtype}; raise the ridge, "
            "soften the targets with a finite hardness, or use weights of a wider dtype"
        )
    named = [(f"base[{layer}]", problem.base[layer])]
    for n, target in enumerate(problem.targets[layer::layers]):
        name = f"values[{layer}]" if problem.targets_are_values else f"concepts[{n}][{layer}]"
        named.append((name, target))
    for name, tensor in named:
        if any_true(~torch.isfinite(tensor)):
            return ValueError(f"merge_kv: {name} must be finite, got NaN or infinity")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return ValueError(
        f"merge_kv: the outputs asked of layer {layer} overflow {accumulate}; scale the embeddings "
        "down or use float64 weights"
    )


def missed_rows(problem: MergeProblem, defect: Tensor, residual: Sequence[Tensor]) -> list[Tensor]:
    """For each layer which constraints were dropped and are missed, (s,) int32.

    R (I - E T) is by how much they are missed. Whatever exceeds what near-repeats and rounding
    explain is a contradiction. Each layer is judged by its own size: a large edit of one must not
    hide the contradiction of another.
    """
    found = []
    for layer, r in enumerate(residual):
        tolerance = 10.0 * REPEATED_ROW_RTOL**0.5 + 1e4 * torch.finfo(r.dtype).eps
        wide = r.detach().to(torch.float64)
        asked = [wide]
        if problem.targets_are_values:
            asked.append(1e-3 * problem.targets[layer].detach().to(torch.float64))
        if r.shape[-2] == 0 or r.shape[-1] == 0:
            found.append(torch.zeros(r.shape[-1], dtype=torch.int32, device=r.device))
            continue
        scale = torch.stack([size.abs().amax(dim=(-2, -1)) for size in asked]).amax(0)
        violation = (wide @ defect).abs().amax(-2)
        found.append((violation > tolerance * scale.unsqueeze(-1)).to(torch.int32))
    return found


def contradiction(
    problem: MergeProblem, rows: Sequence[int], function: str = "merge_kv"
) -> ContradictoryTargetsError:
    """The error about constraints that contradict earlier ones, told in terms of concepts."""
    owners = [
        name for name, count in zip(problem.names, problem.rows, strict=True) for _ in range(count)
    ]
    names = [owners[row] for row in rows]
    named = ContradictoryTargetsError.for_rows(function, rows=rows, names=names)
    tokens, width = problem.c.shape[-2:]
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
    factor.require_current("merge_kv")
    dim, dtype = factor.dim, base[0].dtype
    # Names are for errors: to write one for every tensor takes longer than to look at it.
    for name, tensors in (("base", base), ("embeddings", embeddings)):
        for i, tensor in enumerate(tensors):
            if (
                not isinstance(tensor, Tensor)
                or not tensor.dtype.is_floating_point
                or tensor.dim() != 2
                or tensor.shape[1] != dim
            ):
                _refuse_matrix(name, i, tensor, dim)
    if concepts is not None:
        if len(concepts) != len(embeddings):
            raise ValueError(
                f"merge_kv: concepts and embeddings must have the same length, got {len(concepts)} "
                f"and {len(embeddings)}"
            )
        shapes = [weight.shape for weight in base]
        for n, layers in enumerate(concepts):
            if len(layers) != len(base):
                raise ValueError(
                    f"merge_kv: concepts[{n}] must hold one weight a layer, {len(base)}, got "
                    f"{len(layers)}"
                )
            for layer, weight in enumerate(layers):
                if weight.shape != shapes[layer] or weight.dtype != base[layer].dtype:
                    other = base[layer]
                    raise ValueError(
                        f"merge_kv: concepts[{n}][{layer}] must have the shape and dtype of "
                        f"base[{layer}], {tuple(other.shape)} {other.dtype}, got "
                        f"{tuple(weight.shape)} {weight.dtype}"
                    )
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
            require_floating("merge_kv", "values", value, layer)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"merge_kv: values[{layer}] must have shape {expected}, (outputs, tokens), got "
                    f"{tuple(value.shape)}"
                )
    if concepts is not None:
        targets = tuple(weight for layers in concepts for weight in layers)
    else:
        assert values is not None
        targets = tuple(values)
    device = base[0].device
    for tensor in (*base, *embeddings, *targets, factor.chol):
        if tensor.device != device:
            _refuse_devices(base, embeddings, concepts, values, factor)
    if values is not None:
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        targets = tuple(value.to(accumulate) for value in targets)
    return MergeProblem(
        base=tuple(base),
        targets=targets,
        rows=tuple(e.shape[0] for e in embeddings),
        c=c,
        inverse_hardness=inverse_hardness_of("merge_kv", hardness, s, c),
        names=concept_names("merge_kv", names, len(embeddings)),
        targets_are_values=values is not None,
    )


def require_floating(function: str, name: str, value: Tensor, index: int | None = None) -> None:
    """Refuse anything but a real floating-point tensor, ``name`` or ``name[index]``."""
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return
    name = name if index is None else f"{name}[{index}]"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}; convert it "
            "with torch.as_tensor"
        )
    raise ValueError(
        f"{function}: {name} must have a real floating-point dtype, got {value.dtype}; convert "
        "it with .to(torch.float64)"
    )


def _refuse_matrix(name: str, index: int, tensor: Tensor, dim: int) -> NoReturn:
    require_floating("merge_kv", name, tensor, index)
    raise ValueError(
        f"merge_kv: {name}[{index}] must have shape (rows, {dim}), the width of the factor, got "
        f"{tuple(tensor.shape)}"
    )


def _refuse_devices(
    base: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]] | None,
    values: Sequence[Tensor] | None,
    factor: RegularizationFactor,
) -> None:
    """The error about arguments on several devices."""
    lists = [("base", base), ("embeddings", embeddings)]
    lists += [(f"concepts[{n}]", layers) for n, layers in enumerate(concepts or ())]
    lists += [("values", values or ())]
    named = [(f"{name}[{i}]", tensor) for name, found in lists for i, tensor in enumerate(found)]
    require_same_device("merge_kv", [*named, ("factor", factor.chol)])


def inverse_hardness_of(function: str, hardness: float | Tensor, s: int, c: Tensor) -> Tensor:
    """1 / mu (s,), float64, of a number or of one a row."""
    expected = "positive (infinite for a hard constraint)"
    if isinstance(hardness, (int, float)):  # judged here: no trip to the device and back
        if not hardness > 0:  # NaN too
            raise ValueError(f"{function}: hardness must be {expected}, got {float(hardness)}")
        return c.new_full((s,), 1.0 / hardness)
    mu = torch.as_tensor(hardness, dtype=torch.float64, device=c.device)
    if mu.dim() > 1 or (mu.dim() == 1 and mu.shape[0] != s):
        raise ValueError(
            f"{function}: hardness must be a number or have shape ({s},), one a row of the "
            f"embeddings, got {tuple(mu.shape)}"
        )
    if not torch.compiler.is_compiling():
        require_positive(function, "hardness", mu, expected)
    return mu.reciprocal().expand(s)


def concept_names(function: str, names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """One name a concept, all different."""
    if names is None:
        return tuple(f"concept {n}" for n in range(count))
    if len(names) != count:
        raise ValueError(f"{function}: names must hold {count} names, got {len(names)}")
    # Concepts of one name, two of "art" for instance, are told apart by their number.
    seen: dict[str, int] = {}
    told = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        told.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(told)
