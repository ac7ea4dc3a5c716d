"""Repeated, near-repeated, dependent and contradictory concept rows in the merge.

Prompts share their first and last tokens, so equal rows of C are the rule: T is singular there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from merge_problems import conditions, factor_of, numpy_of, reference_of, solve, targets_of
from sample_inputs import EPS, fewer_examples, gaussian, half_examples
from torch import Tensor

from immunize_ext import reference
from immunize_ext.errors import ContradictoryTargetsError
from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.testing import strategies
from immunize_ext.testing.samples import merge_problem

INF = float("inf")
D = 8

CAPTIONS = gaussian(30, D, seed=90)
FACTOR = RegularizationFactor.from_embeddings(CAPTIONS)
BASE = gaussian(5, D, seed=91)


def merge(c: Tensor, values: Tensor, base: Tensor = BASE, **options) -> Tensor:
    return merge_kv([base], None, [c], FACTOR, values=[values], **options)[0]


def truth_of(c: Tensor, values: Tensor, **options) -> Tensor:
    found = reference.merge_null_space(
        BASE.numpy(), values.numpy(), c.numpy(), CAPTIONS.numpy(), **options
    )
    return torch.from_numpy(found)


def assert_same(found: Tensor, truth: Tensor, rtol: float = 1e-11) -> None:
    assert float((found - truth).norm()) <= rtol * float(truth.norm())


# --- repeats that agree ---------------------------------------------------------------------------


@fewer_examples
@given(problem=strategies.merge_problems(repeats=("consistent",), text_like=False, soft=False))
def test_consistent_repeats_change_nothing(route, problem):
    """Equal to the reference, which never forms T, and to the merge of the rows without repeats."""
    assume(problem.repeats)
    merged = solve(problem)
    c = torch.cat(problem.embeddings)
    values = [torch.from_numpy(v) for v in targets_of(problem)]
    keep = [j for j in range(c.shape[0]) if j != problem.repeats[0][-1]]
    single = merge_kv(
        problem.base, None, [c[keep]], factor_of(problem), values=[v[:, keep] for v in values]
    )
    kappa_q = conditions(problem)[0]
    z = np.linalg.solve(factor_of(problem).chol.numpy(), c[keep].numpy().T)
    bound = 50 * EPS * (kappa_q + np.linalg.cond(z) ** 2)
    for found, other, truth, base in zip(
        merged, single, reference_of(problem), problem.base, strict=True
    ):
        moved = np.linalg.norm(truth - numpy_of(base))
        limit = bound * moved + 10 * EPS * np.linalg.norm(truth)
        assert np.linalg.norm(numpy_of(found) - truth) <= limit
        assert float((found - other).norm()) <= limit


@half_examples
@given(data=st.data())
def test_any_pattern_of_repeats(route, data):
    """Rows drawn with replacement, targets with them: the same as every row once."""
    seed = data.draw(st.integers(0, 20))
    rows = gaussian(4, D, seed=seed)
    wanted = gaussian(5, 4, seed=seed + 100)
    extra = data.draw(st.lists(st.integers(0, 3), max_size=8))
    order = data.draw(st.permutations([0, 1, 2, 3, *extra]))
    repeated = merge(rows[order], wanted[:, order])
    once = merge(rows, wanted)
    assert_same(repeated, once, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("contradictions", ["raise", "average"])
def test_end_of_text_tokens_of_equal_concepts(route, dtype, contradictions):
    """Three prompts that all start and end with the same tokens, and weights that agree there."""
    start, end = gaussian(1, D, seed=1, dtype=dtype), gaussian(1, D, seed=2, dtype=dtype)
    own = [gaussian(1, D, seed=k, dtype=dtype) for k in (3, 4, 5)]
    embeddings = [torch.cat([start, word, end, end, end]) for word in own]
    base = BASE.to(dtype)
    adapted = [[(base.double() + 0.1 * gaussian(5, D, seed=6)).to(dtype)] for _ in own]
    (merged,) = merge_kv([base], adapted, embeddings, FACTOR, contradictions=contradictions)
    c = torch.cat(embeddings).double()
    error = (merged.double() - adapted[0][0].double()) @ c.mT
    # Rounding of the weights, amplified by the size of the edit that five tokens ask for.
    assert float(error.abs().max()) <= 200 * torch.finfo(dtype).eps * float(c.norm())


def test_repeats_of_soft_rows_add_their_hardness(route):
    """Two soft rows of hardness mu_1, mu_2 are one of mu_1 + mu_2 with the weighted mean."""
    row, first, second = gaussian(1, D, seed=1), gaussian(5, 1, seed=2), gaussian(5, 1, seed=3)
    mu = torch.tensor([2.0, 6.0]).double()
    both = merge(torch.cat([row, row]), torch.cat([first, second], 1), hardness=mu)
    one = merge(row, (2 * first + 6 * second) / 8, hardness=8.0)
    assert_same(both, one)


def test_hard_row_outweighs_its_soft_repeat(route):
    row, hard, soft = gaussian(1, D, seed=1), gaussian(5, 1, seed=2), gaussian(5, 1, seed=3)
    mu = torch.tensor([INF, 6.0]).double()
    both = merge(torch.cat([row, row]), torch.cat([hard, soft], 1), hardness=mu)
    one = merge(row, hard)
    assert_same(both, one)


def test_scaled_and_combined_rows_are_dependent_too(route):
    """Not only copies: 2 c_1, c_1 - c_2 and the zero row ask for nothing new."""
    rows, wanted = gaussian(2, D, seed=1), gaussian(5, 2, seed=2)
    mix = torch.tensor([[2.0, 0.0], [1.0, -1.0], [0.0, 0.0]]).double()
    more = merge(torch.cat([rows, mix @ rows]), torch.cat([wanted, wanted @ mix.mT], 1))
    once = merge(rows, wanted)
    assert_same(more, once)


@pytest.mark.parametrize("s", [D, D + 1, 20])
def test_as_many_rows_as_columns_and_more(route, s):
    """Consistent targets: d independent rows determine W, the others repeat what they say."""
    rows, wanted = gaussian(s, D, seed=1), gaussian(5, D, seed=2)
    merged = merge(rows, wanted @ rows.mT)
    assert_same(merged, wanted, 1e-9)


def test_zero_rows_alone_constrain_nothing(route):
    merged = merge(torch.zeros(2, D).double(), torch.zeros(5, 2).double())
    assert torch.equal(merged, BASE)


# --- contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_contradiction_names_the_concepts(route, dtype):
    token = gaussian(1, D, seed=1)
    embeddings = [
        torch.cat([gaussian(1, D, seed=2), token]),
        gaussian(1, D, seed=3),
        torch.cat([token, gaussian(1, D, seed=4)]),
    ]
    base = BASE.to(dtype)
    adapted = [[(base.double() + 0.1 * gaussian(5, D, seed=5 + n)).to(dtype)] for n in range(3)]
    names = ["cat", "dog", "bird"]
    with pytest.raises(ContradictoryTargetsError) as caught:
        merge_kv([base], adapted, embeddings, FACTOR, names=names)
    error = caught.value
    assert isinstance(error, ValueError)
    assert set(error.rows) <= {1, 3}
    assert error.rows
    assert set(error.names) <= {"cat", "bird"}
    assert error.names[0] in str(error)
    assert "average" in str(error)


def test_default_names_count_the_concepts(route):
    token = gaussian(1, D, seed=1)
    adapted = [[BASE], [BASE + 1.0]]
    with pytest.raises(ContradictoryTargetsError, match="concept 1"):
        merge_kv([BASE], adapted, [token, token], FACTOR)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3, 1e8])
@pytest.mark.parametrize("first", [False, True])
def test_contradiction_in_one_layer_is_seen_beside_any_other(route, scale, first):
    """Layers of very different sizes in one call: the edit of one must not hide another's."""
    token = gaussian(1, D, seed=1)
    large, small = scale * BASE, gaussian(3, D, seed=2)
    layers = [
        (large, 1.1 * large, 1.1 * large),  # agree
        (small, small + 0.1, small - 0.1),  # do not
    ]
    if first:
        layers.reverse()
    base, one, other = (list(part) for part in zip(*layers, strict=True))
    with pytest.raises(ContradictoryTargetsError):
        merge_kv(base, [one, other], [token, token], FACTOR)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_contradiction_has_no_scale(route, scale):
    """Embeddings, weights, or both in other units: still the same contradiction, or none."""
    row = gaussian(1, D, seed=1)
    rows = torch.cat([row, row])
    agree, differ = torch.ones(5, 2).double(), torch.tensor([[1.0, 1.1]]).double().expand(5, 2)
    small_base = scale * BASE
    merge(scale * rows, agree)
    merge(rows, scale * agree, base=small_base)
    with pytest.raises(ContradictoryTargetsError):
        merge(scale * rows, scale * differ)
    with pytest.raises(ContradictoryTargetsError):
        merge(rows, scale * differ, base=small_base)


