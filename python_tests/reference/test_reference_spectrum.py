"""Values and derivatives of the reference spectrum, against independent truths."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from immunize_ext import reference
from immunize_ext.reference import finite_differences as fd
from immunize_ext.reference import spectrum

EPS = np.finfo(np.float64).eps
REFERENCE = Path(spectrum.__file__).parent


def orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def matrix_with(sigma, n: int, p: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    k = min(n, p)
    u, v = orthogonal(rng, n)[:, :k], orthogonal(rng, p)[:, :k]
    return (u * np.asarray(sigma)) @ v.T


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("*.py")), ids=lambda path: path.name)
def test_reference_imports_only_numpy_and_scipy(path):
    allowed = set(sys.stdlib_module_names) | {"numpy", "scipy"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        else:
            continue
        for name in names:
            assert name.split(".")[0] in allowed or name.startswith("immunize_ext.reference")


@pytest.mark.parametrize(("n", "p"), [(1, 1), (1, 5), (5, 1), (6, 6), (9, 4), (4, 9)])
@pytest.mark.parametrize("log_kappa", [0.5, 4, 8, 12])
@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_extremes_of_a_chosen_spectrum(n, p, log_kappa, scale):
    k = min(n, p)
    sigma = np.logspace(0, -log_kappa, k) if k > 1 else np.ones(1)
    found = spectrum.extremal_singular_values(scale * matrix_with(sigma, n, p, seed=n * 10 + p))
    bound = 10 * k * EPS * scale
    assert abs(found.sigma_max - scale * sigma[0]) <= bound
    assert abs(found.sigma_min - scale * sigma[-1]) <= bound
    assert found.rank == k
    assert found.multiplicity_max == found.multiplicity_min == 1


def test_all_singular_values_agree_with_another_driver():
    a = np.random.default_rng(0).standard_normal((3, 2, 7, 5))
    assert_allclose(spectrum.singular_values(a), np.linalg.svd(a, compute_uv=False), rtol=1e-13)


ZEROS = np.zeros((3, 4))


@pytest.mark.parametrize(
    ("a", "rank_policy", "expected"),
    [
        (np.diag([1.0, 1, 2, 3, 3]), "numerical", (3, 1, 5, 2, 2)),
        (2 * np.eye(3), "numerical", (2, 2, 3, 3, 3)),
        (np.ones((5, 5)), "numerical", (5, 5, 1, 1, 1)),
        (np.ones((5, 5)), "full", (5, 0, 1, 1, 4)),
        (np.diag([1.0, 0.5, 1e-17, 1e-17]), "numerical", (1, 0.5, 2, 1, 1)),
        (np.diag([1.0, 0.5, 1e-17, 1e-17]), "full", (1, 0, 2, 1, 2)),
        (np.diag([0.0, 0, 1, 1]), "full", (1, 0, 2, 2, 2)),
        (np.array([[0.0, 1], [1, 0]]), "full", (1, 1, 2, 2, 2)),
        (ZEROS, "numerical", (0, 0, 0, 3, 3)),
        (ZEROS, "full", (0, 0, 0, 3, 3)),
        (np.array([[-4.0]]), "full", (4, 4, 1, 1, 1)),
    ],
)
def test_degenerate_matrices(a, rank_policy, expected):
    found = spectrum.extremal_singular_values(a, rank=rank_policy)
    assert_allclose([float(part) for part in found], expected, atol=1e-15, rtol=1e-15)
    gradient = spectrum.extremal_singular_values_gradient(a, rank=rank_policy)
    assert np.isfinite(gradient.sigma_max).all()
    assert np.isfinite(gradient.sigma_min).all()
    # Degree one: <A, grad sigma> = sigma, also in a cluster and at zero.
    assert_allclose(np.sum(a * gradient.sigma_max), found.sigma_max, atol=1e-14)
    assert_allclose(np.sum(a * gradient.sigma_min), found.sigma_min, atol=1e-14)


def test_cluster_gradient_is_the_mean():
    gradient = spectrum.extremal_singular_values_gradient(np.diag([1.0, 1, 2, 3, 3]))
    assert_allclose(gradient.sigma_max, np.diag([0, 0, 0, 0.5, 0.5]), atol=1e-15)
    assert_allclose(gradient.sigma_min, np.diag([0.5, 0.5, 0, 0, 0]), atol=1e-15)


def test_cluster_gradient_does_not_depend_on_the_basis():
    rng = np.random.default_rng(3)
    a = matrix_with([3, 3, 3, 1, 0.5, 0.5], 8, 6, seed=3)
    left, right = orthogonal(rng, 8), orthogonal(rng, 6)
    plain = spectrum.extremal_singular_values_gradient(a, cluster_rtol=1e-12)
    turned = spectrum.extremal_singular_values_gradient(left @ a @ right, cluster_rtol=1e-12)
    assert_allclose(turned.sigma_max, left @ plain.sigma_max @ right, atol=1e-13)
    assert_allclose(turned.sigma_min, left @ plain.sigma_min @ right, atol=1e-13)


def test_gradient_is_a_subgradient_of_least_norm():
    # sigma_max is convex: sigma_max(B) >= sigma_max(A) + <G, B - A> for every B.
    rng = np.random.default_rng(4)
    a = matrix_with([2, 2, 2, 1], 4, 5, seed=4)
    value = float(spectrum.extremal_singular_values(a).sigma_max)
    gradient = spectrum.extremal_singular_values_gradient(a, cluster_rtol=1e-12).sigma_max
    for _ in range(200):
        b = a + rng.standard_normal(a.shape) * 10.0 ** rng.uniform(-6, 1)
        other = float(spectrum.extremal_singular_values(b).sigma_max)
        assert other >= value + np.sum(gradient * (b - a)) - 1e-13
    assert_allclose(np.linalg.norm(gradient), 1 / np.sqrt(3), rtol=1e-12)


def test_tolerances():
    a = np.diag([1.0, 1 - 1e-3, 0.5, 0.5 + 1e-5, 1e-6])
    wide = spectrum.extremal_singular_values(a, rank_rtol=1e-5, cluster_rtol=1e-2)
    assert [int(part) for part in wide[2:]] == [4, 2, 2]
    assert_allclose(wide.sigma_min, 0.5, rtol=1e-15)
    tight = spectrum.extremal_singular_values(a)
    assert [int(part) for part in tight[2:]] == [5, 1, 1]
    # The default follows the dtype of the input: float32 cannot tell 1e-8 from 0.
    small = np.diag([1.0, 1e-8])
    assert spectrum.extremal_singular_values(small).rank == 2
    assert spectrum.extremal_singular_values(small.astype(np.float32)).rank == 1
    assert spectrum.extremal_singular_values(small.astype(np.float16)).rank == 1


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
@pytest.mark.parametrize("which", ["max", "min"])
def test_gradient_equals_finite_differences(shape, which):
    a = np.random.default_rng(5).standard_normal(shape)
    field = f"sigma_{which}"
    gradient = getattr(spectrum.extremal_singular_values_gradient(a), field)
    numeric = fd.gradient(lambda x: getattr(spectrum.extremal_singular_values(x), field), a)
    assert_allclose(gradient, numeric, atol=1e-8)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (1, 3), (3, 1)])
@pytest.mark.parametrize("which", ["max", "min"])
def test_hvp_equals_finite_differences_and_perturbation_theory(shape, which):
    rng = np.random.default_rng(6)
    a, e = rng.standard_normal(shape), rng.standard_normal(shape)
    product = spectrum.extremal_singular_values_hvp(a, e, which=which)
    numeric = fd.hessian_vector_product(
        lambda x: getattr(spectrum.extremal_singular_values_gradient(x), f"sigma_{which}"), a, e
    )
    assert_allclose(product, numeric, atol=1e-7)
    # Second-order perturbation of the symmetric embedding [[0, A], [A^T, 0]].
    n, p = shape
    embed = np.block([[np.zeros((n, n)), a], [a.T, np.zeros((p, p))]])
    along = np.block([[np.zeros((n, n)), e], [e.T, np.zeros((p, p))]])
    values, vectors = np.linalg.eigh(embed)
    sigma = getattr(spectrum.extremal_singular_values(a), f"sigma_{which}")
    k = int(np.argmin(np.abs(values - sigma)))
    coupling = vectors.T @ along @ vectors[:, k]
    others = np.arange(values.size) != k
    second = 2 * np.sum(coupling[others] ** 2 / (values[k] - values[others]))
    assert_allclose(np.sum(e * product), second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_hvp_scales_with_degree_minus_one(scale):
    rng = np.random.default_rng(7)
    a, e = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    plain = spectrum.extremal_singular_values_hvp(a, e, which="max")
    scaled = spectrum.extremal_singular_values_hvp(scale * a, scale * e, which="max")
    assert_allclose(scaled, plain, rtol=1e-12)


@pytest.mark.parametrize("which", ["max", "min"])
@pytest.mark.parametrize("a", [2 * np.eye(3), np.zeros((2, 2))])
def test_hvp_of_a_cluster_is_refused(a, which):
    with pytest.raises(ValueError, match="no second derivative"):
        spectrum.extremal_singular_values_hvp(a, np.ones_like(a), which=which)
    with pytest.raises(ValueError, match="no second derivative"):
        reference.gram_extremes_hvp(a, np.ones_like(a), which=which)


@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (3, 7)])
def test_gram_extremes_equal_those_of_the_formed_matrix(shape):
    x = np.random.default_rng(8).standard_normal(shape)
    k = x.T @ x
    full = reference.gram_extremes(x, rank="full")
    eigenvalues = np.linalg.eigvalsh(k)
    assert_allclose(full.lambda_max, eigenvalues[-1], rtol=1e-13)
    assert_allclose(full.squared_frobenius, np.sum(k * k), rtol=1e-13)
    if shape[0] < shape[1]:
        assert full.lambda_min == 0
        assert full.multiplicity_min == shape[1] - shape[0]
        assert_array_equal(reference.gram_extremes_gradient(x, rank="full").lambda_min, 0)
    else:
        assert_allclose(full.lambda_min, eigenvalues[0], rtol=1e-11)
    numerical = reference.gram_extremes(x)
    nonzero = eigenvalues[shape[1] - min(shape) :]
    assert_allclose(numerical.lambda_min, nonzero[0], rtol=1e-11)


def test_gram_keeps_accuracy_where_forming_it_loses_all():
    # kappa(X) = 1e10: the Gram matrix has kappa 1e20, and its smallest eigenvalue is rounding.
    x = matrix_with(np.logspace(0, -10, 6), 30, 6, seed=9)
    assert_allclose(np.sqrt(reference.gram_extremes(x).lambda_min), 1e-10, rtol=1e-5)


def test_gram_of_extreme_scales():
    x = matrix_with([2.0, 1.0], 3, 2, seed=10)
    assert_allclose(reference.gram_extremes(1e150 * x).lambda_max, 4e300, rtol=1e-12)
    assert_allclose(reference.gram_extremes(1e-150 * x).lambda_min, 1e-300, rtol=1e-12)
    assert reference.gram_extremes(1e150 * x).squared_frobenius == np.inf


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
@pytest.mark.parametrize("field", ["lambda_max", "lambda_min", "squared_frobenius"])
def test_gram_derivatives_equal_finite_differences(shape, field):
    rng = np.random.default_rng(11)
    x, e = rng.standard_normal(shape), rng.standard_normal(shape)
    gradient = getattr(reference.gram_extremes_gradient(x), field)
    numeric = fd.gradient(lambda y: getattr(reference.gram_extremes(y), field), x)
    assert_allclose(gradient, numeric, atol=1e-6)
    which = field.removeprefix("lambda_")
    product = reference.gram_extremes_hvp(x, e, which=which)
    curved = fd.hessian_vector_product(
        lambda y: getattr(reference.gram_extremes_gradient(y), field), x, e
    )
    assert_allclose(product, curved, atol=1e-6)


@pytest.mark.parametrize(
    ("h", "expected"),
    [
        (np.diag([-5.0, 0.1, 4]), (4, -5, 1, 1)),
        (np.array([[0.0, 1], [1, 0]]), (1, -1, 1, 1)),
        (-3 * np.eye(4), (-3, -3, 4, 4)),
        (np.diag([1.0, 1, 2, 3, 3]), (3, 1, 2, 2)),
        (np.zeros((2, 2)), (0, 0, 2, 2)),
    ],
)
def test_symmetric_extremes(h, expected):
    found = reference.symmetric_extremes(h)
    assert_allclose([float(part) for part in found], expected, atol=1e-15)
    gradient = reference.symmetric_extremes_gradient(h)
    for part, value in ((gradient.lambda_max, expected[0]), (gradient.lambda_min, expected[1])):
        assert_allclose(np.trace(part), 1.0)
        assert_allclose(part, part.T)
        assert np.linalg.eigvalsh(part)[0] >= -1e-15
        assert_allclose(np.sum(part * h), value, atol=1e-14)


@pytest.mark.parametrize("which", ["max", "min"])
def test_symmetric_derivatives_equal_finite_differences(which):
    rng = np.random.default_rng(12)
    h, e = rng.standard_normal((5, 5)), rng.standard_normal((5, 5))
    field = f"lambda_{which}"
    gradient = getattr(reference.symmetric_extremes_gradient(h), field)
    numeric = fd.gradient(lambda y: getattr(reference.symmetric_extremes(y), field), h)
    assert_allclose(gradient, numeric, atol=1e-8)
    product = reference.symmetric_extremes_hvp(h, e, which=which)
    curved = fd.hessian_vector_product(
        lambda y: getattr(reference.symmetric_extremes_gradient(y), field), h, e
    )
    assert_allclose(product, curved, atol=1e-7)
    with pytest.raises(ValueError, match="cluster"):
        reference.symmetric_extremes_hvp(np.eye(3), np.ones((3, 3)), which=which)


def test_condition_number_of_an_indefinite_matrix_is_over_magnitudes():
    assert_allclose(reference.condition_number(np.diag([-5.0, 0.1, 4])), 50.0, rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-150, 1e-25, 1e-19, 1, 1e19, 1e25, 1e150])
def test_condition_number_does_not_depend_on_the_scale(scale):
    b = np.array([[4.0, 1, 0], [1, 3, 1], [0, 1, 2]])
    # Eigenvalues of B are 3 +- sqrt(3) and 3.
    assert_allclose(reference.condition_number(scale * b), 2 + np.sqrt(3), rtol=1e-13)
    gradient = reference.condition_number_gradient(scale * b)
    assert_allclose(np.abs(gradient).max() * scale, 1.795584, rtol=1e-6)


@pytest.mark.parametrize("name", ["condition_number", "log_condition_number"])
@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
def test_condition_number_derivatives_equal_finite_differences(name, shape):
    rng = np.random.default_rng(13)
    a, e = rng.standard_normal(shape), rng.standard_normal(shape)
    slope = getattr(reference, f"{name}_gradient")
    assert_allclose(slope(a), fd.gradient(getattr(reference, name), a), rtol=1e-6, atol=1e-7)
    product = getattr(reference, f"{name}_hvp")(a, e)
    assert_allclose(product, fd.hessian_vector_product(slope, a, e), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "rank_policy"), [(np.zeros((3, 3)), "numerical"), (np.ones((2, 2)), "full")]
)
def test_infinite_condition_number_has_gradient_zero(a, rank_policy):
    assert reference.condition_number(a, rank=rank_policy) == np.inf
    assert reference.log_condition_number(a, rank=rank_policy) == np.inf
    assert_array_equal(reference.condition_number_gradient(a, rank=rank_policy), 0)
    assert_array_equal(reference.log_condition_number_gradient(a, rank=rank_policy), 0)


def test_batch_equals_single_calls():
    rng = np.random.default_rng(14)
    a, e = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 4, 5))
    a[1, 1] = 0
    calls = [
        lambda x, _: spectrum.extremal_singular_values(x),
        lambda x, _: spectrum.extremal_singular_values_gradient(x),
        lambda x, _: reference.gram_extremes(x, rank="full"),
        lambda x, _: reference.gram_extremes_gradient(x),
        lambda x, _: (reference.condition_number(x), reference.condition_number_gradient(x)),
        lambda x, d: (reference.gram_extremes_hvp(x, d, which="squared_frobenius"),),
    ]
    for call in calls:
        whole = call(a, e)
        for index in np.ndindex(2, 3):
            for batched, single in zip(whole, call(a[index], e[index]), strict=True):
                assert_array_equal(batched[index], single)


def test_empty_batch():
    a = np.zeros((0, 2, 3, 4))
    found = spectrum.extremal_singular_values(a)
    assert found.sigma_max.shape == (0, 2)
    assert found.rank.dtype == np.int64
    assert spectrum.extremal_singular_values_gradient(a).sigma_max.shape == a.shape
    assert spectrum.extremal_singular_values_hvp(a, a, which="max").shape == a.shape
    assert reference.gram_extremes(a).squared_frobenius.shape == (0, 2)
    assert reference.condition_number_gradient(a).shape == a.shape
    assert reference.symmetric_extremes(np.zeros((0, 3, 3))).lambda_max.shape == (0,)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: spectrum.extremal_singular_values([[np.nan, 0], [0, 1]]), "a must be finite"),
        (lambda: reference.symmetric_extremes([[np.nan, 0], [0, 1]]), "h must be finite"),
        (lambda: reference.gram_extremes([[np.inf]]), "x must be finite"),
        (lambda: spectrum.extremal_singular_values(np.zeros((0, 3))), "at least one row"),
        (lambda: spectrum.extremal_singular_values(np.zeros(3)), "must have shape"),
        (lambda: spectrum.extremal_singular_values(np.eye(2), rank="half"), "rank must be"),
        (lambda: spectrum.extremal_singular_values(np.eye(2), rank_rtol=-1.0), "rank_rtol"),
        (lambda: reference.symmetric_extremes(np.ones((2, 3))), "must be square"),
        (
            lambda: spectrum.extremal_singular_values_hvp(np.eye(2), np.eye(3), which="max"),
            "direction must have shape",
        ),
        (
            lambda: spectrum.extremal_singular_values_hvp(np.eye(2), np.eye(2), which="mid"),
            "which must be",
        ),
    ],
)
def test_refusals_name_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call()
