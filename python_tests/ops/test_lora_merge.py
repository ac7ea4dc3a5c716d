"""Adapters merged in factor space: equal to the dense merges; the best adapter of a lower rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sample_inputs import gaussian
from torch import Tensor

from immunize_ext import testing
from immunize_ext.errors import ContradictoryTargetsError, EqualSingularValuesError
from immunize_ext.ops import (
    LowRank,
    MomentFactor,
    RegularizationFactor,
    merge_adapters,
    merge_adapters_kv,
    merge_kv,
    merge_moments,
    truncate_adapter,
)

D, OUT, RANKS = 6, (5, 3), (2, 1)
SCALES = [[2.0, 0.5], [1.0, 1.5]]


def gram(seed: int, rows: int = 9) -> Tensor:
    h = gaussian(rows, D, seed=seed)
    return h.mT @ h


def adapters_of(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[list[LowRank]]:
    """Two adapters of ranks 2 and 1 for two layers."""
    return [
        [
            LowRank(
                gaussian(o, r, seed=seed + 10 * n + layer, dtype=dtype),
                gaussian(r, D, seed=seed + 50 + 10 * n + layer, dtype=dtype),
            )
            for layer, o in enumerate(OUT)
        ]
        for n, r in enumerate(RANKS)
    ]


def dense(adapters: list[list[LowRank]]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """W0 and the copies that the adapters make of it."""
    base = [gaussian(o, D, seed=90 + o) for o in OUT]
    copies = [
        [w + s * one.delta.double() for w, one, s in zip(base, layers, scales, strict=True)]
        for layers, scales in zip(adapters, SCALES, strict=True)
    ]
    return base, copies


def moment_factors() -> list[MomentFactor]:
    """One a layer."""
    return [
        MomentFactor.from_moments(
            [gram(seed), gram(seed + 1, rows=3)],
            regularization=gram(seed + 2),
            hardness=torch.tensor([0.5, 2.0]),
            ridge=0.01,
        )
        for seed in (1, 5)
    ]


TOKENS = [gaussian(2, D, seed=71), gaussian(1, D, seed=72)]
CAPTIONS = gaussian(20, D, seed=73)


def kv_factor() -> RegularizationFactor:
    return RegularizationFactor.from_embeddings(CAPTIONS, ridge=0.01)


def assert_update(found: list[LowRank], base: list[Tensor], merged: list[Tensor]) -> None:
    for one, w0, w in zip(found, base, merged, strict=True):
        assert (one.delta - (w - w0)).norm() <= 1e-12 * (w - w0).norm()


# --- equal to the dense merges --------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_moments_in_factor_space_equal_the_dense_merge(shared: bool) -> None:
    adapters, factors = adapters_of(), moment_factors()
    given: Any = factors[0] if shared else factors
    base, copies = dense(adapters)
    found = merge_adapters(adapters, given, scales=SCALES)
    assert_update(found, base, merge_moments(base, copies, given))
    by_maps = merge_adapters(adapters, given, scales=SCALES, maps=True)
    assert_update(by_maps, base, merge_moments(base, copies, given))
    for layer, one in enumerate(found):
        assert torch.equal(one.up, torch.cat([a[layer].up for a in adapters], -1))
        assert one.down.shape == (sum(RANKS), D)


@pytest.mark.parametrize("hardness", [torch.inf, 3.0])
def test_tokens_in_factor_space_equal_the_dense_merge(route: str, hardness: float) -> None:
    adapters = adapters_of()
    base, copies = dense(adapters)
    found = merge_adapters_kv(adapters, TOKENS, kv_factor(), scales=SCALES, hardness=hardness)
    merged = merge_kv(base, copies, TOKENS, kv_factor(), hardness=hardness)
    assert_update(found, base, merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_factors(dtype: torch.dtype) -> None:
    narrow = adapters_of(dtype=dtype)
    wide = [[LowRank(a.up.double(), a.down.double()) for a in one] for one in narrow]
    for merge in (
        lambda adapters: merge_adapters(adapters, moment_factors(), scales=SCALES),
        lambda adapters: merge_adapters(adapters, moment_factors(), scales=SCALES, maps=True),
        lambda adapters: merge_adapters_kv(adapters, TOKENS, kv_factor(), scales=SCALES),
    ):
        for found, truth in zip(merge(narrow), merge(wide), strict=True):
            assert found.up.dtype == dtype
            assert found.down.dtype == torch.float32
            torch.testing.assert_close(found.down.double(), truth.down, rtol=1e-6, atol=1e-6)


def test_sizes_that_move_between_the_factors_change_nothing() -> None:
    adapters = adapters_of()
    moved = [[LowRank(4 * a.up, a.down / 4) for a in one] for one in adapters]
    for one, two in zip(
        merge_adapters(adapters, moment_factors()),
        merge_adapters(moved, moment_factors()),
        strict=True,
    ):
        assert torch.equal(one.delta, two.delta)


def test_an_adapter_that_leaves_a_layer_alone() -> None:
    adapters = adapters_of()
    adapters[1][0] = LowRank(torch.zeros(OUT[0], 0).double(), torch.zeros(0, D).double())
    base, copies = dense(adapters)
    found = merge_adapters(adapters, moment_factors(), scales=SCALES)
    assert found[0].down.shape == (2, D)
    assert_update(found, base, merge_moments(base, copies, moment_factors()))


def test_repeated_tokens_are_met_contradicted_or_averaged(route: str) -> None:
    adapters, factor = adapters_of(), kv_factor()
    twice = [TOKENS[0], TOKENS[0][:1]]
    with pytest.raises(ContradictoryTargetsError, match=r"^merge_adapters_kv: .*dog"):
        merge_adapters_kv(adapters, twice, factor, names=["cat", "dog"], scales=SCALES)
    base, copies = dense(adapters)
    found = merge_adapters_kv(adapters, twice, factor, scales=SCALES, contradictions="average")
    assert_update(found, base, merge_kv(base, copies, twice, factor, contradictions="average"))
    agreeing = [adapters[0], adapters[0]]
    found = merge_adapters_kv(agreeing, twice, factor)
    (alone, _) = merge_adapters_kv([adapters[0]], [TOKENS[0]], factor)
    torch.testing.assert_close(found[0].delta, alone.delta, rtol=1e-11, atol=1e-11)


# --- derivatives ----------------------------------------------------------------------------------


def flat(adapters: list[list[LowRank]]) -> list[Tensor]:
    return [part.clone() for one in adapters for layer in one for part in layer]


def unflat(tensors: Any) -> list[list[LowRank]]:
    pairs = [LowRank(*tensors[k : k + 2]) for k in range(0, 8, 2)]
    return [pairs[:2], pairs[2:]]


def by_moments(*tensors: Tensor) -> list[Tensor]:
    *factors, first, second, scale = tensors
    moments = MomentFactor.from_moments([first, second], ridge=0.1)
    scales = [[scale[0], scale[1]], [scale[2], scale[3]]]
    merged = merge_adapters(unflat(factors), moments, scales=scales)
    return [one.delta for one in merged]


def by_tokens(*tensors: Tensor) -> list[Tensor]:
    *factors, first, second, captions = tensors
    factor = RegularizationFactor.from_embeddings(captions, ridge=0.1)
    return [one.delta for one in merge_adapters_kv(unflat(factors), [first, second], factor)]


CASES = {
    "moments": (by_moments, [gram(1), gram(2, rows=3), torch.tensor([2.0, 0.5, 1.0, 1.5])]),
    "tokens": (by_tokens, [*TOKENS, CAPTIONS]),
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_dense_merge(name: str) -> None:
    function, rest = CASES[name]
    inputs = [*flat(adapters_of()), *(t.double() for t in rest)]
    assert torch.autograd.gradcheck(
        function, [t.clone().requires_grad_() for t in inputs], fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        function, [t.clone().requires_grad_() for t in inputs], fast_mode=True
    )
    assert testing.check_forward_mode(function, inputs, required=True) == "supported"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", CASES)
def test_transforms(name: str) -> None:
    moments = moment_factors()[0]
    factor = kv_factor()

    def of_factors(*tensors: Tensor) -> list[Tensor]:
        adapters = unflat(tensors)
        if name == "moments":
            return [one.delta for one in merge_adapters(adapters, moments)]
        return [one.delta for one in merge_adapters_kv(adapters, TOKENS, factor)]

    testing.check_transforms(of_factors, flat(adapters_of()), compile="aot_eager")


# --- the best adapter of a lower rank -------------------------------------------------------------


def objective(delta: Tensor, wanted: Tensor, s: Tensor) -> float:
    return float(((delta - wanted) @ s @ (delta - wanted).mT).trace())


def adapter_and_metric(seed: int = 0) -> tuple[LowRank, Tensor]:
    return LowRank(gaussian(7, 4, seed=seed), gaussian(4, D, seed=seed + 1)), gram(seed + 2)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_adapter_of_that_rank_is_better(rank: int) -> None:
    """Not the truncated Delta, not random ones refitted, not neighbours; and it meets the bound."""
    adapter, s = adapter_and_metric()
    wanted = adapter.delta
    best = truncate_adapter(adapter, s, rank)
    assert best.down.shape == (rank, D)
    torch.testing.assert_close(best.up.mT @ best.up, torch.eye(rank).double(), rtol=0, atol=1e-13)
    value = objective(best.delta, wanted, s)
    root = np.linalg.cholesky(s.numpy())
    tail = np.linalg.svd(wanted.numpy() @ root, compute_uv=False)[rank:]
    np.testing.assert_allclose(value, np.sum(tail**2), rtol=1e-9)
    u, sigma, vt = torch.linalg.svd(wanted)
    truncated = u[:, :rank] @ torch.diag(sigma[:rank]) @ vt[:rank]
    assert objective(truncated, wanted, s) > 1.001 * value
    for seed in range(20):
        q = torch.linalg.qr(gaussian(7, rank, seed=seed))[0]
        assert objective(q @ q.mT @ wanted, wanted, s) > value
        step = 1e-3 * gaussian(7, rank, seed=seed)
        assert objective((best.up + step) @ best.down, wanted, s) >= value


def test_the_merge_cut_is_the_best_of_its_rank_for_the_merge_itself() -> None:
    """Over all W0 + Delta_r the objective of merge_moments differs from this one by a constant."""
    adapters, factor = adapters_of(seed=3), moment_factors()[0]
    (merged, _) = merge_adapters(adapters, factor)
    s, moments = factor.s, factor.moments

    def merge_objective(delta: Tensor) -> float:
        value = float(
            (
                delta @ (s - sum(factor.hardness[n] * moments[n] for n in range(2))) @ delta.mT
            ).trace()
        )
        for n, one in enumerate(adapters):
            value += float(factor.hardness[n]) * objective(delta, one[0].delta, moments[n])
        return value

    deltas = [truncate_adapter(merged, s, 1).delta, merged.delta, gaussian(OUT[0], D)]
    constants = [merge_objective(delta) - objective(delta, merged.delta, s) for delta in deltas]
    np.testing.assert_allclose(constants, constants[0], rtol=1e-10)


@pytest.mark.parametrize("rows", [7, 3])
def test_derivatives_of_the_cut(rows: int) -> None:
    """Tall and wide; reverse, reverse over reverse, forward."""
    inputs = [gaussian(rows, 4, seed=5), gaussian(4, D, seed=6), gram(7)]

    def function(up: Tensor, down: Tensor, s: Tensor) -> Tensor:
        return truncate_adapter(LowRank(up, down), s, 2).delta

    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, leaves, rtol=1e-4)
    assert torch.autograd.gradgradcheck(function, leaves, rtol=1e-3, fast_mode=True)
    assert testing.check_forward_mode(lambda *t: [function(*t)], inputs, required=True)


def test_third_derivatives_of_the_cut() -> None:
    def second(h: Tensor) -> Tensor:
        up = torch.eye(3).double()
        value = truncate_adapter(LowRank(up, up), h, 1).delta.square().sum().sin()
        (first,) = torch.autograd.grad(value, h, create_graph=True)
        return torch.autograd.grad(first.square().sum(), h, create_graph=True)[0]

    h = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double() + 0.3
    assert torch.autograd.gradcheck(second, h.requires_grad_(), rtol=1e-3)


def test_repeated_values_on_one_side_of_the_cut_do_no_harm() -> None:
    """torch's own derivative of an SVD is infinite there."""
    up = torch.eye(4).double()
    down = torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])).double()
    eye = torch.eye(4).double()

    def function(down: Tensor) -> Tensor:
        return truncate_adapter(LowRank(up, down), eye, 2).delta

    assert torch.autograd.gradcheck(function, down.requires_grad_())


