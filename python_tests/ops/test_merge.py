"""Key/value merge: values, derivatives, transforms, refusals. Repeated rows: test_merge_repeats."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from merge_problems import (
    assert_solves,
    conditions,
    factor_of,
    numpy_of,
    reference_of,
    solve,
    targets_of,
)
from operator_contract import OperatorContract, Refusal
from sample_inputs import (
    EPS,
    EPS32,
    ROUTES,
    fewer_examples,
    gaussian,
    taking_route,
    tensors_in,
)
from spectrum_bounds import same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from immunize_ext import reference, testing
from immunize_ext.errors import NotPositiveDefiniteError, NumericalWarning
from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.testing import strategies
from immunize_ext.testing.samples import merge_problem, merge_problem_with_answer

INF = float("inf")


def small_problem(seed: int = 0, **options):
    """Two layers, two concepts of two and one tokens, five columns."""
    options = {"out": (3, 2), "d": 5, "rows_per_concept": (2, 1), "m": 15, **options}
    return merge_problem(np.random.default_rng(seed), **options)


def flat_arguments(problem) -> list[Tensor]:
    """base, concepts, embeddings, C_reg as one list, for gradient checks."""
    return [
        *problem.base,
        *itertools.chain(*problem.concepts),
        *problem.embeddings,
        problem.c_reg,
    ]


def unflatten(tensors, layers: int = 2, concepts: int = 2):
    """base, concepts, embeddings, C_reg of :func:`flat_arguments`."""
    base, rest = list(tensors[:layers]), list(tensors[layers:])
    adapted = [rest[n * layers : (n + 1) * layers] for n in range(concepts)]
    return base, adapted, rest[concepts * layers : -1], rest[-1]


def merge_of_flat(problem, hardness=INF, ridge=0.0, **options):
    """The function of :func:`flat_arguments`."""
    layers, concepts = len(problem.base), len(problem.embeddings)

    def function(*tensors: Tensor) -> list[Tensor]:
        base, adapted, embeddings, c_reg = unflatten(tensors, layers, concepts)
        factor = RegularizationFactor.from_embeddings(c_reg, ridge=ridge)
        return merge_kv(base, adapted, embeddings, factor, hardness=hardness, **options)

    return function


def call(**changes):
    """A valid call with some arguments replaced."""
    arguments = {
        "base": [gaussian(3, 4, seed=1), gaussian(2, 4, seed=2)],
        "concepts": [[gaussian(3, 4, seed=3), gaussian(2, 4, seed=4)]],
        "embeddings": [gaussian(2, 4, seed=5)],
        "factor": RegularizationFactor.from_embeddings(gaussian(9, 4, seed=6)),
        **changes,
    }
    return merge_kv(**arguments)


VALUES = [gaussian(3, 2, seed=7), gaussian(2, 2, seed=8)]

BAD_CALLS = [
    ({"concepts": None}, "exactly one of concepts and values must be given, got neither"),
    ({"values": VALUES}, "exactly one of concepts and values must be given, got both"),
    ({"base": [], "concepts": [[]]}, "base must not be empty"),
    ({"embeddings": [], "concepts": []}, "embeddings must not be empty"),
    ({"concepts": []}, "concepts and embeddings must have the same length, got 0 and 1"),
    ({"concepts": [[gaussian(3, 4)]]}, r"concepts\[0\] must hold one weight a layer, 2, got 1"),
    (
        {"concepts": [[gaussian(3, 4), gaussian(3, 4)]]},
        r"concepts\[0\]\[1\] must have the shape and dtype of base\[1\]",
    ),
    (
        {"concepts": [[gaussian(3, 4), gaussian(2, 4).float()]]},
        r"concepts\[0\]\[1\] must have the shape and dtype of base\[1\]",
    ),
    (
        {"base": [gaussian(3, 4), gaussian(2, 4).float()]},
        r"\[1\]",
    ),
    ({"embeddings": [gaussian(2, 5)]}, r"embeddings\[0\] must have shape \(rows, 4\)"),
    ({"embeddings": [gaussian(4)]}, r"embeddings\[0\] must have shape"),
    ({"embeddings": [gaussian(1, 2, 4)]}, r"embeddings\[0\] must have shape \(rows, 4\)"),
    (
        {"embeddings": [torch.ones(2, 4, dtype=torch.int64)]},
        r"embeddings\[0\] must have a real floating-point dtype",
    ),
    (
        {"base": [torch.ones(3, 4, dtype=torch.int64), gaussian(2, 4)]},
        r"base\[0\] must have a real floating-point dtype",
    ),
    ({"concepts": None, "values": VALUES[:1]}, "values must hold one tensor a layer, 2, got 1"),
    (
        {"concepts": None, "values": [gaussian(3, 3), VALUES[1]]},
        r"values\[0\] must have shape \(3, 2\)",
    ),
    (
        {"concepts": None, "values": [VALUES[0].to(torch.int64), VALUES[1]]},
        r"values\[0\] must have a real floating-point dtype",
    ),
    ({"hardness": 0.0}, "hardness must be positive"),
    ({"hardness": -1.0}, "hardness must be positive"),
    ({"hardness": float("nan")}, "hardness must be positive"),
    ({"hardness": torch.tensor([1.0, 0.0])}, "hardness must be positive"),
    ({"hardness": torch.ones(3)}, r"hardness must be a number or have shape \(2,\)"),
    ({"hardness": torch.ones(2, 1)}, r"hardness must be a number or have shape \(2,\)"),
    ({"contradictions": "ignore"}, "contradictions must be 'raise' or 'average'"),
    ({"names": ["a", "b"]}, "names must hold 1 names, got 2"),
]


class MergeContract(OperatorContract):
    """Of base, concepts, embeddings and C_reg, all at once."""

    hardness: float | Tensor
    name = "merge_kv"
    node = "MergeApply"
    function = staticmethod(call)
    smooth = {"two layers": tuple(flat_arguments(small_problem(seed=8, out=(2, 1), d=4, m=9)))}
    large = tuple(
        flat_arguments(merge_problem(np.random.default_rng(6), out=(200, 50), d=24, m=60))
    )
    moved = 6  # the first embedding: in weights the merge is linear
    batched = False  # one Cholesky factor and one list of rows
    batched_gradients = False
    layout_rtol = 1e-10
    gradient_rtol = 1e-10
    refusals = [Refusal((), message, changes) for changes, message in BAD_CALLS]
    # No leading dimensions; vmap, Jacobians and compile take a factor that exists already: below.
    test_batches_and_dtypes = test_batch_independence = test_transforms = None
    test_meta_tensors_tell_shapes_and_dtypes = None
    test_vmap_over_any_axis_and_nested = test_jacobian_and_hessian = None
    test_column_major_input_is_no_other_matrix = None
    test_second_derivative_equals_the_reference = test_third_derivative_is_refused = None
    test_non_finite_input_is_named = test_something_that_is_no_tensor_is_refused = None
    test_second_derivative_is_refused_at_kinks = None  # there are none

    @pytest.mark.parametrize("dtype", [torch.float32])
    def test_low_precision_equals_float64(self, route, dtype):
        problem = small_problem(seed=12)
        testing.check_float32_against_float64(
            self.outputs,
            flat_arguments(problem),
            dtype=dtype,
            condition=10 * conditions(problem)[1],
        )

    def sample(self, *batch, seed=1, dtype=torch.float64):
        problem = small_problem(seed=seed, weight_dtype=dtype, embedding_dtype=torch.float32)
        return tuple(flat_arguments(problem))

    def call(self, *tensors):
        base, concepts, embeddings, c_reg = unflatten(tensors)
        factor = RegularizationFactor.from_embeddings(c_reg, ridge=0.1)
        return merge_kv(base, concepts, embeddings, factor, hardness=self.hardness)

    def truth(self, *tensors):
        base, concepts, embeddings, c_reg = unflatten(tensors)
        return reference.merge_layers(
            *map(numpy_of, (base, concepts, embeddings, c_reg)),
            ridge=0.1,
            inverse_hardness=1 / np.asarray(self.hardness),
        )

    def true_gradients(self, inputs, cotangents):
        base, concepts, embeddings, c_reg = unflatten(inputs)
        found = reference.merge_layers_gradient(
            *map(numpy_of, (cotangents, base, concepts, embeddings, c_reg)),
            ridge=0.1,
            inverse_hardness=1 / np.asarray(self.hardness),
        )
        return [*found.base, *itertools.chain(*found.concepts), *found.embeddings, found.c_reg]

    def composition(self, *tensors):
        """The plain formula, LU and all."""
        base, concepts, embeddings, c_reg = unflatten(tensors)
        c, d = torch.cat(embeddings), c_reg.shape[1]
        q = c_reg.mT @ c_reg + 0.1 * c_reg.square().sum() / d * torch.eye(d).double()
        a = torch.linalg.inv(q) @ c.mT
        t = c @ a + torch.diag(1 / torch.as_tensor(self.hardness).double().expand(c.shape[0]))
        for layer, w0 in enumerate(base):
            v = torch.cat([concepts[n][layer] @ e.mT for n, e in enumerate(embeddings)], 1)
            yield w0 + (v - w0 @ c.mT) @ torch.linalg.inv(t) @ a.mT


class TestHardRows(MergeContract):
    hardness = INF


class TestSoftRows(MergeContract):
    hardness = 5.0


class TestHardAndSoftRows(MergeContract):
    hardness = torch.tensor([INF, 2.0, INF]).double()


# --- values ---------------------------------------------------------------------------------------


@fewer_examples
@given(problem=strategies.merge_problems(repeats=("none",), max_exponent=8.0))
def test_equals_the_null_space_method(route, problem):
    """Hard and soft rows, several layers and concepts, text-like features, with a ridge or not."""
    assume(conditions(problem)[1] < 1e10)
    merged = solve(problem)
    assert_solves(problem, merged)


@fewer_examples
@given(problem=strategies.merge_problems_with_answer())
def test_finds_an_answer_that_was_chosen_first(route, problem):
    assume(conditions(problem)[1] < 1e10)
    merged = solve(problem)
    bound = 50 * EPS * sum(conditions(problem))
    for found, answer, base in zip(merged, problem.answer, problem.base, strict=True):
        limit = bound * float((answer - base).norm()) + 10 * EPS * float(answer.norm())
        assert float((found - answer).norm()) <= limit


@fewer_examples
@given(problem=strategies.merge_problems(repeats=("none", "consistent"), text_like=False))
def test_optimality_conditions(route, problem):
    """Feasible, and the gradient of the objective vanishes along every feasible direction."""
    kappa_q, kappa_t = conditions(problem)
    repeated = bool(problem.repeats)
    assume(repeated or kappa_t < 1e8)
    merged = solve(problem)
    c = np.concatenate(numpy_of(problem.embeddings))
    for found, base, values in zip(merged, problem.base, targets_of(problem), strict=True):
        residuals = reference.merge_residuals(
            numpy_of(found),
            numpy_of(base),
            values,
            c,
            numpy_of(problem.c_reg),
            ridge=problem.ridge,
            inverse_hardness=problem.inverse_hardness.numpy(),
        )
        # With a repeated row kappa(T) is infinite; the rows that are left were drawn at random.
        loss = kappa_q + (1e6 if repeated else kappa_t)
        assert residuals.feasibility <= 20 * EPS * loss
        assert residuals.stationarity <= 20 * EPS * loss


def test_no_feasible_perturbation_lowers_the_objective(route):
    problem = small_problem(ridge=0.1)
    merged = solve(problem)
    c = np.concatenate(numpy_of(problem.embeddings))
    null = np.linalg.svd(c)[2][c.shape[0] :]
    rng = np.random.default_rng(1)
    for found, base, values in zip(merged, problem.base, targets_of(problem), strict=True):
        arguments = (numpy_of(base), values, c, numpy_of(problem.c_reg))
        least = reference.merge_objective(numpy_of(found), *arguments, ridge=0.1)
        for scale in 10.0 ** rng.uniform(-3, 0, size=50):
            step = scale * rng.standard_normal((found.shape[0], null.shape[0])) @ null
            other = reference.merge_objective(numpy_of(found) + step, *arguments, ridge=0.1)
            assert other > least


def test_every_concept_keeps_its_own_outputs(route):
    """W c = W_n c for every token of every concept, each looked at alone: none is lost."""
    problem = merge_problem(
        np.random.default_rng(3), out=(8, 4), d=16, rows_per_concept=(1, 1, 1), m=40
    )
    merged = solve(problem)
    for n, tokens in enumerate(problem.embeddings):
        for layer, found in enumerate(merged):
            wanted = problem.concepts[n][layer] @ tokens.mT
            torch.testing.assert_close(found @ tokens.mT, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ridge", "expected"), [(0.0, [1.6, 0.4]), (1.0, [10 / 7, 4 / 7])])
def test_by_hand(route, ridge, expected):
    """C_reg = diag(1, 2), one token (1, 1) to map to 2: the cheap direction moves most."""
    captions = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    factor = RegularizationFactor.from_embeddings(captions, ridge=ridge, relative=False)
    base, token = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    value = torch.full((1, 1), 2.0).double()
    (merged,) = merge_kv([base], None, [token], factor, values=[value])
    torch.testing.assert_close(merged, torch.tensor([expected]).double(), rtol=1e-7, atol=0)
    assert abs(float((merged @ token.mT).item()) - 2.0) < 10 * EPS


def test_without_captions_the_least_norm_edit(route):
    """Q = I is what no regularisation features mean, and a huge ridge comes to the same."""
    base, token, value = gaussian(4, 6, seed=1), gaussian(2, 6, seed=2), gaussian(4, 2, seed=3)
    residual = value - base @ token.mT
    truth = base + residual @ torch.linalg.inv(token @ token.mT) @ token
    huge = RegularizationFactor.from_embeddings(gaussian(3, 6), ridge=1e12)
    none = RegularizationFactor.from_embeddings(torch.zeros(0, 6), ridge=1.0, relative=False)
    for factor, rtol in (
        (RegularizationFactor.identity(6), 1e-13),
        (none, 1e-13),
        (huge, 1e-10),
    ):
        (merged,) = merge_kv([base], None, [token], factor, values=[value])
        torch.testing.assert_close(merged, truth, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("exponent", [2, 4, 6, 8, 10])
def test_text_like_embeddings_at_high_kappa(route, exponent):
    """At kappa(Q) = 1e9 a float32 procedure is off by more than 100 %; here W is right.

    The bound is the loss of the normal equations in float64; weights are float64 to see it.
    """
    problem = merge_problem(
        np.random.default_rng(exponent),
        out=(6, 5),
        d=12,
        rows_per_concept=(3, 2),
        m=60,
        text_like=True,
        gram_condition=10.0**exponent,
        embedding_dtype=torch.float32,
    )
    merged = solve(problem)
    assert_solves(problem, merged)
    single = merge_kv(
        [w.float() for w in problem.base],
        [[w.float() for w in layers] for layers in problem.concepts],
        problem.embeddings,
        factor_of(problem),
    )
    kappa_q, kappa_t = conditions(problem)
    for found, truth, base in zip(single, reference_of(problem), problem.base, strict=True):
        moved = np.linalg.norm(truth - numpy_of(base))
        error = np.linalg.norm(numpy_of(found) - truth)
        # float32 weights: rounding of W, and of R (relative to its own size), times |B|.
        size = np.linalg.norm(truth) + moved * kappa_t**0.5
        assert error <= 50 * EPS32 * size + 50 * EPS * (kappa_q + kappa_t) * moved


def test_rounding_of_weights_is_all_that_float32_adds(route):
    problem = small_problem(seed=1)
    testing.check_float32_against_float64(
        lambda *weights: merge_kv(
            weights[:2], [weights[2:4], weights[4:6]], problem.embeddings, factor_of(problem)
        ),
        flat_arguments(problem)[:6],
        condition=conditions(problem)[1] ** 0.5,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [False, True])
def test_half_weights_equal_their_float32_copies_rounded_once(route, dtype, values):
    problem = small_problem(seed=2, weight_dtype=dtype, embedding_dtype=torch.float32)
    embeddings = [e.to(dtype) for e in problem.embeddings]
    given_values = [torch.from_numpy(v).float() for v in targets_of(problem)] if values else None

    def merge(weights):
        concepts = None if values else [[weights(w) for w in ls] for ls in problem.concepts]
        return merge_kv(
            [weights(w) for w in problem.base],
            concepts,
            embeddings,
            factor_of(problem),
            values=given_values,
        )

    half, single = merge(lambda w: w), merge(lambda w: w.float())
    for low, high in zip(half, single, strict=True):
        assert low.dtype == dtype
        assert torch.equal(low, high.to(dtype))


def test_outlier_dimension_does_not_overflow_half_captions(route):
    """Entries of Q reach 1.6e6, beyond float16, for 200 captions with one dimension at -28."""
    rng = np.random.default_rng(5)
    captions = testing.text_embeddings(rng, 200, 32, gram_condition=1e5, dtype=torch.float16).rows
    factor = RegularizationFactor.from_embeddings(captions, ridge=1e-6)
    base = gaussian(4, 32, dtype=torch.float16)
    adapted = (base.float() + 0.1 * gaussian(4, 32, seed=1).float()).half()
    token = captions[:2] + 0.1 * gaussian(2, 32, seed=2).half()
    (merged,) = merge_kv([base], [[adapted]], [token], factor)
    wanted = adapted.double() @ token.double().mT
    found = merged.double() @ token.double().mT
    # Each of 32 products carries the rounding of a half weight, relative to |w| |c|.
    bound = torch.finfo(torch.float16).eps * float(merged.double().norm() * token.double().norm())
    assert float((found - wanted).abs().max()) <= bound


def test_layers_are_independent(route):
    """Merged together or one by one, bit for bit, whatever the sizes of the others."""
    problem = merge_problem(np.random.default_rng(4), out=(40, 1, 7), d=6, m=20)
    together = solve(problem)
    for layer, found in enumerate(together):
        (alone,) = merge_kv(
            [problem.base[layer]],
            [[layers[layer]] for layers in problem.concepts],
            problem.embeddings,
            factor_of(problem),
        )
        assert torch.equal(found, alone)
        assert found.shape == problem.base[layer].shape


@fewer_examples
@given(data=st.data())
def test_order_of_tokens_and_concepts_does_not_matter(route, data):
    problem = small_problem(seed=data.draw(st.integers(0, 50)))
    order = data.draw(st.permutations(range(3)))
    c = torch.cat(problem.embeddings)
    values = [torch.from_numpy(v) for v in targets_of(problem)]
    straight = merge_kv(problem.base, None, [c], factor_of(problem), values=values)
    turned = merge_kv(
        problem.base,
        None,
        [c[[j]] for j in order],
        factor_of(problem),
        values=[v[:, order] for v in values],
    )
    bound = 50 * EPS * sum(conditions(problem))
    for a, b, base in zip(straight, turned, problem.base, strict=True):
        assert float((a - b).norm()) <= bound * float((a - base).norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hardness", [INF, 3.0])
def test_identity_edit_returns_the_base_bit_for_bit(route, dtype, hardness):
    problem = small_problem(seed=3, out=(33, 5), weight_dtype=dtype)
    same = [[w.clone() for w in problem.base] for _ in problem.concepts]
    merged = merge_kv(problem.base, same, problem.embeddings, factor_of(problem), hardness=hardness)
    for found, base in zip(merged, problem.base, strict=True):
        assert torch.equal(found, base)
        assert found.data_ptr() != base.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [5, 64, 768])
def test_values_that_the_base_gives_already_are_no_edit(route, dtype, d):
    base = gaussian(20, d, seed=1, dtype=dtype)
    tokens = gaussian(3, d, seed=2, dtype=dtype)
    tokens[:, 1] -= 28
    (merged,) = merge_kv(
        [base], None, [tokens], RegularizationFactor.identity(d), values=[base @ tokens.mT]
    )
    assert torch.equal(merged, base)


@pytest.mark.parametrize("mixed", [False, True])
def test_hard_rows_are_the_limit_of_soft_rows(route, mixed):
    """The distance falls as 1 / mu, and mu -> 0 leaves the base alone."""
    problem = small_problem(seed=4)
    hard = solve(problem, hardness=INF)
    distances = []
    for mu in (1e4, 1e6, 1e8):
        hardness = torch.tensor([INF, mu, mu]).double() if mixed else mu
        soft = solve(problem, hardness=hardness)
        distances.append(sum(float((a - b).norm()) for a, b in zip(hard, soft, strict=True)))
    none = solve(problem, hardness=1e-300)
    assert 50 < distances[0] / distances[1] < 200
    assert 50 < distances[1] / distances[2] < 200
    for found, base in zip(none, problem.base, strict=True):
        torch.testing.assert_close(found, base, rtol=0, atol=1e-290)


def test_soft_rows_minimise_the_stated_objective(route):
    """|(W - W0) C_reg^T|^2 + ridge |W - W0|^2 + sum mu_j |W c_j - v_j|^2, by least squares."""
    problem = small_problem(seed=5, ridge=0.05)
    mu = torch.tensor([0.3, 2.0, 50.0]).double()
    merged = solve(problem, hardness=mu)
    c, c_reg = torch.cat(problem.embeddings), problem.c_reg
    ridge = float(reference.absolute_ridge(c_reg.numpy(), 0.05))
    design = torch.cat([c_reg, ridge**0.5 * torch.eye(5).double(), mu.sqrt()[:, None] * c])
    for found, base, value in zip(merged, problem.base, targets_of(problem), strict=True):
        misfit = torch.from_numpy(value) - base @ c.mT
        right = torch.cat([torch.zeros(20, base.shape[0]).double(), (misfit * mu.sqrt()).mT])
        delta = torch.linalg.lstsq(design, right).solution.mT
        torch.testing.assert_close(found, base + delta, rtol=1e-11, atol=1e-12)


def test_values_and_concept_weights_say_the_same(route):
    problem = small_problem(seed=6)
    values = [torch.from_numpy(v) for v in targets_of(problem)]
    by_weights = solve(problem)
    by_values = merge_kv(problem.base, None, problem.embeddings, factor_of(problem), values=values)
    for a, b in zip(by_weights, by_values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_scale_of_captions_matters_only_with_an_absolute_ridge(route):
    problem = small_problem(seed=7)

    def merged(factor_scale, **options):
        factor = RegularizationFactor.from_embeddings(factor_scale * problem.c_reg, **options)
        return merge_kv(problem.base, problem.concepts, problem.embeddings, factor)[0]

    for options in ({}, {"ridge": 0.1}, {"ridge": 1e-3}):
        torch.testing.assert_close(
            merged(7.0, **options), merged(1.0, **options), rtol=1e-12, atol=1e-13
        )
    absolute = {"ridge": 0.1, "relative": False}
    difference = merged(7.0, **absolute) - merged(1.0, **absolute)
    assert float(difference.norm()) > 1e-4


@pytest.mark.slow
def test_more_rows_than_a_grid_dimension_holds():
    base, token = gaussian(524_281, 2, seed=1), gaussian(1, 2, seed=2)
    value = gaussian(524_281, 1, seed=3)
    (merged,) = merge_kv([base], None, [token], RegularizationFactor.identity(2), values=[value])
    torch.testing.assert_close(merged @ token.mT, value, rtol=1e-12, atol=1e-12)


def test_one_factor_serves_layers_of_many_sizes():
    """As in SDXL: outputs of 320, 640, 1280; one call, one factor."""
    d, sizes = 24, [320, 640, 1280, 320, 1, 31, 32, 33]
    base = [gaussian(o, d, seed=k, dtype=torch.float32) for k, o in enumerate(sizes)]
    adapted = [w + 0.01 for w in base]
    factor = RegularizationFactor.from_embeddings(gaussian(100, d, seed=9))
    token = gaussian(2, d, seed=10)
    merged = merge_kv(base, [adapted], [token], factor)
    for found, weight in zip(merged, adapted, strict=True):
        error = (found - weight).double() @ token.mT
        assert float(error.abs().max()) <= 100 * EPS32


# --- gradients ------------------------------------------------------------------------------------


def test_gradcheck_of_values_hardness_and_ridge(route):
    problem = small_problem(seed=9, out=(2, 1), d=4, m=6)
    values = [torch.from_numpy(v) for v in targets_of(problem)]
    hardness = torch.tensor([0.5, 3.0, 20.0]).double()

    def function(first, second, c, mu, c_reg, ridge):
        factor = RegularizationFactor.from_embeddings(c_reg, ridge=ridge)
        return merge_kv(problem.base, None, [c], factor, values=[first, second], hardness=mu)

    inputs = (*values, torch.cat(problem.embeddings), hardness, problem.c_reg)
    leaves = [x.clone().requires_grad_() for x in (*inputs, torch.tensor(0.1).double())]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@fewer_examples
@given(problem=strategies.merge_problems(repeats=("none",), text_like=False, max_dim=8))
def test_gradients_equal_the_closed_form(route, problem):
    kappa_q, kappa_t = conditions(problem)
    assume(kappa_t < 1e4)
    assume(kappa_q < 1e4)
    grads = [gaussian(*w.shape, seed=7 + k) for k, w in enumerate(problem.base)]
    leaves = [a.clone().requires_grad_() for a in flat_arguments(problem)]
    mu = problem.hardness.clone().requires_grad_()
    merged = merge_of_flat(problem, hardness=mu, ridge=problem.ridge)(*leaves)
    found = torch.autograd.grad(merged, [*leaves, mu], grads)
    truth = reference.merge_layers_gradient(
        numpy_of(grads),
        numpy_of(problem.base),
        numpy_of(problem.concepts),
        numpy_of(problem.embeddings),
        numpy_of(problem.c_reg),
        ridge=problem.ridge,
        inverse_hardness=problem.inverse_hardness.numpy(),
    )
    # d(1/mu) = -1/mu^2 dmu, and 0 for hard rows.
    of_mu = -truth.inverse_hardness * problem.inverse_hardness.numpy() ** 2
    expected = [
        *truth.base,
        *itertools.chain(*truth.concepts),
        *truth.embeddings,
        truth.c_reg,
        of_mu,
    ]
    largest = max(float(np.linalg.norm(part)) for part in expected)
    for got, right in zip(found, expected, strict=True):
        testing.assert_gradients_close(
            got,
            torch.from_numpy(np.asarray(right)),
            # T^-1 enters three times at most, each time with eps kappa(T); terms cancel.
            rtol=100 * EPS * (kappa_t + kappa_q) ** 2,
            cancellation_scale=largest,
        )


@pytest.mark.parametrize("hardness", [INF, 5.0])
def test_forward_mode_under_vmap_with_a_shared_factor(hardness):
    """One factor broadcast to many right-hand sides: where torch's rule goes wrong."""
    problem = small_problem(seed=26)
    c_reg = problem.c_reg

    def function(base: Tensor, embedding: Tensor, captions: Tensor) -> Tensor:
        factor = RegularizationFactor.from_embeddings(c_reg, ridge=0.1)
        moving = RegularizationFactor(factor.chol, ridge=factor.ridge, samples=15, source=captions)
        concepts = [[2 * base], [base.sin()]]
        tokens = [embedding, problem.embeddings[1]]
        return merge_kv([base], concepts, tokens, moving, hardness=hardness)[0]

    bases, tokens = gaussian(4, 3, 5, seed=1), gaussian(4, 2, 5, seed=2)
    tangents = (gaussian(4, 3, 5, seed=3), gaussian(4, 2, 5, seed=4), gaussian(15, 5, seed=5))

    def directional(base: Tensor, token: Tensor, moved: Tensor, turned: Tensor) -> Tensor:
        tangent = (moved, turned, tangents[2])
        return torch.func.jvp(function, (base, token, c_reg), tangent)[1]

    found = torch.func.vmap(directional)(bases, tokens, tangents[0], tangents[1])
    for k in range(4):
        leaves = [x.clone().requires_grad_() for x in (bases[k], tokens[k], c_reg)]
        probe = gaussian(3, 5, seed=6 + k)
        grads = torch.autograd.grad((function(*leaves) * probe).sum(), leaves)
        direction = (tangents[0][k], tangents[1][k], tangents[2])
        truth = sum((g * t).sum() for g, t in zip(grads, direction, strict=True))
        torch.testing.assert_close((found[k] * probe).sum(), truth, rtol=1e-9, atol=1e-10)


