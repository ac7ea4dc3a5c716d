"""What a merge did: per-concept residual, condition numbers, relative change, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.merge import REPEATED_ROW_RTOL
from immunize_ext.ops.merge_problem import MergeProblem, check_merge_problem

# Beyond this condition number of T half of float64's digits are gone, and |W - W0| grows like
# 1 / distance of the nearly repeated tokens.
_ILL_CONDITIONED_T = 1e8
# An edit larger than the layer itself is no edit any more; seen where the wrong layers were chosen.
_LARGE_CHANGE = 1.0
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class MergeReport:
    """Numbers to look at after a merge.

    Attributes:
        residual: For each concept the largest ``|W c - v| / |v|`` over layers and tokens. Hard
            constraints: rounding. Soft ones: how much was given up.
        relative_change: For each layer ``|W - W0|_F / |W0|_F``.
        condition_q: Condition number of Q = C_reg^T C_reg + ridge I.
        condition_t: Condition number of T = C Q^-1 C^T + diag(1/mu) over the rows kept.
        rank: Number of independent constraints; rows beyond it repeat others.
        tokens: Number of constraint rows s.
        ridge: Absolute ridge in Q.
        warnings: Sentences for a person, each with what to do; empty if nothing stands out.
    """

    residual: dict[str, float]
    relative_change: list[float]
    condition_q: float
    condition_t: float
    rank: int
    tokens: int
    ridge: float
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """A table of a few lines."""
        width = max(len(name) for name in self.residual)
        lines = [
            f"{len(self.relative_change)} layers, {self.tokens} tokens, {self.rank} independent; "
            f"kappa(Q) {self.condition_q:.2g}, kappa(T) {self.condition_t:.2g}, "
            f"ridge {self.ridge:.3g}",
            f"|W - W0| / |W0|: largest {max(self.relative_change):.3g}",
        ]
        lines += [f"  {name:<{width}}  residual {r:.2e}" for name, r in self.residual.items()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def merge_report(
    merged: Sequence[Tensor],
    base: Sequence[Tensor],
    concepts: Sequence[Sequence[Tensor]] | None,
    embeddings: Sequence[Tensor],
    factor: RegularizationFactor,
    *,
    values: Sequence[Tensor] | None = None,
    hardness: float | Tensor = torch.inf,
    names: Sequence[str] | None = None,
) -> MergeReport:
    r"""Measure a merge: which concept was lost, how far each layer moved, what to do about it.

    .. math:: \max_{l, j \in n} \frac{|W_l c_j - v_{l,j}|}{|v_{l,j}|}, \qquad
              \frac{\|W_l - W_{0,l}\|_F}{\|W_{0,l}\|_F}

    Args:
        merged: What :func:`~immunize_ext.ops.merge_kv` returned.
        base: As given to merge_kv.
        concepts: As given to merge_kv.
        embeddings: As given to merge_kv.
        factor: As given to merge_kv.
        values: As given to merge_kv.
        hardness: As given to merge_kv.
        names: As given to merge_kv; the keys of the report's residual.

    Returns:
        The report; ``print`` it, or read its fields.

    Raises:
        ValueError: If the arguments do not fit each other.

    Note:
        Costs about two forward passes of the merge, in float64. Without derivatives.

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
        problem = check_merge_problem(base, concepts, embeddings, factor, values, hardness, names)
        if len(merged) != len(base):
            raise ValueError(
                f"merge_report: merged must hold one weight a layer, {len(base)}, got {len(merged)}"
            )
        return _measure(problem, merged, base, factor, values is not None)


def _measure(
    problem: MergeProblem,
    merged: Sequence[Tensor],
    base: Sequence[Tensor],
    factor: RegularizationFactor,
    targets_are_values: bool,
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
        # A target of zero is missed by its distance relative to what the layer gave before.
        scale = torch.maximum(asked.norm(dim=0), _EPS * (wide0 @ problem.c.mT).norm(dim=0))
        worst = torch.maximum(worst, torch.where(missed == 0, 0.0, missed / scale))
        norm = float(wide0.norm())
        moved = float((wide - wide0).norm())
        change.append(moved / norm if norm > 0 else (0.0 if moved == 0 else float("inf")))

    _, _, _, rank = torch.ops.immunize_ext.merge_solve(
        factor.chol, problem.c, problem.inverse_hardness, REPEATED_ROW_RTOL, False
    )
    condition_t = _condition_of_t(problem, factor, int(rank))
    residual = {
        name: float(part.max())
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
        warnings=_warnings(problem, factor, change, condition_t, int(rank)),
    )


def _condition_of_t(problem: MergeProblem, factor: RegularizationFactor, rank: int) -> float:
    """Condition number of T over its ``rank`` independent directions."""
    if rank == 0:
        return float("inf")
    z = torch.linalg.solve_triangular(factor.chol, problem.c.mT, upper=False)
    t = z.mT @ z + torch.diag(problem.inverse_hardness)
    eigenvalues = torch.linalg.eigvalsh(t).flip(0)
    smallest = float(eigenvalues[rank - 1])
    return float(eigenvalues[0]) / smallest if smallest > 0 else float("inf")


def _warnings(
    problem: MergeProblem,
    factor: RegularizationFactor,
    change: list[float],
    condition_t: float,
    rank: int,
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
    largest = max(range(len(change)), key=lambda layer: change[layer])
    if change[largest] > _LARGE_CHANGE:
        found.append(
            f"layer {largest} changed by {change[largest]:.2g} times its own norm; check that the "
            "layers are the text-conditioned ones, raise the ridge or lower the hardness"
        )
    return tuple(found)