def test_a_cut_through_equal_values_is_refused() -> None:
    eye = torch.eye(4).double()
    with pytest.raises(EqualSingularValuesError, match="singular values 2 and 3, got equal"):
        truncate_adapter(LowRank(eye, eye), eye, 2)
    adapter = LowRank(gaussian(7, 4), torch.cat([gaussian(2, D, seed=1)] * 2))  # Delta of rank 2
    for rank in (2, 3):
        cut = truncate_adapter(adapter, gram(1), rank)
        torch.testing.assert_close(cut.delta, adapter.delta, rtol=1e-12, atol=1e-12)
    with pytest.raises(NotImplementedError, match="the rank of Delta is below 3"):
        truncate_adapter(LowRank(adapter.up.requires_grad_(), adapter.down), gram(1), 3)


def test_adapters_that_repeat_are_cut_but_not_differentiated() -> None:
    half = gaussian(7, 2, seed=1)
    adapter = LowRank(torch.cat([half, half], -1), gaussian(4, D, seed=2))
    folded = LowRank(half, adapter.down[:2] + adapter.down[2:])
    found, truth = (truncate_adapter(one, gram(1), 1).delta for one in (adapter, folded))
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)
    with pytest.raises(NotImplementedError, match="its columns are dependent"):
        truncate_adapter(LowRank(adapter.up.requires_grad_(), adapter.down), gram(1), 1)


