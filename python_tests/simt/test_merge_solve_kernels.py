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


def check_root(t: Any, root: Any, rank: int, kept: list[int]) -> None:
    """E = H H^T inverts T among the kept rows; H is zero elsewhere and beyond the rank."""
    dropped = [j for j in range(len(t)) if j not in kept]
    assert rank == len(kept)
    assert not root[dropped].any()
    assert not root[:, rank:].any()
    if kept:
        block = t[np.ix_(kept, kept)]
        expected = np.linalg.inv(block)
        scale = np.linalg.cond(block) * np.abs(expected).max()
        assert np.abs((root @ root.T)[np.ix_(kept, kept)] - expected).max() <= 1e-13 * scale


@pytest.mark.parametrize("s", [1, 2, 31, 33, 70])
def test_root_equals_numpy(solve: Any, s: int) -> None:
    random = np.random.default_rng(s)
    t = gram(random.standard_normal((3, s, s + 10)) * 10.0 ** random.uniform(-3, 3, (3, s, 1)))
    root, rank = solve.root(t, RTOL, seed=s)
    for one, h, found in zip(t, root, rank.tolist(), strict=True):
        scale = np.sqrt(np.diag(one))
        unit = one / np.outer(scale, scale)  # the kernel scales rows too, so judge in these units
        check_root(unit, h * scale[:, None], found, list(range(s)))


@PROFILE
@given(
    rank=st.integers(1, 10),
    repeats=st.lists(st.integers(0, 9), max_size=8),
    zeros=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_root_keeps_the_first_of_repeated_rows(
    solve: Any, rank: int, repeats: list[int], zeros: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    unique = np.zeros((rank + 1, rank + 1))
    unique[:rank, :rank] = gram(random.standard_normal((rank, 20)))
    # Indexed, so that entries of repeated rows are equal bit for bit, and with them the pivots.
    rows = [*range(rank), *(r % rank for r in repeats), *[rank] * zeros]
    t = np.ascontiguousarray(unique[np.ix_(rows, rows)][None])
    root, found = solve.root(t, RTOL, seed=seed)
    check_root(t[0], root[0], int(found[0]), list(range(rank)))


def test_root_of_nothing_but_zero_rows(solve: Any) -> None:
    root, rank = solve.root(np.zeros((1, 3, 3)), RTOL)
    assert rank.tolist() == [0]
    assert not root.any()


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_a_second_root_repairs_the_first(solve: Any, distance: float) -> None:
    """CholeskyQR2: Z H orthonormal to rounding, where the root of T alone loses 1/distance^2."""
    random = np.random.default_rng(0)
    z = random.standard_normal((5, 40))
    z[3] = z[1] + distance * random.standard_normal(40)
    first = solve.root(gram(z[None]), RTOL)[0][0]
    raw = z.T @ first
    assert np.abs(raw.T @ raw - np.eye(5)).max() > 1e-3 * 1e-16 / distance**2
    second = solve.root(np.ascontiguousarray((raw.T @ raw)[None]), RTOL)[0][0]
    basis = z.T @ (first @ second)
    assert np.abs(basis.T @ basis - np.eye(5)).max() < 100 * 1e-16 / distance


def test_root_gives_the_same_bits_under_every_schedule(solve: Any) -> None:
    random = np.random.default_rng(0)
    t = gram(random.standard_normal((2, 7, 20)))
    first = solve.root(t, RTOL, seed=0)
    for seed in range(1, 4):
        for one, other in zip(first, solve.root(t, RTOL, seed=seed), strict=True):
            np.testing.assert_array_equal(one, other)
