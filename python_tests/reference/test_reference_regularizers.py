"""R_well and R_ill of the reference, against literature values and finite differences."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from immunize_ext.reference import finite_differences as fd
from immunize_ext.reference import regularizers as reg

DIAGONAL = np.diag([3.0, 2, 1])


def test_literature_values_of_r_well():
    assert_allclose(reg.r_well(DIAGONAL), 13 / 6, rtol=1e-15)
    assert_allclose(reg.r_well_gradient(DIAGONAL), np.diag([2, -2 / 3, -1 / 3]), atol=1e-15)
    # sigma_1 u_1 v_1^T = A for a matrix of rank one.
    assert_allclose(reg.r_well_gradient(np.ones((5, 5))), 0.8 * np.ones((5, 5)), rtol=1e-14)


def test_literature_values_of_r_ill():
    assert_allclose(reg.r_ill(DIAGONAL), 6 / 11, rtol=1e-15)
    expected = np.diag([-0.29752066, -0.19834711, 0.19834711])
    assert_allclose(reg.r_ill_gradient(DIAGONAL), expected, atol=1e-8)
    assert_allclose(reg.r_ill_gradient(DIAGONAL)[0, 0], -36 / 121, rtol=1e-14)


def test_gram_of_a_diagonal_equals_the_matrix_case():
    x = np.diag(np.sqrt([3.0, 2, 1]))
    assert_allclose(reg.gram_r_well(x), 13 / 6, rtol=1e-14)
    assert_allclose(reg.gram_r_ill(x), 6 / 11, rtol=1e-14)
    # d/dX of f(X^T X) is 2 X grad f for symmetric grad f.
    assert_allclose(reg.gram_r_well_gradient(x), 2 * x @ reg.r_well_gradient(x.T @ x), atol=1e-14)
    assert_allclose(reg.gram_r_ill_gradient(x), 2 * x @ reg.r_ill_gradient(x.T @ x), atol=1e-14)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_gradient_with_respect_to_theta_as_the_paper_writes_it(n):
    # H = theta^T K theta: grad R_well = 2 K theta (lambda_1 v v^T - H / p), and R_ill likewise.
    rng = np.random.default_rng(n)
    x, theta = rng.standard_normal((n, 5)), rng.standard_normal((5, 4))
    k = x.T @ x
    h = theta.T @ k @ theta
    values, vectors = np.linalg.eigh(h)
    well = 2 * k @ theta @ (values[-1] * np.outer(vectors[:, -1], vectors[:, -1]) - h / 4)
    features = x @ theta
    assert_allclose(x.T @ reg.gram_r_well_gradient(features), well, rtol=1e-9, atol=1e-9)
    rank = min(n, 4)
    low, v = values[4 - rank], vectors[:, 4 - rank]
    d = np.sum(h * h) / (2 * rank) - low**2 / 2
    ill = 2 * k @ theta @ (low * np.outer(v, v) - h / rank) / d**2
    assert_allclose(x.T @ reg.gram_r_ill_gradient(features), ill, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("c", [1.0, 7.25, 1e-70, 1e70])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_multiple_of_the_identity_is_the_minimum_of_r_well(c, size):
    s = c * np.eye(size)
    assert reg.r_well(s) == 0
    assert_allclose(reg.r_well_gradient(s), 0, atol=1e-15 * c)
    assert reg.gram_r_well(s) == 0


def test_zero_matrix():
    assert reg.r_well(np.zeros((4, 4))) == 0
    assert_array_equal(reg.r_well_gradient(np.zeros((4, 4))), 0)
    assert_array_equal(reg.gram_r_well_gradient(np.zeros((3, 4))), 0)


@pytest.mark.parametrize(
    "s", [np.eye(3), np.zeros((3, 3)), np.ones((4, 2)), np.array([[5.0]]), 1e-160 * np.eye(2)]
)
@pytest.mark.parametrize(
    "function", [reg.r_ill, reg.r_ill_gradient, reg.gram_r_ill, reg.gram_r_ill_gradient]
)
def test_r_ill_names_equal_singular_values(function, s):
    with pytest.raises(ValueError, match="at least two different counted singular values"):
        function(s)


def test_r_ill_names_the_batch_index():
    batch = np.stack([DIAGONAL, DIAGONAL, np.eye(3)])
    with pytest.raises(ValueError, match=r"batch index \(2,\)"):
        reg.r_ill(batch)


def test_r_ill_close_to_the_pole_keeps_its_digits():
    # sigma = (1 + gap, 1): 2 k D = gap (2 + gap); a difference of squares would lose 9 digits.
    gap = 2.0**-30
    assert_allclose(reg.r_ill(np.diag([1 + gap, 1.0])), 4 / (gap * (2 + gap)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
@pytest.mark.parametrize("name", ["r_well", "r_ill", "gram_r_well", "gram_r_ill"])
@pytest.mark.parametrize("width", [None, 2.5, 9])
def test_derivatives_equal_finite_differences(name, shape, width):
    rng = np.random.default_rng(1)
    # Singular values with clear gaps, D away from zero for every width.
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    a = (u * np.linspace(3, 0.5, min(shape))) @ vt
    e = rng.standard_normal(shape)
    key = "p" if name.endswith("well") else "k"
    options = {key: width}

    def value(x):
        return getattr(reg, name)(x, **options)

    def slope(x):
        return getattr(reg, f"{name}_gradient")(x, **options)

    numeric = fd.gradient(value, a)
    assert np.linalg.norm(slope(a) - numeric) <= 1e-7 * np.linalg.norm(numeric)
    curved = fd.hessian_vector_product(slope, a, e)
    product = getattr(reg, f"{name}_hvp")(a, e, **options)
    assert np.linalg.norm(product - curved) <= 1e-7 * np.linalg.norm(curved)


def test_degree_of_homogeneity():
    a = np.random.default_rng(2).standard_normal((5, 4))
    for name, degree in (("r_well", 2), ("r_ill", -2), ("gram_r_well", 4), ("gram_r_ill", -4)):
        value, slope = getattr(reg, name), getattr(reg, f"{name}_gradient")
        assert_allclose(np.sum(a * slope(a)), degree * value(a), rtol=1e-12)
        assert_allclose(value(8 * a), 8.0**degree * value(a), rtol=1e-12)


def test_bounds_of_the_paper():
    rng = np.random.default_rng(3)
    for _ in range(50):
        sigma = np.sort(10.0 ** rng.uniform(-3, 1, size=5))[::-1]
        s = np.diag(sigma)
        kappa = sigma[0] / sigma[-1]
        value = float(reg.r_ill(s))
        low = 2 * 5 / ((5 - 1) * (kappa**2 - 1) * sigma[-1] ** 2)
        assert low * (1 - 1e-9) <= value <= 2 * 5 / ((kappa**2 - 1) * sigma[-1] ** 2) * (1 + 1e-9)
        assert 1 / np.log(kappa) <= sigma[0] ** 2 * value * (1 + 1e-9)
        # One step of the guaranteed size raises kappa.
        d = 1 / value
        stepped = s - 0.9 * 5 / 4 * d**2 * reg.r_ill_gradient(s)
        values = np.linalg.svd(stepped, compute_uv=False)
        assert values[0] / values[-1] > kappa


def test_rank_deficient_matrix_uses_the_numerical_rank():
    s = np.diag([3.0, 2, 1, 0])
    assert_allclose(reg.r_ill(s), 6 / 11, rtol=1e-14)
    assert_allclose(reg.r_ill(s, k=4), 1 / (14 / 8 - 0.5), rtol=1e-14)
    assert_allclose(reg.r_well(s), 4.5 - 14 / 8, rtol=1e-14)
    assert_allclose(reg.gram_r_well(np.diag([3.0, 2])[:, :2], p=4), 81 / 2 - 97 / 8, rtol=1e-14)


def test_batch_and_empty_batch():
    rng = np.random.default_rng(4)
    a, e = rng.standard_normal((3, 2, 5, 4)), rng.standard_normal((3, 2, 5, 4))
    for name in ("r_well", "r_ill", "gram_r_well", "gram_r_ill"):
        value, slope, hvp = (getattr(reg, name + end) for end in ("", "_gradient", "_hvp"))
        for index in np.ndindex(3, 2):
            assert_array_equal(value(a)[index], value(a[index]))
            assert_allclose(slope(a)[index], slope(a[index]), rtol=1e-13)
            assert_allclose(hvp(a, e)[index], hvp(a[index], e[index]), rtol=1e-12, atol=1e-14)
        assert value(a[:0]).shape == (0, 2)
        assert slope(a[:0]).shape == (0, 2, 5, 4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: reg.r_well(DIAGONAL, p=0), "p must be positive"),
        (lambda: reg.r_ill(DIAGONAL, k=-1), "k must be positive"),
        (lambda: reg.r_well([[np.nan]]), "s must be finite"),
        (lambda: reg.gram_r_ill([[np.inf, 1.0]]), "x must be finite"),
        (lambda: reg.r_well_hvp(DIAGONAL, np.eye(2)), "direction must have shape"),
        (lambda: reg.r_well_hvp(np.eye(3), np.eye(3)), "no second derivative"),
        (lambda: reg.r_ill_hvp(np.diag([2.0, 1, 1]), np.eye(3)), "no second derivative"),
    ],
)
def test_refusals_name_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call()
