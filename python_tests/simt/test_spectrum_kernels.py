"""The CUDA kernels of the spectrum operators, run on the CPU, against the scipy references."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from immunize_ext import reference

EPS = float(np.finfo(np.float64).eps)
SEEDS = (0, 1, 2)
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@pytest.fixture(scope="module")
def kernels(simt: ModuleType) -> Any:
    return simt.spectrum


def gaussian(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def with_spectrum(n: int, p: int, sigma: Any, *, batch: int = 1, seed: int = 0) -> Any:
    """Matrices U diag(sigma) V^T (batch, n, p) with drawn U and V."""
    sigma = np.asarray(sigma, dtype=np.float64)
    generator = np.random.default_rng([seed, n, p])
    u, _ = np.linalg.qr(generator.standard_normal((batch, n, sigma.size)))
    v, _ = np.linalg.qr(generator.standard_normal((batch, p, sigma.size)))
    return np.einsum("bni,i,bpi->bnp", u, sigma, v)


def tolerance(a: Any) -> float:
    return max(a.shape[-2:]) * float(np.finfo(a.dtype).eps)


def run(kernel: Any, a: Any, **options: Any) -> Any:
    return kernel(a, tolerance(a), tolerance(a), **options)


def value_bound(a: Any) -> float:
    """Error of a singular value in units of eps sigma_max, of ours and of the reference."""
    return 8.0 + 2.0 * float(np.sqrt(a.shape[-2] + a.shape[-1]))


def assert_values(result: Any, a: Any, *, full: bool = False, of_gram: bool = False) -> None:
    policy: Any = "full" if full else "numerical"
    singular = reference.extremal_singular_values(a, rank=policy)
    value_max, value_min = result["value_max"], result["value_min"]
    if of_gram:
        gram = reference.gram_extremes(a, rank=policy)
        np.testing.assert_array_equal(result["rank"], gram.rank)
        np.testing.assert_array_equal(result["multiplicity_max"], gram.multiplicity_max)
        np.testing.assert_array_equal(result["multiplicity_min"], gram.multiplicity_min)
        np.testing.assert_allclose(
            result["squared_frobenius"], gram.squared_frobenius, rtol=EPS * value_bound(a)
        )
        wide = a.shape[-2] <= a.shape[-1]
        x = a.astype(np.float64)
        thin = x @ x.swapaxes(-1, -2) if wide else x.swapaxes(-1, -2) @ x
        np.testing.assert_allclose(
            result["thin_gram"], thin, atol=EPS * value_bound(a) * float(np.abs(thin).max())
        )
        value_max, value_min = np.sqrt(value_max), np.sqrt(value_min)
        expected_min = np.sqrt(gram.lambda_min)
    else:
        np.testing.assert_array_equal(result["rank"], singular.rank)
        np.testing.assert_array_equal(result["multiplicity_max"], singular.multiplicity_max)
        np.testing.assert_array_equal(result["multiplicity_min"], singular.multiplicity_min)
        expected_min = singular.sigma_min
    bound = EPS * value_bound(a) * singular.sigma_max
    assert np.all(np.abs(value_max - singular.sigma_max) <= bound)
    assert np.all(np.abs(value_min - expected_min) <= bound)


def assert_vectors(result: Any, a: Any, conditioning: float) -> None:
    """u v^T equals the reference's gradient; conditioning is sigma_max / gap of both extremes."""
    gradient = reference.extremal_singular_values_gradient(a)
    bound = EPS * value_bound(a) * conditioning
    for extreme, expected in zip(("max", "min"), gradient, strict=True):
        u, v = result[f"u_{extreme}"], result[f"v_{extreme}"]
        product = u[..., :, None] * v[..., None, :]
        assert np.abs(product - expected).max() <= bound, extreme


