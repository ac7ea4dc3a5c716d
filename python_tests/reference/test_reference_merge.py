"""The merge of the reference: three routes, literature values, optimality, degenerate inputs."""

import numpy as np
import pytest
import scipy.optimize
from numpy.testing import assert_allclose, assert_array_equal

from immunize_ext import reference
from immunize_ext.reference import merge as ref

ROUTES = [ref.merge_null_space, ref.merge_kkt, ref.merge_formula]


def problem(seed, *, out=4, d=6, s=3, m=20):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((out, d)),
        rng.standard_normal((out, s)),
        rng.standard_normal((s, d)),
        rng.standard_normal((m, d)),
    )


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("ridge", "expected"), [(0.0, [[1.6, 0.4]]), (1.0, [[1.4285714, 0.5714286]])]
)
def test_literature_values(route, ridge, expected):
    w = route([[0, 0]], [[2]], [[1, 1]], np.diag([1, 2]), ridge=ridge, relative=False)
    assert_allclose(w, expected, atol=5e-8)
    # By hand: W is proportional to c Q^-1 and satisfies w_1 + w_2 = 2.
    q = np.array([1 + ridge, 4 + ridge])
    assert_allclose(w, [2 / q / np.sum(1 / q)], rtol=1e-14)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("nu", [0.0, 0.3, [0.0, 0.2, 0.0], [1e-3, 1.0, 10.0]])
@pytest.mark.parametrize("m", [6, 40])
def test_routes_agree(ridge, nu, m):
    for seed in range(4):
        inputs = problem(seed, m=m)
        options = {"ridge": ridge, "inverse_hardness": nu}
        w = ref.merge_null_space(*inputs, **options)
        assert relative(ref.merge_kkt(*inputs, **options), w) <= 1e-9
        assert relative(ref.merge_formula(*inputs, **options), w) <= 1e-9


@pytest.mark.parametrize("nu", [0.0, [0.0, 0.5, 0.0]])
def test_agrees_with_a_general_optimizer(nu):
    base, values, c, c_reg = problem(10, out=1, d=4, m=9)
    hard = np.broadcast_to(nu, (3,)) == 0

    def objective(w):
        return float(
            reference.merge_objective(
                w[None], base, values, c, c_reg, ridge=0.2, inverse_hardness=nu
            )
        )

    constraint = {"type": "eq", "fun": lambda w: c[hard] @ w - values[0, hard]}
    found = scipy.optimize.minimize(
        objective, base[0], method="SLSQP", constraints=[constraint], options={"ftol": 1e-15}
    )
    w = ref.merge_null_space(base, values, c, c_reg, ridge=0.2, inverse_hardness=nu)
    assert_allclose(found.x, w[0], atol=1e-5)
    assert objective(w[0]) <= found.fun + 1e-9


@pytest.mark.parametrize("nu", [0.0, 0.3, [0.0, 0.2, 0.0]])
def test_result_is_optimal_and_others_are_not(nu):
    inputs = problem(11)
    options = {"ridge": 0.1, "inverse_hardness": nu}
    w = ref.merge_null_space(*inputs, **options)
    found = reference.merge_residuals(w, *inputs, **options)
    assert found.feasibility <= 1e-14
    assert found.stationarity <= 1e-14
    value = reference.merge_objective(w, *inputs, **options)
    c, hard = inputs[2], np.broadcast_to(nu, (3,)) == 0
    null = np.eye(6) - np.linalg.pinv(c[hard]) @ c[hard] if hard.any() else np.eye(6)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1.0):
        step = size * rng.standard_normal(w.shape) @ null  # stays feasible
        assert reference.merge_objective(w + step, *inputs, **options) > value
        assert reference.merge_residuals(w + step, *inputs, **options).stationarity > 1e-5
    off = w + 1e-3 * rng.standard_normal(w.shape)
    worse = reference.merge_residuals(off, *inputs, **options)
    assert max(worse.feasibility, worse.stationarity) > 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_answer_chosen_in_advance(route):
    # With C = B Q and W = W0 + Z B the optimality conditions hold by construction.
    rng = np.random.default_rng(12)
    base, z, b = (rng.standard_normal(shape) for shape in [(5, 7), (5, 3), (3, 7)])
    c_reg = rng.standard_normal((30, 7))
    nu = np.array([0.0, 0.4, 0.0])
    q = c_reg.T @ c_reg + 0.5 * np.eye(7)
    c, answer = b @ q, base + z @ b
    values = answer @ c.T + z * nu
    w = route(base, values, c, c_reg, ridge=0.5, relative=False, inverse_hardness=nu)
    assert relative(w, answer) <= 1e-11


