r"""LoRA adapters merged in factor space: nothing of the size of the weights is formed.

With D_n = W_n - W0 = s_n U_n A_n, (o, r_n) times (r_n, d), both merges of the package are of the
form D = sum_n D_n P_n with maps P_n (d, d) that belong to the input: P_n = mu_n G_n S^-1 for the
second-moment merge, and P_n = C_n^T B_n for the key/value merge, with B_n the rows of B that belong
to concept n. Hence

.. math:: \Delta = [U_1 \cdots U_N]\, \begin{pmatrix} s_1 A_1 P_1 \\ \vdots \\ s_N A_N P_N
          \end{pmatrix} :

the up factors stay as they are, the down factors are solved for anew, and the result is an adapter
again, of rank R = sum r_n. The cost is R d^2 a layer, or R s d with s tokens, whatever o is.

**The best adapter of lower rank.** With S = L L^T the objective is |Delta L - N L^-T|_F^2 plus a
constant, and its unconstrained minimiser makes the first term vanish; so by Eckart, Young and
Mirsky the best Delta of rank r is P_r Delta, P_r the projector onto the r leading left singular
vectors of Delta L. With U = Q R (QR) these are Q times the leading eigenvectors of
H = R Down S Down^T R^T (R x R).

**Derivative of the projector** of a symmetric H with eigenvalues l_i and vectors v_i:

.. math:: dP = K(dH) + K(dH)^\top, \qquad
          K(F) = \sum_{i \le r < j} \frac{v_j^\top F v_i}{l_i - l_j}\, v_j v_i^\top .

Only gaps across the cut enter, so repeated values on one side of it do no harm. X = K(F) solves
X H - H X = (I - P) F P, and differentiating that gives

.. math:: dX = K(dF - dP\, F P + (I - P) F\, dP - X\, dH + dH\, X) - dP\, X + X\, dP,

so P and K have derivatives in each other, of every order. K is its own adjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.errors import EqualSingularValuesError
from immunize_ext.ops import operators  # noqa: F401 - defines leading_projector
from immunize_ext.ops.arguments import any_true, require_finite, require_same_device
from immunize_ext.ops.derivatives import carries_derivative, payload
from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.merge import shared_part
from immunize_ext.ops.merge_problem import (
    MergeProblem,
    concept_names,
    contradiction,
    fault_of_shared_part,
    inverse_hardness_of,
    missed_rows,
    require_floating,
)
from immunize_ext.ops.moment_derivatives import product
from immunize_ext.ops.moment_merge import MomentFactor

__all__ = ["LowRank", "merge_adapters", "merge_adapters_kv", "truncate_adapter"]

_EPS = torch.finfo(torch.float64).eps
Scales = Sequence[Sequence[float | Tensor]]


class LowRank(NamedTuple):
    """An update of one layer, Delta = up @ down.

    Attributes:
        up: (o, r).
        down: (r, d).
    """

    up: Tensor
    down: Tensor

    @property
    def delta(self) -> Tensor:
        """Delta (o, d), in the wider of both dtypes."""
        dtype = torch.promote_types(self.up.dtype, self.down.dtype)
        return self.up.to(dtype) @ self.down.to(dtype)


def merge_adapters(
    adapters: Sequence[Sequence[LowRank]],
    factors: MomentFactor | Sequence[MomentFactor],
    *,
    scales: Scales | None = None,
    maps: bool = False,
) -> list[LowRank]:
    r"""Merge LoRA adapters by the second moments of their inputs, exactly, as an adapter.

    .. math:: \Delta = \sum_n s_n U_n A_n\, \mu_n G_n S^{-1}
              = [U_1 \cdots U_N]\, \mathrm{stack}_n(s_n \mu_n A_n G_n)\, S^{-1}

    Equal to :func:`~immunize_ext.ops.merge_moments` of W_n = W0 + s_n U_n A_n, without W0.

    Args:
        adapters: ``adapters[n][l]``, the update of layer l in adapter n. One that leaves a layer
            alone has factors of rank 0 there.
        factors: Of the inputs: one for all layers, or one a layer.
        scales: ``scales[n][l]``, s: lora_alpha / r, or lora_alpha / sqrt(r) of rsLoRA; default 1.
        maps: Whether to multiply by the maps P_n, which a factor keeps: for many merges by the same
            factors. Otherwise R rows are solved for, which costs less the first time.

    Returns:
        One update a layer: its up is [U_1 ... U_N] (o, R), bit for bit, its down (R, d) float64 for
        float64 adapters and float32 for others. Computed in float64; with maps, in the dtype of
        the result.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or a factor is not finite.

    Note:
        Deterministic for a given number of threads. Derivatives of every order and direction, for
        the factors, the scales and what the moment factors are made of.

    Source:
        DERIVED from the closed form of merge_moments: up factors come out of the sum.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import LowRank, MomentFactor, merge_adapters
        >>> up, down = torch.ones(3, 1), torch.tensor([[1.0, 2.0]])
        >>> factor = MomentFactor.from_moments([torch.eye(2)] * 2, ridge=0.0)
        >>> (merged,) = merge_adapters([[LowRank(up, down)], [LowRank(up, -down)]], factor)
        >>> merged.up.shape, merged.down.tolist(), merged.delta.abs().max().item()
        (torch.Size([3, 2]), [[0.5, 1.0], [-0.5, -1.0]], 0.0)
    """
    function = "merge_adapters"
    layers = _checked(function, adapters, scales)
    given = [factors] * layers if isinstance(factors, MomentFactor) else list(factors)
    if len(given) != layers:
        raise ValueError(
            f"{function}: factors must be one, or one a layer, {layers}, got {len(given)}"
        )
    for layer, factor in enumerate(given):
        _require_width(function, adapters, layer, factor.dim, factor.chol)
        if factor.concepts != len(adapters):
            raise ValueError(
                f"{function}: adapters must be those of {factor.concepts} concepts, as the factor "
                f"of layer {layer} has it, got {len(adapters)}"
            )
    wide = _wide(adapters)
    merged: list[LowRank | None] = [None] * layers
    for factor in dict.fromkeys(given):
        fed = [layer for layer in range(layers) if given[layer] is factor]
        stacks = [_stacked_down(adapters, scales, n, fed) for n in range(len(adapters))]
        if maps:
            every = factor.stacked_maps(wide).split(factor.dim)
            solved = [
                product(stack.to(wide), one) for (stack, _), one in zip(stacks, every, strict=True)
            ]
        else:
            weighted = [
                stack @ (mu * moment)
                for (stack, _), mu, moment in zip(
                    stacks, factor.hardness.unbind(), factor.moments, strict=True
                )
            ]
            together = factor.solve(torch.cat(weighted)).to(wide)
            solved = list(together.split([len(part) for part in weighted]))
        parts = [down.split(ranks) for down, (_, ranks) in zip(solved, stacks, strict=True)]
        for layer, *downs in zip(fed, *parts, strict=True):
            merged[layer] = _adapter(adapters, layer, downs)
    return _finite(function, [one for one in merged if one is not None], adapters)


def merge_adapters_kv(
    adapters: Sequence[Sequence[LowRank]],
    embeddings: Sequence[Tensor],
    factor: RegularizationFactor,
    *,
    scales: Scales | None = None,
    hardness: float | Tensor = torch.inf,
    contradictions: Literal["raise", "average"] = "raise",
    names: Sequence[str] | None = None,
) -> list[LowRank]:
    r"""Merge LoRA adapters of key/value projections by token constraints, as an adapter.

    .. math:: \Delta = [U_1 \cdots U_N]\, \mathrm{blockdiag}_n(s_n A_n C_n^\top)\, B

    Equal to :func:`~immunize_ext.ops.merge_kv` of W_n = W0 + s_n U_n A_n, without W0.

    Args:
        adapters: ``adapters[n][l]``, the update of layer l in adapter n; rank 0 where it leaves the
            layer alone.
        embeddings: As for merge_kv: ``embeddings[n]`` (s_n, d), tokens of concept n.
        factor: As for merge_kv.
        scales: As for :func:`merge_adapters`.
        hardness: As for merge_kv.
        contradictions: As for merge_kv.
        names: As for merge_kv.

    Returns:
        One update a layer, as :func:`merge_adapters`. Delta has rank min(R, s) at most.

    Raises:
        ContradictoryTargetsError: As merge_kv.
        ValueError: As merge_kv, and as merge_adapters.

    Note:
        As :func:`merge_adapters`; derivatives for the embeddings, hardness and the factor's C_reg
        and ridge as well.

    Source:
        DERIVED from the closed form of MIMA (AAAI 2025) and Custom Diffusion (CVPR 2023).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import LowRank, RegularizationFactor, merge_adapters_kv
        >>> adapter = LowRank(torch.ones(3, 1), torch.tensor([[1.0, 2.0]]))
        >>> token, factor = torch.tensor([[1.0, 0.0]]), RegularizationFactor.identity(2)
        >>> (merged,) = merge_adapters_kv([[adapter]], [token], factor)
        >>> merged.down  # what the token sees of the update, and nothing else
        tensor([[1., 0.]])
    """
    function = "merge_adapters_kv"
    layers = _checked(function, adapters, scales)
    if contradictions not in ("raise", "average"):
        raise ValueError(
            f"{function}: contradictions must be 'raise' or 'average', got {contradictions!r}"
        )
    if len(embeddings) != len(adapters):
        raise ValueError(
            f"{function}: embeddings and adapters must have the same length, got {len(embeddings)} "
            f"and {len(adapters)}"
        )
    factor.require_current(function)
    for layer in range(layers):
        _require_width(function, adapters, layer, factor.dim, factor.chol)
    for n, tokens in enumerate(embeddings):
        require_floating(function, f"embeddings[{n}]", tokens)
        if tokens.dim() != 2 or tokens.shape[1] != factor.dim:
            raise ValueError(
                f"{function}: embeddings[{n}] must have shape (rows, {factor.dim}), the width of "
                f"the factor, got {tuple(tokens.shape)}"
            )
    require_same_device(
        function,
        [("factor", factor.chol), *((f"embeddings[{n}]", e) for n, e in enumerate(embeddings))],
    )
    rows = tuple(tokens.shape[0] for tokens in embeddings)
    c = torch.cat([tokens.to(torch.float64) for tokens in embeddings])
    problem = MergeProblem(
        base=(),
        targets=(),
        rows=rows,
        c=c,
        inverse_hardness=inverse_hardness_of(function, hardness, len(c), c),
        names=concept_names(function, names, len(embeddings)),
        targets_are_values=False,
    )
    average = contradictions == "average"
    b, defect, rank = shared_part(problem, factor, average)
    if any_true(rank < 0):
        raise fault_of_shared_part(problem, factor, function)
    wide = _wide(adapters)
    seen: list[Sequence[Tensor]] = []  # s_n A_n C_n^T (r, s_n), by concept and layer
    downs: list[Sequence[Tensor]] = []
    for n, (c_n, b_n) in enumerate(zip(c.split(list(rows)), b.split(list(rows)), strict=True)):
        stacked, ranks = _stacked_down(adapters, scales, n, range(layers))
        met = stacked @ c_n.mT
        seen.append(met.split(ranks))
        downs.append((met @ b_n).to(wide).split(ranks))
    if not average and any_true((defect != 0).any()):
        _refuse_contradictions(problem, adapters, seen, defect)
    if torch.compiler.is_compiling():
        torch._assert_async(
            (rank == len(c)).all() | average,
            "merge_adapters_kv: tokens that repeat cannot be judged inside torch.compile; leave "
            "them out or pass contradictions='average'",
        )
    merged = [_adapter(adapters, layer, [down[layer] for down in downs]) for layer in range(layers)]
    return _finite(function, merged, adapters)


def truncate_adapter(adapter: LowRank, s: Tensor, rank: int) -> LowRank:
    r"""Return the best adapter of a lower rank, in the metric of the merge's objective.

    .. math:: \arg\min_{\mathrm{rank}\,\Delta_r \le r}
              \mathrm{tr}\,(\Delta_r - \Delta)\, S\, (\Delta_r - \Delta)^\top = P_r \Delta

    Args:
        adapter: Delta = up @ down, of :func:`merge_adapters` for instance.
        s: S (d, d), symmetric positive definite: ``MomentFactor.s``.
        rank: r, at least 1. Where it is no less than the adapter's, the adapter itself is returned.

    Returns:
        up (o, r) with orthonormal columns, and down (r, d), in the adapter's dtypes; they are one
        choice of many, Delta_r is unique.

    Raises:
        EqualSingularValuesError: If the singular values r and r + 1 of Delta L are equal to
            rounding: there is no one best adapter.
        NotImplementedError: If a derivative is asked for where there is none: up has dependent
            columns, as of adapters that repeat, or the rank of Delta is below r.
        ValueError: If shapes do not fit, an argument is not finite, or rank is below 1.

    Note:
        Deterministic for a given number of threads. Derivatives of every order for Delta_r, in up,
        down and S.

    Source:
        Eckart, Young 1936, in the metric of S. Truncating Delta itself, as by an SVD after the
        merge, has a larger objective.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import LowRank, truncate_adapter
        >>> adapter = LowRank(torch.eye(2), torch.diag(torch.tensor([1.0, 2.0])))
        >>> metric = torch.diag(torch.tensor([9.0, 1.0]))  # the first input is the common one
        >>> truncate_adapter(adapter, metric, 1).delta.abs()
        tensor([[1., 0.],
                [0., 0.]])
    """
    function = "truncate_adapter"
    up, down = adapter
    for name, tensor in (("up", up), ("down", down), ("s", s)):
        require_floating(function, name, tensor)
    d = down.shape[-1]
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"{function}: up and down must have shape (o, r) and (r, d), got {tuple(up.shape)} and "
            f"{tuple(down.shape)}"
        )
    if tuple(s.shape) != (d, d):
        raise ValueError(f"{function}: s must have shape ({d}, {d}), got {tuple(s.shape)}")
    if rank < 1:
        raise ValueError(f"{function}: rank must be at least 1, got {rank}")
    require_same_device(function, [("up", up), ("down", down), ("s", s)])
    for name, tensor in (("up", up), ("down", down), ("s", s)):
        require_finite(function, name, tensor)
    if rank >= up.shape[1] or rank >= up.shape[0]:
        return adapter
    wide_up, wide_down, metric = (t.to(torch.float64) for t in (up, down, s))
    if up.shape[0] > up.shape[1]:
        q, r = torch.linalg.qr(wide_up)
        core = r @ wide_down
        _refuse_dependent_columns(function, up, r)
    else:
        q, core = None, wide_up @ wide_down
    h = core @ (0.5 * (metric + metric.mT)) @ core.mT
    h = 0.5 * (h + h.mT)
    projector, vectors, values = torch.ops.immunize_ext.leading_projector(h, rank)
    _refuse_equal(function, values, rank, (up, down, s))
    # P V spans what P projects on, for the P of a neighbour too; V is a constant.
    spanned = projector @ vectors[..., :rank].detach()
    left = torch.linalg.solve(spanned.mT @ spanned, spanned.mT).mT
    kept = left if q is None else q @ left
    return LowRank(kept.to(up.dtype), (spanned.mT @ core).to(down.dtype))


def _checked(function: str, adapters: Sequence[Sequence[LowRank]], scales: Scales | None) -> int:
    """Number of layers."""
    if len(adapters) == 0 or len(adapters[0]) == 0:
        raise ValueError(f"{function}: adapters must hold at least one with one layer, got none")
    layers = len(adapters[0])
    for n, one in enumerate(adapters):
        if len(one) != layers or (scales is not None and len(scales[n]) != layers):
            raise ValueError(
                f"{function}: adapters[{n}] and its scales must hold one entry a layer, {layers}, "
                f"got {len(one)}" + ("" if scales is None else f" and {len(scales[n])}")
            )
        for layer, (up, down) in enumerate(one):
            if _fit(up, down, adapters[0][layer].up):
                continue
            here = f"adapters[{n}][{layer}]"
            for name, tensor in (("up", up), ("down", down)):
                require_floating(function, f"{here}.{name}", tensor)
            if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
                raise ValueError(
                    f"{function}: {here} must have up (o, r) and down (r, d), got "
                    f"{tuple(up.shape)} and {tuple(down.shape)}"
                )
            if up.shape[0] != adapters[0][layer].up.shape[0]:
                raise ValueError(
                    f"{function}: {here} must have as many outputs as adapters[0][{layer}], "
                    f"{adapters[0][layer].up.shape[0]}, got {up.shape[0]}"
                )
            raise ValueError(
                f"{function}: {here} must have the dtype of adapters[0][{layer}], "
                f"{adapters[0][layer].up.dtype}, got {up.dtype} and {down.dtype}; cast all alike"
            )
    for layer, (up, _) in enumerate(adapters[0]):
        if up.dtype != adapters[0][0].up.dtype:
            raise ValueError(
                f"{function}: adapters[0][{layer}] must have the dtype of adapters[0][0], "
                f"{adapters[0][0].up.dtype}, got {up.dtype}; cast all alike"
            )
    return layers


def _fit(up: Any, down: Any, like: Any) -> bool:
    """Whether factors are matrices that fit each other and those of the first adapter."""
    return (
        isinstance(up, Tensor)
        and isinstance(down, Tensor)
        and up.dim() == down.dim() == 2
        and up.shape[1] == down.shape[0]
        and up.shape[0] == like.shape[0]
        and up.dtype == down.dtype == like.dtype
        and up.dtype.is_floating_point
    )


def _require_width(
    function: str,
    adapters: Sequence[Sequence[LowRank]],
    layer: int,
    width: int,
    beside: Tensor,
) -> None:
    for n, one in enumerate(adapters):
        up, down = one[layer]
        # Asked first, as names of what is right cost more than the question.
        if down.shape[1] == width and up.device == down.device == beside.device:
            continue
        if down.shape[1] != width:
            raise ValueError(
                f"{function}: adapters[{n}][{layer}].down must have shape (r, {width}), the width "
                f"of its factor, got {tuple(down.shape)}"
            )
        named = [("the factor", beside), (f"adapters[{n}][{layer}].down", down)]
        require_same_device(function, [*named, (f"adapters[{n}][{layer}].up", up)])


def _stacked_down(
    adapters: Sequence[Sequence[LowRank]], scales: Scales | None, n: int, layers: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Stacked s A of one adapter for several layers, float64, and how many rows each has."""
    ranks = [adapters[n][layer].down.shape[0] for layer in layers]
    stacked = torch.cat([adapters[n][layer].down for layer in layers]).to(torch.float64)
    if scales is None:
        return stacked, ranks
    factors = [
        torch.as_tensor(scales[n][layer], dtype=torch.float64, device=stacked.device).expand(rank)
        for layer, rank in zip(layers, ranks, strict=True)
    ]
    return torch.cat(factors).unsqueeze(-1) * stacked, ranks