def test_forward_mode_of_values_hardness_and_ridge():
    problem = small_problem(seed=14)

    def function(value, mu, ridge):
        factor = RegularizationFactor.from_embeddings(problem.c_reg, ridge=ridge)
        values = [value, value[:2]]
        return merge_kv(problem.base, None, problem.embeddings, factor, values=values, hardness=mu)

    inputs = [gaussian(3, 3), torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor(0.1).double()]
    assert testing.check_forward_mode(function, inputs, required=True) == "supported"


def test_first_order_gradient_through_the_merge_is_the_upstream_one(route):
    """With W0 the start of every concept: summed over W0 and all W_n, the gradient is G itself."""
    problem = small_problem(seed=15)
    start = problem.base
    base = [w.clone().requires_grad_() for w in start]
    concepts = [[(w + 0.1 * k).requires_grad_() for k, w in enumerate(start)] for _ in range(2)]
    upstream = [gaussian(*w.shape, seed=k) for k, w in enumerate(start)]
    merged = merge_kv(base, concepts, problem.embeddings, factor_of(problem))
    found = torch.autograd.grad(merged, [*base, *concepts[0], *concepts[1]], upstream)
    for layer, truth in enumerate(upstream):
        total = found[layer] + found[2 + layer] + found[4 + layer]
        testing.assert_gradients_close(total, truth, rtol=1e-12)


