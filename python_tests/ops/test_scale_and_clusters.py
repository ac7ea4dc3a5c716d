"""Matrices at the ends of the range of float64, zeros that full rank counts, and small gaps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import EPS, diagonal, fewer_examples, gaussian, taking_route

from immunize_ext import reference
from immunize_ext.errors import EqualSingularValuesError
from immunize_ext.ops import (
    condition_number,
    extremal_singular_values,
    gram_extremes,
    log_condition_number,
    symmetric_extremes,
)
from immunize_ext.ops.regularizers import gram_r_ill, r_ill

# --- scale ----------------------------------------------------------------------------------------


def test_zero_times_an_infinite_square_is_zero(route):
    x = 1e160 * torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    with taking_route(route):
        found = gram_extremes(x, rank="full")
    assert found.lambda_min.item() == 0.0
    assert found.lambda_max.item() == torch.inf


def test_condition_number_where_sigma_max_overflows(route):
    a = 1.7e308 * torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    with taking_route(route):
        assert condition_number(a).item() == pytest.approx(1.0, rel=1e-14)
        assert log_condition_number(a).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("exponent", [-1070, -1060, -900, 900, 1015])
def test_condition_number_has_no_scale(route, exponent):
    """Singular values among the subnormal numbers have no digits left to divide."""
    a = torch.tensor([[4.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64).ldexp(torch.tensor(exponent - 1))
    with taking_route(route):
        found = condition_number(a * scale)
    assert found.item() == pytest.approx(torch.linalg.cond(a).item(), rel=1e-13)


def test_gradient_of_the_condition_number_scales_inversely():
    a = gaussian(3, 3)
    grads = []
    for scale in (1.0, 2.0**-900):
        leaf = (a * scale).requires_grad_()
        (grad,) = torch.autograd.grad(log_condition_number(leaf), leaf)
        grads.append(grad * scale)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-13)


# --- zeros under rank="full" ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "value"),
    [
        # D = |K|_F^2 / (2 k), k the numerical rank.
        (torch.tensor([[1.0, 2.0]]), 2 / 25),
        (torch.tensor([[3.0, 0.0], [0.0, 0.0]]), 2 / 81),
        (torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]), 2.0),
    ],
)
def test_zeros_that_full_rank_counts_are_no_cluster(route, x, value):
    x = x.double()
    k = int(torch.linalg.matrix_rank(x))
    expected = -(value**2) * (2.0 / k) * (x @ x.mT @ x)
    fused, mapped = x.clone().requires_grad_(), x[None].clone().requires_grad_()
    with taking_route(route):
        found = gram_r_ill(fused, rank="full")
        other = torch.func.vmap(lambda leaf: gram_r_ill(leaf, rank="full"))(mapped)
        grads = torch.autograd.grad(found, fused) + torch.autograd.grad(other.sum(), mapped)
    assert found.item() == pytest.approx(value, rel=1e-13)
    assert other.item() == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(grads[0], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grads[1][0], expected, rtol=1e-12, atol=1e-14)


def test_r_ill_of_a_deficient_matrix_under_full_rank(route):
    with taking_route(route):
        assert r_ill(diagonal(3.0, 0.0), rank="full").item() == pytest.approx(2 / 9)
        for function in (r_ill, gram_r_ill):
            with pytest.raises(EqualSingularValuesError):
                function(torch.zeros(2, 2).double(), rank="full")


# --- gaps near the resolution ---------------------------------------------------------------------


@fewer_examples
@given(gap=st.floats(0.0, 2000.0), seed=st.integers(0, 50))
def test_gradient_is_that_of_a_cluster_or_that_of_a_vector(route, gap, seed):
    """Between gaps of 16 and 64 eps it was once neither: the vectors were those of rounding.

    Where the extreme counts as simple, the vectors are known to a few eps over the gap.
    """
    u, _ = torch.linalg.qr(gaussian(4, 4, seed=seed))
    v, _ = torch.linalg.qr(gaussian(4, 4, seed=seed + 100))
    sigma = torch.tensor([1.0, 1.0 - gap * EPS, 0.5, 0.25], dtype=torch.float64)
    a = ((u * sigma) @ v.mT).requires_grad_()
    with taking_route(route):
        found = extremal_singular_values(a)
        (grad,) = torch.autograd.grad(found.sigma_max, a)
    if int(found.multiplicity_max) == 2:
        assert gap < 64 + 16
        truth, allowed = (u[:, :2] @ v[:, :2].mT) / 2, 1e-13
    else:
        assert int(found.multiplicity_max) == 1
        assert gap > 64 - 16
        truth, allowed = torch.outer(u[:, 0], v[:, 0]), 16 / gap
    assert float((grad - truth).norm()) <= allowed


@fewer_examples
@given(gap=st.floats(0.0, 2000.0), seed=st.integers(0, 50))
def test_the_same_of_symmetric_matrices(route, gap, seed):
    v, _ = torch.linalg.qr(gaussian(4, 4, seed=seed))
    values = torch.tensor([1.0, 1.0 - gap * EPS, 0.5, -0.25], dtype=torch.float64)
    h = (v * values) @ v.mT
    h = ((h + h.mT) / 2).requires_grad_()
    with taking_route(route):
        found = symmetric_extremes(h)
        (grad,) = torch.autograd.grad(found.lambda_max, h)
    if int(found.multiplicity_max) == 2:
        truth, allowed = (v[:, :2] @ v[:, :2].mT) / 2, 1e-13
    else:
        assert gap > 64 - 16
        truth, allowed = torch.outer(v[:, 0], v[:, 0]), 16 / gap
    assert float((grad - truth).norm()) <= allowed


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_a_cluster_is_relative_to_sigma_max(route, scale):
    """Entries of 1/64 to 1/32 and sigma_max 1: neither is the unit of the tolerance."""
    n = 64
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < n:
        hadamard = torch.cat([torch.cat([hadamard, hadamard]), torch.cat([hadamard, -hadamard])], 1)
    sigma = torch.full((n,), 1e-3, dtype=torch.float64)
    sigma[0], sigma[1] = 1.0, 1.0 - 5e-7
    a = scale * (hadamard * sigma / n) @ hadamard.mT
    with taking_route(route):
        for rtol, count in ((1e-6, 2), (2.5e-7, 1)):
            assert int(extremal_singular_values(a, cluster_rtol=rtol).multiplicity_max) == count
            assert int(gram_extremes(a, cluster_rtol=rtol).multiplicity_max) == count


@pytest.mark.parametrize("kappa", [1e1, 1e2, 1e3, 1e5])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_gram_matrix_has_the_accuracy_of_its_features(route, kappa, shape):
    """K itself knows sigma_min to eps sigma_max kappa / 2 only; promised is a few eps sigma_max."""
    u, _ = torch.linalg.qr(gaussian(shape[0], 6, seed=1))
    v, _ = torch.linalg.qr(gaussian(shape[1], 6, seed=2))
    x = (u * torch.logspace(0.0, -math.log10(kappa), 6, dtype=torch.float64)) @ v.mT
    with taking_route(route):
        found = gram_extremes(x)
    truth = float(reference.singular_values(x.numpy())[-1])
    assert abs(math.sqrt(float(found.lambda_min)) - truth) <= 8 * max(shape) * EPS
