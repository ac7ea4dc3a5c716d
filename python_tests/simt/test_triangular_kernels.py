"""The triangular solves with few right-hand sides, run on the CPU, against LAPACK."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg

TILE, RIGHT_HAND_SIDES = 32, 4


@pytest.fixture(scope="module")
def triangular(simt: ModuleType) -> Any:
    return simt.triangular


def make(batch: int, d: int, s: int, seed: int, spread: float = 0.0) -> tuple[Any, Any]:
    """Cholesky factors with rubbish above the diagonal, which nobody may read, and s rows."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch, 2 * d, d)) * 10.0 ** random.uniform(-spread, spread, d)
    factor = np.linalg.cholesky(x.swapaxes(1, 2) @ x)
    factor += np.triu(np.full((d, d), np.nan), 1)
    return factor, random.standard_normal((batch, s, d))


def solved(factor: Any, rhs: Any, transposed: bool) -> Any:
    lower = np.nan_to_num(np.tril(factor))
    return scipy.linalg.solve_triangular(lower, rhs.T, lower=True, trans=int(transposed)).T


def solve(
    triangular: Any,
    factor: Any,
    rhs: Any,
    transposed: bool,
    columns: bool,
    seed: int,
    width: int = 1024,
) -> Any:
    """``width``: columns of a panel, a multiple of TILE."""
    given = np.ascontiguousarray(rhs.swapaxes(1, 2)) if columns else rhs
    return triangular.solve(factor, given, transposed, columns, seed, width)


def backward_errors(factor: Any, rhs: Any, found: Any, transposed: bool) -> Any:
    """|L y - f| / (|L| |y|), element by element: what substitution promises, whatever L is."""
    lower = np.tril(np.nan_to_num(factor))
    matrix = lower.swapaxes(1, 2) if transposed else lower
    residual = np.abs(found @ matrix.swapaxes(1, 2) - rhs)
    return residual / (np.abs(found) @ np.abs(matrix).swapaxes(1, 2))


def test_constants(triangular: Any) -> None:
    """The shapes below are chosen around these numbers."""
    assert (triangular.TILE, triangular.RIGHT_HAND_SIDES) == (TILE, RIGHT_HAND_SIDES)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    ("batch", "d", "s", "width"),
    [
        (1, 1, 1, TILE),
        (2, 31, 4, TILE),
        (1, 32, 5, TILE),
        (1, 33, 3, 2 * TILE),
        (2, 97, 6, 4 * TILE),
        (1, 165, 9, 8 * TILE),
        # Panels: of one tile, of several, and a last one that is not full.
        (1, 33, 3, TILE),
        (2, 97, 6, TILE),
        (1, 165, 9, 2 * TILE),
        (2, 160, 2, 3 * TILE),
    ],
)
def test_solve_equals_lapack(
    triangular: Any, transposed: bool, columns: bool, batch: int, d: int, s: int, width: int
) -> None:
    factor, rhs = make(batch, d, s, seed=d)
    found = solve(triangular, factor, rhs, transposed, columns, s, width)
    for one, right, given in zip(found, rhs, factor, strict=True):
        expected = solved(given, right, transposed)
        np.testing.assert_allclose(one, expected, rtol=1e-11, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("width", [TILE, 2 * TILE, 5 * TILE])
@pytest.mark.parametrize("transposed", [False, True])
def test_errors_are_those_of_substitution_for_any_condition(
    triangular: Any, transposed: bool, width: int
) -> None:
    factor, rhs = make(1, 150, 4, seed=1, spread=6.0)
    assert np.linalg.cond(np.tril(np.nan_to_num(factor[0]))) > 1e10
    found = solve(triangular, factor, rhs, transposed, False, 0, width)
    assert backward_errors(factor, rhs, found, transposed).max() <= 150 * 2.0**-52


@pytest.mark.parametrize("width", [2 * TILE, 4 * TILE])
@pytest.mark.parametrize("transposed", [False, True])
def test_solve_has_the_same_bits_under_every_schedule_and_in_any_company(
    triangular: Any, transposed: bool, width: int
) -> None:
    factor, rhs = make(1, 100, 6, seed=2)
    first = solve(triangular, factor, rhs, transposed, False, 0, width)
    for seed in range(1, 4):
        again = solve(triangular, factor, rhs, transposed, False, seed, width)
        np.testing.assert_array_equal(first, again)
    alone = solve(triangular, factor, rhs[:, 2:3].copy(), transposed, True, 0, width)
    np.testing.assert_array_equal(first[:, 2:3], alone)


def test_nothing_to_solve(triangular: Any) -> None:
    assert triangular.solve(np.zeros((0, 3, 3)), np.zeros((0, 2, 3)), False, False).shape == (
        0,
        2,
        3,
    )
    assert triangular.solve(np.ones((1, 3, 3)), np.zeros((1, 0, 3)), True, False).shape == (1, 0, 3)


def test_panels_fit_a_block(triangular: Any) -> None:
    """One up to side 768, then as many as it takes; 99 KiB is what every GPU since sm_80 has."""
    for d in (1, 32, 33, 767, 768, 769, 1024, 1280, 2048, 4096, 10000):
        width = triangular.panel_width(d)
        assert width % TILE == 0
        assert triangular.solve_bytes(min(width, d)) <= 99 * 1024
        assert (width >= d) == (d <= 768)
        assert width <= 512 or d <= 768
    assert triangular.panel_width(2048) == 512