def _wide(adapters: Sequence[Sequence[LowRank]]) -> torch.dtype:
    """The dtype of new down factors."""
    return torch.float64 if adapters[0][0].up.dtype == torch.float64 else torch.float32


def _adapter(adapters: Sequence[Sequence[LowRank]], layer: int, downs: Sequence[Tensor]) -> LowRank:
    """The up factors beside each other, and the new down factors below each other."""
    return LowRank(torch.cat([one[layer].up for one in adapters], -1), torch.cat(list(downs)))


def _finite(
    function: str, merged: list[LowRank], adapters: Sequence[Sequence[LowRank]]
) -> list[LowRank]:
    """Look at the results, and only where one is not finite at the arguments."""
    # A sum that is finite has finite terms, and is one pass without a mask to write; a sum may
    # overflow where no term does, so what it says is asked again.
    sums = torch.stack([part.detach().sum() for one in merged for part in one])
    bad = ~torch.isfinite(sums.to(torch.float64))
    if not torch.compiler.is_compiling() and any_true(bad):
        bad = torch.stack([~torch.isfinite(part.detach()).all() for one in merged for part in one])
    if torch.compiler.is_compiling():
        torch._assert_async(~bad.any(), f"{function}: a factor or a scale is not finite")
    elif any_true(bad):
        for n, one in enumerate(adapters):
            for layer, factors in enumerate(one):
                for name, part in (("up", factors.up), ("down", factors.down)):
                    require_finite(function, f"adapters[{n}][{layer}].{name}", part)
        raise ValueError(
            f"{function}: scales must be finite and the merged factors fit float32, got NaN or "
            "infinity"
        )
    return merged


