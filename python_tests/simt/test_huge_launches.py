"""Launches of billions of elements: what CUDA refuses, and what an index of 32 bits would miss.

Only the last blocks of each grid are run, on buffers that are mapped but hardly touched.
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

MANY = 70_001  # a batch beyond what gridDim.y and gridDim.z can be
CARDS = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}


@pytest.fixture(scope="module")
def huge(simt: ModuleType) -> Any:
    return simt.huge


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def single(*shape: int, seed: int = 0) -> Any:
    return numbers(*shape, seed=seed).astype(np.float32)


# --- merge: 2.3e9 weights, once in the batch and once in the rows --------------------------------

MERGES = [(MANY, 64, 512, 4), (1, 4_500_000, 512, 1)]


@pytest.mark.parametrize(("batch", "rows", "d", "blocks"), MERGES)
def test_merge_apply(huge: Any, batch: int, rows: int, d: int, blocks: int) -> None:
    assert batch * rows * d > 2**31
    last, c, b = single(16, d), single(3, d, seed=1), single(3, d, seed=2)
    merged, residual = huge.merge_apply(batch, rows, last, c, b, blocks)
    expected = last.astype(np.float64) @ c.T  # W0 is zero
    np.testing.assert_allclose(residual, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(merged, expected @ b, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("batch", "rows", "d", "blocks"), MERGES)
def test_merge_backward(huge: Any, batch: int, rows: int, d: int, blocks: int) -> None:
    last, c, b = single(16, d), single(3, d, seed=1), single(3, d, seed=2)
    base, target, coefficients = huge.merge_backward(batch, rows, last, c, b, blocks)
    expected = last.astype(np.float64) @ b.T
    np.testing.assert_allclose(coefficients, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(target, expected @ c, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(base, last - expected @ c, rtol=1e-4, atol=1e-2)


def test_merge_sum(huge: Any) -> None:
    batch, rows, s, d = 2_900_000, 4, 3, 512
    assert batch * s * d > 2**32
    last, coefficients = single(rows, d), single(rows, s, seed=1)
    total = huge.merge_sum(batch, rows, last, coefficients, 8)
    expected = coefficients.astype(np.float64).T @ last
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-3)


# --- precondition --------------------------------------------------------------------------------


def test_precondition(huge: Any) -> None:
    rows, side = 70_000_000, 70
    assert rows * side > 2**32
    basis = numbers(side, side) / 20 + np.eye(side)
    k = basis @ basis.T
    last = single(8, side, seed=1)
    result = huge.precondition(rows, last, np.linalg.cholesky(k), 1)
    np.testing.assert_allclose(result, last @ np.linalg.inv(k), rtol=1e-4, atol=1e-4)


# --- spectrum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_gram", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_spectrum(huge: Any, shape: tuple[int, int], of_gram: bool) -> None:
    batch = 2**30 - 3
    assert batch * shape[0] * shape[1] > 2**32
    a = single(*shape)
    value_max, value_min, grad = huge.spectrum(batch, a, of_gram, 2)
    u, sigma, vt = np.linalg.svd(a.astype(np.float64))
    expected = np.outer(u[:, 0], vt[0])
    if of_gram:
        expected = 2 * sigma[0] * expected + 4 * a.astype(np.float64) @ a.T @ a
        sigma = sigma**2
    np.testing.assert_allclose([value_max[0], value_min[0]], [sigma[0], sigma[1]], rtol=1e-12)
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [1, 3, 4, 5, 16, 17, 32, 33, 64, 65, 90, 116])
@pytest.mark.parametrize("rows", [1, 600])
def test_small_route(huge: Any, rows: int, side: int) -> None:
    for n, p in ((side, side + rows), (side + rows, side)):
        assert huge.small_launches(MANY, n, p, CARDS["sm_80"]) in {32, 64, 128, 256, 512}


@pytest.mark.parametrize("shape", [(200, 784), (5000, 300), (4100, 40000)])
@pytest.mark.parametrize("card", CARDS)
def test_large_route(huge: Any, shape: tuple[int, int], card: str) -> None:
    batch = huge.large_launches(*shape, CARDS[card])
    assert batch >= 1
    assert shape[0] > 1000 or batch > 65_535  # of matrices of ordinary size


@pytest.mark.parametrize(("s", "card"), [(770, "sm_86"), (4000, "sm_86"), (9000, "sm_90")])
def test_pivoted_cholesky(huge: Any, s: int, card: str) -> None:
    huge.pivoted_launch(MANY, s, CARDS[card])


def test_a_problem_beyond_shared_memory_is_refused(simt: ModuleType, huge: Any) -> None:
    with pytest.raises(simt.LaunchError, match=r"merge_pivoted_cholesky: .*shared memory"):
        huge.pivoted_launch(1, 10_000, CARDS["sm_90"])
