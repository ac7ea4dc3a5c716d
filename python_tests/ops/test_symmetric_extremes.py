"""Algebraic extremes of a symmetric matrix: values, derivatives, transforms, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import Refusal, SpectralContract, bad_matrices
from sample_inputs import (
    EPS,
    EPS32,
    diagonal,
    fewer_examples,
    gaussian,
    half_examples,
    symmetric,
)
from spectrum_bounds import VALUE_UNITS, assert_within
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.ops import symmetric_extremes


def with_eigenvalues(values, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    h = (q * np.asarray(values)) @ q.T
    return torch.from_numpy((h + h.T) / 2)


class TestContract(SpectralContract):
    function = staticmethod(symmetric_extremes)
    argument = "h"
    smooth = {
        "square": (symmetric(4, seed=11),),
        "one": (symmetric(1, seed=12),),
        "batch": (symmetric(2, 3, seed=13),),
    }
    kinks = {"clusters": (diagonal(1, 1, 2, 3, 3),)}
    degenerate = {"zero": (torch.zeros(3, 3).double(),), "negative": (diagonal(-2, -2, 1),)}
    node = "SymmetricPair"
    large = (symmetric(3, 30, seed=10),)
    which = ("max", "min")
    degree = 1
    second_rtol = 1e-11
    routes_rtol = 1e-12
    poisons = {
        **dict.fromkeys(("zero", "rank_one", "huge", "tiny"), "independent"),
        "nan": "raised",
    }
    refusals = bad_matrices(
        "h",
        Refusal((gaussian(2, 3),), "h must .*shape"),
        Refusal((gaussian(3, 3),), "h must .*symmetric"),
        *(
            Refusal((torch.eye(2),), "cluster_rtol must be", {"cluster_rtol": value})
            for value in (-1e-9, 1.0, float("nan"))
        ),
    )

    def outputs(self, a):
        """As a function of all entries: the operator takes symmetric matrices only."""
        return tuple(symmetric_extremes((a + a.mT) / 2)[:2])

    def sample(self, *batch, seed=1, dtype=torch.float64):
        return (symmetric(*batch, 4, seed=seed, dtype=dtype),)

    def batches(self):
        return [self.sample(4, seed=11)]

    def composition(self, a):
        eigenvalues = torch.linalg.eigvalsh((a + a.mT) / 2)
        return eigenvalues[..., -1], eigenvalues[..., 0]


def gradients_of(h: Tensor, **options) -> tuple[Tensor, Tensor]:
    found = []
    for which in (0, 1):
        leaf = h.detach().clone().requires_grad_()
        value = symmetric_extremes(leaf, **options)[which]
        found.append(torch.autograd.grad(value.sum(), leaf)[0])
    return found[0], found[1]


def assert_equals_reference(h: Tensor, found) -> None:
    truth = reference.symmetric_extremes(h.double().numpy())
    size = np.maximum(np.abs(truth.lambda_max), np.abs(truth.lambda_min))
    cast = 0.0 if h.dtype == torch.float64 else torch.finfo(h.dtype).eps
    bound = (VALUE_UNITS * h.shape[-1] * EPS + cast) * size
    assert_within(found.lambda_max, truth.lambda_max, bound)
    assert_within(found.lambda_min, truth.lambda_min, bound)


# --- values ---------------------------------------------------------------------------------------


@half_examples
@given(data=st.data())
def test_values_are_the_chosen_ones(route, data):
    """Definite, indefinite and singular, kappa to 1e12, at scales of 1e-30 to 1e30."""
    p = data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    values = rng.choice([-1, 1, 0], p) * np.logspace(0, -data.draw(st.floats(0, 12)), p)
    h = with_eigenvalues(values * 10.0 ** data.draw(st.integers(-30, 30)), seed)
    found = symmetric_extremes(h)
    assert_equals_reference(h, found)
    assert bool(found.lambda_min <= found.lambda_max)


def test_smallest_by_sign_not_by_magnitude(route):
    found = symmetric_extremes(diagonal(-5, 0.1, 4))
    assert (found.lambda_max, found.lambda_min) == (4, -5)
    assert (found.multiplicity_max, found.multiplicity_min) == (1, 1)


@pytest.mark.parametrize("p", [1, 2, 3, 13, 33, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sides(route, p, dtype):
    h = symmetric(p, seed=p, dtype=dtype)
    assert_equals_reference(h, symmetric_extremes(h))


@pytest.mark.parametrize(
    ("h", "expected"),
    [
        (diagonal(1, 1, 2, 3, 3), (3, 1, 2, 2)),
        (diagonal(-2, -2, -2), (-2, -2, 3, 3)),
        (torch.zeros(3, 3).double(), (0, 0, 3, 3)),
        (diagonal(0, 0, 1, 1), (1, 0, 2, 2)),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), (1, -1, 1, 1)),
        (torch.ones(4, 4).double(), (4, 0, 1, 3)),
        (torch.tensor([[-3.0]]).double(), (-3, -3, 1, 1)),
    ],
)
def test_multiplicities(route, h, expected):
    found = symmetric_extremes(h)
    for value, right in zip(found[:2], expected[:2], strict=True):
        assert_within(value, right, 8 * EPS * float(h.abs().sum()))
    assert [value.item() for value in found[2:]] == list(expected[2:])


# --- gradients ------------------------------------------------------------------------------------


@fewer_examples
@given(data=st.data())
def test_gradient_is_symmetric_and_equals_the_closed_form(route, data):
    p = data.draw(st.integers(2, 9))
    seed = data.draw(st.integers(0, 1000))
    values = np.linspace(-1, 1, p) + 0.2 / p * np.random.default_rng(seed).uniform(-1, 1, p)
    h = with_eigenvalues(values, seed)
    grads = gradients_of(h)
    truth = reference.symmetric_extremes_gradient(h.numpy())
    for grad, right in zip(grads, truth, strict=True):
        assert torch.equal(grad, grad.mT)
        # eps over the gap, which is 1.6 / p at least.
        testing.assert_gradients_close(grad, torch.from_numpy(right), rtol=100 * p**2 * EPS)


@pytest.mark.parametrize(
    ("h", "of_max", "of_min"),
    [
        (diagonal(1, 1, 2, 3, 3), [0, 0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0, 0]),
        (diagonal(-2, -2, -2), [1 / 3] * 3, [1 / 3] * 3),
        (torch.zeros(2, 2).double(), [0.5, 0.5], [0.5, 0.5]),
    ],
)
def test_clusters_get_the_mean(route, h, of_max, of_min):
    """Positive semidefinite, trace 1, supported on the eigenspace, of least norm."""
    grads = gradients_of(h)
    for grad, entries in zip(grads, (of_max, of_min), strict=True):
        assert_within(grad, diagonal(*entries), 4 * EPS)


@pytest.mark.parametrize("exponent", [-14, -10, -6, -2])
def test_closing_gap_keeps_the_gradient_bounded(route, exponent):
    h = with_eigenvalues([3.0, 3.0 - 10.0**exponent, 1.0, -1.0, -1.0 - 10.0**exponent])
    for grad in gradients_of(h):
        assert_within(grad.trace(), 1.0, 100 * EPS)
        assert float(grad.norm()) <= 1 + 100 * EPS


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_asymmetry_of_rounding_is_no_error(route, dtype):
    h = symmetric(6, dtype=dtype)
    eps = EPS if dtype == torch.float64 else EPS32
    found = symmetric_extremes(h * (1 + eps * torch.triu(torch.ones(6, 6), 1).to(dtype)))
    assert_within(found.lambda_max, symmetric_extremes(h).lambda_max, 20 * eps)