def test_average_meets_the_mean(route):
    """The documented answer for exact repeats, alone and beside other rows."""
    row, other = gaussian(1, D, seed=1), gaussian(1, D, seed=2)
    first, second, third = (gaussian(5, 1, seed=k) for k in (3, 4, 5))
    averaged = merge(
        torch.cat([row, other, row]),
        torch.cat([first, third, second], 1),
        contradictions="average",
    )
    mean = merge(torch.cat([row, other]), torch.cat([(first + second) / 2, third], 1))
    assert_same(averaged, mean)


@fewer_examples
@given(data=st.data())
def test_average_is_the_least_squares_answer(route, data):
    """Against the reference: least squares on the constraints first, then the least change."""
    seed = data.draw(st.integers(0, 100))
    rank = data.draw(st.integers(1, 4))
    s = rank + data.draw(st.integers(1, 4))
    weights = np.random.default_rng(seed).integers(-2, 3, size=(s, rank)).astype(float)
    weights[:rank] = np.eye(rank)
    rows = torch.from_numpy(weights) @ gaussian(rank, D, seed=seed)
    values = gaussian(5, s, seed=seed + 1)
    found = merge(rows, values, contradictions="average")
    assert_same(found, truth_of(rows, values, contradictions="average"), 1e-9)


def test_average_with_more_rows_than_columns(route):
    """s > d contradicts itself in general: refused, or least squares on request."""
    rows, values = gaussian(20, D, seed=1), gaussian(5, 20, seed=2)
    with pytest.raises(ContradictoryTargetsError, match="20 tokens"):
        merge(rows, values)
    found = merge(rows, values, contradictions="average")
    truth = torch.linalg.lstsq(rows, values.mT).solution.mT
    assert_same(found, truth, 1e-9)