@pytest.mark.parametrize("log_kappa", [4, 8, 10])
def test_ill_conditioned_regularization(log_kappa):
    # kappa(Q) = 10^log_kappa; the constraints hold and the conditions are met to rounding.
    rng = np.random.default_rng(13)
    u = np.linalg.qr(rng.standard_normal((40, 12)))[0]
    v = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    c_reg = (u * np.logspace(0, -log_kappa / 2, 12)) @ v.T
    base, values, c, _ = problem(13, d=12)
    w = ref.merge_null_space(base, values, c, c_reg)
    found = reference.merge_residuals(w, base, values, c, c_reg)
    assert found.feasibility <= 1e-13
    assert found.stationarity <= 1e-9
    assert relative(ref.merge_formula(base, values, c, c_reg), w) <= 1e-6


@pytest.mark.parametrize("route", ROUTES)
def test_identity_edit_returns_the_base(route):
    base, _, c, c_reg = problem(14)
    assert relative(route(base, base @ c.T, c, c_reg), base) <= 1e-14


@pytest.mark.parametrize("route", ROUTES)
def test_without_regularization_embeddings_the_edit_has_minimum_norm(route):
    base, values, c, _ = problem(15)
    expected = base + (values - base @ c.T) @ np.linalg.pinv(c.T)
    assert relative(route(base, values, c, None), expected) <= 1e-13
    # Also the limit of a large ridge, and an empty C_reg with a ridge.
    reg = np.zeros((0, 6))
    assert relative(route(base, values, c, reg, ridge=1.0, relative=False), expected) <= 1e-13


@pytest.mark.parametrize("route", ROUTES)
def test_scale_of_the_regularization(route):
    inputs = problem(16)
    base, values, c, c_reg = inputs
    for ridge in (0.0, 0.3):
        relative_ridge = route(base, values, c, 7 * c_reg, ridge=ridge)
        assert relative(relative_ridge, route(*inputs, ridge=ridge)) <= 1e-12
    absolute = route(base, values, c, 7 * c_reg, ridge=3.0, relative=False)
    assert relative(absolute, route(*inputs, ridge=3.0, relative=False)) > 1e-3


@pytest.mark.parametrize("route", ROUTES)
def test_order_of_the_rows_does_not_matter(route):
    base, values, c, c_reg = problem(17)
    order = [2, 0, 1]
    nu = np.array([0.0, 0.2, 0.5])
    w = route(base, values, c, c_reg, inverse_hardness=nu)
    permuted = route(base, values[:, order], c[order], c_reg, inverse_hardness=nu[order])
    assert relative(permuted, w) <= 1e-11


def test_hard_limit_of_soft_constraints():
    inputs = problem(18)
    hard = ref.merge_null_space(*inputs, ridge=0.1)
    errors = [
        relative(ref.merge_null_space(*inputs, ridge=0.1, inverse_hardness=nu), hard)
        for nu in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]
    soft = ref.merge_null_space(*inputs, ridge=0.1, inverse_hardness=1e12)
    assert relative(soft, inputs[0]) <= 1e-9