def _refuse_contradictions(
    problem: MergeProblem,
    adapters: Sequence[Sequence[LowRank]],
    seen: Sequence[Sequence[Tensor]],
    defect: Tensor,
) -> None:
    """The outputs asked for, (o, s) a layer, are formed where rows were dropped, and only there."""
    with torch.no_grad():
        residual = [
            torch.cat(
                [
                    one[layer].up.to(torch.float64) @ met[layer]
                    for one, met in zip(adapters, seen, strict=True)
                ],
                -1,
            )
            for layer in range(len(adapters[0]))
        ]
        missed = torch.stack(missed_rows(problem, defect, residual)).amax(0)
    rows = payload(missed)
    if rows is not None and bool(rows.any()):
        found = rows.reshape(-1, rows.shape[-1]).amax(0).nonzero().flatten().tolist()
        raise contradiction(problem, found, "merge_adapters_kv")


def _refuse_dependent_columns(function: str, up: Tensor, r: Tensor) -> None:
    """The derivative of a QR factorisation needs independent columns."""
    diagonal = payload(r.detach().diagonal(dim1=-2, dim2=-1).abs())
    if diagonal is None or not _differentiated_here(up):
        return
    if bool((diagonal.amin(-1) <= 1e3 * len(r) * _EPS * diagonal.amax(-1)).any()):
        raise NotImplementedError(
            f"{function}: the derivative in up does not exist where its columns are dependent, as "
            "of adapters that repeat; detach up, or drop one of each pair"
        )


def _refuse_equal(function: str, values: Tensor, rank: int, arguments: tuple[Tensor, ...]) -> None:
    found = payload(values)
    if found is None:
        return
    largest = found[..., 0].clamp(min=0.0)
    tolerance = 64 * found.shape[-1] * _EPS * largest
    closed = found[..., rank - 1] - found[..., rank] <= tolerance
    nothing_left = found[..., rank - 1] <= tolerance  # Delta has a lower rank: nothing is cut
    if bool((closed & ~nothing_left).any()):
        raise EqualSingularValuesError.at_cut(function, "Delta L", rank)
    if bool(closed.any()) and any(_differentiated_here(t) for t in arguments):
        raise NotImplementedError(
            f"{function}: the derivative does not exist where the rank of Delta is below {rank}; "
            "keep the adapter as it is, or take its rank"
        )


def _differentiated_here(tensor: Tensor) -> bool:
    """As carries_derivative; within transforms of torch.func, where none can tell, true."""
    return torch._C._are_functorch_transforms_active() or (
        (torch.is_grad_enabled() and tensor.requires_grad) or carries_derivative(tensor.detach())
    )
