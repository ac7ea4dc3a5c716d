"""The kernels of the merge's shared part, run on the CPU, against numpy."""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import immunize_ext.ops  # noqa: F401  registers the operators

PROFILE = settings(max_examples=15, deadline=None, derandomize=True)
RTOL = 1e-12


@pytest.fixture(scope="module")
def solve(simt: ModuleType) -> Any:
    return simt.merge_solve


def gram(z: Any) -> Any:
    """T of rows z, as the kernels get it."""
    return np.ascontiguousarray(z @ z.swapaxes(-1, -2))


def factorise(solve: Any, t: Any, seed: int = 0) -> tuple[Any, Any, Any]:
    """Triangle, order and rank of T, given as a sum: part of its diagonal comes as 1 / mu."""
    soft = np.einsum("bjj->bj", t) / 4
    gram = t - soft[..., None] * np.eye(t.shape[1])
    *found, whole = solve.pivoted_cholesky(gram, soft, RTOL, seed=seed)
    np.testing.assert_array_equal(whole, gram + soft[..., None] * np.eye(t.shape[1]))
    return tuple(found)


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
    for one, *found in zip(t, *factorise(solve, t, seed=s), strict=True):
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
    triangle, order, found, _ = solve.pivoted_cholesky(t, t[:, 0] * 0, RTOL, seed=seed)
    check_factor(t[0], triangle[0], order[0], int(found[0]), list(range(rank)))


def test_nothing_but_zero_rows(solve: Any) -> None:
    triangle, order, rank = factorise(solve, np.zeros((1, 3, 3)))
    assert rank.tolist() == [0]
    assert order.tolist() == [[0, 1, 2]]
    np.testing.assert_array_equal(triangle[0], np.eye(3))


def test_factor_has_the_same_bits_under_every_schedule(solve: Any) -> None:
    random = np.random.default_rng(0)
    t = gram(random.standard_normal((2, 7, 20)))
    first = factorise(solve, t, seed=0)
    for seed in range(1, 4):
        for one, other in zip(first, factorise(solve, t, seed=seed), strict=True):
            np.testing.assert_array_equal(one, other)


# --- root and basis -------------------------------------------------------------------------------


class Solved(NamedTuple):
    """What is made of Z^T and 1 / mu, as merge.cpp goes about it."""

    t: Any
    order: Any
    rank: Any
    first: Any
    correction: Any
    root: Any
    defect: Any
    final_rank: Any


def solve_few(solve: Any, z: Any, soft: Any, seed: int = 0) -> Solved:
    triangle, order, rank, t = solve.pivoted_cholesky(gram(z), soft, RTOL, seed=seed)
    first, inverse = solve.orthonormalise(z, soft, triangle, order, rank, seed=seed)
    found = solve.finish_root(gram(first), inverse, t, order, rank, seed=seed)
    return Solved(t, order, rank, first, *found)


def check_solved(z: Any, soft: Any, found: Solved, kept: list[int], tolerance: float) -> None:
    """Of one problem: H orthonormalises Z' in the rows that are kept, and E inverts T there."""
    s = len(z)
    rank = len(kept)
    assert int(found.final_rank) == int(found.rank) == rank
    assert not found.root[:, rank:].any()
    assert not found.root[[j for j in range(s) if j not in kept]].any()
    wide = np.concatenate([z, np.diag(np.sqrt(soft))], axis=1)
    basis = found.root[:, :rank].T @ wide
    np.testing.assert_allclose(basis @ basis.T, np.eye(rank), atol=tolerance)
    np.testing.assert_allclose((found.correction @ found.first)[:rank], basis, atol=tolerance)
    assert not found.first[rank:].any()
    inverse = np.zeros((s, s))
    inverse[np.ix_(kept, kept)] = np.linalg.inv(found.t[np.ix_(kept, kept)])
    scale = np.abs(inverse).max(initial=1e-300)
    assert np.abs(found.root @ found.root.T - inverse).max(initial=0) <= tolerance * scale
    dropped = [j for j in range(s) if j not in kept]
    assert not found.defect[:, kept].any()
    expected = np.eye(s) - inverse @ found.t
    np.testing.assert_allclose(
        found.defect[:, dropped], expected[:, dropped], atol=tolerance * scale * found.t.max()
    )


