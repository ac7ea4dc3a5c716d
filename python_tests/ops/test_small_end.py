"""Singular values that a thin Gram matrix cannot tell from zero, and columns of zeros.

Matrices with a known spectrum whose smallest values lie below what K = x^T x can show (about 1e-7
of the largest), beside a null space or alone, against numpy; and that no decomposition of the whole
matrix was needed for them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sample_inputs import EPS, compiled_only
from spectrum_bounds import assert_same_bits_alone_and_together
from torch import Tensor

from immunize_ext import _load, ops, reference
from immunize_ext.ops.regularizers import gram_r_ill

SHAPES = [(200, 79), (79, 200), (120, 120)]
LARGE = np.logspace(0, -1, 30)


def with_spectrum(n: int, p: int, sigma: np.ndarray) -> Tensor:
    """A matrix n x p with these singular values, and zeros."""
    generator = torch.Generator().manual_seed(7)

    def vectors(side: int) -> Tensor:
        normal = torch.randn(side, len(sigma), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal)[0]

    return (vectors(n) * torch.from_numpy(np.asarray(sigma))) @ vectors(p).mT


def decompositions(function: Callable[[Tensor], object], x: Tensor) -> int:
    """How often a matrix of the shape of x was decomposed."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        function(x)
    return sum(
        event.name == "aten::linalg_svd" and list(event.input_shapes[0]) == list(x.shape)
        for event in profile.function_events
    )