def test_two_unrolled_steps_equal_finite_differences(route):
    """theta -> two SGD steps per concept -> merge -> loss, differentiated to theta and tokens."""
    x, y, z = gaussian(2, 4, 3, seed=1), gaussian(2, 3, 3, seed=2), gaussian(4, 3, seed=3)
    captions = RegularizationFactor.from_embeddings(gaussian(12, 4, seed=4))

    def adapted(theta: Tensor, n: int) -> Tensor:
        weight = theta
        for _ in range(2):
            loss = (torch.tanh(weight) @ x[n] - y[n]).square().sum()
            (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
            weight = weight - 0.02 * grad
        return weight

    def outer(theta: Tensor, first: Tensor, second: Tensor) -> Tensor:
        with torch.enable_grad():
            theta = theta if theta.requires_grad else theta.detach().requires_grad_()
            concepts = [[adapted(theta, n)] for n in range(2)]
            (merged,) = merge_kv([theta], concepts, [first, second], captions)
            return (merged @ z).square().sum()

    inputs = [gaussian(3, 4, seed=5), gaussian(1, 4, seed=6), gaussian(2, 4, seed=7)]
    testing.check_against_finite_differences(outer, inputs)


class _Needs(TorchDispatchMode):
    """Which gradients the raw backward operator was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[bool, ...]] = []
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(str(func))
        if str(func) == "immunize_ext.merge_apply_backward.default":
            self.asked.append(tuple(args[-4:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "needs"),
    [
        ("base", (True, False, False, False)),
        ("concepts", (False, True, False, False)),
        ("embeddings", (False, False, True, True)),
        ("c_reg", (False, False, False, True)),
        ("hardness", (False, False, False, True)),
    ],
)
def test_gradients_nobody_asked_for_are_not_computed(wanted, needs):
    problem = small_problem(seed=16)
    c_reg = problem.c_reg.clone()
    mu = torch.full((3,), 4.0).double()
    groups = {
        "base": [w.clone() for w in problem.base],
        "concepts": [w.clone() for layers in problem.concepts for w in layers],
        "embeddings": [e.clone() for e in problem.embeddings],
        "c_reg": [c_reg],
        "hardness": [mu],
    }
    for leaf in groups[wanted]:
        leaf.requires_grad_()
    factor = RegularizationFactor.from_embeddings(c_reg)
    adapted = [groups["concepts"][:2], groups["concepts"][2:]]
    merged = merge_kv(groups["base"], adapted, groups["embeddings"], factor, hardness=mu)
    with _Needs() as seen:
        found = torch.autograd.grad(merged, groups[wanted], [torch.ones_like(w) for w in merged])
    assert seen.asked == [needs]
    solves = {name for name in seen.operators if "free_solve" in name or "triangular" in name}
    assert bool(solves) == (wanted in ("embeddings", "c_reg")), "no solve for weights alone"
    assert not any("cholesky" in name and "solve" not in name for name in seen.operators), (
        "the backward factorises nothing again"
    )
    # The values are those of a backward that asks for everything.
    everything = [
        *groups["base"],
        *groups["concepts"],
        *groups["embeddings"],
        c_reg,
        mu,
    ]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in everything]
    whole = merge_kv(
        leaves[:2],
        [leaves[2:4], leaves[4:6]],
        leaves[6:8],
        RegularizationFactor.from_embeddings(leaves[8]),
        hardness=leaves[9],
    )
    all_grads = torch.autograd.grad(whole, leaves, [torch.ones_like(w) for w in whole])
    offset = next(k for k, leaf in enumerate(everything) if leaf is groups[wanted][0])
    for k, grad in enumerate(found):
        testing.assert_gradients_close(grad, all_grads[offset + k], rtol=1e-12)


def test_gradient_of_one_layer_leaves_the_others_at_zero(route):
    problem = small_problem(seed=17)
    base = [w.clone().requires_grad_() for w in problem.base]
    merged = merge_kv(base, problem.concepts, problem.embeddings, factor_of(problem))
    first, second = torch.autograd.grad(merged[0].sum(), base, allow_unused=True)
    assert first.any()
    assert second is None or not second.any()


@pytest.mark.parametrize("options", [{}, {"ridge": 0.1}, {"ridge": 0.1, "relative": False}])
def test_one_factor_serves_several_backward_passes(route, options):
    """A factor is reusable across steps, also one that gradients reach C_reg through."""
    problem = small_problem(seed=19)
    c_reg = problem.c_reg.clone().requires_grad_()
    factor = RegularizationFactor.from_embeddings(c_reg, **options)
    found = []
    for _ in range(2):
        merged = merge_kv(problem.base, problem.concepts, problem.embeddings, factor)
        found += torch.autograd.grad(merged[0].sum(), c_reg)
    assert torch.equal(*found)


def test_gradient_reaches_hard_rows_hardness_as_zero():
    problem = small_problem(seed=19)
    mu = torch.tensor([INF, 1.0, INF]).double().requires_grad_()
    merged = solve(problem, hardness=mu)
    (grad,) = torch.autograd.grad(sum(w.sum() for w in merged), mu)
    assert torch.isfinite(grad).all()
    assert grad[0] == grad[2] == 0
    assert grad[1] != 0


@pytest.mark.parametrize("values", [False, True])
def test_every_block_of_rows_counts(values):
    """1,100 rows are 35 blocks for 32 partial sums of dB and dC, which divide unevenly."""
    problem = small_problem(seed=32, out=(1100,))
    given = [torch.from_numpy(v) for v in targets_of(problem)] if values else None
    found = []
    for route in ROUTES:
        leaves = [x.clone().requires_grad_() for x in (*problem.embeddings, problem.c_reg)]
        factor = RegularizationFactor.from_embeddings(leaves[2])
        concepts = None if values else problem.concepts
        with taking_route(route):
            (merged,) = merge_kv(problem.base, concepts, leaves[:2], factor, values=given)
            found.append(torch.autograd.grad(merged.square().sum(), leaves))
    for kernel, composite in zip(*found, strict=True):
        testing.assert_gradients_close(kernel, composite, rtol=1e-11)


# --- registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_routes_agree(soft, average):
    problem = small_problem(seed=20, soft=soft, repeats="consistent")
    found = []
    for route in ROUTES:
        leaves = [a.clone().requires_grad_() for a in flat_arguments(problem)]
        function = merge_of_flat(
            problem,
            hardness=problem.hardness,
            ridge=0.1,
            contradictions="average" if average else "raise",
        )
        with taking_route(route):
            merged = function(*leaves)
            grads = torch.autograd.grad(sum(w.square().sum() for w in merged), leaves)
        found.append((*merged, *grads))
    for kernel, composite in zip(*found, strict=True):
        torch.testing.assert_close(kernel, composite, rtol=1e-11, atol=1e-12)


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("hardness", [INF, 2.0])
def test_vmap_func_grad_and_compile(hardness):
    """Over all weights and embeddings at once, and over each of them alone."""
    problem = small_problem(seed=21)
    factor = factor_of(problem)

    def function(*tensors: Tensor) -> list[Tensor]:
        return merge_kv(
            tensors[:2], [tensors[2:4], tensors[4:6]], tensors[6:], factor, hardness=hardness
        )

    testing.check_transforms(function, flat_arguments(problem)[:-1], compile="aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_transforms_of_values():
    problem = small_problem(seed=22)
    factor = factor_of(problem)
    values = [torch.from_numpy(v) for v in targets_of(problem)]

    def function(*tensors: Tensor) -> list[Tensor]:
        return merge_kv(tensors[:2], None, [tensors[2]], factor, values=tensors[3:])

    inputs = [*problem.base, torch.cat(problem.embeddings), *values]
    testing.check_transforms(function, inputs, compile="aot_eager")


def test_vmap_over_hardness():
    """A sweep over mu in one call."""
    problem = small_problem(seed=23)
    sweep = torch.tensor([0.5, 2.0, 100.0]).double()
    found = torch.func.vmap(lambda mu: solve(problem, hardness=mu)[0])(sweep)
    for mu, merged in zip(sweep, found, strict=True):
        torch.testing.assert_close(merged, solve(problem, hardness=float(mu))[0])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_gradients_of_embeddings_and_captions():
    problem = small_problem(seed=24)
    leaves = [a.clone().requires_grad_() for a in flat_arguments(problem)]
    # An absolute ridge: a relative one has a graph of its own, which is freed with the first use.
    factor = RegularizationFactor.from_embeddings(leaves[8], ridge=0.1, relative=False)

    def function() -> Tensor:
        merged = merge_kv(leaves[:2], [leaves[2:4], leaves[4:6]], leaves[6:8], factor)
        return sum(w.square().sum() for w in merged)

    eager = torch.autograd.grad(function(), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, truth in zip(torch.autograd.grad(compiled(), leaves), eager, strict=True):
        testing.assert_gradients_close(found, truth, rtol=1e-11)


def test_jacobian_of_a_linear_layer():
    """W is linear in W0 and in every W_n: the Jacobian is G -> G (I - C^T M)^T and G M_n^T C_n."""
    problem = small_problem(seed=25, out=(2,))
    factor = factor_of(problem)

    def function(base: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return merge_kv([base], [[first], [second]], problem.embeddings, factor)[0]

    inputs = (problem.base[0], problem.concepts[0][0], problem.concepts[1][0])
    jacobian = torch.func.jacrev(function, argnums=(0, 1, 2))(*inputs)
    c = torch.cat(problem.embeddings)
    q = problem.c_reg.mT @ problem.c_reg
    direction = c @ torch.linalg.inv(q)
    m = torch.linalg.inv(direction @ c.mT) @ direction
    maps = [torch.eye(5).double() - c.mT @ m, c[:2].mT @ m[:2], c[2:].mT @ m[2:]]
    for found, right in zip(jacobian, maps, strict=True):
        truth = torch.einsum("ik,lj->ijkl", torch.eye(2).double(), right)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)


# --- memory, determinism, settings ----------------------------------------------------------------


@same_bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [False, True])
def test_layers_do_not_depend_on_the_number_of_threads(dtype, values):
    """Sums over rows run in a fixed order: 250 rows are several blocks for two threads."""
    d, rows = 24, [2, 1]
    base = [gaussian(o, d, seed=o, dtype=dtype) for o in (200, 50)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    targets = [gaussian(o, 3, seed=o + 1, dtype=wide) for o in (200, 50)]
    if not values:
        targets = [gaussian(o, d, seed=o + n, dtype=dtype) for n in (2, 3) for o in (200, 50)]
    c, b = gaussian(3, d, seed=4), gaussian(3, d, seed=5)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            merged, residual, _ = torch.ops.immunize_ext.merge_apply(
                base, targets, rows, values, c, b
            )
            grads = torch.ops.immunize_ext.merge_apply_backward(
                base, base, targets, rows, values, c, b, residual, True, True, True, True
            )
            results.append(tensors_in([merged, residual, *grads]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, truth in zip(other, results[0], strict=True):
            assert torch.equal(found, truth)


@same_bits
@pytest.mark.parametrize(("d", "rows"), [(24, (2, 1)), (300, (9, 8)), (150, (70, 50))])
def test_merge_does_not_depend_on_the_number_of_threads(d, rows):
    """LAPACK's solves and inverses do; the merge, given the factor, does not.

    One group of right-hand sides, several, and an s x s system that LAPACK would split.
    """
    problem = merge_problem(
        np.random.default_rng(7), out=(70, 33), d=d, m=2 * d, rows_per_concept=rows
    )
    factor = factor_of(problem)
    weights = flat_arguments(problem)[:6]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [w.clone().requires_grad_() for w in weights]
            merged = merge_kv(leaves[:2], [leaves[2:4], leaves[4:6]], problem.embeddings, factor)
            grads = torch.autograd.grad(merged, leaves, [w.sin() for w in merged])
            results.append([*merged, *grads])
    finally:
        torch.set_num_threads(before)
    for found, truth in zip(*results, strict=True):
        assert torch.equal(found, truth)


# --- refusals of values ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["base", "concepts", "embeddings", "values"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_non_finite_arguments_are_named(route, bad, where, dtype):
    spoiled = {
        "base": [gaussian(3, 4, seed=1).to(dtype), gaussian(2, 4, seed=2).to(dtype)],
        "concepts": [[gaussian(3, 4, seed=3).to(dtype), gaussian(2, 4, seed=4).to(dtype)]],
        "embeddings": [gaussian(2, 4, seed=5).to(dtype)],
    }
    if where == "values":
        spoiled["concepts"] = None
        spoiled["values"] = [v.clone() for v in VALUES]
    target = spoiled[where]
    while isinstance(target, list):
        target = target[-1]
    target[-1, -1] = bad
    with pytest.raises(ValueError, match=f"{where}.*must be finite"):
        call(**spoiled)


def test_failure_leaves_nothing_changed(route):
    """One bad layer: the call raises and every argument is as before, bit for bit."""
    base = [gaussian(3, 4, seed=1), gaussian(2, 4, seed=2)]
    concepts = [[gaussian(3, 4, seed=3), torch.full((2, 4), float("inf")).double()]]
    copies = [w.clone() for w in (*base, *concepts[0])]
    with pytest.raises(ValueError, match="finite"):
        call(base=base, concepts=concepts)
    for found, truth in zip((*base, *concepts[0]), copies, strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("where", ["base", "embeddings", "concepts"])
def test_mixed_devices_are_refused(where):
    meta = {
        "base": [gaussian(3, 4), gaussian(2, 4).to("meta")],
        "embeddings": [gaussian(2, 4).to("meta")],
        "concepts": [[gaussian(3, 4), gaussian(2, 4).to("meta")]],
    }
    with pytest.raises(ValueError, match=rf"merge_kv: {where}\[.*must be on the device of base"):
        call(**{where: meta[where]})


def test_factor_of_another_width_is_refused():
    with pytest.raises(ValueError, match="width of the factor"):
        call(factor=RegularizationFactor.identity(5))


def test_answer_without_meaning_is_refused(route):
    """merge_problem_with_answer with no freedom left: d tokens determine W alone."""
    problem = merge_problem_with_answer(
        np.random.default_rng(7), out=(2,), d=3, rows_per_concept=(3,), m=9
    )
    (merged,) = solve(problem)
    torch.testing.assert_close(merged, problem.answer[0], rtol=1e-9, atol=1e-9)


# --- one bad layer --------------------------------------------------------------------------------


def half_problem(scale: float, dtype: torch.dtype):
    """One token, a wanted output of ``scale``: the merged weight is base + scale / 2 there."""
    base = [torch.ones(2, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)]
    token = torch.tensor([[0.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = [torch.ones(2, 1, dtype=wide), torch.full((3, 1), scale, dtype=wide)]
    return base, None, [token], RegularizationFactor.identity(4), values


@pytest.mark.parametrize(
    ("dtype", "fits", "too_large"),
    [
        (torch.float16, 1.3e5, 1.4e5),
        (torch.bfloat16, 3e38, None),
        (torch.float32, 3e38, None),
        (torch.float64, 1e308, None),
    ],
)
def test_weights_that_their_dtype_cannot_hold_are_refused(route, dtype, fits, too_large):
    base, concepts, tokens, factor, values = half_problem(fits, dtype)
    merged = merge_kv(base, concepts, tokens, factor, values=values)
    assert float(merged[1][0, 1]) == pytest.approx(fits / 2, rel=2 * torch.finfo(dtype).eps)
    if too_large is None:
        return
    values[1].fill_(too_large)
    with pytest.raises(ValueError, match="merged weights of layer 1 overflow"):
        merge_kv(base, concepts, tokens, factor, values=values)


def test_overflow_of_the_product_is_refused(route):
    """R and B fit float32 each, R B does not."""
    base = [torch.ones(2, 3)]
    token = torch.tensor([[1e-25, 0.0, 0.0]])
    with pytest.raises(ValueError, match="merged weights of layer 0 overflow"):
        merge_kv(
            base,
            None,
            [token],
            RegularizationFactor.identity(3),
            values=[torch.full((2, 1), 1e20)],
        )


@pytest.mark.parametrize("where", ["base", "concepts"])
def test_one_bad_layer_does_not_cost_the_others(route, where):
    problem = merge_problem(np.random.default_rng(8), out=(5, 40, 3), d=6, m=20)
    truth = solve(problem)
    bad = problem.base[1] if where == "base" else problem.concepts[1][1]
    bad[2, 3] = float("nan")
    before = problem.base[1].clone()
    with pytest.raises(ValueError, match=r"layer 1|\[1\]"):
        solve(problem)
    with pytest.warns(NumericalWarning, match="1 of 3 layers .* layer 1 .*must be finite"):
        merged = solve(problem, on_error="skip")
    assert torch.equal(merged[0], truth[0])
    assert torch.equal(merged[2], truth[2])
    assert torch.equal(merged[1].nan_to_num(7.0), before.nan_to_num(7.0))
    assert merged[1].data_ptr() != problem.base[1].data_ptr()


def test_gradients_beside_a_skipped_layer(route):
    """The others as ever; the skipped layer passes its own gradient to its base."""
    problem = merge_problem(np.random.default_rng(9), out=(4, 3), d=6, m=20)
    problem.concepts[0][1][0, 0] = float("inf")
    leaves = [w.clone().requires_grad_() for w in problem.base]
    adapted = [layers[0].clone().requires_grad_() for layers in problem.concepts]
    concepts = [[first, layers[1]] for first, layers in zip(adapted, problem.concepts, strict=True)]
    upstream = [gaussian(*w.shape, seed=k) for k, w in enumerate(leaves)]
    with pytest.warns(NumericalWarning, match="layer 1"):
        merged = merge_kv(leaves, concepts, problem.embeddings, factor_of(problem), on_error="skip")
    found = torch.autograd.grad(merged, [*leaves, *adapted], upstream)
    alone = merge_kv(leaves[:1], [[w] for w in adapted], problem.embeddings, factor_of(problem))
    truth = torch.autograd.grad(alone, [leaves[0], *adapted], upstream[:1])
    for grad, right in zip([found[0], *found[2:]], truth, strict=True):
        assert torch.equal(grad, right)
    assert torch.equal(found[1], upstream[1])


def test_contradiction_in_one_layer_can_be_skipped(route):
    problem = small_problem(seed=27)
    tokens = [problem.embeddings[0][:1], problem.embeddings[0][:1]]
    concepts = [problem.concepts[0], [problem.concepts[0][0], problem.concepts[1][1]]]
    with pytest.warns(NumericalWarning, match="layer 1 .*one token for different values"):
        merged = merge_kv(problem.base, concepts, tokens, factor_of(problem), on_error="skip")
    (truth,) = merge_kv(problem.base[:1], [concepts[0][:1]], tokens[:1], factor_of(problem))
    torch.testing.assert_close(merged[0], truth, rtol=1e-12, atol=1e-13)
    assert torch.equal(merged[1], problem.base[1])


def test_what_concerns_all_layers_raises_even_so():
    problem = small_problem(seed=28)
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip'"):
        solve(problem, on_error="ignore")
    problem.embeddings[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="embeddings must be finite"):
        solve(problem, on_error="skip")


@pytest.mark.parametrize("contradictions", ["raise", "average"])
def test_a_product_that_vanishes_is_refused_by_name(route, contradictions):
    """C Q^-1 C^T of 1e-170 is zero: a contradiction of concepts, or W0 with nothing merged."""
    token = torch.tensor([[1e-170, 0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"C Q\^-1 C\^T must be larger than zero"):
        merge_kv(
            [torch.ones(2, 3).double()],
            None,
            [token],
            RegularizationFactor.identity(3),
            values=[torch.ones(2, 1).double()],
            contradictions=contradictions,
        )


def test_captions_whose_squares_vanish_are_told_so():
    captions = 1e-170 * torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match=r"whose squares are 0 in float64.* scale"):
        RegularizationFactor.from_embeddings(captions, ridge=0.1)
