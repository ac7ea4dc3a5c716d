"""Condition number and its logarithm: values, derivatives, transforms, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import SpectralContract, bad_matrices, bad_policies
from sample_inputs import (
    EPS,
    EPS32,
    diagonal,
    fewer_examples,
    gaussian,
    half_examples,
    with_spectrum,
)
from spectrum_bounds import VALUE_UNITS, assert_within
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.ops import (
    condition_number,
    extremal_singular_values,
    gram_log_condition_number,
    log_condition_number,
)
from immunize_ext.probing.metrics import log_kappa
from immunize_ext.testing import strategies

FUNCTIONS = [condition_number, log_condition_number]
REFERENCE = {condition_number: "condition_number", log_condition_number: "log_condition_number"}

every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)

# A symmetric positive definite matrix with kappa = 2 + sqrt(3) exactly.
TRIDIAGONAL = torch.tensor([[4.0, 1, 0], [1, 3, 1], [0, 1, 2]], dtype=torch.float64)


def reference_of(function, kind: str, a: Tensor, **policy):
    name = REFERENCE[function] + ("" if kind == "value" else f"_{kind}")
    return getattr(reference, name)(a.double().numpy(), **policy)


def gradient_of(function, a: Tensor, **policy) -> Tensor:
    leaf = a.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf, **policy).sum(), leaf)[0]


class ConditionContract(SpectralContract):
    node = "ConditionNumber"
    vmap_rtol = 1e-12  # by the composition, the fused operator takes plain tensors
    degree = 0
    finite_message = "must be finite"  # named by the operator that it is composed of
    kinks = {**SpectralContract.kinks, "orthogonal": (2 * torch.eye(4).double()[[2, 0, 3, 1]],)}
    refusals = bad_matrices("a", *bad_policies(torch.eye(2)))

    def composition(self, a):
        sigma = torch.linalg.svdvals(a)
        kappa = sigma[..., 0] / sigma[..., -1]
        return (kappa if type(self).function is condition_number else kappa.log(),)


class TestConditionNumber(ConditionContract):
    function = staticmethod(condition_number)


class TestLogConditionNumber(ConditionContract):
    function = staticmethod(log_condition_number)
    test_powers_of_two_scale_exactly = None  # a difference of logarithms, each rounded


# --- values ---------------------------------------------------------------------------------------


@half_examples
@given(sample=strategies.ill_conditioned(max_side=8, min_kappa=1.0, max_kappa=1e12))
def test_kappa_up_to_1e12(route, sample):
    """The relative error of sigma_min, VALUE_UNITS max(n, p) eps kappa, is the absolute of log."""
    a = sample.matrix
    kappa, logarithm = condition_number(a), log_condition_number(a)
    truth = float(reference.condition_number(a.numpy()))
    error = 2 * VALUE_UNITS * max(a.shape) * EPS * truth
    assert_within(kappa / truth, 1.0, error)
    # One rounding of a logarithm of up to log(1e12) comes on top.
    assert_within(logarithm, math.log(truth), 2 * error + 30 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@half_examples
@given(data=st.data())
def test_scale_does_not_matter(route, dtype, data):
    sample = data.draw(strategies.badly_scaled(dtype=dtype, max_kappa=100.0))
    a = sample.matrix
    kappa = condition_number(a)
    scaled = condition_number(a * 2.0 ** data.draw(st.integers(-10, 10)))
    assert torch.equal(kappa, scaled)
    truth = float(reference.condition_number(a.double().numpy()))
    assert_within(kappa / truth, 1.0, 1e-11 if dtype == torch.float64 else 2 * EPS32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1.0, 1e19, 1e25])
def test_scale_of_float32_where_squares_overflow(route, dtype, scale):
    """kappa = 3.732051, and |gradient| scale is the same number at every scale."""
    a = (TRIDIAGONAL * scale).to(dtype)
    eps = torch.finfo(dtype).eps
    assert_within(condition_number(a), 2 + math.sqrt(3), 20 * eps)
    grad = gradient_of(condition_number, a)
    unit = gradient_of(condition_number, TRIDIAGONAL)
    testing.assert_gradients_close(grad.double() * scale, unit, rtol=20 * eps)


@pytest.mark.parametrize(
    ("a", "rank", "kappa"),
    [
        (diagonal(4, 2), "numerical", 2.0),
        (torch.eye(5).double(), "full", 1.0),
        (torch.ones(2, 2).double(), "numerical", 1.0),
        (torch.ones(2, 2).double(), "full", math.inf),
        (torch.zeros(3, 3).double(), "numerical", math.inf),
        (torch.zeros(3, 3).double(), "full", math.inf),
        (diagonal(4, 2, 0), "numerical", 2.0),
        (diagonal(4, 2, 0), "full", math.inf),
        (diagonal(-5, 0.1, 4), "numerical", 50.0),  # indefinite: max|lambda| / min|lambda|
        (torch.tensor([[7.0]]).double(), "numerical", 1.0),
    ],
)
def test_degenerate_matrices(route, a, rank, kappa):
    """Infinity where sigma_min is 0, with gradient 0: never NaN."""
    for function, truth in ((condition_number, kappa), (log_condition_number, math.log(kappa))):
        found = function(a, rank=rank)
        grad = gradient_of(function, a, rank=rank)
        assert torch.isfinite(grad).all()
        if math.isinf(kappa):
            assert found == math.inf
            assert not grad.any()
        else:
            assert_within(found, truth, 10 * EPS * kappa)


def test_kappa_between_the_ranks_of_two_dtypes(route):
    """1e-9 counts in float64, not in float32."""
    a = diagonal(1.0, 0.5, 1e-9)
    assert_within(condition_number(a), 1e9, 1e-5)
    assert_within(condition_number(a.float()), 2.0, 4 * EPS32)
    assert condition_number(a.float(), rank="full") == math.inf
    assert_within(condition_number(a.float(), rank_rtol=1e-10) / 1e9, 1.0, 4 * EPS32)


# --- gradients ------------------------------------------------------------------------------------


@every_function
@half_examples
@given(sample=strategies.well_conditioned(min_side=2, max_side=6, max_kappa=1e3))
def test_gradient_equals_the_closed_form(route, function, sample):
    a = sample.matrix
    found = gradient_of(function, a)
    truth = reference_of(function, "gradient", a)
    # eps / gap from the pairs, and kappa from 1 / sigma_min; at kappa = 1 both terms may cancel.
    rtol = 100 * max(a.shape) * EPS * float(sample.kappa) / float(sample.gap)
    size = 1.0 if function is log_condition_number else float(sample.kappa)
    testing.assert_gradients_close(
        found,
        torch.from_numpy(truth),
        rtol=rtol,
        cancellation_scale=size / float(sample.sigma_min),
    )


@every_function
@pytest.mark.parametrize("log_kappa", [4, 8, 12])
def test_gradient_at_high_kappa(route, function, log_kappa):
    a = with_spectrum([1.0, 0.5, 10.0**-log_kappa], 5, 3, seed=3)
    found = gradient_of(function, a)
    truth = reference_of(function, "gradient", a)
    testing.assert_gradients_close(
        found, torch.from_numpy(truth), rtol=100 * 5 * EPS * 10.0**log_kappa
    )


@every_function
@fewer_examples
@given(sample=strategies.near_multiple(exact=True, max_side=6))
def test_clusters_do_not_depend_on_the_basis(route, function, sample):
    """Also: kappa is of degree 0, so <A, gradient> = 0."""

    def loose(a: Tensor) -> Tensor:
        return function(a, cluster_rtol=1e-9)

    testing.check_orthogonal_invariance(
        loose,
        [sample.matrix],
        rtol=1e-10,
        cancellation_scale=float(sample.kappa / sample.sigma_min),
    )
    testing.check_euler_identity(loose, [sample.matrix], 0)


@every_function
def test_orthogonal_matrices_are_stationary(route, function):
    """kappa = 1 is the minimum, and the least-norm subgradient there is exactly 0."""
    a = 2 * torch.eye(4).double()[[2, 0, 3, 1]]
    assert_within(gradient_of(function, a), 0.0, 2 * EPS)


# --- registration ---------------------------------------------------------------------------------


def test_both_are_the_quotient_of_the_extremes():
    a = gaussian(3, 4, 5)
    found = extremal_singular_values(a)
    kappa = found.sigma_max / found.sigma_min
    assert_within(condition_number(a), kappa, 4 * EPS * kappa)
    assert_within(log_condition_number(a), kappa.log(), 8 * EPS * (1 + kappa.log()))


# --- the floor of the published code --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (2, 3, 5, 5)])
@pytest.mark.parametrize("floor", [1e-6, 0.5])
def test_floored_kappa_is_that_of_the_gram_matrix(route, shape, floor):
    x = gaussian(*shape)
    k = x.mT @ x + floor * torch.eye(shape[-1]).double()
    eigenvalues = torch.linalg.eigvalsh(k)
    expected = eigenvalues[..., -1].log() - eigenvalues[..., 0].log()
    found = gram_log_condition_number(x, floor=floor)
    # The eigenvalues of K + floor I carry eps |K|; ours are sharper.
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_floored_kappa_is_the_metric():
    for x in (gaussian(6, 4), gaussian(4, 6)):
        metric, _ = log_kappa(x, policy="official")
        torch.testing.assert_close(gram_log_condition_number(x), metric, rtol=0.0, atol=0.0)


def test_floored_kappa_has_derivatives_of_both_orders(route):
    x = gaussian(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gram_log_condition_number(x, floor=0.3), x)
    assert torch.autograd.gradgradcheck(lambda x: gram_log_condition_number(x, floor=0.3), x)
    # With fewer samples than features the smallest eigenvalue is the floor, a constant.
    wide = gaussian(3, 5).requires_grad_()
    (grad,) = torch.autograd.grad(gram_log_condition_number(wide, floor=0.3), wide)
    top = extremal_singular_values(wide).sigma_max.square()
    expected = torch.autograd.grad((top + 0.3).log(), wide)[0]
    torch.testing.assert_close(grad, expected)


def test_floored_kappa_of_zeros_and_bad_floors():
    x = torch.zeros(3, 2, dtype=torch.float32, requires_grad=True)
    value = gram_log_condition_number(x)
    assert value.dtype == torch.float32
    assert value == 0.0
    assert not torch.autograd.grad(value, x)[0].any()
    for floor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="floor must be finite and positive"):
            gram_log_condition_number(gaussian(3, 2), floor=floor)
