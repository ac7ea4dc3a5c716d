"""The CUDA kernel of the regularizers, run on the CPU, against their formulas in numpy."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

RANGE = {"side": 8.0, "vanishing": 1e-14, "least": 2.0**-256, "most": 2.0**256}


@pytest.fixture(scope="module")
def kernels(simt: ModuleType) -> Any:
    return simt.regularizer


def spectra(count: int, seed: int = 0) -> Any:
    """Singular values (count, 5), descending and apart."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.uniform(0.5, 3.0, (count, 5)), axis=1)[:, ::-1]


def run(kernels: Any, sigma: Any, dtype: str = "float64", **changes: Any) -> tuple[Any, Any, Any]:
    """Value, weights and multiplicities for singular values (count, 5)."""
    count = len(sigma)
    given: dict[str, Any] = {
        "extreme": np.ascontiguousarray(sigma[:, -1 if changes["ill"] else 0]),
        "squares": (sigma**2).sum(axis=1),
        "rank": np.full(count, 5, dtype=np.int64),
        "multiplicity": np.ones(count, dtype=np.int64),
        "normaliser": 0.0,
        "floor": 0.0,
        **RANGE,
        **changes,
    }
    value, weights, multiplicity = getattr(kernels, f"values_{dtype}")(**given)
    return value, weights, multiplicity


# 128 is a block.
@pytest.mark.parametrize("count", [1, 127, 128, 129])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("normaliser", [0.0, 12.0])
def test_r_well(kernels: Any, count: int, dtype: str, normaliser: float) -> None:
    sigma = spectra(count)
    value, weights, counts = run(kernels, sigma, dtype, ill=False, normaliser=normaliser)
    p = normaliser or 8.0
    expected = sigma[:, 0] ** 2 / 2 - (sigma**2).sum(axis=1) / (2 * p)
    np.testing.assert_allclose(value, expected, rtol=8 * np.finfo(dtype).eps)
    right = np.zeros((count, 4))
    right[:, 0], right[:, 2], right[:, 3] = sigma[:, 0], -1 / (2 * p), 1.0
    np.testing.assert_allclose(weights, right, rtol=1e-15)
    assert (counts == 1).all()


@pytest.mark.parametrize("normaliser", [0.0, 4.0])
def test_r_ill(kernels: Any, normaliser: float) -> None:
    sigma = spectra(200, seed=1)
    value, weights, counts = run(kernels, sigma, ill=True, normaliser=normaliser)
    k = normaliser or 5.0
    d = (sigma**2).sum(axis=1) / (2 * k) - sigma[:, -1] ** 2 / 2
    np.testing.assert_allclose(value, 1 / d, rtol=1e-13)
    np.testing.assert_allclose(weights[:, 1], sigma[:, -1] / d**2, rtol=1e-13)
    np.testing.assert_allclose(weights[:, 2], -1 / (2 * k * d**2), rtol=1e-13)
    assert not weights[:, 0].any()
    assert (counts == 1).all()


def test_where_d_vanishes_the_count_is_zero_and_the_gradient_too(kernels: Any) -> None:
    sigma = np.stack([np.full(5, 2.0), spectra(1)[0]])
    multiplicity = np.array([5, 1], dtype=np.int64)
    value, weights, counts = run(kernels, sigma, ill=True, multiplicity=multiplicity)
    assert counts.tolist() == [0, 1]
    assert not weights[0, :3].any()
    assert value[0] == pytest.approx(1 / (2.0 * 1e-14))
    value, weights, counts = run(kernels, sigma, ill=True, multiplicity=multiplicity, floor=0.1)
    assert counts.tolist() == [5, 1]
    assert not weights[0, :3].any()
    assert value[0] == pytest.approx(1 / (2.0 * 0.1))


@pytest.mark.parametrize("ill", [False, True])
def test_squares_out_of_range_are_marked(kernels: Any, ill: bool) -> None:
    scales = [1e-200, 1e-30, 1.0, 1e30, 1e200]
    squares = np.array([s * 25.0 for s in scales])
    sigma = np.repeat(spectra(1), len(scales), axis=0)
    _, _, counts = run(kernels, sigma, ill=ill, squares=squares)
    assert (counts < 0).tolist() == [True, False, False, False, True]
    bad = np.array([np.nan, np.inf, 1.0, 1.0, 1.0])
    assert (run(kernels, sigma, ill=ill, squares=bad)[2] < 0).tolist()[:2] == [True, True]


def test_zero_is_in_range(kernels: Any) -> None:
    value, _, counts = run(kernels, np.zeros((1, 5)), ill=False, rank=np.zeros(1, dtype=np.int64))
    assert value[0] == 0.0
    assert counts[0] == 1