SMALL_SHAPES = [
    (1, 1),
    (1, 7),
    (9, 1),
    (2, 2),
    (3, 3),
    (3, 5),
    (5, 2),
    (4, 600),
    (31, 40),
    (32, 32),
    (45, 33),
]


# --- small route: values --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SMALL_SHAPES)
@pytest.mark.parametrize("of_gram", [False, True])
def test_small_equals_reference(
    kernels: Any, shape: tuple[int, int], dtype: Any, of_gram: bool
) -> None:
    a = gaussian(2, *shape).astype(dtype)
    result = run(kernels.small_extremes, a, of_gram=of_gram, seed=1)
    assert_values(result, a, of_gram=of_gram)


@pytest.mark.parametrize("of_gram", [False, True])
def test_small_equals_reference_at_64(kernels: Any, of_gram: bool) -> None:
    a = gaussian(1, 64, 200)
    assert_values(run(kernels.small_extremes, a, of_gram=of_gram), a, of_gram=of_gram)


@pytest.mark.slow
def test_small_equals_reference_at_96(kernels: Any) -> None:
    a = gaussian(1, 100, 96)
    assert_values(run(kernels.small_extremes, a, of_gram=True), a, of_gram=True)


@pytest.mark.parametrize("shape", [(5, 5), (12, 20), (33, 17)])
@pytest.mark.parametrize("kappa", [1e4, 1e8, 1e12])
def test_small_is_accurate_at_large_condition_numbers(
    kernels: Any, shape: tuple[int, int], kappa: float
) -> None:
    t = min(shape)
    graded = with_spectrum(*shape, np.geomspace(1.0, 1.0 / kappa, t), batch=2)
    assert_values(run(kernels.small_extremes, graded), graded)
    # One small value far from the others: it is found to eps sigma_max, its vectors to
    # eps sigma_max / sigma_min (nothing but sigma_min separates u from the orthogonal complement).
    alone = with_spectrum(*shape, [2.0, *np.linspace(1.0, 1.5, t - 2), 1.0 / kappa], batch=2)
    result = run(kernels.small_extremes, alone)
    assert_values(result, alone)
    assert_vectors(result, alone, 2.0 * kappa if shape[0] != shape[1] else 8.0)


@pytest.mark.parametrize("scale", [1e-310, 1e-150, 1e-20, 1e20, 1e150, 3e307])
def test_small_scales(kernels: Any, scale: float) -> None:
    a = gaussian(2, 6, 9)
    result = run(kernels.small_extremes, scale * a)
    expected = reference.extremal_singular_values(scale * a)
    rtol = 1e-12 if scale > 1e-300 else 1e-9
    np.testing.assert_allclose(result["value_max"], expected.sigma_max, rtol=rtol)
    np.testing.assert_allclose(result["value_min"], expected.sigma_min, rtol=rtol)
    np.testing.assert_array_equal(result["rank"], 6)


def test_powers_of_two_scale_exactly(kernels: Any) -> None:
    a = gaussian(1, 5, 8)
    one = run(kernels.small_extremes, a, of_gram=True)
    other = run(kernels.small_extremes, 2.0**60 * a, of_gram=True)
    np.testing.assert_array_equal(other["value_max"], 2.0**120 * one["value_max"])
    np.testing.assert_array_equal(other["squared_frobenius"], 2.0**240 * one["squared_frobenius"])
    np.testing.assert_array_equal(other["v_min"], one["v_min"])


