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


def check_inverse(t: Any, e: Any, defect: Any, kept: list[int]) -> None:
    """E inverts T among the kept rows and is zero elsewhere; the defect is I - E T."""
    s = len(t)
    dropped = [j for j in range(s) if j not in kept]
    assert not e[dropped].any()
    assert not e[:, dropped].any()
    assert not defect[:, kept].any()
    if kept:
        block = t[np.ix_(kept, kept)]
        expected = np.linalg.inv(block)
        scale = np.linalg.cond(block) * np.abs(expected).max()
        assert np.abs(e[np.ix_(kept, kept)] - expected).max() <= 1e-13 * scale
    right = np.eye(s) - e @ t
    np.testing.assert_allclose(defect[:, dropped], right[:, dropped], atol=1e-10)


@pytest.mark.parametrize("s", [1, 2, 31, 33, 70])
def test_invert_equals_numpy(solve: Any, s: int) -> None:
    random = np.random.default_rng(s)
    t = gram(random.standard_normal((3, s, s + 10)) * 10.0 ** random.uniform(-3, 3, (3, s, 1)))
    e, defect, rank = solve.invert(t, RTOL, seed=s)
    assert rank.tolist() == [s] * 3
    assert not defect.any()
    for one, inverse, zero in zip(t, e, defect, strict=True):
        scale = np.sqrt(np.diag(one))
        unit = one / np.outer(scale, scale)  # the kernel scales rows too, so judge in these units
        check_inverse(unit, inverse * np.outer(scale, scale), zero, list(range(s)))


@PROFILE
@given(
    rank=st.integers(1, 10),
    repeats=st.lists(st.integers(0, 9), max_size=8),
    zeros=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_invert_keeps_the_first_of_repeated_rows(
    solve: Any, rank: int, repeats: list[int], zeros: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    unique = np.zeros((rank + 1, rank + 1))
    unique[:rank, :rank] = gram(random.standard_normal((rank, 20)))
    # Indexed, so that entries of repeated rows are equal bit for bit, and with them the pivots.
    rows = [*range(rank), *(r % rank for r in repeats), *[rank] * zeros]
    t = np.ascontiguousarray(unique[np.ix_(rows, rows)][None])
    e, defect, found = solve.invert(t, RTOL, seed=seed)
    assert found.tolist() == [rank]
    check_inverse(t[0], e[0], defect[0], list(range(rank)))


def test_invert_of_nothing_but_zero_rows(solve: Any) -> None:
    e, defect, rank = solve.invert(np.zeros((1, 3, 3)), RTOL)
    assert rank.tolist() == [0]
    assert not e.any()
    np.testing.assert_array_equal(defect[0], np.eye(3))


@pytest.mark.parametrize(("d", "s"), [(1, 1), (31, 3), (32, 9), (33, 40), (64, 5), (127, 12)])
def test_small_solve_equals_numpy(solve: Any, d: int, s: int) -> None:
    random = np.random.default_rng(d)
    captions = random.standard_normal((2, 2 * d + 1, d))
    q = captions.swapaxes(1, 2) @ captions
    chol = np.ascontiguousarray(np.linalg.cholesky(q))
    c = random.standard_normal((2, s, d))
    hardness = np.ascontiguousarray(random.uniform(0.1, 1, (2, s)))
    a, (e, defect, rank) = solve.solve_small(chol, c, hardness, RTOL, seed=s)
    expected = np.linalg.solve(q, c.swapaxes(1, 2))
    np.testing.assert_allclose(a, expected, rtol=1e-8, atol=1e-10)
    t = c @ expected + np.stack([np.diag(h) for h in hardness])
    assert rank.tolist() == [s, s]
    for one, inverse, zero in zip(t, e, defect, strict=True):
        check_inverse(one, inverse, zero, list(range(s)))


def test_small_solve_with_repeated_rows(solve: Any) -> None:
    random = np.random.default_rng(0)
    c = random.standard_normal((1, 5, 40))
    c[0, 3], c[0, 4] = c[0, 1], -2 * c[0, 0]
    chol = np.eye(40)[None].copy()
    _, (e, defect, rank) = solve.solve_small(chol, c, np.zeros((1, 5)), RTOL)
    assert rank.tolist() == [3]
    check_inverse(c[0] @ c[0].T, e[0], defect[0], [0, 1, 2])


def test_solve_gives_the_same_bits_under_every_schedule(solve: Any) -> None:
    random = np.random.default_rng(0)
    chol = np.ascontiguousarray(np.tril(random.uniform(1, 2, (2, 20, 20))))
    c = random.standard_normal((2, 7, 20))
    first = solve.solve_small(chol, c, np.zeros((2, 7)), RTOL, seed=0)
    for seed in range(1, 4):
        again = solve.solve_small(chol, c, np.zeros((2, 7)), RTOL, seed=seed)
        for one, other in zip([first[0], *first[1]], [again[0], *again[1]], strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_small_route_asks_for_shared_memory(solve: Any) -> None:
    assert solve.is_small(128, 24)
    assert not solve.is_small(129, 24)
    assert not solve.is_small(128, 24, shared_limit=99 * 1024)
    assert solve.is_small(96, 24, shared_limit=99 * 1024)
