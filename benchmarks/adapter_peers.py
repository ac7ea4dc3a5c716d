"""Other ways of making one update of several LoRA adapters, written from their papers.

Each is a function of the adapters (float64) that returns the update. What PEFT's
``add_weighted_adapter`` has is taken from PEFT, one layer at a time. All of them look at the
adapters alone, none at what the layers receive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from peft.utils import merge_utils
from torch import Tensor

from immunize_ext.ops import LowRank

DENSITY = 0.5  # of what TIES and DARE keep

Rule = Callable[[Sequence[Tensor]], Tensor]


def mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean."""
    return torch.stack(list(parts)).mean(0)


def ties(parts: Sequence[Tensor]) -> Tensor:
    """TIES (Yadav et al., NeurIPS 2023): trim, elect signs, mean of those that agree."""
    found: Tensor = merge_utils.ties(list(parts), torch.ones(len(parts)).double(), density=DENSITY)
    return found


def dare(parts: Sequence[Tensor]) -> Tensor:
    """DARE (Yu et al., ICML 2024): drop at random, scale up, mean."""
    shares = torch.full((len(parts),), 1.0 / len(parts), dtype=torch.float64)
    found: Tensor = merge_utils.dare_linear(list(parts), shares, density=DENSITY)
    return found


def peft_linear(updates: Sequence[LowRank], weight: float) -> Tensor:
    """PEFT's "linear": up factors and down factors are added up, each by the root of a weight."""
    up = torch.stack([one.up for one in updates]).sum(0)
    down = torch.stack([one.down for one in updates]).sum(0)
    return weight * up @ down


def of_factors(updates: Sequence[LowRank], combine: Callable[..., Tensor], weight: float) -> Tensor:
    """PEFT's other types: up factors are combined by themselves, and so are down factors."""
    roots = torch.full((len(updates),), math.sqrt(weight), dtype=torch.float64)
    up = combine([one.up for one in updates], roots, density=DENSITY)
    return up @ combine([one.down for one in updates], roots, density=DENSITY)


def knots(updates: Sequence[LowRank], rule: Rule) -> Tensor:
    """KnOTS (Stoica et al., ICLR 2025): a rule for the parts of V of one SVD of all updates.

    [D_1 ... D_N] = U S [V_1^T ... V_N^T], so D_n = U S V_n^T, and the V_n are merged.
    """
    beside = torch.cat([one.delta for one in updates], 1)
    u, sigma, vt = torch.linalg.svd(beside, full_matrices=False)
    rank = sum(one.up.shape[1] for one in updates)
    parts = vt[:rank].chunk(len(updates), 1)
    return (u[:, :rank] * sigma[:rank]) @ rule(parts)


def _bases(updates: Sequence[LowRank], rank: int | None) -> tuple[Tensor, Tensor]:
    """Orthonormal bases that all updates share on the left and on the right."""
    ups, _, _ = torch.linalg.svd(torch.cat([one.up for one in updates], 1), full_matrices=False)
    *_, downs = torch.linalg.svd(torch.cat([one.down for one in updates]), full_matrices=False)
    return ups[:, :rank], downs[:rank]


def core_space(updates: Sequence[LowRank], rule: Rule) -> Tensor:
    """Core Space (Panariello et al., NeurIPS 2025): a rule for the updates in shared bases.

    The left one is of the up factors beside each other, the right one of the down factors below
    each other; both span all there is, so nothing is lost.
    """
    left, right = _bases(updates, None)
    return left @ rule([left.mT @ one.up @ one.down @ right.mT for one in updates]) @ right


def compress_then_merge(updates: Sequence[LowRank], rule: Rule, rank: int) -> Tensor:
    """Compress then Merge (He et al., ICML 2026): the same in bases of the rank wanted.

    They are those of the leading singular vectors of all updates, beside and below each other; the
    paper has refinements of the choice, which are not in here.
    """
    deltas = [one.delta for one in updates]
    left = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False).U[:, :rank]
    right = torch.linalg.svd(torch.cat(deltas), full_matrices=False).Vh[:rank]
    return left @ rule([left.mT @ delta @ right.mT for delta in deltas]) @ right


def svd(delta: Tensor, rank: int) -> Tensor:
    """The best update of a rank where all inputs count alike."""
    u, sigma, vt = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def others(updates: Sequence[LowRank], rank: int) -> dict[str, Tensor]:
    """All of them; those below ``rank`` have that rank, the others what their rule leaves them."""
    deltas = [one.delta for one in updates]
    count = len(updates)
    return {
        "mean (cat)": mean(deltas),
        "sum (cat)": mean(deltas) * count,
        "PEFT linear, weights 1/3": peft_linear(updates, 1.0 / count),
        "PEFT linear, weights 1": peft_linear(updates, 1.0),
        "PEFT ties": of_factors(updates, merge_utils.ties, 1.0),
        "PEFT dare_linear": of_factors(updates, merge_utils.dare_linear, 1.0 / count),
        "PEFT dare_ties": of_factors(updates, merge_utils.dare_ties, 1.0),
        "PEFT magnitude_prune": of_factors(updates, merge_utils.magnitude_prune, 1.0 / count),
        "PEFT ties on whole updates": ties(deltas),
        "PEFT dare_linear on whole updates": dare(deltas),
        "PEFT dare_ties on whole updates": merge_utils.dare_ties(
            deltas, torch.ones(count).double(), density=DENSITY
        ),
        "PEFT magnitude_prune on whole updates": merge_utils.magnitude_prune(
            deltas, torch.full((count,), 1.0 / count).double(), density=DENSITY
        ),
        "KnOTS with ties": knots(updates, ties),
        "Core Space with ties": core_space(updates, ties),
        f"mean, rank {rank}, by an SVD (PEFT svd)": svd(mean(deltas), rank),
        f"KnOTS with ties, rank {rank}, by an SVD": svd(knots(updates, ties), rank),
        f"Core Space with ties, rank {rank}, by an SVD": svd(core_space(updates, ties), rank),
        f"Compress then Merge, mean, rank {rank}": compress_then_merge(updates, mean, rank),
        f"Compress then Merge, ties, rank {rank}": compress_then_merge(updates, ties, rank),
    }
