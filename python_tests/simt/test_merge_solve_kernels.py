"""The kernels of the merge's shared part, run on the CPU, against numpy."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PROFILE = settings(max_examples=15, deadline=None, derandomize=True)
RTOL = 1e-12


@pytest.fixture(scope="module")
def solve(simt: ModuleType) -> Any:
    return simt.merge_solve


def gram(z: Any) -> Any:
    """T of rows z, as the kernels get it."""
    return np.ascontiguousarray(z @ z.swapaxes(-1, -2))


def check_factor(t: Any, triangle: Any, order: Any, rank: int, kept: list[int]) -> None:
    """L L^T is T in the rows that were kept, in the order of the pivots; then the identity."""
    s = len(t)
    assert sorted(order[:rank].tolist()) == kept
    assert order[rank:].tolist() == [j for j in range(s) if j not in kept]
    assert not np.triu(triangle, 1).any()
    np.testing.assert_array_equal(triangle[rank:], np.eye(s)[rank:])
    lower = triangle[:rank, :rank]
    block = t[np.ix_(order[:rank], order[:rank])]
    assert np.abs(lower @ lower.T - block).max(initial=0) <= 1e-13 * np.abs(t).max()
    # Pivots fall, in units of the diagonal.
    sines = np.diag(lower) / np.sqrt(np.diag(block))
    assert (np.diff(sines) <= 1e-12).all()


@pytest.mark.parametrize("s", [1, 2, 31, 33, 70])
def test_factor_equals_numpy(solve: Any, s: int) -> None:
    random = np.random.default_rng(s)
    t = gram(random.standard_normal((3, s, s + 10)) * 10.0 ** random.uniform(-3, 3, (3, s, 1)))
    for one, *found in zip(t, *solve.pivoted_cholesky(t, RTOL, seed=s), strict=True):
        check_factor(one, *found, list(range(s)))


@PROFILE
@given(
    rank=st.integers(1, 10),
    repeats=st.lists(st.integers(0, 9), max_size=8),
    zeros=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_first_of_repeated_rows_is_kept(
    solve: Any, rank: int, repeats: list[int], zeros: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    unique = np.zeros((rank + 1, rank + 1))
    unique[:rank, :rank] = gram(random.standard_normal((rank, 20)))
    # Indexed, so that entries of repeated rows are equal bit for bit, and with them the pivots.
    rows = [*range(rank), *(r % rank for r in repeats), *[rank] * zeros]
    t = np.ascontiguousarray(unique[np.ix_(rows, rows)][None])
    triangle, order, found = solve.pivoted_cholesky(t, RTOL, seed=seed)
    check_factor(t[0], triangle[0], order[0], int(found[0]), list(range(rank)))


def test_nothing_but_zero_rows(solve: Any) -> None:
    triangle, order, rank = solve.pivoted_cholesky(np.zeros((1, 3, 3)), RTOL)
    assert rank.tolist() == [0]
    assert order.tolist() == [[0, 1, 2]]
    np.testing.assert_array_equal(triangle[0], np.eye(3))


def test_factor_has_the_same_bits_under_every_schedule(solve: Any) -> None:
    random = np.random.default_rng(0)
    t = gram(random.standard_normal((2, 7, 20)))
    first = solve.pivoted_cholesky(t, RTOL, seed=0)
    for seed in range(1, 4):
        for one, other in zip(first, solve.pivoted_cholesky(t, RTOL, seed=seed), strict=True):
            np.testing.assert_array_equal(one, other)