class TestRepeatedRows:
    base, values, c, c_reg = problem(20)
    twice = np.concatenate([c, c[:1]])

    @pytest.mark.parametrize("route", ROUTES)
    def test_same_target_equals_the_deduplicated_problem(self, route):
        values = np.concatenate([self.values, self.values[:, :1]], axis=1)
        expected = ref.merge_null_space(self.base, self.values, self.c, self.c_reg)
        assert relative(route(self.base, values, self.twice, self.c_reg), expected) <= 1e-11

    def test_contradictory_targets_are_refused_by_name(self):
        values = np.concatenate([self.values, self.values[:, :1] + 1], axis=1)
        with pytest.raises(ValueError, match=r"contradictions at rows \[0, 3\]"):
            ref.merge_null_space(self.base, values, self.twice, self.c_reg)
        with pytest.raises(ValueError, match=r"rows \[0, 3\]"):
            reference.deduplicate_rows(self.twice, values)

    def test_contradictory_targets_are_averaged_on_request(self):
        values = np.concatenate([self.values, self.values[:, :1] + 1], axis=1)
        mean = self.values.copy()
        mean[:, 0] += 0.5
        expected = ref.merge_null_space(self.base, mean, self.c, self.c_reg)
        w = ref.merge_null_space(
            self.base, values, self.twice, self.c_reg, contradictions="average"
        )
        assert relative(w, expected) <= 1e-12
        formula = ref.merge_formula(self.base, values, self.twice, self.c_reg)
        assert relative(formula, expected) <= 1e-11
        found = reference.merge_residuals(w, self.base, values, self.twice, self.c_reg)
        assert max(found.feasibility, found.stationarity) <= 1e-13

    def test_rounding_of_float32_targets_is_no_contradiction(self):
        values = np.concatenate([self.values, self.values[:, :1] * (1 + 1e-8)], axis=1)
        ref.merge_null_space(self.base, values, self.twice, self.c_reg)

    def test_soft_repeats_count_with_their_hardness(self):
        values = np.concatenate([self.values, self.values[:, :1] + 1], axis=1)
        nu = np.array([0.5, 0.2, 0.0, 0.25])
        joined = reference.deduplicate_rows(self.twice, values, inverse_hardness=nu)
        assert joined.groups == ((0, 3), (1,), (2,))
        assert_allclose(joined.inverse_hardness, [1 / 6, 0.2, 0.0])
        assert_allclose(joined.values[:, 0], self.values[:, 0] + 4 / 6)
        whole = ref.merge_null_space(self.base, values, self.twice, self.c_reg, inverse_hardness=nu)
        short = ref.merge_null_space(
            self.base,
            joined.values,
            joined.c,
            self.c_reg,
            inverse_hardness=joined.inverse_hardness,
        )
        assert relative(whole, short) <= 1e-12

    def test_hard_row_outweighs_its_soft_repeat(self):
        values = np.concatenate([self.values, self.values[:, :1] + 1], axis=1)
        nu = np.array([0.0, 0.0, 0.0, 0.3])
        joined = reference.deduplicate_rows(self.twice, values, inverse_hardness=nu)
        assert_array_equal(joined.values, self.values)
        whole = ref.merge_null_space(self.base, values, self.twice, self.c_reg, inverse_hardness=nu)
        assert (
            relative(whole, ref.merge_null_space(self.base, self.values, self.c, self.c_reg))
            <= 1e-12
        )

    def test_near_repeats_need_a_large_edit(self):
        # The closer the rows, the larger the edit that separates their targets.
        rng = np.random.default_rng(0)
        sizes = []
        for size in (1e-2, 1e-4, 1e-6):
            near = np.concatenate([self.c, self.c[:1] + size * rng.standard_normal((1, 6))])
            values = np.concatenate([self.values, self.values[:, :1] + 0.1], axis=1)
            w = ref.merge_null_space(self.base, values, near, self.c_reg)
            assert_allclose(w @ near.T, values, atol=1e-8)
            sizes.append(np.linalg.norm(w))
        assert sizes[2] > 20 * sizes[1] > 400 * sizes[0]

    def test_more_constraints_than_dimensions(self):
        base, values, c, c_reg = problem(21, d=4, s=7)
        with pytest.raises(ValueError, match="must agree"):
            ref.merge_null_space(base, values, c, c_reg)
        w = ref.merge_null_space(base, values, c, c_reg, contradictions="average")
        assert_allclose(w, values @ np.linalg.pinv(c.T), atol=1e-12)  # least squares in C alone
        consistent = base @ c.T + 1.0 * np.sum(c, axis=1)
        assert_allclose(ref.merge_null_space(base, consistent, c, c_reg), base + 1.0, atol=1e-11)


class TestSingularRegularization:
    base, values, c, _ = problem(30, d=8)

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize(
        ("c_reg", "rank"),
        [
            (np.random.default_rng(0).standard_normal((5, 8)), 5),
            (np.zeros((5, 8)), 0),
            (np.zeros((0, 8)), 0),
            (np.random.default_rng(0).standard_normal((20, 8)) * (np.arange(8) != 2), 7),
        ],
    )
    def test_error_gives_the_rank(self, route, c_reg, rank):
        with pytest.raises(ValueError, match=f"rank {rank} of 8"):
            route(self.base, self.values, self.c, c_reg)
        if rank:
            route(self.base, self.values, self.c, c_reg, ridge=1e-4)

    def test_few_rows_with_a_small_ridge(self):
        c_reg = np.random.default_rng(1).standard_normal((5, 8))
        for ridge in (1e-12, 1e-8, 1e-4, 1e-2):
            w = ref.merge_null_space(self.base, self.values, self.c, c_reg, ridge=ridge)
            found = reference.merge_residuals(w, self.base, self.values, self.c, c_reg, ridge=ridge)
            assert found.feasibility <= 1e-14