def triplets(a: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Values and vectors of the raw operator, with the default tolerances."""
    rank_rtol, cluster_rtol = max(a.shape) * EPS, max(*a.shape, 64) * EPS
    values = torch.ops.immunize_ext.extremal_singular_values(a, rank_rtol, cluster_rtol, False)
    return [(values[0], values[5], values[6]), (values[1], values[7], values[8])]


@pytest.mark.parametrize("tiny", [[1e-7], [1e-9], [1e-11], [1e-8, 3e-9], [1e-9, 2e-12]])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_below_the_noise_of_the_gram_matrix(shape, tiny):
    """Rank, value and both vectors, in the class of gesdd."""
    x = with_spectrum(*shape, np.concatenate([LARGE, tiny]))
    found = ops.extremal_singular_values(x)
    bound = 4 * np.sqrt(sum(shape)) * EPS
    assert found.rank == 30 + len(tiny)
    assert found.multiplicity_min == 1
    assert abs(found.sigma_max - 1.0) <= bound
    assert abs(found.sigma_min - tiny[-1]) <= bound
    for sigma, u, v in triplets(x):
        assert (x @ v - sigma * u).norm() <= 2 * bound
        assert (x.mT @ u - sigma * v).norm() <= 2 * bound
        assert abs(u.norm() - 1.0) <= 1e-13
        assert abs(v.norm() - 1.0) <= 1e-13
    if _load.available():
        assert decompositions(ops.extremal_singular_values, x) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", [0.0, 1e-15, 3e-13])
def test_clusters_beside_the_null_space(shape, distance):
    """Three values at the edge of the rank: one cluster within the tolerance, else apart."""
    x = with_spectrum(*shape, np.concatenate([LARGE, [1e-9 + 2 * distance, 1e-9 + distance, 1e-9]]))
    found = ops.extremal_singular_values(x)
    assert found.rank == 33
    assert found.multiplicity_min == (3 if distance < 1e-14 else 1)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ops.extremal_singular_values(x).sigma_min, x)
    u, _, vh = torch.linalg.svd(x.detach())
    count = int(found.multiplicity_min)
    right = u[:, 33 - count : 33] @ vh[33 - count : 33] / count
    # eps over the gap: to the null space beside for a cluster, to each other otherwise.
    gap = 1e-9 if count == 3 else distance
    assert (grad - right).norm() <= 200 * EPS / gap


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_logarithm(shape):
    """d log sigma_min = u v^T / sigma_min; the vectors are known to eps / sigma_min."""
    x = with_spectrum(*shape, np.concatenate([LARGE, [1e-8]])).requires_grad_()
    value = ops.log_condition_number(x)
    (grad,) = torch.autograd.grad(value, x)
    right = reference.log_condition_number_gradient(x.detach().numpy())
    assert abs(value - np.log(1e8)) <= 1e-6
    assert np.linalg.norm(grad.numpy() - right) <= 200 * EPS / 1e-8 * np.linalg.norm(right)


@pytest.mark.parametrize("ratio", [1.02, 1.2, 3.0])
@pytest.mark.parametrize("shape", [(200, 79), (79, 200)])
def test_spectra_that_run_through_the_noise(shape, ratio):
    """Whether or not a gap lies where one is looked for, the answer is that of a decomposition."""
    sigma = np.geomspace(1.0, 1e-4, 40)
    tail = 3e-7 * ratio ** -np.arange(12.0)
    x = with_spectrum(*shape, np.concatenate([sigma, tail]))
    truth = np.linalg.svd(x.numpy(), compute_uv=False)
    found = ops.extremal_singular_values(x)
    assert found.rank == 52
    assert abs(found.sigma_min - truth[51]) <= 4 * np.sqrt(sum(shape)) * EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 24), (24, 60), (24, 24)])
@pytest.mark.parametrize("side", ["rows", "columns", "both"])
def test_rows_and_columns_of_zeros(dtype, shape, side):
    """Nothing but the zeros themselves tells them from features without them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if side != "columns":
        x[2::5] = 0.0
    if side != "rows":
        x[:, 1::4] = -0.0
    x = x.to(dtype).requires_grad_()
    plain = x.detach()[x.detach().any(1)][:, x.detach().any(0)].requires_grad_()
    rank = min(plain.shape)
    found = ops.gram_extremes(x)
    truth = np.linalg.svd(plain.detach().double().numpy(), compute_uv=False)
    tolerance = 100 * torch.finfo(dtype).eps
    assert found.rank == rank
    assert found.lambda_min.item() == pytest.approx(truth[-1] ** 2, rel=tolerance)
    assert found.squared_frobenius.item() == pytest.approx((truth**4).sum(), rel=tolerance)
    for loss in (lambda a: gram_r_ill(a, k=rank), lambda a: ops.gram_extremes(a).lambda_min.log()):
        (grad,) = torch.autograd.grad(loss(x), x)
        (right,) = torch.autograd.grad(loss(plain), plain)
        kept = grad[x.detach().any(1)][:, x.detach().any(0)]
        assert (kept - right).norm() <= 100 * tolerance * right.norm()
        assert abs(grad.norm() - kept.norm()) <= tolerance * grad.norm()


def test_features_like_one_digit_of_mnist():
    """Pixels never set, images of rank less than their pixels, one pixel set once to almost 0."""
    sigma = np.concatenate([np.logspace(0, -4, 60), [2e-7]])
    x = torch.zeros(300, 100, dtype=torch.float64)
    x[:, 15:85] = with_spectrum(300, 70, sigma)
    found = ops.gram_extremes(x)
    assert found.rank == 61
    assert found.lambda_min.sqrt().item() == pytest.approx(2e-7, abs=4 * 20 * EPS)
    ours = gram_r_ill(x.requires_grad_())
    (grad,) = torch.autograd.grad(ours, x)
    array = x.detach().numpy()
    assert ours.item() == pytest.approx(float(reference.gram_r_ill(array)), rel=1e-12)
    right = reference.gram_r_ill_gradient(array)
    assert np.linalg.norm(grad.numpy() - right) <= 1e-11 * np.linalg.norm(right)
    if _load.available():
        assert decompositions(ops.gram_extremes, x.detach()) == 0


def test_values_within_float32_tolerance_are_no_rank():
    """At the tolerance of float32 the same features lack what float64 counts."""
    x = with_spectrum(200, 79, np.concatenate([LARGE, [1e-8]])).float()
    assert ops.extremal_singular_values(x).rank == 30
    assert ops.extremal_singular_values(x, rank_rtol=1e-6).rank == 30
    small = torch.finfo(torch.float32).eps
    # What rounding to float32 made of the null space counts in exact arithmetic.
    assert ops.extremal_singular_values(x, rank_rtol=1e-3 * small).rank == 79


@compiled_only
def test_same_bits_whatever_the_threads_the_batch_and_the_random_state():
    """The values of x need the matrix itself; others of the batch do not."""
    x = torch.zeros(200, 90, dtype=torch.float64)
    x[:, 5:84] = with_spectrum(200, 79, np.concatenate([LARGE, [1e-9, 3e-10]]))
    other = torch.randn(200, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_same_bits_alone_and_together(ops.gram_extremes, x, other)
    assert_same_bits_alone_and_together(ops.extremal_singular_values, x, other)


def test_not_a_number_in_a_column_of_zeros():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0.0
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        ops.extremal_singular_values(x)