def test_average_of_hard_repeats_beside_soft_rows(route):
    row, soft = gaussian(1, D, seed=1), gaussian(1, D, seed=2)
    rows = torch.cat([row, soft, row])
    values = gaussian(5, 3, seed=3)
    mu = torch.tensor([INF, 5.0, INF]).double()
    found = merge(rows, values, hardness=mu, contradictions="average")
    truth = truth_of(
        rows, values, inverse_hardness=mu.reciprocal().numpy(), contradictions="average"
    )
    assert_same(found, truth)


def test_average_without_repeats_is_the_plain_merge(route):
    rows, values = gaussian(3, D, seed=1), gaussian(5, 3, seed=2)
    assert_same(merge(rows, values, contradictions="average"), merge(rows, values), 1e-12)


def test_finite_hardness_accepts_contradictions(route):
    row, values = gaussian(1, D, seed=1), gaussian(5, 2, seed=2)
    found = merge(torch.cat([row, row]), values, hardness=1e6)
    mean = merge(row, values.mean(1, keepdim=True))
    assert_same(found, mean, 1e-3)


# --- near-repeats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_near_repeats_are_met_as_asked(route, distance):
    """Rows further apart than 1e-6 are rows of their own: W grows as 1 / distance, and fits."""
    row = gaussian(1, D, seed=1)
    rows = torch.cat([row, row + distance * gaussian(1, D, seed=2)])
    values = torch.tensor([[1.0, 1.1]]).double().expand(5, 2)
    found = merge(rows, values)
    assert float((found @ rows.mT - values).abs().max()) <= 1e3 * EPS / distance**2
    assert 0.01 < float((found - BASE).norm()) * distance < 10
    assert_same(found, truth_of(rows, values), 1e4 * EPS / distance**2)


