"""Features without full rank: the right rank and the smallest value that counts, without an SVD.

Real features lose rank exactly: a pixel that is never set, a column that repeats another. Their
thin Gram matrix shows the null space as noise; what decides is a proof from the features.
"""

from __future__ import annotations

import pytest
import torch
from sample_inputs import compiled_only
from torch import Tensor

from immunize_ext import ops
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well

EPS = torch.finfo(torch.float64).eps


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(n: int, p: int, sigma: Tensor) -> Tensor:
    """A matrix n x p with these singular values and zeros."""
    u, _ = torch.linalg.qr(gaussian(n, sigma.numel(), seed=1))
    v, _ = torch.linalg.qr(gaussian(p, sigma.numel(), seed=2))
    return (u * sigma) @ v.mT


def graded(rank: int, kappa: float) -> Tensor:
    """Singular values from 10 down, evenly in the logarithm."""
    exponents = torch.linspace(0.0, 1.0, rank, dtype=torch.float64)
    return 10.0 * kappa**-exponents


@pytest.mark.parametrize("scale", [1.0, 2.0**-300, 2.0**300])
@pytest.mark.parametrize("kappa", [3.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize(
    ("n", "p", "rank"),
    [(200, 79, 74), (79, 200, 74), (60, 40, 1), (60, 40, 39), (300, 100, 55), (40, 40, 20)],
)
def test_rank_and_smallest_value(n, p, rank, kappa, scale):
    """House Prices are 200 x 79 of rank 74; any share of the rank may be lost."""
    sigma = graded(rank, kappa)
    a = with_spectrum(n, p, sigma) * scale
    found = ops.extremal_singular_values(a)
    assert found.rank == rank
    assert found.multiplicity_max == found.multiplicity_min == 1
    bound = 4.0 * (n + p) ** 0.5 * EPS * 10.0
    assert abs(found.sigma_max / scale - sigma[0]) <= bound
    assert abs(found.sigma_min / scale - sigma[-1]) <= bound


@pytest.mark.parametrize("shape", [(200, 79), (79, 200)])
def test_regularizers_and_their_gradients(shape):
    """R_ill and R_well of K = x^T x against formulas written out with the SVD of the features."""
    x = with_spectrum(*shape, graded(74, 30.0)).requires_grad_()
    u, s, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    lam, k, p = s[:74].square(), 74, shape[1]
    square = lam.square().sum()
    d = square / (2 * k) - lam[-1].square() / 2
    cubic = (u[:, :74] * s[:74] ** 3) @ vh[:74]
    ill, well = gram_r_ill(x), gram_r_well(x)
    assert torch.allclose(ill, 1 / d, rtol=1e-11)
    assert torch.allclose(well, lam[0].square() / 2 - square / (2 * p), rtol=1e-11)
    (grad,) = torch.autograd.grad(ill, x)
    smallest = 2 * s[73] * torch.outer(u[:, 73], vh[73])
    right = (lam[-1] * smallest - 4 * cubic / (2 * k)) / d.square()
    assert (grad - right).norm() <= 1e-9 * right.norm()


@pytest.mark.parametrize("loss", ["zero columns", "repeated columns", "a sum of columns"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ways_to_lose_rank(loss, dtype):
    """What real features do, in both precisions; the null space is exact only with zeros."""
    x = torch.rand(120, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if loss == "zero columns":
        x[:, 3::7] = 0.0
    elif loss == "repeated columns":
        x[:, 3::7] = x[:, 2::7][:, : x[:, 3::7].shape[1]]
    else:
        x[:, 29] = x[:, :20].mean(1)
    x = x.to(dtype)
    found = ops.extremal_singular_values(x, rank_rtol=120 * torch.finfo(dtype).eps)
    sigma = torch.linalg.svdvals(x.to(torch.float64))
    rank = int((sigma > 120 * torch.finfo(dtype).eps * sigma[0]).sum())
    assert rank < 30
    assert found.rank == rank
    assert abs(found.sigma_min.double() - sigma[rank - 1]) <= 8 * torch.finfo(dtype).eps * sigma[0]


@pytest.mark.parametrize(
    ("rank", "decompositions"), [pytest.param(55, 0, marks=compiled_only), (None, 1)]
)
def test_no_decomposition_where_the_rank_is_lost(rank, decompositions):
    """The proof takes products and factorisations; only a spectrum without a gap takes an SVD."""
    sigma = graded(55, 100.0) if rank else torch.logspace(0, -16, 100, dtype=torch.float64)
    x = with_spectrum(300, 100, sigma)
    with torch.autograd.profiler.profile() as profile:
        found = ops.extremal_singular_values(x)
    calls = [event for event in profile.function_events if event.name == "aten::linalg_svd"]
    assert len(calls) == decompositions
    assert rank is None or found.rank == rank


def test_a_spectrum_that_runs_through_the_threshold():
    """Where no gap tells what counts, the answer is that of a singular value decomposition."""
    x = with_spectrum(200, 79, torch.logspace(0, -16, 79, dtype=torch.float64))
    sigma = torch.linalg.svdvals(x)
    found = ops.extremal_singular_values(x)
    assert found.rank == int((sigma > 200 * EPS * sigma[0]).sum())


@pytest.mark.parametrize("small", [1e-7, 1e-9, 1e-11])
def test_a_small_value_is_not_a_null_space(small):
    """What the Gram matrix cannot see but the features hold still counts."""
    sigma = torch.cat([graded(40, 10.0), torch.tensor([small], dtype=torch.float64)])
    found = ops.extremal_singular_values(with_spectrum(200, 79, sigma))
    assert found.rank == 41
    assert abs(found.sigma_min - small) <= 4.0 * 279**0.5 * EPS * 10.0


def test_batches_are_settled_like_single_matrices():
    """Deficient matrices beside others; within threads the proof waits its turn."""
    full = with_spectrum(200, 79, graded(79, 10.0))
    lost = with_spectrum(200, 79, graded(74, 10.0))
    batch = torch.stack([full, lost, torch.zeros_like(full), lost * 2, full * 3, lost])
    found = ops.extremal_singular_values(batch)
    assert found.rank.tolist() == [79, 74, 0, 74, 79, 74]
    for index, matrix in enumerate(batch):
        alone = ops.extremal_singular_values(matrix)
        assert torch.equal(alone.sigma_min, found.sigma_min[index])
