"""Gradients of the merge: two closed routes against each other and against finite differences."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from immunize_ext.reference import finite_differences as fd
from immunize_ext.reference import merge as ref
from immunize_ext.reference import merge_gradients as grads

ROUTES = [grads.merge_gradient, grads.merge_gradient_implicit]
NAMES = ("base", "values", "c", "c_reg", "ridge", "inverse_hardness")


def inputs(seed, *, out=3, d=5, s=3, m=9, nu=(0.0, 0.3, 1.5), ridge=0.2):
    rng = np.random.default_rng(seed)
    return {
        "base": rng.standard_normal((out, d)),
        "values": rng.standard_normal((out, s)),
        "c": rng.standard_normal((s, d)),
        "c_reg": rng.standard_normal((m, d)),
        "ridge": ridge,
        "inverse_hardness": np.array(nu),
    }


def weight_for(arguments, seed=99):
    return np.random.default_rng(seed).standard_normal(arguments["base"].shape)


def close(actual, expected, rtol):
    scale = np.linalg.norm(expected)
    return np.linalg.norm(np.asarray(actual) - expected) <= rtol * scale


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("nu", [(0.1, 0.3, 1.5), (0.2, 0.2, 0.2)])
def test_every_gradient_equals_finite_differences(route, name, relative, nu):
    arguments = inputs(1, nu=nu)
    g = weight_for(arguments)

    def loss(value):
        changed = {**arguments, name: float(value) if name == "ridge" else value}
        return float(np.sum(g * ref.merge_null_space(**changed, relative=relative)))

    numeric = fd.gradient(loss, arguments[name])
    found = route(g, **arguments, relative=relative)
    assert close(getattr(found, name), numeric, 1e-7)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["base", "values", "c", "c_reg", "ridge"])
def test_hard_constraints(route, name):
    arguments = inputs(2, nu=(0.0, 0.0, 0.0))
    g = weight_for(arguments)

    def loss(value):
        changed = {**arguments, name: float(value) if name == "ridge" else value}
        return float(np.sum(g * ref.merge_null_space(**changed)))

    numeric = fd.gradient(loss, arguments[name])
    assert close(getattr(route(g, **arguments), name), numeric, 1e-7)


@pytest.mark.parametrize("route", ROUTES)
def test_one_sided_gradient_of_a_hard_constraint_that_softens(route):
    arguments = inputs(3, nu=(0.0, 0.0, 0.0))
    g = weight_for(arguments)
    found = route(g, **arguments).inverse_hardness
    start = np.sum(g * ref.merge_null_space(**arguments))
    for row in range(3):
        step = 1e-7
        nu = np.zeros(3)
        nu[row] = step
        moved = np.sum(g * ref.merge_null_space(**{**arguments, "inverse_hardness": nu}))
        assert_allclose((moved - start) / step, found[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nu", [(0.0, 0.0, 0.0), (0.0, 0.3, 1.5)])
@pytest.mark.parametrize("relative", [True, False])
def test_routes_agree(nu, relative):
    for seed in range(5):
        arguments = inputs(seed, nu=nu)
        g = weight_for(arguments, seed)
        left = grads.merge_gradient(g, **arguments, relative=relative)
        right = grads.merge_gradient_implicit(g, **arguments, relative=relative)
        for name in NAMES:
            assert close(getattr(left, name), getattr(right, name), 1e-9), name


@pytest.mark.parametrize("log_kappa", [6, 9])
def test_routes_agree_on_ill_conditioned_regularization(log_kappa):
    arguments = inputs(4, d=6, m=30, nu=(0.0, 0.0, 0.1), ridge=0.0)
    u, _, vt = np.linalg.svd(arguments["c_reg"], full_matrices=False)
    arguments["c_reg"] = (u * np.logspace(0, -log_kappa / 2, 6)) @ vt
    g = weight_for(arguments)
    left = grads.merge_gradient(g, **arguments)
    right = grads.merge_gradient_implicit(g, **arguments)
    for name in NAMES:
        tolerance = 1e-13 * 10**log_kappa
        assert close(getattr(left, name), getattr(right, name), tolerance), name


@pytest.mark.parametrize("route", ROUTES)
def test_repeated_rows(route):
    arguments = inputs(5, s=3, nu=(0.0, 0.0, 0.0, 0.0))
    arguments["c"] = np.concatenate([arguments["c"], arguments["c"][:1]])
    arguments["values"] = np.concatenate([arguments["values"], arguments["values"][:, :1]], axis=1)
    g = weight_for(arguments)
    found = route(g, **arguments)
    for name in ("base", "values", "c_reg", "ridge"):

        def loss(value, name=name):
            changed = {**arguments, name: float(value) if name == "ridge" else value}
            return float(np.sum(g * ref.merge_null_space(**changed, contradictions="average")))

        assert close(getattr(found, name), fd.gradient(loss, arguments[name]), 1e-7), name

    # The repeated row as one variable.
    def tied(rows):
        changed = {**arguments, "c": np.concatenate([rows, rows[:1]])}
        return float(np.sum(g * ref.merge_null_space(**changed)))

    total = found.c[:3].copy()
    total[0] += found.c[3]
    assert close(total, fd.gradient(tied, arguments["c"][:3]), 1e-7)


@pytest.mark.parametrize("given", [True, False])
def test_layers(given):
    rng = np.random.default_rng(6)
    base = [rng.standard_normal((out, 5)) for out in (2, 4)]
    embeddings = [rng.standard_normal((1, 5)), rng.standard_normal((2, 5))]
    c_reg = rng.standard_normal((8, 5))
    concepts = [[w + rng.standard_normal(w.shape) for w in base] for _ in range(2)]
    values = [rng.standard_normal((w.shape[0], 3)) for w in base] if given else None
    g = [rng.standard_normal(w.shape) for w in base]
    options = {"ridge": 0.1, "inverse_hardness": np.array([0.2, 0.4, 0.1])}
    found = grads.merge_layers_gradient(
        g, base, None if given else concepts, embeddings, c_reg, values=values, **options
    )

    def loss(base, concepts, embeddings, c_reg, values, options):
        merged = ref.merge_layers(
            base, None if given else concepts, embeddings, c_reg, values=values, **options
        )
        return float(sum(np.sum(a * b) for a, b in zip(g, merged, strict=True)))

    state = [base, concepts, embeddings, c_reg, values, options]

    def along(position, replace):
        changed = list(state)
        changed[position] = replace
        return loss(*changed)

    for index in range(2):

        def of_base(w, index=index):
            return along(0, [w if i == index else other for i, other in enumerate(base)])

        assert close(found.base[index], fd.gradient(of_base, base[index]), 1e-7)

        def of_rows(rows, index=index):
            return along(2, [rows if i == index else o for i, o in enumerate(embeddings)])

        assert close(found.embeddings[index], fd.gradient(of_rows, embeddings[index]), 1e-7)
    assert close(found.c_reg, fd.gradient(lambda x: along(3, x), c_reg), 1e-7)
    nu = options["inverse_hardness"]
    numeric = fd.gradient(lambda x: along(5, {**options, "inverse_hardness": x}), nu)
    assert close(found.inverse_hardness, numeric, 1e-7)
    numeric = fd.gradient(lambda x: along(5, {**options, "ridge": float(x)}), 0.1)
    assert close(found.ridge, numeric, 1e-7)
    if given:
        assert found.concepts is None

        def of_values(v):
            return along(4, [v, values[1]])

        assert close(found.values[0], fd.gradient(of_values, values[0]), 1e-7)
    else:
        assert found.values is None

        def of_concept(w):
            return along(1, [concepts[0], [concepts[1][0], w]])

        assert close(found.concepts[1][1], fd.gradient(of_concept, concepts[1][1]), 1e-7)


def test_sum_of_weight_gradients_when_every_concept_starts_from_the_base():
    # If W_n = W0 for all n as one variable, the merge is the identity in it.
    rng = np.random.default_rng(7)
    base = [rng.standard_normal((3, 5))]
    embeddings = [rng.standard_normal((2, 5)), rng.standard_normal((1, 5))]
    g = [rng.standard_normal((3, 5))]
    found = grads.merge_layers_gradient(
        g, base, [base, base], embeddings, rng.standard_normal((9, 5))
    )
    total = found.base[0] + found.concepts[0][0] + found.concepts[1][0]
    assert_allclose(total, g[0], atol=1e-12)
    assert_allclose(found.c_reg, 0, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_batches_and_empty_sizes(route):
    rng = np.random.default_rng(8)
    base, values = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 2))
    c, c_reg = rng.standard_normal((2, 2, 5)), rng.standard_normal((9, 5))
    g = rng.standard_normal(base.shape)
    whole = route(g, base, values, c, c_reg, ridge=0.1)
    assert whole.ridge.shape == (2,)
    for i in range(2):
        single = route(g[i], base[i], values[i], c[i], c_reg, ridge=0.1)
        for name in NAMES:
            assert_array_equal(getattr(whole, name)[i], getattr(single, name))
    empty = route(g[:0], base[:0], values[:0], c[:0], c_reg)
    assert empty.c_reg.shape == (0, 9, 5)
    none = route(g[0], base[0], np.zeros((3, 0)), np.zeros((0, 5)), c_reg)
    assert_array_equal(none.base, g[0])
    assert none.c.shape == (0, 5)
    assert none.inverse_hardness.shape == (0,)
    assert_array_equal(none.c_reg, 0)


def test_refusals():
    arguments = inputs(9)
    with pytest.raises(ValueError, match="grad must be finite"):
        grads.merge_gradient(np.full((3, 5), np.nan), **arguments)
    with pytest.raises(ValueError, match="merge_gradient: grad must end in shape"):
        grads.merge_gradient(np.ones((5, 3)), **arguments)
    with pytest.raises(ValueError, match="rank 0 of 5"):
        grads.merge_gradient(np.ones((3, 5)), **{**arguments, "c_reg": np.zeros((4, 5))})
    with pytest.raises(ValueError, match="one entry per layer"):
        grads.merge_layers_gradient([], [], [], [], None)