def test_a_rank_that_is_there_already_changes_nothing() -> None:
    adapter, s = adapter_and_metric()
    assert truncate_adapter(adapter, s, 4) is adapter


# --- refusals -------------------------------------------------------------------------------------


def changed(n: int, layer: int, **parts: Tensor) -> list[list[LowRank]]:
    adapters = adapters_of()
    adapters[n][layer] = adapters[n][layer]._replace(**parts)
    return adapters


@pytest.mark.parametrize("kind", ["moments", "tokens"])
@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        ([], {}, "adapters must hold at least one with one layer"),
        ([adapters_of()[0], []], {}, r"adapters\[1\] and its scales must hold one entry a layer"),
        (adapters_of(), {"scales": [[1.0, 1.0], [1.0]]}, r"adapters\[1\] and its scales"),
        (changed(1, 0, up=gaussian(5, 3)), {}, r"adapters\[1\]\[0\] must have up \(o, r\)"),
        (changed(1, 0, up=gaussian(4, 1)), {}, r"adapters\[1\]\[0\] must have as many outputs"),
        (changed(1, 0, up=gaussian(5, 1).float()), {}, r"adapters\[1\]\[0\] must have the dtype"),
        (
            changed(0, 1, down=gaussian(2, 5)),
            {},
            r"adapters\[0\]\[1\]\.down must have shape \(r, 6",
        ),
        (
            changed(0, 1, down=gaussian(2, D) * torch.nan),
            {},
            r"adapters\[0\]\[1\]\.down must be finite",
        ),
        (adapters_of(), {"scales": [[1.0, torch.inf], [1.0, 1.0]]}, "scales must be finite"),
    ],
)
def test_bad_adapters_are_named(kind: str, adapters: Any, options: Any, message: str) -> None:
    if kind == "moments":
        with pytest.raises(ValueError, match=rf"^merge_adapters: .*{message}"):
            merge_adapters(adapters, moment_factors(), **options)
    else:
        tokens = TOKENS[: len(adapters)]
        with pytest.raises(ValueError, match=rf"^merge_adapters_kv: .*{message}"):
            merge_adapters_kv(adapters, tokens, kv_factor(), **options)


