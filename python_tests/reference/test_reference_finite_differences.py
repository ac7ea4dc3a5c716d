"""Central differences: exact on quadratics, error estimates that hold."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from immunize_ext.reference import finite_differences as fd


def test_exact_for_a_quadratic():
    x, d = np.array([1.0, -2.0, 0.5]), np.array([0.3, 1.0, -4.0])
    for step in (1.0, 1e-2, 1e-4):
        slope = fd.directional_derivative(lambda y: float(y @ y), x, d, step=step)
        assert_allclose(slope, 2 * x @ d, rtol=1e-9)


def test_array_valued_function():
    result = fd.directional_derivative(lambda y: y**3, np.array([[1.0, 2.0]]), np.ones((1, 2)))
    assert_allclose(result, [[3.0, 12.0]], rtol=1e-8)


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9])
def test_estimated_error_covers_the_true_error(step):
    for f, slope in ((np.sin, np.cos), (np.exp, np.exp), (np.log, np.reciprocal)):
        for x in (0.7, 1.9, 3.1):
            found = fd.estimate(f, x, 1.0, step=step)
            assert abs(found.value - slope(x)) <= found.truncation + found.rounding


@pytest.mark.parametrize("scale", [1e-100, 1e-8, 1.0, 1e8, 1e100])
def test_default_step_follows_the_scale(scale):
    x, d = scale * np.array([1.0, 2.0]), np.array([1.0, 1.0])
    slope = fd.directional_derivative(lambda y: np.prod(y / scale), x, d) * scale
    assert_allclose(slope, 3.0, rtol=1e-9)


def test_a_kink_gives_the_mean_of_both_slopes():
    slope = fd.directional_derivative(lambda y: max(3 * float(y), float(y)), 0.0, 1.0)
    assert_allclose(slope, 2.0, rtol=1e-9)


def test_hessian_vector_product():
    m = np.array([[2.0, 1.0], [1.0, 5.0]])
    product = fd.hessian_vector_product(lambda y: m @ y, np.array([1.0, 3.0]), np.array([1.0, 0.0]))
    assert_allclose(product, [2.0, 1.0], rtol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="direction must have a nonzero entry"):
        fd.directional_derivative(np.sin, 1.0, 0.0)
    with pytest.raises(ValueError, match="step must be positive"):
        fd.directional_derivative(np.sin, 1.0, 1.0, step=0.0)
    with pytest.raises(ValueError, match="f must be scalar"):
        fd.gradient(lambda y: y, np.ones(2))
