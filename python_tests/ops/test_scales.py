"""Matrices of every magnitude that float64 has, from denormal numbers to the largest there are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from immunize_ext import _load
from immunize_ext.ops import (
    condition_number,
    extremal_singular_values,
    gram_extremes,
    gram_log_condition_number,
    log_condition_number,
)
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well, with_extremes

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


# --- regularizers and condition numbers -----------------------------------------------------------

SMALL_TALL = SMALL.mT.contiguous()
# Value and gradient of degree d and d - 1 in the entries.
SCALED = {
    "sigma_min": (lambda a: extremal_singular_values(a).sigma_min, 1),
    "lambda_max": (lambda a: gram_extremes(a).lambda_max, 2),
    "lambda_min": (lambda a: gram_extremes(a).lambda_min, 2),
    "squared_frobenius": (lambda a: gram_extremes(a).squared_frobenius, 4),
    "condition_number": (condition_number, 0),
    "log_condition_number": (log_condition_number, 0),
    "r_well": (r_well, 2),
    "r_ill": (r_ill, -2),
    "gram_r_well": (gram_r_well, 4),
    "gram_r_ill": (gram_r_ill, -4),
    # The compositions, one decomposition for the value and the extremes.
    "r_ill with extremes": (lambda a: with_extremes("r_ill", a)[0], -2),
    "gram_r_ill with extremes": (lambda a: with_extremes("gram_r_ill", a)[0], -4),
}
EXPONENTS = {
    torch.float64: (-1000, -700, -530, -400, -260, -140, -40, 60, 150, 270, 330, 510, 700, 1000),
    torch.float32: (-120, -100, -70, -45, -20, 20, 45, 70, 100, 120),
}


def value_and_gradient(function, a: Tensor) -> tuple[Tensor, Tensor]:
    leaf = a.clone().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_scaled(found: Tensor, unit: Tensor, exponent: int, beside: float = 0.0) -> None:
    """found = 2^exponent unit as its dtype has it: infinite, zero or denormal where that is."""
    kind = torch.finfo(found.dtype)
    scaled = [times_power(v, exponent) for v in unit.flatten().tolist()]
    right = torch.tensor(scaled, dtype=torch.float64).to(found.dtype)
    got = found.flatten()
    finite = torch.isfinite(right)
    assert torch.equal(got[~finite], right[~finite])
    error = (got[finite].double() - right[finite].double()).abs()
    largest = right[finite].double().abs().max() if bool(finite.any()) else 0.0
    assert bool((error <= 64 * kind.eps * largest + kind.tiny + beside).all())


@pytest.mark.parametrize("dtype", EXPONENTS, ids=str)
@pytest.mark.parametrize("matrix", [SMALL, SMALL_TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("name", SCALED)
def test_values_and_gradients_at_every_scale(route, name, matrix, dtype):
    """f(c x) = c^d f(x): infinite or zero only where the result is, and never not a number."""
    function, degree = SCALED[name]
    value, gradient = value_and_gradient(function, matrix)
    for exponent in EXPONENTS[dtype]:
        found = value_and_gradient(function, (matrix * power(exponent)).to(dtype))
        assert found[0].dtype == dtype
        # A difference of two logarithms as large as 700.
        rounding = 2e-13 if name == "log_condition_number" else 0.0
        assert_scaled(found[0], value, degree * exponent, rounding)
        overflows = math.isinf(times_power(float(value), degree * exponent))
        if name.endswith("r_well") and overflows and not _load.available():
            assert not found[1].any()  # a composition, as the module of the regularizers says
            continue
        assert_scaled(found[1], gradient, (degree - 1) * exponent)


@pytest.mark.parametrize("name", ["r_well", "r_ill", "gram_r_well", "gram_r_ill"])
def test_second_derivatives_at_every_scale(route, name):
    """Of degree d - 2: |H z| of the fused operator, whose coefficients are of degree 3 d."""
    function, degree = SCALED[name]
    z = torch.tensor([[1.0, -2.0, 0.5], [0.25, 1.0, 3.0]], dtype=torch.float64)

    def along(a: Tensor) -> Tensor:
        leaf = a.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad((gradient * z).sum(), leaf)[0]

    unit = along(SMALL)
    for exponent in (-150, -100, -70, 70, 100, 150):
        assert_scaled(along(SMALL * power(exponent)), unit, (degree - 2) * exponent)


@pytest.mark.parametrize("name", ["r_ill", "gram_r_ill"])
def test_a_batch_of_scales_and_a_cluster(route, name):
    """Each matrix by its own factor; the mean over a repeated value as well."""
    function, degree = SCALED[name]
    cluster = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    plain = torch.tensor([[3.0, 1.0, 0.5], [-1.0, 2.0, 0.25], [0.5, 0.0, 1.0]]).double()
    exponents = (0, -150, -150, 150)
    matrices = (plain, plain, cluster, cluster)
    batch = torch.stack([m * power(e) for m, e in zip(matrices, exponents, strict=True)])
    leaf = batch.requires_grad_()
    values = function(leaf)
    (found,) = torch.autograd.grad(values.sum(), leaf)
    for k, (matrix, exponent) in enumerate(zip(matrices, exponents, strict=True)):
        value, gradient = value_and_gradient(function, matrix)
        assert_scaled(values[k].detach(), value, degree * exponent)
        assert_scaled(found[k], gradient, (degree - 1) * exponent)


@pytest.mark.parametrize("name", ["r_ill", "gram_r_ill"])
@pytest.mark.parametrize("exponent", [-530, -140, 0, 140])
def test_transforms_and_compiled_code_at_every_scale(fresh_compiler, name, exponent):
    function, degree = SCALED[name]
    unit = value_and_gradient(function, SMALL)[1]
    x = SMALL * power(exponent)
    assert_scaled(torch.func.grad(function)(x), unit, (degree - 1) * exponent)
    (mapped,) = torch.func.vmap(torch.func.grad(function))(x.unsqueeze(0))
    assert_scaled(mapped, unit, (degree - 1) * exponent)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_scaled(value_and_gradient(compiled, x)[1], unit, (degree - 1) * exponent)
    assert compiled(x.expand(0, 2, 3)).shape == (0,)


def test_the_gradient_of_a_loss_of_r_ill_that_is_moderate_again():
    """log R_ill at 1e-60: R_ill is 1e240, the gradient of the logarithm -4 / x."""
    for function in (gram_r_ill, SCALED["gram_r_ill with extremes"][0]):
        unit = value_and_gradient(lambda x, f=function: f(x).log(), SMALL)[1]
        for exponent in (-250, -200, 200):
            found = value_and_gradient(lambda x, f=function: f(x).log(), SMALL * power(exponent))[1]
            assert_scaled(found, unit, -exponent)


@pytest.mark.parametrize("exponent", [-1000, -600, -100, 0, 100, 600, 1000, 1021])
@pytest.mark.parametrize("matrix", [SMALL, SMALL_TALL], ids=["wide", "tall"])
def test_the_condition_number_with_a_floor(route, matrix, exponent):
    """log((lambda_1 + floor) / (lambda_k + floor)): NaN with gradient 0 at 1e200 before."""
    x = matrix * power(exponent)
    sigma = [times_power(float(s), exponent - 4) for s in torch.linalg.svdvals(matrix)]
    sizes = [math.hypot(s, 1e-3 * 2.0**-4) for s in (sigma[0], sigma[1])]
    # More features than samples: the smallest eigenvalue is 0.
    bottom = sizes[1] if matrix.shape[0] >= matrix.shape[1] else 1e-3 * 2.0**-4
    truth = 2 * (math.log(sizes[0]) - math.log(bottom))
    value, gradient = value_and_gradient(gram_log_condition_number, x)
    # The logarithms are as large as 700.
    assert float(value) == pytest.approx(truth, rel=1e-14, abs=4e-13)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    expected = 2 * (sigma[0] / sizes[0]) / sizes[0] * torch.outer(u[:, 0], vh[0])
    if matrix.shape[0] >= matrix.shape[1]:
        expected -= 2 * (sigma[1] / sizes[1]) / sizes[1] * torch.outer(u[:, 1], vh[1])
    assert_scaled(gradient, expected, -4)
