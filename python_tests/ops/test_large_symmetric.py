"""Symmetric extremes of sides where the reduction has two stages (band.inl)."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from sample_inputs import EPS
from spectrum_bounds import (
    VALUE_UNITS,
    assert_same_bits_alone_and_together,
    assert_within,
    same_bits,
)
from torch import Tensor

from immunize_ext.ops import symmetric_extremes

SIDE = 410  # beyond the crossover of the kernel, 192, and no multiple of its tiles


@functools.cache
def rotation() -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((SIDE, SIDE)))[0]


def with_eigenvalues(values: np.ndarray) -> Tensor:
    h = (rotation() * values) @ rotation().T
    return torch.from_numpy((h + h.T) / 2)


def ends(low: list[float], high: list[float], inner: tuple[float, float]) -> np.ndarray:
    return np.concatenate([low, np.linspace(*inner, SIDE - len(low) - len(high)), high])


GRADED = np.logspace(-4, 0, SIDE)
SPECTRA = {
    "graded": (GRADED, 1, 1),
    "negative": (-GRADED[::-1], 1, 1),
    "indefinite": (np.linspace(-1, 2, SIDE), 1, 1),
    "kappa 1e12": (ends([1e-12, 1e-11], [], (1e-3, 1)), 1, 1),
    "outlier": (ends([], [1e6], (1, 1.5)), 1, 1),
    "both ends repeated": (ends([0.5] * 3, [3.0] * 2, (1, 2)), 2, 3),
    "a gap of 1e-6 is a gap": (ends([], [1 + 1e-6], (0, 1)), 1, 1),
    "wide null space": (ends([0.0] * 240, [], (1, 2)), 1, 240),
    "two values": (np.repeat([1.0, 2.0], SIDE // 2), SIDE // 2, SIDE // 2),
    "one value": (np.ones(SIDE), SIDE, SIDE),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_values_and_multiplicities(name):
    values, most, least = SPECTRA[name]
    found = symmetric_extremes(with_eigenvalues(values))
    bound = VALUE_UNITS * SIDE * EPS * np.abs(values).max()
    assert_within(found.lambda_max, values.max(), bound)
    assert_within(found.lambda_min, values.min(), bound)
    assert (found.multiplicity_max.item(), found.multiplicity_min.item()) == (most, least)


@pytest.mark.parametrize("name", ["graded", "indefinite", "both ends repeated"])
def test_gradients_are_the_mean_projectors(name):
    values, most, least = SPECTRA[name]
    h = with_eigenvalues(values).requires_grad_()
    found = symmetric_extremes(h)
    for value, vectors in (
        (found.lambda_max, rotation()[:, SIDE - most :]),
        (found.lambda_min, rotation()[:, :least]),
    ):
        (grad,) = torch.autograd.grad(value, h, retain_graph=True)
        assert torch.equal(grad, grad.mT)
        assert_within(grad.trace(), 1.0, 100 * EPS)
        # The matrix is known to SIDE eps of its size; its vectors to that over their gap.
        distance = values.max() - values.min() if most == SIDE else np.diff(np.unique(values))
        gap = np.min(distance if most > 1 else [np.diff(values)[0], np.diff(values)[-1]])
        error = (grad - torch.from_numpy(vectors @ vectors.T) / vectors.shape[1]).norm()
        assert float(error) <= 10 * SIDE * EPS * np.abs(values).max() / gap


@same_bits
def test_same_bits_whatever_the_threads_the_batch_and_the_random_state():
    other = with_eigenvalues(SPECTRA["wide null space"][0])
    assert_same_bits_alone_and_together(symmetric_extremes, with_eigenvalues(GRADED), other)


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**500])
def test_scale(scale):
    """A power of two changes no bit but the exponent."""
    h = with_eigenvalues(GRADED)
    plain, scaled = symmetric_extremes(h), symmetric_extremes(h * scale)
    assert torch.equal(plain.lambda_max * scale, scaled.lambda_max)
    assert torch.equal(plain.lambda_min * scale, scaled.lambda_min)


def test_a_wide_tolerance_is_one_cluster():
    """The edge lies well inside the spectrum."""
    found = symmetric_extremes(with_eigenvalues(np.linspace(0, 1, SIDE)), cluster_rtol=0.1005)
    inside = int((np.linspace(0, 1, SIDE) <= 0.1005).sum())
    assert (found.multiplicity_max.item(), found.multiplicity_min.item()) == (inside, inside)
