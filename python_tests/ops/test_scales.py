"""Matrices of every magnitude that float64 has, from denormal numbers to the largest there are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

ops = torch.ops.immunize_ext
POLICY = (1e-13, 1e-13, False)
FULL = (1e-13, 1e-13, True)
LARGEST = torch.finfo(torch.float64).max
SMALL = torch.tensor([[3.0, 1.0, 0.5], [-1.0, 2.0, 0.25]], dtype=torch.float64)
SYMMETRIC = torch.tensor([[2.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
# Powers of two, by which everything scales without rounding: 2^-1060 is 8.1e-320.
exponents = st.integers(min_value=-1060, max_value=1020)


def power(exponent: int) -> float:
    return math.ldexp(1.0, exponent)


def times_power(value: float, exponent: int) -> float:
    """Value * 2^exponent, infinite where that is beyond the largest number, never an error."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def check_scaled(found: Tensor, unit: Tensor, exponent: int) -> None:
    """found = 2^exponent unit, to the last bit but for what a denormal number rounds away."""
    for got, value in zip(found.reshape(-1).tolist(), unit.reshape(-1).tolist(), strict=True):
        right = times_power(value, exponent)
        assert got == right or abs(got - right) <= 1e-12 * abs(right) + 5e-324


@given(exponent=exponents)
def test_singular_values(exponent):
    """Values scale, vectors and counts do not change."""
    unit = ops.extremal_singular_values(SMALL, *POLICY)
    found = ops.extremal_singular_values(SMALL * power(exponent), *POLICY)
    if exponent > -1020:  # else the entries themselves are rounded
        check_scaled(torch.stack(found[:2]), torch.stack(unit[:2]), exponent)
    assert [int(f) for f in found[2:5]] == [2, 1, 1]
    for vector in found[5:]:
        assert abs(float(vector.norm()) - 1.0) <= 1e-12


@given(exponent=exponents, full_rank=st.booleans())
def test_gram_extremes(exponent, full_rank):
    """Squares and fourth powers overflow and vanish as they must, and nothing is not a number."""
    policy = FULL if full_rank else POLICY
    unit = ops.gram_extremes(SMALL, *policy)
    found = ops.gram_extremes(SMALL * power(exponent), *policy)
    assert not any(bool(f.isnan().any()) for f in found)
    if exponent > -1020:
        check_scaled(torch.stack(found[:2]), torch.stack(unit[:2]), 2 * exponent)
        check_scaled(found[2], unit[2], 4 * exponent)
        check_scaled(found[10], unit[10], 2 * exponent)


@given(exponent=exponents)
def test_symmetric_extremes(exponent):
    """The same for eigenvalues, of both signs."""
    unit = ops.symmetric_extremes(SYMMETRIC, 1e-13)
    found = ops.symmetric_extremes(SYMMETRIC * power(exponent), 1e-13)
    check_scaled(torch.stack(found[:2]), torch.stack(unit[:2]), exponent)


@given(exponent=st.integers(min_value=-500, max_value=1000))
def test_gradients_of_gram_extremes(exponent):
    """d lambda = 2 sigma u v^T, also where lambda itself has left the range."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        out = ops.gram_extremes(x, *POLICY)
        return ops.gram_extremes_backward(one, one, zero, x, *out[:2], *out[4:10], out[10], *POLICY)

    check_scaled(gradient(SMALL * power(exponent)), gradient(SMALL), exponent)


def test_a_zero_beside_a_huge_value():
    """1e160 [[1, 0, 0], [0, 2, 0]] with rank="full": lambda_min is 0, not 0 times infinity."""
    x = 1e160 * torch.tensor([[1.0, 0, 0], [0, 2, 0]], dtype=torch.float64)
    found = ops.gram_extremes(x, *FULL)
    assert found[1] == 0.0
    assert found[0] == math.inf
    assert found[10].tolist() == [[math.inf, 0.0], [0.0, math.inf]]


@pytest.mark.parametrize("exponent", [0, 600, -600])
def test_zero_matrices_have_no_scale(exponent):
    """Zero times any scale."""
    found = ops.gram_extremes(torch.zeros(2, 3, dtype=torch.float64) * power(exponent), *FULL)
    assert [float(f) for f in found[:3]] == [0.0, 0.0, 0.0]
