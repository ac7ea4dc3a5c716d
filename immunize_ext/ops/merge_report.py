"""What a merge did: per-concept residual, condition numbers, relative change, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.lora_merge import LowRank
from immunize_ext.ops.merge_problem import (
    REPEATED_ROW_RTOL,
    MergeProblem,
    check_merge_problem,
    concept_names,
    require_floating,
)
from immunize_ext.ops.moment_merge import MomentFactor, check_copies

# Beyond this condition number of T half of float64's digits are gone, and |W - W0| grows like
# 1 / distance of the nearly repeated tokens.
_ILL_CONDITIONED_T = 1e8
# An edit larger than the layer itself is no edit any more; seen where the wrong layers were chosen.
_LARGE_CHANGE = 1.0
# A concept of which less than this is left was not merged but overwritten.
_LOST = 0.9
_EPS = torch.finfo(torch.float64).eps

Weights = Sequence[Tensor | LowRank]


@dataclass(frozen=True)
class MergeReport:
    """Numbers to look at after a merge.

    Attributes:
        residual: What each concept lost. By tokens the largest ``|W c - v| / |v|`` over layers and
            tokens: rounding for hard constraints; soft ones: how much was given up. By moments the
            root of ``tr (W - W_n) G_n (W - W_n)^T``, summed over layers, relative to what it is of
            W0: 0 where the concept's inputs see its copy, 1 where the merge does nothing for it.
        relative_change: For each layer ``|W - W0|_F / |W0|_F``; of adapters without base relative
            to the largest of them.
        condition_q: Condition number of Q = C_reg^T C_reg + ridge I, or the largest of any S.
        condition_t: Condition number of T = C Q^-1 C^T + diag(1/mu) over the rows kept; None by
            moments.
        rank: Number of independent constraints; rows beyond it repeat others. None by moments.
        tokens: Number of constraint rows s; None by moments.
        ridge: Absolute ridge in Q, or the largest in any S.
        left: By moments what the objective is, as a share of what it is of W0, all layers together;
            None by tokens.
        least: The smallest share that any weights could leave; None by tokens.
        warnings: Sentences for a person, each with what to do; empty if nothing stands out.
    """

    residual: dict[str, float]
    relative_change: list[float]
    condition_q: float
    condition_t: float | None
    rank: int | None
    tokens: int | None
    ridge: float
    left: float | None
    least: float | None
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """A table of a few lines."""
        width = max(len(name) for name in self.residual)
        layers = f"{len(self.relative_change)} layers"
        if self.condition_t is None:
            first = (
                f"{layers}, {len(self.residual)} concepts; kappa(S) {self.condition_q:.2g}, ridge "
                f"{self.ridge:.3g}; {self.left:.3g} of the objective left, least {self.least:.3g}"
            )
        else:
            first = (
                f"{layers}, {self.tokens} tokens, {self.rank} independent; "
                f"kappa(Q) {self.condition_q:.2g}, kappa(T) {self.condition_t:.2g}, "
                f"ridge {self.ridge:.3g}"
            )
        lines = [first, f"|W - W0| / |W0|: largest {max(self.relative_change):.3g}"]
        lines += [f"  {name:<{width}}  residual {r:.2e}" for name, r in self.residual.items()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def merge_report(
    merged: Weights,
    base: Sequence[Tensor] | None,
    concepts: Sequence[Weights] | None,
    embeddings: Sequence[Tensor] | None,
    factor: RegularizationFactor | MomentFactor | Sequence[MomentFactor],
    *,
    values: Sequence[Tensor] | None = None,
    hardness: float | Tensor = torch.inf,
    names: Sequence[str] | None = None,
) -> MergeReport:
    r"""Measure a merge: which concept was lost, how far each layer moved, what to do about it.

    .. math:: \max_{l, j \in n} \frac{|W_l c_j - v_{l,j}|}{|v_{l,j}|}, \qquad
              \sqrt{\frac{\sum_l \mathrm{tr}\,(W_l - W_{n,l})\, G_n\, (W_l - W_{n,l})^\top}
              {\sum_l \mathrm{tr}\,(W_{0,l} - W_{n,l})\, G_n\, (W_{0,l} - W_{n,l})^\top}}, \qquad
              \frac{\|W_l - W_{0,l}\|_F}{\|W_{0,l}\|_F}

    By tokens or by moments, whatever factor is given; however the weights were made: what a mean,
    a mask or gates leave is measured with the factor of the merge that they stand in for.

    Args:
        merged: The weights, or adapters, one a layer.
        base: As given to the merge; None for adapters alone.
        concepts: As given to the merge, copies or adapters, these with their scales in them.
        embeddings: As given to :func:`~immunize_ext.ops.merge_kv`; None by moments.
        factor: As given to the merge.
        values: As given to merge_kv.
        hardness: As given to merge_kv; moment factors have their own.
        names: As given to merge_kv; the keys of the report's residual.

    Returns:
        The report; ``print`` it, or read its fields.

    Raises:
        ValueError: If the arguments do not fit each other.

    Note:
        Costs about two forward passes of the merge, in float64; of adapters that of dense weights.
        Without derivatives.

    Source:
        The residual answers adobe-research/custom-diffusion#88: a merged concept that is lost
        without a sign.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import RegularizationFactor, merge_kv, merge_report
        >>> base, adapted = torch.eye(4, dtype=torch.float64), 2 * torch.eye(4, dtype=torch.float64)
        >>> token, factor = torch.ones(1, 4, dtype=torch.float64), RegularizationFactor.identity(4)
        >>> problem = ([base], [[adapted]], [token], factor)
        >>> report = merge_report(merge_kv(*problem), *problem, names=["cat"])
        >>> report.residual["cat"] < 1e-15, report.relative_change
        (True, [0.5])
    """
    with torch.no_grad():
        start = None if base is None else list(base)
        if concepts is not None and len(concepts) == 0:
            raise ValueError("merge_report: concepts must hold at least one, got none")
        layers = len(merged if start is None else start)
        for name, one in [("merged", merged), *_named(concepts)]:
            if len(one) != layers:
                raise ValueError(
                    f"merge_report: {name} must hold one weight a layer, {layers}, got {len(one)}"
                )
        found = _dense("merged", merged, start)
        copies = None
        if concepts is not None:
            copies = [_dense(name, one, start) for name, one in _named(concepts)]
        if start is None:
            start = [torch.zeros_like(w) for w in found]
        largest = None
        if base is None:
            if copies is None:
                raise ValueError("merge_report: base must be given where values are, got None")
            largest = [
                max(float(one[layer].double().norm()) for one in copies)
                for layer in range(len(found))
            ]
        if isinstance(factor, RegularizationFactor):
            if embeddings is None:
                raise ValueError(
                    "merge_report: embeddings must be given with a RegularizationFactor, got None"
                )
            problem = check_merge_problem(
                start, copies, embeddings, factor, values, hardness, names
            )
            for layer, (w, w0) in enumerate(zip(found, start, strict=True)):
                require_floating("merge_report", "merged", w, layer)
                if w.shape != w0.shape:
                    raise ValueError(
                        f"merge_report: merged[{layer}] must have the shape of base[{layer}], "
                        f"{tuple(w0.shape)}, got {tuple(w.shape)}"
                    )
            return _by_tokens(problem, found, start, factor, values is not None, largest)
        if embeddings is not None or values is not None or copies is None:
            raise ValueError(
                "merge_report: concepts alone must be given with a MomentFactor, got "
                "embeddings, values or no concepts; pass embeddings=None"
            )
        by_layer = check_copies("merge_report", start, copies, factor)
        check_copies("merge_report", start, [found], factor, names=["merged"])
        called = concept_names("merge_report", names, len(copies))
        return _by_moments(found, start, copies, by_layer, called, largest)


def _named(concepts: Sequence[Weights] | None) -> list[tuple[str, Weights]]:
    return [(f"concepts[{n}]", one) for n, one in enumerate(concepts or ())]


def _dense(name: str, weights: Weights, base: Sequence[Tensor] | None) -> list[Tensor]:
    """The weights; where an adapter stands for them, what it makes of the base."""
    found: list[Tensor] = []
    for layer, one in enumerate(weights):
        if not isinstance(one, LowRank):
            found.append(one)
        elif base is None:
            found.append(one.delta)
        else:
            w0, delta = base[layer], one.delta
            if delta.numel() != w0.numel():
                raise ValueError(
                    f"merge_report: {name}[{layer}] must be an adapter of base[{layer}], "
                    f"{tuple(w0.shape)}, got {tuple(delta.shape)}"
                )
            found.append((w0.to(torch.float64) + delta.reshape(w0.shape)).to(w0.dtype))
    return found


def _change(w: Tensor, w0: Tensor, relative_to: float | None) -> float:
    moved = float((w - w0).norm())
    norm = float(w0.norm()) if relative_to is None else relative_to
    return moved / norm if norm > 0 else (0.0 if moved == 0 else float("inf"))


def _by_tokens(
    problem: MergeProblem,
    merged: Sequence[Tensor],
    base: Sequence[Tensor],
    factor: RegularizationFactor,
    targets_are_values: bool,
    largest: Sequence[float] | None,
) -> MergeReport:
    layers = len(base)
    worst = torch.zeros(problem.c.shape[0], dtype=torch.float64, device=problem.c.device)
    change: list[float] = []
    for layer, (w, w0) in enumerate(zip(merged, base, strict=True)):
        wide, wide0 = w.to(torch.float64), w0.to(torch.float64)
        if targets_are_values:
            asked = problem.targets[layer].to(torch.float64)
        else:
            parts = problem.c.split(list(problem.rows), 0)
            asked = torch.cat(
                [
                    problem.targets[n * layers + layer].to(torch.float64) @ part.mT
                    for n, part in enumerate(parts)
                ],
                1,
            )
        missed = (wide @ problem.c.mT - asked).norm(dim=0)
        if largest is None:
            # A target of zero is missed by its distance relative to what the layer gave before.
            scale = torch.maximum(asked.norm(dim=0), _EPS * (wide0 @ problem.c.mT).norm(dim=0))
        else:  # an adapter may leave a layer alone; what others ask for there is the measure
            scale = asked.norm(dim=0).amax().expand_as(missed)
        worst = torch.maximum(worst, torch.where(missed == 0, 0.0, missed / scale))
        change.append(_change(wide, wide0, None if largest is None else largest[layer]))

    *_, rank = torch.ops.immunize_ext.merge_solve(
        factor.chol, problem.c, problem.inverse_hardness, REPEATED_ROW_RTOL, False
    )
    condition_t = _condition_of_t(problem, factor, int(rank))
    residual = {
        name: float(part.max()) if len(part) else 0.0
        for name, part in zip(problem.names, worst.split(list(problem.rows)), strict=True)
    }
    return MergeReport(
        residual=residual,
        relative_change=change,
        condition_q=factor.condition,
        condition_t=condition_t,
        rank=int(rank),
        tokens=problem.c.shape[0],
        ridge=factor.ridge,
        left=None,
        least=None,
        warnings=(
            *_warnings_of_tokens(problem, factor, condition_t, int(rank)),
            *(_warnings_of_change(change) if largest is None else ()),
        ),
    )


def _by_moments(
    merged: Sequence[Tensor],
    base: Sequence[Tensor],
    copies: Sequence[Sequence[Tensor]],
    factors: Sequence[MomentFactor],
    names: Sequence[str],
    largest: Sequence[float] | None,
) -> MergeReport:
    missed, before = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    change: list[float] = []
    reached = at_base = lowest = 0.0
    for layer, (w, w0, factor) in enumerate(zip(merged, base, factors, strict=True)):
        wide0 = w0.flatten(1).to(torch.float64)
        delta = w.flatten(1).to(torch.float64) - wide0
        moves = [one[layer].flatten(1).to(torch.float64) - wide0 for one in copies]
        wanted = torch.zeros_like(delta)
        for name, move, moment, mu in zip(
            names, moves, factor.moments, factor.hardness.tolist(), strict=True
        ):
            seen = move @ moment
            own = max(float((seen * move).sum()), 0.0)
            before[name] += own
            at_base += mu * own
            wanted += mu * seen
        lost = _missed(delta, moves, factor)
        for name, part in zip(names, lost, strict=True):
            missed[name] += part
        best = factor.solve(wanted)
        reached += _objective(delta, lost, factor)
        lowest += _objective(best, _missed(best, moves, factor), factor)
        change.append(_change(delta + wide0, wide0, None if largest is None else largest[layer]))
    residual = {
        name: (lost / before[name]) ** 0.5
        if before[name] > 0.0
        else (0.0 if lost == 0.0 else float("inf"))
        for name, lost in missed.items()
    }
    left = reached / at_base if at_base > 0.0 else 0.0
    least = lowest / at_base if at_base > 0.0 else 0.0
    distinct = list(dict.fromkeys(factors))
    sigma = [torch.linalg.svdvals(factor.chol) for factor in distinct]
    return MergeReport(
        residual=residual,
        relative_change=change,
        condition_q=max(float((one[0] / one[-1]).square()) for one in sigma),
        condition_t=None,
        rank=None,
        tokens=None,
        ridge=max(factor.ridge for factor in distinct),
        left=left,
        least=least,
        warnings=(
            *(
                f"{name} keeps little of its copy (residual {lost:.2g}); raise its hardness, or "
                "merge fewer concepts"
                for name, lost in residual.items()
                if lost > _LOST
            ),
            *(_warnings_of_change(change) if largest is None else ()),
        ),
    )


def _missed(delta: Tensor, moves: Sequence[Tensor], factor: MomentFactor) -> list[float]:
    """Tr (delta - D_n) G_n (delta - D_n)^T of every concept."""
    aways = [delta - move for move in moves]
    return [
        max(float(((away @ moment) * away).sum()), 0.0)
        for away, moment in zip(aways, factor.moments, strict=True)
    ]


def _objective(delta: Tensor, missed: Sequence[float], factor: MomentFactor) -> float:
    """Terms that are not negative: a difference would lose what little a good merge leaves."""
    total = factor.ridge * float(delta.square().sum())
    if factor._regularization is not None:
        identity = torch.eye(factor.dim, dtype=torch.float64, device=delta.device)
        weighted = [mu * g for mu, g in zip(factor.hardness.tolist(), factor.moments, strict=True)]
        held = factor.s - sum(weighted) - factor.ridge * identity
        total += max(float(((delta @ held) * delta).sum()), 0.0)
    return total + sum(mu * part for mu, part in zip(factor.hardness.tolist(), missed, strict=True))


def _condition_of_t(problem: MergeProblem, factor: RegularizationFactor, rank: int) -> float:
    """Condition number of T over its ``rank`` independent directions."""
    if rank == 0:
        return float("inf")
    z = torch.linalg.solve_triangular(factor.chol, problem.c.mT, upper=False)
    # T = Z'^T Z': the singular values of Z' keep the digits that T has lost.
    sigma = torch.linalg.svdvals(torch.cat([z, torch.diag(problem.inverse_hardness.sqrt())]))
    smallest = float(sigma[rank - 1])
    return (float(sigma[0]) / smallest) ** 2 if smallest > 0 else float("inf")


def _warnings_of_tokens(
    problem: MergeProblem, factor: RegularizationFactor, condition_t: float, rank: int
) -> tuple[str, ...]:
    found: list[str] = []
    tokens = problem.c.shape[0]
    if rank < tokens:
        found.append(
            f"{tokens - rank} of {tokens} tokens repeat others and were dropped or averaged; leave "
            "out special tokens and shared prompt prefixes to say what is meant"
        )
    if condition_t > _ILL_CONDITIONED_T:
        found.append(
            f"tokens of different rows nearly coincide (kappa(T) = {condition_t:.1e}) and pull the "
            "weights far; drop one of each pair, or use a finite hardness"
        )
    if 0 < factor.samples < factor.dim:
        found.append(
            f"C_reg has {factor.samples} rows for {factor.dim} columns: directions without "
            f"captions are held by the ridge ({factor.ridge:.3g}) alone; use more captions"
        )
    return tuple(found)


def _warnings_of_change(change: Sequence[float]) -> tuple[str, ...]:
    largest = max(range(len(change)), key=lambda layer: change[layer])
    if change[largest] <= _LARGE_CHANGE:
        return ()
    return (
        f"layer {largest} changed by {change[largest]:.2g} times its own norm; check that the "
        "layers are the ones meant, raise the ridge or lower the hardness",
    )
