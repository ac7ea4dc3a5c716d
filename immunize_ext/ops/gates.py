r"""Gates between several ways of merging: how far each layer, head or row goes along each of them.

.. math:: W_l = W_{0,l} + \sum_k g_{l,k}\, (W_{k,l} - W_{0,l})

One gate a layer and way is a learned average (as AdaMerging has them, where the ways are the
copies); one a head goes between ways head by head; one a row and the mean as the only way is a
scaling of features, FiLM's form without its shift. All are linear in the gates, so

.. math:: \frac{\partial L}{\partial g_k} = \langle \bar W, W_k - W_0 \rangle

over the rows of the gate, and their best values for the objective of the second-moment merge are a
least squares problem of as many unknowns as there are ways: with D_k = W_k - W0 and D of the merge,

.. math:: \min_g \Bigl\| \Bigl(\sum_k g_k D_k - D\Bigr) L \Bigr\|_F^2, \qquad S = L L^\top .
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from immunize_ext.ops.arguments import require_finite
from immunize_ext.ops.derivatives import carries_derivative
from immunize_ext.ops.merge_problem import require_floating
from immunize_ext.ops.moment_derivatives import product
from immunize_ext.ops.moment_merge import MomentFactor, check_copies

__all__ = ["best_gates", "gate_layers"]

_EPS = torch.finfo(torch.float64).eps


def gate_layers(
    base: Sequence[Tensor], ways: Sequence[Sequence[Tensor]], gates: Sequence[Tensor]
) -> list[Tensor]:
    r"""Go some of the way from the base weights to each of several others.

    .. math:: W = W_0 + \sum_k g_k\, (W_k - W_0)

    Args:
        base: W0, one (o_l, ...) tensor a layer.
        ways: ``ways[k][l]``, layer l merged in way k, shape and dtype of base.
        gates: One a layer: (K,), or (K, groups) for as many groups of consecutive rows: heads, or
            single rows. Any floating dtype and any real value; those of a softmax over the ways and
            staying at W0 lie between all of them.

    Returns:
        The weights, one a layer, shape and dtype of base; computed in float32, for float64 weights
        in float64.

    Raises:
        ValueError: If lengths, shapes or dtypes do not fit.

    Note:
        Deterministic. Derivatives of every order and direction, for all arguments; vmap, compile.

    Source:
        Yang et al., ICLR 2024 (AdaMerging), layer by layer; Perez et al., AAAI 2018 (FiLM).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import gate_layers
        >>> base, mean, merged = torch.zeros(2, 1), torch.ones(2, 1), torch.full((2, 1), 3.0)
        >>> heads = torch.tensor([[1.0, 0.0], [0.0, 0.5]])  # the mean for the first, half the merge
        >>> gate_layers([base], [[mean], [merged]], [heads])
        [tensor([[1.0000],
                [1.5000]])]
    """
    function = "gate_layers"
    if len(ways) == 0 or len(gates) != len(base) or any(len(w) != len(base) for w in ways):
        raise ValueError(
            f"{function}: ways and gates must hold one entry a layer, {len(base)}, got "
            f"{[len(way) for way in ways]} and {len(gates)}"
        )
    gated = []
    for layer, (w0, gate) in enumerate(zip(base, gates, strict=True)):
        require_floating(function, f"base[{layer}]", w0)
        require_floating(function, f"gates[{layer}]", gate)
        if w0.dim() == 0:
            raise ValueError(f"{function}: base[{layer}] must have shape (o, ...), got ()")
        groups = gate.shape[1] if gate.dim() == 2 else 1
        fits = gate.dim() in (1, 2) and len(gate) == len(ways) and groups > 0
        if not fits or w0.shape[0] % groups:
            raise ValueError(
                f"{function}: gates[{layer}] must have shape ({len(ways)},) or ({len(ways)}, "
                f"groups), groups a divisor of {w0.shape[0]} rows, got {tuple(gate.shape)}"
            )
        wide = torch.float64 if w0.dtype == torch.float64 else torch.float32
        start = w0.to(wide)
        total = start
        for k, way in enumerate(ways):
            require_floating(function, f"ways[{k}][{layer}]", way[layer])
            if way[layer].shape != w0.shape or way[layer].dtype != w0.dtype:
                raise ValueError(
                    f"{function}: ways[{k}][{layer}] must have the shape and dtype of "
                    f"base[{layer}], {tuple(w0.shape)} {w0.dtype}, got {tuple(way[layer].shape)} "
                    f"{way[layer].dtype}"
                )
            share = gate[k].to(wide)
            if gate.dim() == 2:
                rows = share.repeat_interleave(w0.shape[0] // groups)
                share = rows.reshape(-1, *[1] * (w0.dim() - 1))
            total = total + share * (way[layer].to(wide) - start)
        gated.append(total.to(w0.dtype))
    return gated


def best_gates(
    base: Sequence[Tensor],
    ways: Sequence[Sequence[Tensor]],
    merged: Sequence[Tensor],
    factors: MomentFactor | Sequence[MomentFactor],
    *,
    groups: int | Sequence[int] = 1,
) -> list[Tensor]:
    r"""Gates that minimise the objective of the second-moment merge.

    .. math:: \min_g \mathrm{tr}\, E\, S\, E^\top, \qquad
              E = \sum_k g_k\, (W_k - W_0) - (W - W_0)

    Args:
        base: W0, one (o_l, d_l) tensor a layer, or (o_l, i, *kernel) of a convolution.
        ways: As for :func:`gate_layers`: the copies for a learned average of them, their mean alone
            for a scaling of it.
        merged: What :func:`~immunize_ext.ops.merge_moments` makes of the copies: where the
            objective is least.
        factors: As given to merge_moments.
        groups: Of consecutive rows with a gate of their own, in each layer: 1 for the layer as a
            whole, the number of heads, or that of rows.

    Returns:
        The gates (K, groups) of each layer, float64; of several that are as good the least ones, in
        units of what their ways change.

    Raises:
        NotImplementedError: If a derivative is asked for where the ways of a group are linearly
            dependent: the least solution jumps there.
        ValueError: If shapes, dtypes or devices do not fit, or an argument is not finite.

    Note:
        Deterministic for a given number of threads. First and second derivatives, for base, ways,
        merged and what the factors are made of. The ways enter by their K^2 inner products, scaled
        to cosines: dependent are those of which an eigenvalue is at most 64 K eps, 3e-14 for two
        ways. Of two this is 1 - cos, so they count as different from an angle of about 2.4e-7 on.

    Source:
        DERIVED: least squares in the metric of S.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import MomentFactor, best_gates
        >>> factor = MomentFactor.from_moments([torch.eye(2)], ridge=0.0)
        >>> mean, merged = torch.ones(2, 2), torch.tensor([[3.0, 1.0], [0.0, 0.0]])
        >>> (rows,) = best_gates([torch.zeros(2, 2)], [[mean]], [merged], factor, groups=2)
        >>> rows.round(decimals=6)
        tensor([[2., 0.]], dtype=torch.float64)
    """
    function = "best_gates"
    if len(ways) == 0:
        raise ValueError(f"{function}: ways must hold at least one, got none")
    names = ["merged", *(f"ways[{k}]" for k in range(len(ways)))]
    by_layer = check_copies(function, base, [merged, *ways], factors, names=names)
    counts = [groups] * len(base) if isinstance(groups, int) else list(groups)
    if len(counts) != len(base):
        raise ValueError(
            f"{function}: groups must be one number, or one a layer, {len(base)}, got {len(counts)}"
        )
    found = []
    for layer, (w0, w, factor, count) in enumerate(
        zip(base, merged, by_layer, counts, strict=True)
    ):
        if count < 1 or w0.shape[0] % count:
            raise ValueError(
                f"{function}: groups must be at least 1 and divide the {w0.shape[0]} rows of "
                f"base[{layer}], got {count}"
            )
        for name, weights in zip(names, [w, *(way[layer] for way in ways)], strict=True):
            require_finite(function, f"{name}[{layer}]", weights)
        start = w0.flatten(1).to(torch.float64)
        deltas = torch.stack([way[layer].flatten(1).to(torch.float64) - start for way in ways])
        target = w.flatten(1).to(torch.float64) - start
        metric = torch.stack([product(delta, factor.s) for delta in deltas])
        # (K, groups, rows of a group, d): inner products within a group.
        split = deltas.unflatten(1, (count, -1))
        seen = metric.unflatten(1, (count, -1))
        gram = torch.einsum("kgrd,lgrd->gkl", seen, split)
        right = torch.einsum("kgrd,grd->gk", seen, target.unflatten(0, (count, -1)))
        found.append(_least_squares(function, gram, right, layer).mT)
    return found


def _least_squares(function: str, gram: Tensor, right: Tensor, layer: int) -> Tensor:
    """The least g with gram g = right, once gram is scaled to ones on its diagonal."""
    with torch.no_grad():
        scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
        scale = torch.where(scale > 0.0, scale, 1.0)
        even = gram / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
        values = torch.linalg.eigvalsh(0.5 * (even + even.mT))
        # Inner products know a difference of ways to the root of what they are rounded to.
        tolerance = 64 * _EPS * gram.shape[-1]
        full = bool((values[..., 0] > tolerance).all())
    if full:
        return torch.linalg.solve(gram, right)
    if carries_derivative(gram) or carries_derivative(right):
        raise NotImplementedError(
            f"{function}: the derivative does not exist where the ways of a group are linearly "
            f"dependent, as they are in layer {layer}; leave one of them out, or detach"
        )
    inverse = torch.linalg.pinv(even, rtol=tolerance, hermitian=True)
    return (inverse @ (right / scale).unsqueeze(-1)).squeeze(-1) / scale
