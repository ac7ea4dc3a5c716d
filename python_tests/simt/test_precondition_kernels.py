"""The CUDA kernel of the preconditioned gradient, run on the CPU, against scipy."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.linalg import cho_solve

SEEDS = (0, 1, 2)
# Relative error of one rounding to the stored type; all arithmetic is float64.
UNIT = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(scope="module")
def kernels(simt: ModuleType) -> Any:
    return simt.precondition


def stored(x: Any, dtype: str) -> Any:
    """``x`` as the kernel holds it: bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        return (np.asarray(x, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    held = np.asarray(x, dtype=dtype)
    return held.view(np.uint16) if dtype == "float16" else held


def as_float64(held: Any, dtype: str) -> Any:
    """The numbers behind what the kernel holds."""
    if dtype == "bfloat16":
        return (held.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (held.view(np.float16) if dtype == "float16" else held).astype(np.float64)


def problem(rows: int, side: int, kappa: float = 1e3, seed: int = 0) -> tuple[Any, Any]:
    """A gradient (rows, side) and the lower Cholesky factor of a K of this condition number."""
    generator = np.random.default_rng([rows, side, seed])
    basis, _ = np.linalg.qr(generator.standard_normal((side, side)))
    k = (basis * np.geomspace(1.0, 1.0 / kappa, side)) @ basis.T
    return generator.standard_normal((rows, side)), np.linalg.cholesky((k + k.T) / 2)


def solve(kernels: Any, grad: Any, factor: Any, dtype: str = "float64", **options: Any) -> Any:
    held = getattr(kernels, f"small_{dtype}")(stored(grad, dtype), factor, **options)
    return as_float64(held, dtype)


def assert_solution(result: Any, grad: Any, factor: Any, dtype: str, kappa: float) -> None:
    """Backward stability of two triangular solves, and one rounding to the stored type."""
    expected = cho_solve((factor, True), as_float64(stored(grad, dtype), dtype).T).T
    bound = 4 * factor.shape[0] * UNIT["float64"] * kappa + UNIT[dtype]
    assert result.shape == expected.shape
    scale = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(result - expected) <= bound * scale).all()


# 32 is a warp, 128 the largest side; a lane has one entry more on the other side of each.
@pytest.mark.parametrize("side", [1, 2, 31, 32, 33, 64, 65, 127, 128])
@pytest.mark.parametrize("rows", [1, 8, 19])
def test_equals_scipy(kernels: Any, side: int, rows: int) -> None:
    grad, factor = problem(rows, side)
    assert_solution(solve(kernels, grad, factor, seed=1), grad, factor, "float64", 1e3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("side", [5, 40])
def test_types_of_storage(kernels: Any, dtype: str, side: int) -> None:
    grad, factor = problem(9, side, kappa=10.0)
    assert_solution(solve(kernels, grad, factor, dtype), grad, factor, dtype, 10.0)


@pytest.mark.parametrize("kappa", [1.0, 1e8])
def test_condition_numbers(kernels: Any, kappa: float) -> None:
    grad, factor = problem(6, 50, kappa)
    assert_solution(solve(kernels, grad, factor), grad, factor, "float64", kappa)


def test_what_lies_above_the_diagonal_of_the_factor_is_not_read(kernels: Any) -> None:
    grad, factor = problem(4, 20)
    spoiled = factor + np.triu(np.full_like(factor, np.nan), 1)
    np.testing.assert_array_equal(solve(kernels, grad, spoiled), solve(kernels, grad, factor))


def test_bits_depend_on_no_schedule_grid_or_alignment(kernels: Any) -> None:
    grad, factor = problem(70, 33)
    whole = solve(kernels, grad, factor)
    for seed in SEEDS:
        np.testing.assert_array_equal(
            solve(kernels, grad, factor, seed=seed, processors=1, shift=1), whole
        )
    np.testing.assert_array_equal(solve(kernels, grad[41:42], factor)[0], whole[41])


def test_non_finite_rows_spoil_no_other(kernels: Any) -> None:
    grad, factor = problem(5, 12)
    bad = grad.copy()
    bad[1, 3] = np.nan
    bad[2, 0] = np.inf
    result = solve(kernels, bad, factor)
    np.testing.assert_array_equal(result[[0, 3, 4]], solve(kernels, grad, factor)[[0, 3, 4]])
    assert not np.isfinite(result[1]).all()
    assert not np.isfinite(result[2]).all()


@pytest.mark.parametrize(("kib", "side"), [(227, 128), (163, 128), (99, 112), (48, 77)])
def test_the_route_ends_where_shared_memory_does(kernels: Any, kib: int, side: int) -> None:
    assert kernels.is_small(side, kib * 1024)
    assert not kernels.is_small(side + 1, kib * 1024)
    assert not kernels.is_small(0, kib * 1024)