@pytest.mark.parametrize(("s", "d"), [(1, 1), (5, 9), (24, 70), (33, 64), (70, 80)])
@pytest.mark.parametrize("soft", [False, True])
def test_root_inverts_t(solve: Any, s: int, d: int, soft: bool) -> None:
    random = np.random.default_rng(s)
    z = random.standard_normal((2, s, d)) * 10.0 ** random.uniform(-2, 2, (2, s, 1))
    mu = random.uniform(0, 2, (2, s)) * soft
    found = solve_few(solve, z, mu, seed=s)
    for i in range(2):
        one = Solved(*(x[i] for x in found))
        check_solved(z[i], mu[i], one, list(range(s)), 1e-9)
        assert not one.defect.any()


def test_close_rows_keep_their_digits(solve: Any) -> None:
    """Orthogonal to rounding where the Gram matrix has lost ten digits of the angle."""
    random = np.random.default_rng(0)
    z = random.standard_normal((1, 4, 12))
    z[0, 3] = z[0, 0] + 1e-5 * z[0, 3]
    found = solve_few(solve, z, np.zeros((1, 4)))
    q = (found.correction @ found.first)[0]
    np.testing.assert_allclose(q @ q.T, np.eye(4), atol=1e-14)
    np.testing.assert_allclose(found.root[0].T @ z[0], q[:, :12], atol=1e-9)


def test_repeated_and_zero_rows_have_a_defect(solve: Any) -> None:
    random = np.random.default_rng(1)
    unique = random.standard_normal((4, 11))
    unique[3] = 0
    z = np.ascontiguousarray(unique[[0, 1, 0, 3, 2, 1]][None])
    found = solve_few(solve, z, np.zeros((1, 6)), seed=3)
    one = Solved(*(x[0] for x in found))
    check_solved(z[0], np.zeros(6), one, sorted(one.order[:3].tolist()), 1e-12)
    assert one.defect[:, 2] == pytest.approx([-1, 0, 1, 0, 0, 0], abs=1e-12)
    assert one.defect[3].tolist() == [0, 0, 0, 1, 0, 0]


def test_what_is_not_finite_has_no_rank(solve: Any) -> None:
    z = np.random.default_rng(2).standard_normal((3, 3, 5))
    z[1, 2, 4] = np.nan
    z[2, 0, 0] = np.inf
    assert solve_few(solve, z, np.zeros((3, 3))).final_rank.tolist() == [3, -1, -1]


def test_root_has_the_same_bits_under_every_schedule(solve: Any) -> None:
    z = np.random.default_rng(3).standard_normal((2, 7, 90))
    first = solve_few(solve, z, np.full((2, 7), 0.5), seed=0)
    for seed in range(1, 4):
        again = solve_few(solve, z, np.full((2, 7), 0.5), seed=seed)
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("batch", "s", "d"), [(1, 5, 40), (2, 9, 70)])
@pytest.mark.parametrize("repeated", [False, True])
def test_the_kernels_together_equal_the_operator(
    simt: ModuleType, batch: int, s: int, d: int, repeated: bool
) -> None:
    """In the layouts in which merge.cpp hands them on, against merge_solve on the CPU."""
    random = np.random.default_rng(s)
    x = random.standard_normal((batch, 3 * d, d))
    chol = np.linalg.cholesky(gram(x.swapaxes(1, 2)))
    c = random.standard_normal((batch, s, d))
    if repeated:
        c[:, 3] = c[:, 1]
    soft = random.uniform(0, 1, (batch, s)) * (not repeated)
    z = simt.triangular.solve(chol, c, False, False)
    found = solve_few(simt.merge_solve, z, soft)
    basis = (found.correction @ found.first)[:, :, :d].swapaxes(1, 2).copy()
    b = found.root @ simt.triangular.solve(chol, basis, True, True)
    expected = torch.ops.immunize_ext.merge_solve(
        *(torch.from_numpy(array) for array in (chol, c, soft)), RTOL, False
    )
    for one, other in zip(
        (b, found.root, basis, found.defect, found.final_rank), expected, strict=True
    ):
        np.testing.assert_allclose(
            one, other.numpy(), rtol=1e-9, atol=1e-11 * float(other.abs().max())
        )