DEGENERATE = {
    "zero": np.zeros((1, 4, 5)),
    "ones": np.ones((1, 5, 5)),
    "identity": 2.0 * np.eye(6)[None],
    "doublets": with_spectrum(8, 10, [3, 3, 2.5, 2, 1.7, 1.5, 0.5, 0.5]),
    "triplet": with_spectrum(10, 7, [3, 3, 3, 2, 1.5, 1, 0.2]),
    "deficient": with_spectrum(9, 12, [3, 2, 1.5, 1, 0.7, 0, 0, 0, 0]),
    "deficient doublet": with_spectrum(12, 9, [3, 2, 1.5, 1, 1, 0, 0, 0, 0]),
    "null columns": np.pad(gaussian(1, 7, 3), ((0, 0), (0, 0), (0, 3))),
    "diagonal": np.diag([1.0, 1.0, 2.0, 3.0, 3.0])[None],
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("of_gram", [False, True])
def test_small_degenerate(kernels: Any, name: str, full: bool, of_gram: bool) -> None:
    a = DEGENERATE[name]
    result = run(kernels.small_extremes, a, full_rank=full, of_gram=of_gram)
    assert_values(result, a, full=full, of_gram=of_gram)
    for extreme in ("max", "min"):
        norm = np.linalg.norm(result[f"u_{extreme}"], axis=-1)
        exists = result[f"value_{extreme}"] > 0
        np.testing.assert_allclose(norm, np.where(exists, 1.0, 0.0), atol=1e-14)


def test_non_finite_matrices_are_named_and_spoil_no_other(kernels: Any) -> None:
    a = gaussian(5, 4, 6)
    clean = run(kernels.small_extremes, a, of_gram=True)
    assert clean["first_bad"] == 2**31 - 1
    bad = a.copy()
    bad[1, 2, 3] = np.inf
    bad[3, 0, 0] = np.nan
    result = run(kernels.small_extremes, bad, of_gram=True)
    assert result["first_bad"] == 1
    for name in set(clean) - {"first_bad"}:
        np.testing.assert_array_equal(result[name][[0, 2, 4]], clean[name][[0, 2, 4]])
    assert np.isnan(result["value_max"][[1, 3]]).all()


@pytest.mark.parametrize("most_blocks", [1, 3])
def test_blocks_take_any_number_of_matrices(kernels: Any, most_blocks: int) -> None:
    a = with_spectrum(6, 5, [2, 1, 0.5, 1e-4, 1e-7], batch=7)
    whole = run(kernels.small_extremes, a)
    few = run(kernels.small_extremes, a, most_blocks=most_blocks, seed=5)
    for name in whole:
        np.testing.assert_array_equal(few[name], whole[name])
    alone = run(kernels.small_extremes, a[4:5])
    np.testing.assert_array_equal(alone["u_min"][0], whole["u_min"][4])


@pytest.mark.parametrize("shape", [(2, 2), (7, 300), (33, 20)])
def test_small_bits_do_not_depend_on_the_schedule(kernels: Any, shape: tuple[int, int]) -> None:
    a = with_spectrum(*shape, np.geomspace(1.0, 1e-9, min(shape)), batch=2)
    first = run(kernels.small_extremes, a, of_gram=True, seed=SEEDS[0])
    for seed in SEEDS[1:]:
        other = run(kernels.small_extremes, a, of_gram=True, seed=seed)
        for name in first:
            np.testing.assert_array_equal(other[name], first[name])


@pytest.mark.parametrize(("card", "side"), [("sm_80", 116), ("sm_90", 128)])
def test_the_small_route_reaches_this_side(kernels: Any, card: str, side: int) -> None:
    limit = SHARED_LIMITS[card]
    assert kernels.is_small(side, 784, limit)
    assert kernels.is_small(100000, side, limit)
    assert not kernels.is_small(256, 256, limit)
    assert not kernels.is_small(100000, 100000, limit)


# --- small route: the two ends alone --------------------------------------------------------------
# The tridiagonal form of the Gram matrix comes first and proves what it finds, or refuses; Jacobi
# alone (by_ends=False) is what it is compared with.

COUNTS = ("rank", "multiplicity_max", "multiplicity_min")
END_SIDES = [1, 2, 3, 4, 5, 8, 9, 16, 17, 20, 21, 32, 33, 52, 64, 65]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("side", END_SIDES)
def test_well_conditioned_matrices_need_no_jacobi(kernels: Any, side: int, dtype: Any) -> None:
    for shape in ((side, 2 * side + 3), (2 * side + 3, side)):
        a = with_spectrum(*shape, np.linspace(2.0, 0.5, side)).astype(dtype)
        result = run(kernels.small_extremes, a, of_gram=side % 2 == 0, seed=side)
        assert not result["refused"].any()
        assert_values(result, a, of_gram=side % 2 == 0)
        assert_vectors(result, a, 2.0 * side)


@pytest.mark.parametrize("shape", [(3, 1100), (1100, 3), (20, 700), (700, 20), (64, 784)])
def test_long_matrices_need_no_jacobi(kernels: Any, shape: tuple[int, int]) -> None:
    a = gaussian(1, *shape)
    result = run(kernels.small_extremes, a)
    assert not result["refused"].any()
    assert_values(result, a)
    assert_vectors(result, a, 1e3)


@pytest.mark.slow
@pytest.mark.parametrize("side", [100, 127, 128])
def test_large_sides_need_no_jacobi(kernels: Any, side: int) -> None:
    a = gaussian(1, side, 2 * side)
    result = run(kernels.small_extremes, a)
    assert not result["refused"].any()
    assert_values(result, a)


@pytest.mark.parametrize("kappa", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12)])
def test_newton_steps_reach_backward_stability(
    kernels: Any, shape: tuple[int, int], kappa: float
) -> None:
    for sigma in (np.geomspace(1.0, 1.0 / kappa, 12), [2.0, *np.linspace(1, 1.5, 10), 1.0 / kappa]):
        a = with_spectrum(*shape, sigma, batch=2)
        result = run(kernels.small_extremes, a)
        assert not result["refused"].any()
        assert_values(result, a)
        bound = 4 * np.sqrt(sum(shape)) * EPS * result["value_max"]
        for extreme in ("max", "min"):
            value = result[f"value_{extreme}"][:, None]
            u, v = result[f"u_{extreme}"], result[f"v_{extreme}"]
            one = np.linalg.norm(np.einsum("bnp,bp->bn", a, v) - value * u, axis=1)
            other = np.linalg.norm(np.einsum("bnp,bn->bp", a, u) - value * v, axis=1)
            assert np.all(np.maximum(one, other) <= bound)


