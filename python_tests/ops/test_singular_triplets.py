"""The raw spectrum operators on structured matrices: singular triplets, ranks, multiplicities.

The public tests ask for values and gradients; here the saved vectors are looked at, on matrices
that decouple in a tridiagonal form, are graded by rows or columns, repeat rows, or sit where the
kernels change their method (sides 12, 24, 256).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import EPS, EPS32
from spectrum_bounds import VALUE_UNITS

Generator = np.random.Generator


def orthogonal(rng: Generator, n: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((n, k)))[0]


def with_values(rng: Generator, n: int, p: int, sigma: np.ndarray) -> np.ndarray:
    k = min(n, p)
    return (orthogonal(rng, n, k) * sigma) @ orthogonal(rng, p, k).T


def falling(rng: Generator, count: int) -> np.ndarray:
    return np.logspace(0, -rng.uniform(0, 14), count)


def geometric(rng: Generator, n: int, p: int) -> np.ndarray:
    return with_values(rng, n, p, falling(rng, min(n, p)))


def one_small(rng: Generator, n: int, p: int) -> np.ndarray:
    sigma = np.ones(min(n, p))
    sigma[-1] = 10.0 ** -rng.uniform(0, 14)
    return with_values(rng, n, p, sigma)


def one_large(rng: Generator, n: int, p: int) -> np.ndarray:
    sigma = np.full(min(n, p), 10.0 ** -rng.uniform(0, 14))
    sigma[0] = 1.0
    return with_values(rng, n, p, sigma)


def permuted_diagonal(rng: Generator, n: int, p: int) -> np.ndarray:
    a = np.zeros((n, p))
    np.fill_diagonal(a, falling(rng, min(n, p)) * rng.choice([-1, 1], min(n, p)))
    return a[rng.permutation(n)][:, rng.permutation(p)]


def graded_rows(rng: Generator, n: int, p: int) -> np.ndarray:
    return rng.standard_normal((n, p)) * falling(rng, n)[:, None]


def graded_columns(rng: Generator, n: int, p: int) -> np.ndarray:
    return rng.standard_normal((n, p)) * falling(rng, p)


def integers(rng: Generator, n: int, p: int) -> np.ndarray:
    return rng.integers(-2, 3, (n, p)).astype(np.float64)


def triangular(rng: Generator, n: int, p: int) -> np.ndarray:
    return np.eye(n, p) - 0.5 * np.triu(np.ones((n, p)))


def hilbert(rng: Generator, n: int, p: int) -> np.ndarray:
    return 1.0 / (np.arange(n)[:, None] + np.arange(p) + 1.0)


def few_values(rng: Generator, n: int, p: int) -> np.ndarray:
    return with_values(rng, n, p, np.sort(rng.choice([1.0, 0.5, 0.25, 0.0], min(n, p)))[::-1])


def near_clusters(rng: Generator, n: int, p: int) -> np.ndarray:
    gap, k = 10.0 ** -rng.uniform(0, 15), min(n, p)
    sigma = np.concatenate([[1, 1 - gap], np.linspace(0.9, 0.3, max(k - 4, 0)), [0.1 + gap, 0.1]])
    return with_values(rng, n, p, sigma if k >= 4 else np.ones(k))


def zero_rows_and_columns(rng: Generator, n: int, p: int) -> np.ndarray:
    a = rng.standard_normal((n, p))
    a[rng.random(n) < 0.4] = 0
    a[:, rng.random(p) < 0.3] = 0
    return a


def near_repeated_rows(rng: Generator, n: int, p: int) -> np.ndarray:
    a = np.repeat(rng.standard_normal((n // 3 + 1, p)), 3, axis=0)[:n]
    return a + 10.0 ** -rng.uniform(4, 16) * rng.standard_normal((n, p))


def strong_mean(rng: Generator, n: int, p: int) -> np.ndarray:
    return rng.standard_normal((n, p)) + 30


KINDS: list[Callable[[Generator, int, int], np.ndarray]] = [
    geometric,
    one_small,
    one_large,
    permuted_diagonal,
    graded_rows,
    graded_columns,
    integers,
    triangular,
    hilbert,
    few_values,
    near_clusters,
    zero_rows_and_columns,
    near_repeated_rows,
    strong_mean,
]

SIDES = [1, 2, 3, 4, 5, 8, 11, 12, 13, 23, 24, 25, 40]


def check(a: torch.Tensor, rank_rtol: float, cluster_rtol: float, full: bool, gram: bool) -> None:
    """Everything a raw forward operator returns for one matrix, against a full decomposition."""
    n, p = a.shape
    outputs = (
        torch.ops.immunize_ext.gram_extremes
        if gram
        else torch.ops.immunize_ext.extremal_singular_values
    )(a, rank_rtol, cluster_rtol, full)
    if gram:
        lambda_max, lambda_min, frobenius, *outputs, _ = outputs
        largest, smallest = float(lambda_max.sqrt()), float(lambda_min.sqrt())
    else:
        largest, smallest = float(outputs[0]), float(outputs[1])
        outputs = outputs[2:]
    rank, above, below = (int(count) for count in outputs[:3])
    pairs = [vector.numpy() for vector in outputs[3:]]
    wide = a.double().numpy()
    sigma = np.linalg.svd(wide, compute_uv=False)
    top, full_side = sigma[0], p if gram else min(n, p)
    if top == 0:
        assert (largest, smallest, rank, above, below) == (0, 0, 0, full_side, full_side)
        assert not any(vector.any() for vector in pairs)
        return
    unit = max(n, p) * EPS * top
    assert abs(largest - top) <= VALUE_UNITS * unit
    if gram:
        assert abs(float(frobenius) / np.sum(sigma**4) - 1) <= 1e-13
    # What lies within rounding of a threshold may fall on either side of it.
    loose = 20 * unit
    assert (
        np.sum(sigma > rank_rtol * top + loose) <= rank <= np.sum(sigma > rank_rtol * top - loose)
    )
    deficient = full and rank < full_side
    truth = 0.0 if deficient else sigma[rank - 1]
    assert abs(smallest - truth) <= VALUE_UNITS * unit
    counted = sigma[:rank]
    assert np.sum(top - counted <= cluster_rtol * top - 2 * loose) <= above
    assert 1 <= above <= np.sum(top - counted <= cluster_rtol * top + 2 * loose)
    if deficient:
        assert below == full_side - rank
        assert smallest == 0
        assert not pairs[2].any()
        assert not pairs[3].any()
    else:
        assert np.sum(counted - truth <= cluster_rtol * top - 2 * loose) <= below
        assert 1 <= below <= np.sum(counted - truth <= cluster_rtol * top + 2 * loose)
    for value, u, v in ((largest, *pairs[:2]), (smallest, *pairs[2:])):
        if not u.any():
            assert deficient
            continue
        assert abs(np.linalg.norm(u) - 1) <= 100 * EPS
        assert abs(np.linalg.norm(v) - 1) <= 100 * EPS
        # Backward stable: an exact triplet of a matrix this close. 128 units are what the stated
        # error of a Gram matrix of side 16 and less allows at the top.
        residual = max(np.linalg.norm(wide @ v - value * u), np.linalg.norm(wide.T @ u - value * v))
        assert residual <= VALUE_UNITS * unit + 128 * EPS * top


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_triplets_of_structured_matrices(kind, gram, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n, p = data.draw(st.sampled_from(SIDES)), data.draw(st.sampled_from(SIDES))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    a = torch.from_numpy(kind(rng, n, p) * 10.0 ** rng.integers(-30, 30)).to(dtype)
    default = max(n, p) * (EPS if dtype == torch.float64 else EPS32)
    check(
        a,
        rank_rtol=data.draw(st.sampled_from([default, default, 1e-3, 1e-8])),
        cluster_rtol=data.draw(st.sampled_from([default, default, 0.0, 1e-2, 1e-6])),
        full=data.draw(st.booleans()),
        gram=gram,
    )


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("kind", [geometric, few_values], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("n", "p"), [(255, 256), (256, 257), (257, 260), (2000, 13), (13, 2000)])
def test_triplets_where_the_method_changes(kind, gram, n, p):
    rng = np.random.default_rng(n + p)
    a = torch.from_numpy(kind(rng, n, p))
    check(a, rank_rtol=max(n, p) * EPS, cluster_rtol=max(n, p) * EPS, full=False, gram=gram)
