"""Features of sides where the thin Gram matrix is reduced in two stages (band.inl)."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import EPS, fewer_examples
from spectrum_bounds import (
    VALUE_UNITS,
    assert_same_bits_alone_and_together,
    assert_within,
    same_bits,
)
from torch import Tensor

from immunize_ext.ops import condition_number, extremal_singular_values, gram_extremes
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well

SIDE, LENGTH = 410, 437  # beyond the crossover of the kernel, 192, and no multiple of its tiles
LOG_KAPPAS = [0.05, 1, 3, 5, 5.8, 7, 12]


@functools.cache
def vectors() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    u = np.linalg.qr(generator.standard_normal((SIDE, SIDE)))[0]
    v = np.linalg.qr(generator.standard_normal((LENGTH, SIDE)))[0]
    return u, v


def with_singular_values(sigma: np.ndarray, *, tall: bool = False) -> Tensor:
    u, v = vectors()
    a = torch.from_numpy((u * sigma) @ v.T)
    return a.mT.contiguous() if tall else a


def graded(log_kappa: float) -> np.ndarray:
    return np.logspace(0, -log_kappa, SIDE)


def triplets(a: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    tolerance = max(a.shape) * EPS
    values = torch.ops.immunize_ext.extremal_singular_values(a, tolerance, tolerance, False)
    return [(values[0], values[5], values[6]), (values[1], values[7], values[8])]


@pytest.mark.parametrize("log_kappa", LOG_KAPPAS)
@pytest.mark.parametrize("tall", [False, True])
def test_every_kappa_is_in_the_class_of_gesdd(log_kappa, tall):
    """Beyond 10^6 the Gram matrix refuses and a decomposition serves; seen from here all the same.

    The matrix was made in float64 and so has these singular values up to the same class.
    """
    sigma = graded(log_kappa)
    a = with_singular_values(sigma, tall=tall)
    found = extremal_singular_values(a)
    bound = VALUE_UNITS * np.sqrt(SIDE + LENGTH) * EPS
    assert_within(found.sigma_max, sigma[0], bound)
    assert_within(found.sigma_min, sigma[-1], bound)
    assert found.rank.item() == SIDE
    # So many values down to 1e-12 lie closer to each other than the resolution of a cluster.
    least = int((sigma - sigma[-1] <= LENGTH * EPS).sum())
    assert (found.multiplicity_max.item(), found.multiplicity_min.item()) == (1, least)
    for value, u, v in triplets(a):
        residual = 4 * np.sqrt(SIDE + LENGTH) * EPS
        assert (a @ v - value * u).norm() <= 2 * residual
        assert (a.mT @ u - value * v).norm() <= 2 * residual
        assert u.norm().item() == pytest.approx(1.0, abs=1e-12)
        assert v.norm().item() == pytest.approx(1.0, abs=1e-12)


SPECTRA = {
    "top repeated": (np.concatenate([[2.0] * 3, np.linspace(1, 0.5, SIDE - 3)]), SIDE, 3, 1),
    "bottom repeated": (np.concatenate([np.linspace(2, 1, SIDE - 2), [0.5] * 2]), SIDE, 1, 2),
    "null space": (np.concatenate([np.linspace(2, 1, SIDE - 40), [0.0] * 40]), SIDE - 40, 1, 1),
    "rank 3": (np.concatenate([[3.0, 2.0, 1.0], [0.0] * (SIDE - 3)]), 3, 1, 1),
    "one value": (np.ones(SIDE), SIDE, SIDE, SIDE),
    "outlier": (np.concatenate([[1e5], np.linspace(2, 1, SIDE - 1)]), SIDE, 1, 1),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_rank_and_multiplicities(name):
    sigma, rank, most, least = SPECTRA[name]
    found = extremal_singular_values(with_singular_values(sigma))
    bound = VALUE_UNITS * LENGTH * EPS * sigma[0]
    assert_within(found.sigma_max, sigma[0], bound)
    assert_within(found.sigma_min, sigma[rank - 1], bound)
    assert found.rank.item() == rank
    assert (found.multiplicity_max.item(), found.multiplicity_min.item()) == (most, least)


def test_full_rank_policy():
    """Fewer samples than features: the p-th singular value is an exact zero without a gradient."""
    x = with_singular_values(graded(2)).requires_grad_()
    found = gram_extremes(x, rank="full")
    assert found.lambda_min.item() == 0.0
    assert found.multiplicity_min.item() == LENGTH - SIDE
    (grad,) = torch.autograd.grad(found.lambda_min, x)
    assert not grad.any()


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("log_kappa", [0.5, 3, 5])
def test_gradients_are_those_of_the_known_vectors(tall, log_kappa):
    """sigma u v^T of the extremes, to the backward error over the gap in the spectrum."""
    sigma = graded(log_kappa)
    x = with_singular_values(sigma, tall=tall).requires_grad_()
    found = gram_extremes(x)
    u, v = vectors()
    gaps = np.abs(np.diff(sigma))
    for value, index, gap in ((found.lambda_max, 0, gaps[0]), (found.lambda_min, -1, gaps[-1])):
        (grad,) = torch.autograd.grad(value, x, retain_graph=True)
        truth = 2 * sigma[index] * np.outer(u[:, index], v[:, index])
        error = np.abs(grad.numpy() - (truth.T if tall else truth)).max()
        assert error <= 2 * sigma[index] * 20 * np.sqrt(SIDE + LENGTH) * EPS / gap


def test_float32_features_are_computed_in_float64():
    narrow = with_singular_values(graded(4)).float()
    same = {"rank_rtol": LENGTH * EPS, "cluster_rtol": LENGTH * EPS}
    found, wide = gram_extremes(narrow, **same), gram_extremes(narrow.double(), **same)
    assert found.lambda_min.dtype == torch.float32
    assert torch.equal(found.lambda_max, wide.lambda_max.float())
    assert torch.equal(found.lambda_min, wide.lambda_min.float())


@same_bits
def test_same_bits_whatever_the_threads_the_batch_and_the_random_state():
    """One degenerate element leaves the others as they are."""
    other = with_singular_values(SPECTRA["rank 3"][0])
    assert_same_bits_alone_and_together(gram_extremes, with_singular_values(graded(3)), other)


@pytest.mark.parametrize("scale", [2.0**-450, 2.0**450])
def test_scale(scale):
    """A power of two changes no bit but the exponent."""
    x = with_singular_values(graded(3))
    plain, scaled = extremal_singular_values(x), extremal_singular_values(x * scale)
    assert torch.equal(plain.sigma_max * scale, scaled.sigma_max)
    assert torch.equal(plain.sigma_min * scale, scaled.sigma_min)


@fewer_examples
@given(
    log_kappa=st.floats(0.1, 6.5),
    shape=st.sampled_from(["graded", "linear", "outlier above", "outlier below"]),
    tall=st.booleans(),
)
def test_any_spectrum(log_kappa, shape, tall):
    low = 10.0**-log_kappa
    middle = np.linspace(1, max(low, 0.3), SIDE - 1)
    sigma = {
        "graded": graded(log_kappa),
        "linear": np.linspace(1, low, SIDE),
        "outlier above": np.concatenate([[2.0], np.linspace(min(2 * low, 1), low, SIDE - 1)]),
        "outlier below": np.concatenate([middle, [low]]),
    }[shape]
    found = extremal_singular_values(with_singular_values(sigma, tall=tall))
    bound = VALUE_UNITS * np.sqrt(SIDE + LENGTH) * EPS
    assert_within(found.sigma_max, sigma[0], sigma[0] * bound)
    assert_within(found.sigma_min, sigma[-1], sigma[0] * bound)
    assert found.rank.item() == SIDE


@pytest.mark.parametrize("regularizer", [gram_r_well, gram_r_ill])
def test_descent_from_exact_doublets_moves_kappa_the_right_way(regularizer):
    """Three steps from repeated extremes; a step that splits a cluster unevenly would not.

    R_well pulls the top down and so lowers kappa, R_ill pushes the bottom down and raises it.
    """
    sigma = np.concatenate([[2.0] * 2, np.linspace(1.5, 1.0, SIDE - 4), [0.5] * 2])
    x = with_singular_values(sigma)
    kappas = [condition_number(x).item()]
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(regularizer(leaf), leaf)
        assert torch.isfinite(grad).all()
        x = x - 0.02 * grad / torch.linalg.matrix_norm(grad, 2)
        kappas.append(condition_number(x).item())
    steps = np.diff(kappas)
    assert (steps < 0).all() if regularizer is gram_r_well else (steps > 0).all()