def test_bad_factors_and_tokens_are_named() -> None:
    adapters = adapters_of()
    with pytest.raises(ValueError, match="factors must be one, or one a layer, 2, got 1"):
        merge_adapters(adapters, moment_factors()[:1])
    with pytest.raises(ValueError, match="adapters must be those of 1 concepts"):
        merge_adapters(adapters, MomentFactor.from_moments([gram(1)]))
    with pytest.raises(ValueError, match="must have the same length, got 1 and 2"):
        merge_adapters_kv(adapters, TOKENS[:1], kv_factor())
    with pytest.raises(ValueError, match=r"embeddings\[1\] must have shape \(rows, 6\)"):
        merge_adapters_kv(adapters, [TOKENS[0], gaussian(2, 5)], kv_factor())
    with pytest.raises(ValueError, match=r"^merge_adapters_kv: embeddings must be finite"):
        merge_adapters_kv(adapters, [TOKENS[0], TOKENS[1] * torch.nan], kv_factor())
    with pytest.raises(ValueError, match="contradictions must be"):
        merge_adapters_kv(adapters, TOKENS, kv_factor(), contradictions="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hardness must be positive"):
        merge_adapters_kv(adapters, TOKENS, kv_factor(), hardness=0.0)


@pytest.mark.parametrize(
    ("adapter", "s", "rank", "message"),
    [
        (LowRank(gaussian(3, 2), gaussian(3, D)), gram(1), 1, "up and down must have shape"),
        (LowRank(gaussian(3, 2), gaussian(2, D)), gram(1)[:2], 1, r"s must have shape \(6, 6\)"),
        (LowRank(gaussian(3, 2), gaussian(2, D)), gram(1), 0, "rank must be at least 1"),
        (LowRank(gaussian(3, 2), gaussian(2, D)), gram(1) * torch.nan, 1, "s must be finite"),
    ],
)
def test_bad_cuts_are_named(adapter: LowRank, s: Tensor, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^truncate_adapter: .*{message}"):
        truncate_adapter(adapter, s, rank)
