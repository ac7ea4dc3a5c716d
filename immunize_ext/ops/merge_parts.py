r"""Which part of a second-moment merge is worth most: rows, columns or whole layers.

The objective of a layer is a paraboloid around its merge: with D = W - W0 of the merged weights W
and any other update Delta,

.. math:: f(\Delta) = f(D) + \mathrm{tr}\,(\Delta - D)\, S\, (\Delta - D)^\top .

**Rows.** f is a sum over rows, so leaving row i at W0 costs exactly

.. math:: \mathrm{score}_i = D_i S D_i^\top ,

whatever is done to the others: the best k rows, of all layers together, are those of the k largest
scores. Scores of a head, or of a layer, are sums of those of its rows.

**Columns.** With the input j left alone (column j of Delta is zero) the others are solved for anew:

.. math:: \Delta = D - \frac{D_{:,j}}{(S^{-1})_{jj}} (S^{-1})_{j,:}, \qquad
          f(\Delta) - f(D) = \frac{\|D_{:,j}\|^2}{(S^{-1})_{jj}} ,

the optimal brain surgeon's identity, and the inverse for the inputs that are left is S^-1 less a
multiple of that row's square. So one deletion takes O(d^2 + o d); which set of deletions is best is
a search, and taking the cheapest one at a time is exact for the first of them only.

**Layers.** Worth and size of a layer add up: a knapsack, solved exactly by keeping, of all choices,
those that no other beats in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.arguments import require_finite
from immunize_ext.ops.derivatives import carries_derivative
from immunize_ext.ops.moment_derivatives import product
from immunize_ext.ops.moment_merge import MomentFactor, check_copies

__all__ = ["KeptPart", "LayerChoice", "best_layers", "keep_columns", "keep_rows", "row_scores"]

_EPS = torch.finfo(torch.float64).eps


class KeptPart(NamedTuple):
    """Merged weights of which a part is as before.

    Attributes:
        weights: One a layer, shape and dtype of base.
        kept: What is merged, one mask a layer: rows (o,) or columns (d,), bool.
        lost: What the objective of the merge rose by, float64, over all layers; without derivative.
    """

    weights: list[Tensor]
    kept: list[Tensor]
    lost: float


class LayerChoice(NamedTuple):
    """A set of layers that no other beats in both worth and size.

    Attributes:
        layers: Their numbers, rising.
        size: The sum of their sizes.
        worth: The sum of their worths.
    """

    layers: tuple[int, ...]
    size: int
    worth: float


def row_scores(
    base: Sequence[Tensor],
    merged: Sequence[Tensor],
    factors: MomentFactor | Sequence[MomentFactor],
) -> list[Tensor]:
    r"""What the objective of the merge rises by for each row that is left as it was.

    .. math:: \mathrm{score}_i = (W - W_0)_i\, S\, (W - W_0)_i^\top

    Args:
        base: W0, one (o_l, d_l) tensor a layer, or (o_l, i, *kernel) of a convolution.
        merged: What :func:`~immunize_ext.ops.merge_moments` made of it.
        factors: As given to merge_moments.

    Returns:
        Scores (o_l,), float64, one a layer. Those of a head are the sum of its rows', that of a
        layer the sum of all.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or an argument is not finite.

    Note:
        Deterministic for a given number of threads. Derivatives of every order and direction, for
        base, merged and what the factors are made of.

    Source:
        DERIVED: the objective is a sum over rows.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import MomentFactor, row_scores
        >>> factor = MomentFactor.from_moments([torch.diag(torch.tensor([4.0, 1.0]))], ridge=0.0)
        >>> row_scores([torch.zeros(2, 2)], [torch.eye(2)], factor)
        [tensor([4., 1.], dtype=torch.float64)]
    """
    return [
        (product(delta, factor.s) * delta).sum(-1)
        for delta, factor in _updates("row_scores", base, merged, factors)
    ]


def keep_rows(
    base: Sequence[Tensor],
    merged: Sequence[Tensor],
    factors: MomentFactor | Sequence[MomentFactor],
    count: int,
    *,
    group: int = 1,
) -> KeptPart:
    r"""Merge the best rows of all layers and leave the others as they were.

    .. math:: \min_{|K| = k} f(\Delta_K), \qquad (\Delta_K)_i = (W - W_0)_i \ \text{for}\ i \in K,
              \ \text{else}\ 0

    Args:
        base: As for :func:`row_scores`.
        merged: As there.
        factors: As there.
        count: k, how many groups of rows are merged, of all layers together.
        group: Rows of a group, one after the other: 1, or the width of a head.

    Returns:
        The weights, which rows are merged, and what that costs. Exact: no other k groups cost less.
        Of groups that cost the same the first ones are taken.

    Raises:
        NotImplementedError: If a derivative is asked for where groups k and k + 1 cost the same:
            which of them is merged jumps there.
        ValueError: As :func:`row_scores`, or if count or group is out of range.

    Note:
        Deterministic for a given number of threads. Derivatives of every order for base and merged,
        with the choice held, which it is in a neighbourhood.

    Source:
        DERIVED; exhaustive search agrees.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import MomentFactor, keep_rows
        >>> factor = MomentFactor.from_moments([torch.diag(torch.tensor([4.0, 1.0]))], ridge=0.0)
        >>> keep_rows([torch.zeros(2, 2)], [torch.eye(2)], factor, 1)
        KeptPart(weights=[tensor([[1., 0.],
                [0., 0.]])], kept=[tensor([ True, False])], lost=1.0)
    """
    function = "keep_rows"
    pairs = _updates(function, base, merged, factors)
    for layer, w0 in enumerate(base):
        if group < 1 or w0.shape[0] % group:
            raise ValueError(
                f"{function}: group must be at least 1 and divide the rows of every layer, got "
                f"{group} for the {w0.shape[0]} rows of base[{layer}]"
            )
    with torch.no_grad():
        scores = torch.cat(
            [
                (delta @ factor.chol).square().sum(-1).unflatten(0, (-1, group)).sum(-1)
                for delta, factor in pairs
            ]
        )
        if not 0 <= count <= len(scores):
            raise ValueError(
                f"{function}: count must be from 0 to the number of groups, {len(scores)}, got "
                f"{count}"
            )
        order = scores.argsort(descending=True, stable=True)
        chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        chosen[order[:count]] = True
        if 0 < count < len(scores) and any(carries_derivative(w) for w in (*base, *merged)):
            last, next_ = scores[order[count - 1 : count + 1]].tolist()
            # Rows that did not move at all are the same merged or not.
            if last - next_ <= 64 * _EPS * pairs[0][1].dim * last and last > 0.0:
                raise NotImplementedError(
                    f"{function}: the derivative does not exist where groups {count} and "
                    f"{count + 1} cost the same, {last:.6g}; take another count, or detach base "
                    "and merged"
                )
        lost = float(scores[~chosen].sum())
    parts = chosen.split([w0.shape[0] // group for w0 in base])
    kept = [part.repeat_interleave(group) for part in parts]
    weights = [
        torch.where(mask.reshape(-1, *[1] * (w0.dim() - 1)), w, w0)
        for mask, w, w0 in zip(kept, merged, base, strict=True)
    ]
    return KeptPart(weights, kept, lost)


def keep_columns(base: Tensor, merged: Tensor, factor: MomentFactor, count: int) -> KeptPart:
    r"""Change what a layer does with few of its inputs, as well as these allow.

    .. math:: \Delta_{:,K} = \bigl((W - W_0)\, S\bigr)_{:,K}\, S_{KK}^{-1}, \qquad
              \Delta_{:,j} = 0 \ \text{for}\ j \notin K

    The inputs are given up one by one, each time the one that costs least once the others are
    solved for anew.

    Args:
        base: W0 (o, d), or (o, i, *kernel) of a convolution. Layers that shall change for the same
            inputs are stacked: ``torch.cat``.
        merged: What :func:`~immunize_ext.ops.merge_moments` made of it.
        factor: Of its input.
        count: k, how many columns may change.

    Returns:
        The weights, which columns changed, and what that costs. For the set of columns the best
        there is; the set is the greedy one.

    Raises:
        ValueError: As :func:`row_scores`, or if count is out of range.

    Note:
        Deterministic for a given number of threads. Derivatives of every order for base, merged and
        what the factor is made of, with the choice held. O(d^2 + o d) a column given up.

    Source:
        Hassibi and Stork 1993 (optimal brain surgeon), in the metric of S.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import MomentFactor, keep_columns
        >>> moment = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> factor = MomentFactor.from_moments([moment], ridge=0.0)
        >>> kept = keep_columns(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]), factor, 1)
        >>> kept.weights, round(kept.lost, 6)  # the first column does a part of the second's work
        ([tensor([[3.5000, 0.0000]])], 1.5)
    """
    function = "keep_columns"
    ((delta, _),) = _updates(function, [base], [merged], factor)
    d = factor.dim
    if not 0 <= count <= d:
        raise ValueError(f"{function}: count must be from 0 to {d}, the columns, got {count}")
    with torch.no_grad():
        left = torch.ones(d, dtype=torch.bool, device=delta.device)
        inverse = torch.cholesky_inverse(factor.chol)
        update = delta.detach().clone()
        for _ in range(d - count):
            costs = update.square().sum(0) / inverse.diagonal()
            costs[~left] = torch.inf
            j = int(costs.argmin())
            row = inverse[j] / inverse[j, j]
            update -= torch.outer(update[:, j].clone(), row)
            inverse -= torch.outer(inverse[:, j].clone(), row)
            # What is zero but for rounding, to be exact for the deletions that follow.
            inverse[j], inverse[:, j], inverse[j, j], update[:, j] = 0.0, 0.0, 1.0, 0.0
            left[j] = False
    weight = base.clone()
    lost = float((delta.detach() @ factor.chol).square().sum())
    if count:
        s = factor.s
        part = s[left][:, left]
        wanted = product(delta, s)[:, left]
        found = torch.linalg.solve(part, wanted, left=False)
        whole = torch.zeros_like(delta).index_copy(1, left.nonzero().flatten(), found)
        weight = (base.to(torch.float64) + whole.reshape(base.shape)).to(base.dtype)
        lost = float(((delta - whole).detach() @ factor.chol).square().sum())
    return KeptPart([weight], [left], lost)


def best_layers(
    worths: Sequence[float], sizes: Sequence[int], *, budget: int | None = None
) -> list[LayerChoice]:
    r"""Which layers to merge for each size that the merge may have: the knapsack, exactly.

    .. math:: \max_K \sum_{l \in K} \mathrm{tr}\,(W_l - W_{0,l})\, S_l\, (W_l - W_{0,l})^\top
              \quad\text{subject to}\quad \sum_{l \in K} \mathrm{size}_l \le \mathrm{budget}

    Args:
        worths: What the objective rises by if the layer is left as it was, finite and not negative:
            sums of :func:`row_scores`.
        sizes: What it costs to merge it, whole numbers, at least 1: its number of weights.
        budget: The largest size of interest; all of them by default.

    Returns:
        The choices that no other beats in both, from the empty one on, sizes and worths rising: the
        last is the best within the budget, and all of them the curve of worth against size.

    Raises:
        ValueError: If lengths differ, a worth is negative or not finite, a size is no whole number
            of at least 1, or the budget is NaN.

    Note:
        Exact. The number of choices kept is at most that of different sums of sizes, which for the
        few widths of a denoiser is small; layers that are worth nothing are never chosen.

    Source:
        Nemhauser and Ullmann 1969.

    Example:
        >>> from immunize_ext.ops import best_layers
        >>> best_layers([5.0, 4.0, 3.0], [4, 3, 2], budget=5)[-1]
        LayerChoice(layers=(1, 2), size=5, worth=7.0)
    """
    function = "best_layers"
    if len(worths) != len(sizes):
        raise ValueError(
            f"{function}: worths and sizes must have the same length, got {len(worths)} and "
            f"{len(sizes)}"
        )
    for layer, (worth, size) in enumerate(zip(worths, sizes, strict=True)):
        if not 0.0 <= worth < float("inf"):
            raise ValueError(
                f"{function}: worths must be finite and not negative, got {worth} at layer {layer}"
            )
        if not 1 <= size < float("inf") or size != int(size):
            raise ValueError(
                f"{function}: sizes must be whole numbers of at least 1, got {size} at layer "
                f"{layer}"
            )
    limit = sum(sizes) if budget is None else budget
    if limit != limit:
        raise ValueError(f"{function}: budget must be a number, got {limit}")
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for layer, (worth, size) in enumerate(zip(worths, sizes, strict=True)):
        more = [(s + size, w + worth, (*k, layer)) for s, w, k in front if s + size <= limit]
        # By size, of equal ones by worth; what is no better than a smaller one goes.
        every = sorted([*front, *more], key=lambda choice: (choice[0], -choice[1], choice[2]))
        front, best = [], -1.0
        for choice in every:
            if choice[1] > best:
                front.append(choice)
                best = choice[1]
    return [LayerChoice(k, s, w) for s, w, k in front]


def _updates(
    function: str,
    base: Sequence[Tensor],
    merged: Sequence[Tensor],
    factors: MomentFactor | Sequence[MomentFactor],
) -> list[tuple[Tensor, MomentFactor]]:
    """W - W0 of each layer as a float64 matrix, and its factor."""
    given = check_copies(function, base, [merged], factors, names=["merged"])
    found = []
    for layer, (w0, w, factor) in enumerate(zip(base, merged, given, strict=True)):
        require_finite(function, f"base[{layer}]", w0)
        require_finite(function, f"merged[{layer}]", w)
        found.append((w.flatten(1).to(torch.float64) - w0.flatten(1).to(torch.float64), factor))
    return found