@pytest.mark.parametrize(
    "sigma",
    [
        [3, 2, 1.5, 1, 0.7, 0.5, 1e-9],  # the Gram matrix does not tell the last from zero
        [3, 2, 1.5, 1, 0.7, 0, 0],
        [3, 3, 2, 1.5, 1, 0.7, 0.5],  # how many are within the tolerance is in doubt
        [3, 2, 1.5, 1, 0.7, 0.5, 0.5],
        [0, 0, 0, 0, 0, 0, 0],
    ],
)
@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_what_is_refused_is_what_jacobi_finds(
    kernels: Any, shape: tuple[int, int], sigma: Any
) -> None:
    a = with_spectrum(*shape, sigma, batch=2)
    result = run(kernels.small_extremes, a, of_gram=True)
    jacobi = run(kernels.small_extremes, a, of_gram=True, by_ends=False)
    assert result["refused"].all()
    for name in result:
        np.testing.assert_array_equal(result[name], jacobi[name])


def drawn_spectrum(generator: Any, t: int) -> Any:
    low = 10.0 ** -generator.uniform(0, 16)
    kind = generator.integers(6)
    sigma = [
        np.geomspace(1.0, low, t),
        np.linspace(1.0, low, t),
        np.where(np.arange(t) < t // 2, 1.0, low),
        np.sort(generator.uniform(0.1, 1.0, t))[::-1],
    ][kind % 4].copy()
    if kind == 4 and t > 2:  # almost clusters at both ends
        sigma[1] = sigma[0] * (1 - 10.0 ** generator.uniform(-16, -8))
        sigma[-2] = sigma[-1] + 10.0 ** generator.uniform(-16, -8)
    if kind == 5:
        sigma[t - t // 3 :] = 0.0
    return sigma


@pytest.mark.parametrize("seed", range(8))
def test_the_ends_agree_with_jacobi_on_drawn_spectra(kernels: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    proven = 0
    for trial in range(25):
        t, extra = int(generator.integers(1, 14)), int(generator.integers(0, 9))
        shape = (t, t + extra) if trial % 2 == 0 else (t + extra, t)
        a = with_spectrum(*shape, drawn_spectrum(generator, t), seed=trial)
        a *= 2.0 ** float(generator.integers(-900, 900))
        if trial % 3 == 0:
            a = (a / np.abs(a).max()).astype(np.float32)
        full = bool(generator.integers(2))
        found = run(kernels.small_extremes, a, full_rank=full, seed=trial)
        jacobi = run(kernels.small_extremes, a, full_rank=full, by_ends=False)
        for name in COUNTS:
            np.testing.assert_array_equal(found[name], jacobi[name])
        bound = EPS * value_bound(a) * jacobi["value_max"]
        for name in ("value_max", "value_min"):
            assert np.all(np.abs(found[name] - jacobi[name]) <= bound)
        proven += int(~found["refused"][0])
    assert 5 < proven < 25


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-600, 2.0**300, 2.0**900])
def test_the_ends_scale_exactly(kernels: Any, scale: float) -> None:
    a = with_spectrum(9, 14, np.linspace(2.0, 0.5, 9))
    one = run(kernels.small_extremes, a)
    other = run(kernels.small_extremes, scale * a)
    assert not other["refused"].any()
    for name in ("u_max", "v_max", "u_min", "v_min", *COUNTS):
        np.testing.assert_array_equal(other[name], one[name])
    for name in ("value_max", "value_min"):
        np.testing.assert_array_equal(other[name], scale * one[name])


@pytest.mark.parametrize("shape", [(2, 2), (7, 300), (33, 20), (4, 600)])
def test_the_ends_have_the_same_bits_alone_and_in_any_order(
    kernels: Any, shape: tuple[int, int]
) -> None:
    a = with_spectrum(*shape, np.geomspace(1.0, 1e-3, min(shape)), batch=3)
    whole = run(kernels.small_extremes, a, of_gram=True, seed=SEEDS[0])
    assert not whole["refused"].any()
    for seed in SEEDS[1:]:
        other = run(kernels.small_extremes, a, of_gram=True, seed=seed)
        for name in whole:
            np.testing.assert_array_equal(other[name], whole[name])
    alone = run(kernels.small_extremes, a[1:2], of_gram=True)
    for name in set(whole) - {"first_bad"}:
        np.testing.assert_array_equal(alone[name][0], whole[name][1])


# Beyond 64 rows a matrix is cut into parts, of more than 64 rows each beyond 2048.
@pytest.mark.parametrize("shape", [(3, 64), (3, 65), (129, 5), (2, 2100), (4200, 3), (40, 90)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parts_give_the_gram_matrix_of_the_whole(
    kernels: Any, shape: tuple[int, int], dtype: Any
) -> None:
    a = gaussian(2, *shape).astype(dtype)
    result = run(kernels.small_extremes, a, of_gram=True)
    assert not result["refused"].any()
    assert_values(result, a, of_gram=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_part_has_its_own_scale(kernels: Any, transposed: bool) -> None:
    a = gaussian(2, 300, 4)
    a[:, :64] = 0.0
    a[:, 64:128] *= 2.0**-700  # squares underflow beside the others, not in their part
    a[0, 128:] *= 2.0**500
    a[1, 128:] *= 2.0**-1000  # where the second part is the largest
    a = np.ascontiguousarray(a.swapaxes(1, 2)) if transposed else a
    result = run(kernels.small_extremes, a)
    assert not result["refused"].any()
    for exact, b in ((2.0**-500, 0), (2.0**700, 1)):
        scaled = {name: value[b : b + 1] for name, value in result.items() if name != "first_bad"}
        scaled["value_max"] = exact * scaled["value_max"]
        scaled["value_min"] = exact * scaled["value_min"]
        assert_values(scaled, exact * a[b : b + 1])


def test_a_number_that_is_not_finite_is_found_in_any_part(kernels: Any) -> None:
    a = gaussian(4, 3, 200)
    a[1, 2, 199] = np.nan
    a[2, 0, 64] = -np.inf
    result = run(kernels.small_extremes, a)
    assert result["first_bad"] == 1
    assert np.isnan(result["value_max"][[1, 2]]).all()
    for b in (0, 3):
        alone = run(kernels.small_extremes, a[b : b + 1])
        np.testing.assert_array_equal(result["v_min"][b], alone["v_min"][0])


def test_a_rank_tolerance_above_noise_is_counted(kernels: Any) -> None:
    a = with_spectrum(10, 16, [3, 2.5, 2, 1.5, 1.2, 1, 1e-5, 1e-6, 1e-7, 0])
    for full in (False, True):
        found = kernels.small_extremes(a, 1e-3, 1e-12, full_rank=full)
        jacobi = kernels.small_extremes(a, 1e-3, 1e-12, full_rank=full, by_ends=False)
        assert not found["refused"].any()
        for name in COUNTS:
            np.testing.assert_array_equal(found[name], jacobi[name])
        np.testing.assert_allclose(found["value_min"], jacobi["value_min"], atol=1e-14)
        np.testing.assert_allclose(
            np.abs(np.sum(found["u_min"] * jacobi["u_min"])), 0.0 if full else 1.0, atol=1e-12
        )


@pytest.mark.parametrize(("card", "side"), [("sm_80", 104), ("sm_90", 128)])
def test_the_ends_have_room_up_to_this_side(kernels: Any, card: str, side: int) -> None:
    assert kernels.ends_fit(side, 784, SHARED_LIMITS[card])
    assert kernels.ends_fit(100000, side, SHARED_LIMITS[card])
    assert not kernels.ends_fit(129, 784, SHARED_LIMITS[card])


# --- gradient -------------------------------------------------------------------------------------


def incoming(batch: int, of_gram: bool, seed: int = 0) -> Any:
    names = ["grad_max", "grad_min", *(["grad_squared_frobenius"] if of_gram else [])]
    return {name: gaussian(batch, seed=seed + i) for i, name in enumerate(names)}


def expected_gradient(a: Any, grads: Any, full: bool) -> Any:
    policy: Any = "full" if full else "numerical"
    parts: Any = (
        reference.gram_extremes_gradient(a, rank=policy)
        if "grad_squared_frobenius" in grads
        else reference.extremal_singular_values_gradient(a, rank=policy)
    )
    terms = [g[:, None, None] * part for g, part in zip(grads.values(), parts, strict=True)]
    return np.sum(terms, axis=0)


def assert_gradient(
    kernel: Any, forward: Any, a: Any, grads: Any, *, full: bool = False, **options: Any
) -> None:
    result = run(
        lambda x, *rest, **more: kernel(x, forward, grads, *rest, **more),
        a,
        full_rank=full,
        **options,
    )
    assert result.dtype == a.dtype
    expected = expected_gradient(a, grads, full)
    largest = max(float(np.abs(expected).max()), 1.0)
    eps = EPS * 64 * max(a.shape[-2:]) + 2 * float(np.finfo(a.dtype).eps)
    assert np.abs(result - expected).max() <= eps * largest


GRADIENT_SHAPES = [(1, 1), (2, 2), (5, 9), (9, 5), (12, 12), (20, 130), (70, 18), (3, 5000)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", GRADIENT_SHAPES)
@pytest.mark.parametrize("of_gram", [False, True])
def test_gradient_equals_reference(
    kernels: Any, shape: tuple[int, int], dtype: Any, of_gram: bool
) -> None:
    t = min(shape)
    a = with_spectrum(*shape, np.linspace(2.0, 0.5, t), batch=2).astype(dtype)
    forward = run(kernels.small_extremes, a, of_gram=of_gram)
    assert_gradient(kernels.small_gradient, forward, a, incoming(2, of_gram), seed=3)


def test_gradient_of_one_wide_matrix_spans_chunks(kernels: Any) -> None:
    a = gaussian(1, 1, 9000)
    forward = run(kernels.small_extremes, a)
    assert_gradient(kernels.small_gradient, forward, a, incoming(1, False))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("of_gram", [False, True])
def test_gradient_at_clusters(
    kernels: Any, name: str, dtype: Any, full: bool, of_gram: bool
) -> None:
    # A regular matrix beside it, which the cluster kernel must leave alone.
    other = with_spectrum(*DEGENERATE[name].shape[1:], np.linspace(3, 1, 4 if full else 3))
    a = np.concatenate([DEGENERATE[name], other]).astype(dtype)
    forward = run(kernels.small_extremes, a, of_gram=of_gram, full_rank=full)
    assert_gradient(kernels.small_gradient, forward, a, incoming(2, of_gram), full=full)


def test_a_cluster_without_a_gradient_costs_none(kernels: Any) -> None:
    a = DEGENERATE["doublets"]
    forward = run(kernels.small_extremes, a)
    grads = incoming(1, False)
    grads["grad_min"][:] = 0.0
    assert_gradient(kernels.small_gradient, forward, a, grads)


def test_an_overflowing_gram_matrix_needs_a_gradient_to_matter(kernels: Any) -> None:
    a = 1e150 * gaussian(1, 3, 4)
    forward = run(kernels.small_extremes, a, of_gram=True)
    grads = incoming(1, True)
    grads["grad_squared_frobenius"][:] = 0.0
    result = kernels.small_gradient(a, forward, grads, tolerance(a), tolerance(a))
    assert np.isfinite(result).all()


@pytest.mark.parametrize("of_gram", [False, True])
def test_gradient_bits_do_not_depend_on_the_schedule(kernels: Any, of_gram: bool) -> None:
    a = np.concatenate([DEGENERATE["doublets"], gaussian(1, 8, 10)])
    forward = run(kernels.small_extremes, a, of_gram=of_gram)
    grads = incoming(2, of_gram)
    first, *others = (
        kernels.small_gradient(a, forward, grads, tolerance(a), tolerance(a), seed=seed)
        for seed in SEEDS
    )
    for other in others:
        np.testing.assert_array_equal(other, first)


# --- large route ----------------------------------------------------------------------------------
# Column blocks of 2 or 4 instead of 32 give many of them at sizes that the executor can run.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "column_block"),
    [((1, 1), 2), ((4, 4), 2), ((5, 3), 2), ((20, 30), 4), ((24, 24), 2), ((7, 300), 2)],
)
def test_large_equals_reference(
    kernels: Any, shape: tuple[int, int], column_block: int, dtype: Any
) -> None:
    a = gaussian(2, *shape).astype(dtype)
    result = run(kernels.large_extremes, a, column_block=column_block, seed=2)
    assert_values(result, a)


@pytest.mark.parametrize("kappa", [1.0, 1e9])
def test_watching_the_large_route_changes_nothing(kernels: Any, kappa: float) -> None:
    slow = with_spectrum(12, 14, np.geomspace(1.0, 1.0 / kappa, 12))
    a = np.concatenate([slow, np.eye(12, 14)[None]])  # one matrix is done at once
    whole = run(kernels.large_extremes, a, column_block=2)
    watched = run(kernels.large_extremes, a, column_block=2, watched=True, seed=4)
    for name in whole:
        np.testing.assert_array_equal(watched[name], whole[name])
    assert_values(watched, a)


@pytest.mark.slow
def test_large_with_its_own_column_blocks(kernels: Any) -> None:
    a = gaussian(1, 66, 70)
    assert_values(run(kernels.large_extremes, a), a)


@pytest.mark.parametrize("kappa", [1e6, 1e12])
def test_large_is_accurate_at_large_condition_numbers(kernels: Any, kappa: float) -> None:
    a = with_spectrum(20, 26, np.geomspace(1.0, 1.0 / kappa, 20))
    result = run(kernels.large_extremes, a, column_block=2)
    assert_values(result, a)
    assert result["sweeps"] <= 16
    alone = with_spectrum(20, 20, [2.0, *np.linspace(1.0, 1.5, 18), 1.0 / kappa])
    result = run(kernels.large_extremes, alone, column_block=2)
    assert_values(result, alone)
    assert_vectors(result, alone, 8.0)


@pytest.mark.parametrize("scale", [1e-310, 1e-150, 1e150, 3e307])
def test_large_scales(kernels: Any, scale: float) -> None:
    a = scale * gaussian(1, 6, 9)
    result = run(kernels.large_extremes, a, column_block=2)
    expected = reference.extremal_singular_values(a)
    rtol = 1e-12 if scale > 1e-300 else 1e-9
    np.testing.assert_allclose(result["value_max"], expected.sigma_max, rtol=rtol)
    np.testing.assert_allclose(result["value_min"], expected.sigma_min, rtol=rtol)


def test_large_scale_of_a_matrix_that_many_blocks_read(kernels: Any) -> None:
    a = gaussian(1, 2, 33_000)  # 65,536 entries are read by one block
    a[0, 1, -1] = 1e300  # its square overflows without a scale
    result = run(kernels.large_extremes, a, column_block=2)
    np.testing.assert_allclose(result["value_max"], 1e300, rtol=1e-12)
    np.testing.assert_array_equal(result["rank"], 1)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("full", [False, True])
def test_large_degenerate(kernels: Any, name: str, full: bool) -> None:
    a = DEGENERATE[name]
    forward = run(kernels.large_extremes, a, full_rank=full, column_block=2)
    assert_values(forward, a, full=full)
    for of_gram in (False, True):
        before = run(kernels.small_extremes, a, of_gram=of_gram, full_rank=full)
        assert_gradient(
            kernels.large_gradient, before, a, incoming(1, of_gram), full=full, column_block=2
        )


def test_large_cluster_gradient_leaves_regular_matrices_alone(kernels: Any) -> None:
    a = np.concatenate([gaussian(1, 8, 10), DEGENERATE["doublets"]])
    forward = run(kernels.small_extremes, a)
    grads = incoming(2, False)
    assert_gradient(kernels.large_gradient, forward, a, grads, column_block=2)
    both = kernels.large_gradient(a, forward, grads, tolerance(a), tolerance(a), column_block=2)
    small = kernels.small_gradient(a, forward, grads, tolerance(a), tolerance(a))
    np.testing.assert_array_equal(both[0], small[0])


def test_large_non_finite(kernels: Any) -> None:
    a = gaussian(3, 5, 6)
    clean = run(kernels.large_extremes, a, column_block=2)
    a[1, 0, 0] = np.nan
    result = run(kernels.large_extremes, a, column_block=2)
    assert result["first_bad"] == 1
    np.testing.assert_array_equal(result["v_min"][[0, 2]], clean["v_min"][[0, 2]])
    assert np.isnan(result["value_min"][1])


def test_large_bits_do_not_depend_on_the_schedule(kernels: Any) -> None:
    a = with_spectrum(10, 12, np.geomspace(1.0, 1e-9, 10), batch=2)
    first, *others = (run(kernels.large_extremes, a, column_block=2, seed=s) for s in SEEDS)
    for other in others:
        for name in first:
            np.testing.assert_array_equal(other[name], first[name])