def layered_problem():
    rng = np.random.default_rng(40)
    base = tuple(rng.standard_normal((out, 6)) for out in (3, 5))
    concepts = tuple(tuple(w + rng.standard_normal(w.shape) for w in base) for _ in range(2))
    embeddings = (rng.standard_normal((2, 6)), rng.standard_normal((1, 6)))
    return base, concepts, embeddings, rng.standard_normal((25, 6))


class TestLayers:
    base, concepts, embeddings, c_reg = layered_problem()

    def test_every_concept_is_kept(self):
        merged = ref.merge_layers(self.base, self.concepts, self.embeddings, self.c_reg)
        for n, rows in enumerate(self.embeddings):
            for index, w in enumerate(merged):
                assert relative(w @ rows.T, self.concepts[n][index] @ rows.T) <= 1e-12

    def test_values_in_place_of_concepts(self):
        targets = ref.layer_targets(self.base, self.concepts, self.embeddings, None)
        given = ref.merge_layers(self.base, None, self.embeddings, self.c_reg, values=targets)
        whole = ref.merge_layers(self.base, self.concepts, self.embeddings, self.c_reg)
        for left, right in zip(given, whole, strict=True):
            assert_array_equal(left, right)

    def test_unchanged_concepts_change_nothing(self):
        merged = ref.merge_layers(self.base, (self.base,) * 2, self.embeddings, self.c_reg)
        for w, w0 in zip(merged, self.base, strict=True):
            assert relative(w, w0) <= 1e-13

    def test_wrong_counts_are_refused(self):
        with pytest.raises(ValueError, match="exactly one of concepts and values"):
            ref.merge_layers(self.base, None, self.embeddings, self.c_reg)
        with pytest.raises(ValueError, match="concepts must be 2 lists of 2 layers"):
            ref.merge_layers(self.base, self.concepts[:1], self.embeddings, self.c_reg)
        with pytest.raises(ValueError, match="one entry per layer"):
            ref.merge_layers(self.base, None, self.embeddings, self.c_reg, values=[])
        with pytest.raises(ValueError, match="at least one concept"):
            ref.merge_layers(self.base, [], [], self.c_reg)


@pytest.mark.parametrize("route", ROUTES)
def test_batches(route):
    rng = np.random.default_rng(50)
    base, values = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal((2, 3, 4, 3))
    c, c_reg = rng.standard_normal((3, 3, 6)), rng.standard_normal((20, 6))
    w = route(base, values, c, c_reg)
    for i, j in np.ndindex(2, 3):
        assert_array_equal(w[i, j], route(base[i, j], values[i, j], c[j], c_reg))
    assert route(base[:0], values[:0], c, c_reg).shape == (0, 3, 4, 6)
    assert_array_equal(route(base[0, 0], np.zeros((4, 0)), np.zeros((0, 6)), c_reg), base[0, 0])
    assert route(np.zeros((0, 6)), np.zeros((0, 3)), c[0], c_reg).shape == (0, 6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"base": np.full((4, 6), np.nan)}, "base must be finite"),
        ({"c": np.full((3, 6), np.inf)}, "c must be finite"),
        ({"c": np.ones((3, 5))}, r"c must end in shape \(3, 6\)"),
        ({"values": np.ones((3, 4))}, r"values must end in shape \(4, 3\)"),
        ({"c_reg": np.ones(6)}, "c_reg must be a matrix"),
        ({"ridge": -1.0}, "ridge must be finite and not negative"),
        ({"inverse_hardness": -1.0}, "inverse_hardness must be"),
        ({"contradictions": "ignore"}, "contradictions must be"),
    ],
)
def test_refusals_name_the_argument(change, match):
    inputs = dict(zip(("base", "values", "c", "c_reg"), problem(60), strict=True))
    with pytest.raises(ValueError, match=match):
        ref.merge_null_space(**{**inputs, **change})