@pytest.mark.parametrize("distance", [1e-7, 1e-8, 1e-10, 1e-13])
def test_rows_closer_than_rounding_are_repeats(route, distance):
    """The rounding of a text encoder: consistent ones are dropped, others refused or averaged."""
    row, wanted = gaussian(1, D, seed=1), gaussian(5, 1, seed=3)
    rows = torch.cat([row, row + distance * gaussian(1, D, seed=2)])
    differ = torch.cat([wanted, wanted + 0.1], 1)
    dropped = merge(rows, torch.cat([wanted, wanted], 1))
    with pytest.raises(ContradictoryTargetsError):
        merge(rows, differ)
    averaged = merge(rows, differ, contradictions="average")
    once = merge(row, wanted)
    mean = merge(row, wanted + 0.05)
    assert_same(dropped, once, 100 * distance)
    assert_same(averaged, mean, 1000 * distance + 1e-9)


def test_result_is_continuous_where_repeats_begin(route):
    """From 1e-5 to 1e-8 apart with targets that agree: the merge hardly moves."""
    row, direction = gaussian(1, D, seed=1), gaussian(1, D, seed=2)
    wanted = gaussian(5, D, seed=3)
    found = []
    for distance in (1e-5, 2e-6, 1e-6, 5e-7, 1e-8):
        rows = torch.cat([row, row + distance * direction])
        found.append(merge(rows, (BASE + 1e-3 * wanted) @ rows.mT))
    once = merge(row, (BASE + 1e-3 * wanted) @ row.mT)
    # Two rows pin the direction between them as well, so only |W| of the edit stays comparable.
    for merged in found:
        assert float((merged - once).norm()) <= 1e-3 * float(wanted.norm()) * 2


# --- gradients at repeats -------------------------------------------------------------------------


@pytest.mark.parametrize("contradictions", ["raise", "average"])
def test_gradients_at_consistent_repeats(route, contradictions):
    """Summed over the copies of a row they are those of the merge without repeats."""
    rows, wanted = gaussian(3, D, seed=1), gaussian(5, D, seed=2)
    upstream = gaussian(5, D, seed=3)
    order = [0, 1, 2, 0, 2]

    def gradients(copies, **options):
        base = BASE.clone().requires_grad_()
        distinct = rows.clone().requires_grad_()
        targets = (wanted @ rows.mT).requires_grad_()
        captions = CAPTIONS.clone().requires_grad_()
        factor = RegularizationFactor.from_embeddings(captions)
        (merged,) = merge_kv(
            [base], None, [distinct[copies]], factor, values=[targets[:, copies]], **options
        )
        return torch.autograd.grad(merged, (base, distinct, targets, captions), upstream)

    repeated = gradients(order, contradictions=contradictions)
    once = gradients([0, 1, 2])
    for found, truth in zip(repeated, once, strict=True):
        assert_same(found, truth, 1e-9)


def test_gradient_of_averaged_targets(route):
    """Each copy of a repeated row gets half of the gradient of its mean."""
    row = gaussian(1, D, seed=1)
    values = gaussian(5, 2, seed=2).requires_grad_()
    upstream = gaussian(5, D, seed=3)
    merged = merge(torch.cat([row, row]), values, contradictions="average")
    (found,) = torch.autograd.grad(merged, values, upstream)
    mean = values.detach().mean(1, keepdim=True).requires_grad_()
    (truth,) = torch.autograd.grad(merge(row, mean), mean, upstream)
    assert_same(found, torch.cat([truth, truth], 1) / 2)


def test_gradient_reaches_the_rows_that_were_kept(route):
    problem = merge_problem(
        np.random.default_rng(2), out=(4,), d=D, rows_per_concept=(1, 2), m=20, repeats="consistent"
    )
    concepts = [[w.clone().requires_grad_() for w in layers] for layers in problem.concepts]
    (merged,) = merge_kv(problem.base, concepts, problem.embeddings, factor_of(problem))
    found = torch.autograd.grad(merged.sum(), [w for layers in concepts for w in layers])
    assert all(torch.isfinite(grad).all() for grad in found)
    assert all(grad.any() for grad in found)
