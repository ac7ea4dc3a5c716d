"""Preconditioned gradient of the reference: two routes against a plain solve."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from immunize_ext.reference import precondition as ref

ROUTES = [ref.preconditioned_gradient, ref.preconditioned_gradient_by_qr]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(20, 6), (6, 6), (3, 6), (1, 1), (0 + 1, 4)])
@pytest.mark.parametrize("relative", [True, False])
def test_equals_a_solve_with_the_formed_matrix(route, shape, relative):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal(shape), rng.standard_normal((5, shape[1]))
    ridge = 0.3
    mu = ridge * np.sum(x**2) / shape[1] if relative else ridge
    k = x.T @ x + mu * np.eye(shape[1])
    expected = np.linalg.solve(k, g.T).T
    assert_allclose(route(g, x, ridge=ridge, relative=relative), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_input_side(route):
    # K = diag(4, 1) acts on the columns, the input features, not on the rows.
    x = np.diag([2.0, 1.0])
    assert_allclose(route([[4.0, 4.0], [8.0, 8.0]], x), [[1, 4], [2, 8]], rtol=1e-14)


@pytest.mark.parametrize("route", ROUTES)
def test_self_adjoint_and_inverse(route):
    rng = np.random.default_rng(1)
    x, g, h = rng.standard_normal((9, 4)), rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    assert_allclose(np.sum(route(g, x) * h), np.sum(g * route(h, x)), rtol=1e-12)
    assert_allclose(route(g, x) @ (x.T @ x), g, atol=1e-12)


def test_routes_agree_on_ill_conditioned_features():
    rng = np.random.default_rng(2)
    u, _, vt = np.linalg.svd(rng.standard_normal((30, 8)), full_matrices=False)
    x = (u * np.logspace(0, -6, 8)) @ vt
    g = rng.standard_normal((3, 8))
    left, right = ref.preconditioned_gradient(g, x), ref.preconditioned_gradient_by_qr(g, x)
    # K is never formed: kappa(X) = 1e6 enters once, not kappa(K) = 1e12.
    assert np.linalg.norm(left - right) <= 1e-8 * np.linalg.norm(left)


@pytest.mark.parametrize("route", ROUTES)
def test_batches(route):
    rng = np.random.default_rng(3)
    x, g = rng.standard_normal((2, 9, 4)), rng.standard_normal((2, 3, 4))
    whole = route(g, x)
    for i in range(2):
        assert_array_equal(whole[i], route(g[i], x[i]))
        assert_array_equal(route(g, x[0])[i], route(g[i], x[0]))
    assert route(g[:0], x[:0]).shape == (0, 3, 4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("x", [np.ones((3, 6)), np.zeros((8, 6)), np.ones((8, 6))])
def test_singular_matrix_is_refused_with_its_rank(route, x):
    rank = np.linalg.matrix_rank(x)
    with pytest.raises(ValueError, match=f"rank {rank} of 6"):
        route(np.ones((2, 6)), x)
    route(np.ones((2, 6)), x, ridge=0.1, relative=False)


@pytest.mark.parametrize("route", ROUTES)
def test_refusals_name_the_argument(route):
    with pytest.raises(ValueError, match="grad must have shape"):
        route(np.ones((2, 3)), np.eye(4))
    with pytest.raises(ValueError, match="grad must be finite"):
        route(np.full((2, 4), np.nan), np.eye(4))
    with pytest.raises(ValueError, match="x must be finite"):
        route(np.ones((2, 4)), np.full((4, 4), np.inf))
    with pytest.raises(ValueError, match="ridge must be finite"):
        route(np.ones((2, 4)), np.eye(4), ridge=-1.0)
