"""Rows, columns and layers of a merge, gates between ways, overlap: against trying all of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sample_inputs import gaussian
from torch import Tensor

from immunize_ext import reference
from immunize_ext.ops import (
    MomentFactor,
    RegularizationFactor,
    best_gates,
    best_layers,
    concept_overlap,
    gate_layers,
    keep_columns,
    keep_rows,
    merge_kv,
    merge_moments,
    merge_report,
    row_scores,
)

D, OUT = 6, 8


def problem(
    *, out: tuple[int, ...] = (OUT,), seed: int = 0, grad: bool = False
) -> tuple[list[Tensor], list[list[Tensor]], MomentFactor]:
    base = [gaussian(o, D, seed=seed + k).requires_grad_(grad) for k, o in enumerate(out)]
    copies = [
        [w.detach() + gaussian(*w.shape, seed=seed + 10 * n + k) for k, w in enumerate(base)]
        for n in (1, 2, 3)
    ]
    grams = [(h := gaussian(rows, D, seed=seed + rows)).mT @ h for rows in (3, 5, 9)]
    return (
        base,
        copies,
        MomentFactor.from_moments(grams, ridge=0.05, hardness=torch.tensor([1, 2, 0.5])),
    )


def cost(weights: Tensor, merged: Tensor, factor: MomentFactor) -> float:
    error = weights.detach() - merged.detach()
    return float(((error @ factor.s) * error).sum())


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8])
def test_rows_are_those_of_an_exhaustive_search(count: int) -> None:
    base, copies, factor = problem()
    merged = merge_moments(base, copies, factor)
    found = keep_rows(base, merged, factor, count)
    rows, lost = reference.best_rows((merged[0] - base[0]).numpy(), factor.s.numpy(), count)
    assert found.kept[0].nonzero().flatten().tolist() == rows
    assert found.lost == pytest.approx(lost, rel=1e-12, abs=1e-12)
    assert cost(found.weights[0], merged[0], factor) == pytest.approx(lost, rel=1e-12, abs=1e-12)
    assert torch.equal(found.weights[0][found.kept[0]], merged[0][found.kept[0]])
    assert torch.equal(found.weights[0][~found.kept[0]], base[0][~found.kept[0]])


def test_rows_of_all_layers_compete_and_heads_are_taken_whole() -> None:
    base, copies, factor = problem(out=(4, 8))
    merged = merge_moments(base, copies, factor)
    scores = torch.cat([s.unflatten(0, (-1, 2)).sum(-1) for s in row_scores(base, merged, factor)])
    found = keep_rows(base, merged, factor, 3, group=2)
    kept = torch.cat(found.kept).unflatten(0, (-1, 2))
    assert torch.equal(kept[:, 0], kept[:, 1])
    best = min(
        float(scores.sum() - scores[list(chosen)].sum())
        for chosen in itertools.combinations(range(6), 3)
    )
    assert found.lost == pytest.approx(best, rel=1e-12)


def test_a_convolution_is_its_unfolded_matrix() -> None:
    base, copies, factor = problem()
    flat = keep_rows(base, merge_moments(base, copies, factor), factor, 3)
    folded = [w.unflatten(1, (2, 3)) for w in base]
    merged = merge_moments(folded, [[w.unflatten(1, (2, 3)) for w in c] for c in copies], factor)
    found = keep_rows(folded, merged, factor, 3)
    assert torch.equal(found.weights[0].flatten(1), flat.weights[0])
    columns = keep_columns(folded[0], merged[0], factor, 2)
    assert columns.weights[0].shape == folded[0].shape


def test_gradients_of_rows_scores_and_columns() -> None:
    base, copies, factor = problem(out=(4,))
    moments = [g.clone().requires_grad_() for g in factor.moments]
    w0, moved = base[0].requires_grad_(), copies[0][0].clone().requires_grad_()

    def rows(w0: Tensor, moved: Tensor) -> tuple[Tensor, ...]:
        return (*keep_rows([w0], [moved], factor, 2).weights, *row_scores([w0], [moved], factor))

    def columns(w0: Tensor, moved: Tensor, *grams: Tensor) -> Tensor:
        made = MomentFactor.from_moments([0.5 * (g + g.mT) for g in grams], ridge=0.1)
        return keep_columns(w0, moved, made, 3).weights[0]

    assert torch.autograd.gradcheck(rows, (w0, moved))
    assert torch.autograd.gradgradcheck(rows, (w0, moved))
    assert torch.autograd.gradcheck(columns, (w0, moved, *moments))
    assert torch.autograd.gradgradcheck(columns, (w0, moved, *moments))


def test_a_tie_at_the_cut_has_no_derivative_and_no_other_refusal() -> None:
    factor = MomentFactor.from_moments([torch.eye(2).double()], ridge=0.0)
    base, merged = torch.zeros(3, 2).double(), torch.ones(3, 2).double()
    assert keep_rows([base], [merged], factor, 1).kept[0].tolist() == [True, False, False]
    with pytest.raises(NotImplementedError, match="groups 1 and 2 cost the same, 2"):
        keep_rows([base], [merged.requires_grad_()], factor, 1)


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deleted", range(D))
def test_one_column_less_costs_what_the_surgeon_says(deleted: int) -> None:
    base, copies, factor = problem()
    (merged,) = merge_moments(base, copies, factor)
    update, s = (merged - base[0]).numpy(), factor.s.numpy()
    others = [j for j in range(D) if j != deleted]
    _, lost = reference.columns_update(update, s, others)
    said = (update[:, deleted] ** 2).sum() / np.linalg.inv(s)[deleted, deleted]
    assert said == pytest.approx(lost, rel=1e-10)


@pytest.mark.parametrize("count", range(D + 1))
def test_columns_are_solved_for_and_greedy_is_near_the_best_set(count: int) -> None:
    base, copies, factor = problem()
    (merged,) = merge_moments(base, copies, factor)
    update, s = (merged - base[0]).numpy(), factor.s.numpy()
    found = keep_columns(base[0], merged, factor, count)
    kept = found.kept[0].nonzero().flatten().tolist()
    solved, lost = reference.columns_update(update, s, kept)
    np.testing.assert_allclose((found.weights[0] - base[0]).numpy(), solved, rtol=1e-9, atol=1e-11)
    assert len(kept) == count
    assert found.lost == pytest.approx(lost, rel=1e-9, abs=1e-11)
    best, least = reference.best_columns(update, s, count)
    assert found.lost >= least * (1 - 1e-9) - 1e-11
    if count in (0, D - 1, D):  # nothing to choose, or one choice, which is exact
        assert kept == best


def test_weights_without_columns_are_a_tensor_of_their_own() -> None:
    base, copies, factor = problem()
    merged = merge_moments(base, copies, factor)
    (rows,), (columns,) = (
        keep_rows(base, merged, factor, 0).weights,
        keep_columns(base[0], merged[0], factor, 0).weights,
    )
    before = base[0].clone()
    for found in (rows, columns):
        assert torch.equal(found, before)
        found.add_(1.0)
    assert torch.equal(base[0], before)


@pytest.mark.parametrize("seed", range(4))
def test_each_column_given_up_is_the_cheapest_then(seed: int) -> None:
    base, copies, factor = problem(seed=100 * seed)
    (merged,) = merge_moments(base, copies, factor)
    update, s = (merged - base[0]).numpy(), factor.s.numpy()
    kept = list(range(D))
    while kept:
        left = [[k for k in kept if k != j] for j in kept]
        kept = min(left, key=lambda columns: reference.columns_update(update, s, columns)[1])
        found = keep_columns(base[0], merged, factor, len(kept)).kept[0]
        assert found.nonzero().flatten().tolist() == kept


def test_uncorrelated_columns_are_the_best_set() -> None:
    factor = MomentFactor.from_moments([torch.diag(torch.arange(1.0, D + 1)).double()], ridge=0.0)
    merged = gaussian(3, D, seed=5)
    for count in range(D + 1):
        found = keep_columns(torch.zeros_like(merged), merged, factor, count)
        best, least = reference.best_columns(merged.numpy(), factor.s.numpy(), count)
        assert found.kept[0].nonzero().flatten().tolist() == best
        assert found.lost == pytest.approx(least, rel=1e-10, abs=1e-12)


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_layers_are_those_of_an_exhaustive_search_at_every_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    worths, sizes = rng.random(7).tolist(), rng.integers(1, 9, 7).tolist()
    front = best_layers(worths, sizes)
    assert front[0].layers == ()
    assert front[-1].size <= sum(sizes)
    for budget in range(sum(sizes) + 1):
        chosen = [choice for choice in front if choice.size <= budget][-1]
        assert chosen.worth == pytest.approx(reference.best_layers(worths, sizes, budget))
        assert chosen.worth == pytest.approx(sum(worths[layer] for layer in chosen.layers))
        assert chosen.size == sum(sizes[layer] for layer in chosen.layers)
        assert best_layers(worths, sizes, budget=budget)[-1].worth == chosen.worth


# --- gates ----------------------------------------------------------------------------------------


def test_gates_at_their_corners_and_halfway() -> None:
    base, copies, factor = problem()
    mean = [torch.stack([copy[0] for copy in copies]).mean(0)]
    merged = merge_moments(base, copies, factor)
    for gates, truth in (
        ([0.0, 0.0], base[0]),
        ([1.0, 0.0], mean[0]),
        ([0.0, 1.0], merged[0]),
        ([0.5, 0.5], 0.5 * (mean[0] + merged[0])),
    ):
        (found,) = gate_layers(base, [mean, merged], [torch.tensor(gates)])
        torch.testing.assert_close(found, truth)
    heads = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    (found,) = gate_layers(base, [mean, merged], [heads])
    torch.testing.assert_close(found, torch.cat([mean[0][: OUT // 2], merged[0][OUT // 2 :]]))


def test_derivative_of_a_gate_is_an_inner_product() -> None:
    base, copies, factor = problem()
    mean, merged = [copies[0][0]], merge_moments(base, copies, factor)
    gates = torch.tensor([0.3, 0.4]).double().requires_grad_()
    cotangent = gaussian(OUT, D, seed=9)
    (found,) = gate_layers(base, [mean, merged], [gates])
    (grad,) = torch.autograd.grad((found * cotangent).sum(), gates)
    truth = [float((cotangent * (w[0] - base[0])).sum()) for w in (mean, merged)]
    assert grad.tolist() == pytest.approx(truth, rel=1e-12)

    def along(gates: Tensor, w0: Tensor, way: Tensor) -> Tensor:
        return gate_layers([w0], [[way], [way * way]], [gates])[0]

    heads = gaussian(2, 4, seed=3).requires_grad_()
    arguments = (heads, base[0].requires_grad_(), mean[0].clone().requires_grad_())
    assert torch.autograd.gradcheck(along, arguments)
    assert torch.autograd.gradgradcheck(along, arguments)
    batched = torch.func.vmap(along, in_dims=(0, None, None))(
        heads.detach().expand(3, 2, 4), *arguments[1:]
    )
    torch.testing.assert_close(batched[1], along(*arguments))


@pytest.mark.usefixtures("fresh_compiler")
def test_gates_compile_whole() -> None:
    base, copies, factor = problem()
    ways = [copies[0], merge_moments(base, copies, factor)]
    gates = [gaussian(2, 4, seed=3).requires_grad_()]
    compiled = torch.compile(gate_layers, fullgraph=True, backend="aot_eager")
    (found,), (truth,) = compiled(base, ways, gates), gate_layers(base, ways, gates)
    torch.testing.assert_close(found, truth)
    grads = [torch.autograd.grad(w.square().sum(), gates[0])[0] for w in (found, truth)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("groups", [1, 2, OUT])
def test_best_gates_are_the_least_squares_solution(groups: int) -> None:
    base, copies, factor = problem()
    merged = merge_moments(base, copies, factor)
    (gates,) = best_gates(base, copies, merged, factor, groups=groups)
    assert gates.shape == (3, groups)
    for group, rows in enumerate(np.split(np.arange(OUT), groups)):
        ways = [(copy[0] - base[0])[rows].numpy() for copy in copies]
        truth = reference.best_gates(ways, (merged[0] - base[0])[rows].numpy(), factor.s.numpy())
        np.testing.assert_allclose(gates[:, group].numpy(), truth, rtol=1e-9)
    # Nothing that was merged exactly is merged better by gates; the merge as a way gets gate 1.
    (own,) = best_gates(base, [merged], merged, factor, groups=groups)
    torch.testing.assert_close(own, torch.ones_like(own))


def test_best_gates_of_dependent_ways() -> None:
    base, copies, factor = problem()
    merged = merge_moments(base, copies, factor)
    (gates,) = best_gates(base, [copies[0], copies[0]], merged, factor)
    (alone,) = best_gates(base, [copies[0]], merged, factor)
    assert gates.flatten().tolist() == pytest.approx([float(alone) / 2] * 2, rel=1e-10)
    (none,) = best_gates(base, [base], merged, factor)  # a way that goes nowhere
    assert none.tolist() == [[0.0]]
    with pytest.raises(NotImplementedError, match="linearly dependent, as they are in layer 0"):
        best_gates(base, [copies[0], copies[0]], [merged[0].requires_grad_()], factor)


@pytest.mark.parametrize(("apart", "dependent"), [(1e-7, True), (3e-7, False)])
def test_where_two_ways_count_as_one(apart: float, dependent: bool) -> None:
    """By 1 - cos, whose resolution is the root of eps in the angle."""
    base, merged = torch.zeros(1, 2).double(), torch.tensor([[1.0, 1.0]]).double().requires_grad_()
    ways = [torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, apart]]).double()]
    factor = MomentFactor.from_moments([torch.eye(2)], ridge=0.0)
    if dependent:
        with pytest.raises(NotImplementedError, match="linearly dependent"):
            best_gates([base], [[way] for way in ways], [merged], factor)
    else:
        (gates,) = best_gates([base], [[way] for way in ways], [merged], factor)
        assert float(gates.detach()[1]) == pytest.approx(1.0 / apart, rel=0.1)


def test_gradient_of_best_gates() -> None:
    base, copies, factor = problem(out=(4,))
    merged = merge_moments(base, copies, factor)[0]

    def gates(w0: Tensor, one: Tensor, w: Tensor) -> Tensor:
        return best_gates([w0], [[one], [copies[1][0]]], [w], factor, groups=2)[0]

    arguments = [t.detach().clone().requires_grad_() for t in (base[0], copies[0][0], merged)]
    assert torch.autograd.gradcheck(gates, arguments)
    assert torch.autograd.gradgradcheck(gates, arguments)


# --- overlap --------------------------------------------------------------------------------------


def test_overlap_is_scipys_principal_angle() -> None:
    rows = [gaussian(s, D, seed=s) for s in (1, 2, 3)]
    captions = gaussian(30, D, seed=9) * torch.logspace(0, -2, D).double()
    factor = RegularizationFactor.from_embeddings(captions, ridge=1e-3)
    found = concept_overlap(rows, factor)
    q = (factor.chol @ factor.chol.mT).numpy()
    for n, m in itertools.combinations(range(3), 2):
        truth = reference.concept_overlap(rows[n].numpy(), rows[m].numpy(), q)
        assert float(found[n, m]) == float(found[m, n]) == pytest.approx(truth, rel=1e-9)
    # Neither scale nor repetition of a row matters, nor rows that span the same.
    other = [torch.cat([rows[0], 3.0 * rows[0]]), rows[1].flip(0), rows[2]]
    torch.testing.assert_close(concept_overlap(other, factor), found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.99])
def test_two_tokens_give_the_condition_number_of_t(rho: float) -> None:
    """kappa(T) = (1 + rho) / (1 - rho), and the price of an update bounded by 1 / (1 - rho)."""
    captions = gaussian(40, D, seed=2)
    factor = RegularizationFactor.from_embeddings(captions)
    z = torch.zeros(2, D).double()
    z[0, 0], z[1, 0], z[1, 1] = 1.0, rho, math.sqrt(1 - rho * rho)
    tokens = list((z @ factor.chol.mT).split(1))  # L^-1 c = z
    assert float(concept_overlap(tokens, factor)[0, 1]) == pytest.approx(rho, abs=1e-12)
    base, values = [gaussian(3, D, seed=3)], [gaussian(3, 2, seed=4)]
    merged = merge_kv(base, None, tokens, factor, values=values)
    report = merge_report(merged, base, None, tokens, factor, values=values)
    assert report.condition_t == pytest.approx((1 + rho) / (1 - rho), rel=1e-9)
    moved = float(((merged[0] - base[0]) @ factor.chol).square().sum())
    asked = values[0] - base[0] @ torch.cat(tokens).mT
    t = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    assert moved == pytest.approx(float((asked @ torch.linalg.inv(t) * asked).sum()), rel=1e-9)
    assert moved <= float(asked.square().sum()) / (1 - rho) * (1 + 1e-12)


def test_overlap_refuses_derivatives_and_knows_concepts_without_tokens() -> None:
    factor = RegularizationFactor.identity(D)
    found = concept_overlap([gaussian(2, D), gaussian(0, D)], factor)
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(NotImplementedError, match="no derivative is known"):
        concept_overlap([gaussian(2, D).requires_grad_()], factor)


# --- refusals -------------------------------------------------------------------------------------

BASE, COPIES, FACTOR = problem()
MERGED = merge_moments(BASE, COPIES, FACTOR)
ONE = torch.ones(1)

REFUSALS: list[tuple[Any, tuple[Any, ...], str]] = [
    (
        keep_rows,
        (BASE, MERGED, FACTOR, 9),
        "count must be from 0 to the number of groups, 8",
    ),
    (row_scores, (BASE, [MERGED[0][:3]], FACTOR), r"merged\[0\] must have the shape and dtype"),
    (row_scores, (BASE, [MERGED[0] * torch.inf], FACTOR), r"merged\[0\] must be finite"),
    (row_scores, (BASE, [], FACTOR), "merged must hold one weight a layer, 1, got 0"),
    (keep_columns, (BASE[0], MERGED[0], FACTOR, -1), "count must be from 0 to 6"),
    (best_layers, ([1.0], [1, 2]), "worths and sizes must have the same length, got 1 and 2"),
    (best_layers, ([-1.0], [1]), "worths must be finite and not negative, got -1.0 at layer 0"),
    (best_layers, ([1.0], [0]), "sizes must be whole numbers of at least 1, got 0 at layer 0"),
    (best_layers, ([1.0], [math.inf]), "sizes must be whole numbers .*, got inf at layer 0"),
    (best_layers, ([1.0], [math.nan]), "sizes must be whole numbers .*, got nan at layer 0"),
    (best_layers, ([math.nan], [1]), "worths must be finite and not negative, got nan at layer 0"),
    (gate_layers, (BASE, [MERGED], [torch.ones(1, 0)]), "groups a divisor of 8 rows"),
    (gate_layers, ([ONE[0]], [[ONE[0]]], [ONE]), r"base\[0\] must have shape \(o, \.\.\.\)"),
    (gate_layers, (BASE, [], [ONE]), "ways and gates must hold one entry a layer"),
    (gate_layers, (BASE, [MERGED], [torch.ones(2)]), r"gates\[0\] must have shape \(1,\) or"),
    (gate_layers, (BASE, [MERGED], [torch.ones(1, 3)]), "groups a divisor of 8 rows"),
    (gate_layers, (BASE, [[MERGED[0].float()]], [ONE]), r"ways\[0\]\[0\] must have the shape"),
    (best_gates, (BASE, [], MERGED, FACTOR), "ways must hold at least one, got none"),
    (
        best_gates,
        (BASE, [[MERGED[0] * torch.nan]], MERGED, FACTOR),
        r"ways\[0\]\[0\] must be fin",
    ),
    (concept_overlap, ([gaussian(2, 3)], RegularizationFactor.identity(D)), r"\(rows, 6\)"),
]


@pytest.mark.parametrize(("function", "arguments", "words"), REFUSALS)
def test_what_does_not_fit_is_refused(
    function: Any, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        function(*arguments)


def test_a_way_that_is_no_tensor_and_a_budget_that_is_no_number_are_refused() -> None:
    with pytest.raises(TypeError, match=r"gate_layers: ways\[0\]\[0\] must be a torch.Tensor"):
        gate_layers(BASE, [[1.0]], [ONE])
    with pytest.raises(ValueError, match="best_layers: budget must be a number, got nan"):
        best_layers([1.0], [1], budget=math.nan)  # type: ignore[arg-type]


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="group must be at least 1 and divide the rows"):
        keep_rows(BASE, MERGED, FACTOR, 1, group=3)
    with pytest.raises(ValueError, match="groups must be at least 1 and divide the 8 rows"):
        best_gates(BASE, COPIES, MERGED, FACTOR, groups=3)
