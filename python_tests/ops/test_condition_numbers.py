"""Condition number and its logarithm: values, derivatives, transforms, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import (
    EPS,
    EPS32,
    ROUTES,
    diagonal,
    fewer_examples,
    gaussian,
    half_examples,
    symmetric_clusters,
    taking_route,
    with_spectrum,
)
from spectrum_bounds import VALUE_UNITS, assert_within
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.ops import condition_number, extremal_singular_values, log_condition_number
from immunize_ext.testing import strategies

FUNCTIONS = [condition_number, log_condition_number]
REFERENCE = {condition_number: "condition_number", log_condition_number: "log_condition_number"}

every_route = pytest.mark.parametrize("route", ROUTES)
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)

# A symmetric positive definite matrix with kappa = 2 + sqrt(3) exactly.
TRIDIAGONAL = torch.tensor([[4.0, 1, 0], [1, 3, 1], [0, 1, 2]], dtype=torch.float64)


def reference_of(function, kind: str, a: Tensor, **policy):
    name = REFERENCE[function] + ("" if kind == "value" else f"_{kind}")
    return getattr(reference, name)(a.double().numpy(), **policy)


def gradient_of(function, a: Tensor, **policy) -> Tensor:
    leaf = a.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf, **policy).sum(), leaf)[0]


# --- values ---------------------------------------------------------------------------------------


@every_route
@half_examples
@given(sample=strategies.ill_conditioned(max_side=8, min_kappa=1.0, max_kappa=1e12))
def test_kappa_up_to_1e12(route, sample):
    """The relative error of sigma_min, VALUE_UNITS max(n, p) eps kappa, is the absolute of log."""
    a = sample.matrix
    with taking_route(route):
        kappa, logarithm = condition_number(a), log_condition_number(a)
    truth = float(reference.condition_number(a.numpy()))
    error = 2 * VALUE_UNITS * max(a.shape) * EPS * truth
    assert_within(kappa / truth, 1.0, error)
    # One rounding of a logarithm of up to log(1e12) comes on top.
    assert_within(logarithm, math.log(truth), 2 * error + 30 * EPS)


@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@half_examples
@given(data=st.data())
def test_scale_does_not_matter(route, dtype, data):
    sample = data.draw(strategies.badly_scaled(dtype=dtype, max_kappa=100.0))
    a = sample.matrix
    with taking_route(route):
        kappa = condition_number(a)
        scaled = condition_number(a * 2.0 ** data.draw(st.integers(-10, 10)))
    assert torch.equal(kappa, scaled)
    truth = float(reference.condition_number(a.double().numpy()))
    assert_within(kappa / truth, 1.0, 1e-11 if dtype == torch.float64 else 2 * EPS32)


@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1.0, 1e19, 1e25])
def test_scale_of_float32_where_squares_overflow(route, dtype, scale):
    """kappa = 3.732051, and |gradient| scale is the same number at every scale."""
    a = (TRIDIAGONAL * scale).to(dtype)
    eps = torch.finfo(dtype).eps
    with taking_route(route):
        assert_within(condition_number(a), 2 + math.sqrt(3), 20 * eps)
        grad = gradient_of(condition_number, a)
    unit = gradient_of(condition_number, TRIDIAGONAL)
    testing.assert_gradients_close(grad.double() * scale, unit, rtol=20 * eps)


@every_route
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
    with taking_route(route):
        for function, truth in ((condition_number, kappa), (log_condition_number, math.log(kappa))):
            found = function(a, rank=rank)
            grad = gradient_of(function, a, rank=rank)
            assert torch.isfinite(grad).all()
            if math.isinf(kappa):
                assert found == math.inf
                assert not grad.any()
            else:
                assert_within(found, truth, 10 * EPS * kappa)


@every_route
@every_function
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_batches_and_dtypes(route, function, batch, dtype):
    a = gaussian(*batch, 4, 3, seed=1, dtype=dtype)
    with taking_route(route):
        found = function(a)
    assert found.shape == batch
    assert found.dtype == dtype
    if a.numel():
        truth = reference_of(function, "value", a)
        np.testing.assert_allclose(
            found.double().numpy(), truth, rtol=torch.finfo(dtype).eps + 1e-12
        )


@every_route
def test_kappa_between_the_ranks_of_two_dtypes(route):
    """1e-9 counts in float64, not in float32."""
    a = diagonal(1.0, 0.5, 1e-9)
    with taking_route(route):
        assert_within(condition_number(a), 1e9, 1e-5)
        assert_within(condition_number(a.float()), 2.0, 4 * EPS32)
        assert condition_number(a.float(), rank="full") == math.inf
        assert_within(condition_number(a.float(), rank_rtol=1e-10) / 1e9, 1.0, 4 * EPS32)


# --- gradients ------------------------------------------------------------------------------------

SIMPLE = [
    pytest.param(gaussian(3, 5, seed=11), id="wide"),
    pytest.param(gaussian(5, 3, seed=12), id="tall"),
    pytest.param(gaussian(4, 4, seed=13), id="square"),
    pytest.param(gaussian(2, 3, 2, seed=16), id="batch"),
]


@every_route
@every_function
@pytest.mark.parametrize("a", SIMPLE)
def test_gradcheck_and_gradgradcheck(route, function, a):
    with taking_route(route):
        assert torch.autograd.gradcheck(function, (a.clone().requires_grad_(),))
        assert torch.autograd.gradgradcheck(function, (a.clone().requires_grad_(),))


@every_route
@every_function
@half_examples
@given(sample=strategies.well_conditioned(min_side=2, max_side=6, max_kappa=1e3))
def test_gradient_equals_the_closed_form(route, function, sample):
    a = sample.matrix
    with taking_route(route):
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


@every_route
@every_function
@pytest.mark.parametrize("log_kappa", [4, 8, 12])
def test_gradient_at_high_kappa(route, function, log_kappa):
    a = with_spectrum([1.0, 0.5, 10.0**-log_kappa], 5, 3, seed=3)
    with taking_route(route):
        found = gradient_of(function, a)
    truth = reference_of(function, "gradient", a)
    testing.assert_gradients_close(
        found, torch.from_numpy(truth), rtol=100 * 5 * EPS * 10.0**log_kappa
    )


@every_route
@every_function
@pytest.mark.parametrize("a", SIMPLE)
def test_gradient_equals_the_one_through_all_singular_values(route, function, a):
    leaf = a.clone().requires_grad_()
    sigma = torch.linalg.svdvals(leaf)
    kappa = sigma[..., 0] / sigma[..., -1]
    value = kappa if function is condition_number else kappa.log()
    (truth,) = torch.autograd.grad(value.sum(), leaf)
    with taking_route(route):
        testing.assert_gradients_close(gradient_of(function, a), truth, rtol=1e-11)


@every_route
@every_function
@fewer_examples
@given(sample=strategies.near_multiple(exact=True, max_side=6))
def test_clusters_do_not_depend_on_the_basis(route, function, sample):
    """Also: kappa is of degree 0, so <A, gradient> = 0."""

    def loose(a: Tensor) -> Tensor:
        return function(a, cluster_rtol=1e-9)

    with taking_route(route):
        testing.check_orthogonal_invariance(
            loose,
            [sample.matrix],
            rtol=1e-10,
            cancellation_scale=float(sample.kappa / sample.sigma_min),
        )
        testing.check_euler_identity(loose, [sample.matrix], 0)


@every_route
@every_function
def test_orthogonal_matrices_are_stationary(route, function):
    """kappa = 1 is the minimum, and the least-norm subgradient there is exactly 0."""
    a = 2 * torch.eye(4).double()[[2, 0, 3, 1]]
    with taking_route(route):
        assert_within(gradient_of(function, a), 0.0, 2 * EPS)


@every_route
@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gradient_equals_float64(route, function, dtype):
    with taking_route(route):
        testing.check_float32_against_float64(function, [gaussian(2, 4, 3, seed=3)], dtype=dtype)


@every_function
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@every_route
def test_second_derivative_equals_the_closed_form(route, function, shape):
    a = gaussian(*shape, seed=17).requires_grad_()
    direction = gaussian(*shape, seed=18)
    with taking_route(route):
        (grad,) = torch.autograd.grad(function(a), a, create_graph=True)
        (found,) = torch.autograd.grad((grad * direction).sum(), a)
    truth = getattr(reference, f"{REFERENCE[function]}_hvp")(a.detach().numpy(), direction.numpy())
    testing.assert_gradients_close(found, torch.from_numpy(truth), rtol=1e-10)


@every_route
@every_function
def test_second_derivative_is_refused_at_clusters(route, function):
    with taking_route(route):
        testing.check_double_backward(function, [symmetric_clusters()], expect="raises")


@every_function
@pytest.mark.parametrize("a", SIMPLE)
def test_forward_mode(function, a):
    assert testing.check_forward_mode(function, [a], required=True) == "supported"


# --- registration ---------------------------------------------------------------------------------


def test_both_are_the_quotient_of_the_extremes():
    a = gaussian(3, 4, 5)
    found = extremal_singular_values(a)
    kappa = found.sigma_max / found.sigma_min
    assert_within(condition_number(a), kappa, 4 * EPS * kappa)
    assert_within(log_condition_number(a), kappa.log(), 8 * EPS * (1 + kappa.log()))


@every_function
def test_routes_agree(function):
    for a in (gaussian(2, 3, 5), symmetric_clusters(), torch.ones(3, 4).double()):
        found = []
        for route in ROUTES:
            with taking_route(route):
                found.append((function(a), gradient_of(function, a)))
        for kernel, composite in zip(*found, strict=True):
            torch.testing.assert_close(kernel, composite, rtol=1e-11, atol=1e-12)


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@every_function
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3)])
def test_vmap_and_func_grad(function, shape):
    testing.check_transforms(function, [gaussian(*shape, seed=7)], compile="aot_eager")


@every_function
def test_hessian_is_symmetric(function):
    hessian = torch.func.hessian(function)(gaussian(3, 4)).reshape(12, 12)
    size = float(hessian.abs().max())
    assert_within(hessian, hessian.T, 1e-12 * size)


@every_route
@every_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(route, function, dtype):
    a = gaussian(4, 3, dtype=torch.float32).requires_grad_()
    with taking_route(route):
        plain = function(a)
        (truth,) = torch.autograd.grad(plain, a)
        with torch.autocast("cpu", dtype=dtype):
            cast = function(a)
            (found,) = torch.autograd.grad(cast, a)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert torch.equal(found, truth)


# --- memory, determinism, independence ------------------------------------------------------------


@every_route
@every_function
def test_layouts_determinism_and_batches(route, function):
    with taking_route(route):
        testing.check_layouts(function, [gaussian(2, 4, 3, seed=9)])
        testing.check_determinism(function, [gaussian(3, 10, 12)])
        outcome = testing.check_batch_independence(function, [gaussian(4, 5, 3, seed=11)])
    assert outcome["zero"] == "independent"
    assert outcome["nan"] == "raised"


# --- refusals -------------------------------------------------------------------------------------


@every_route
@every_function
@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "finite"),
        (torch.zeros(3), r"shape \(\*, n, p\)"),
        (torch.zeros(2, 0), "n >= 1 and p >= 1"),
        (torch.eye(2, dtype=torch.int64), "floating-point dtype"),
    ],
)
def test_bad_input_is_refused(route, function, a, message):
    with taking_route(route), pytest.raises(ValueError, match=f"a must.*{message}"):
        function(a)


@every_function
def test_bad_policy_is_refused(function):
    with pytest.raises(ValueError, match=f"^{function.__name__}: rank must be"):
        function(torch.eye(2), rank="none")
    with pytest.raises(ValueError, match=f"^{function.__name__}: cluster_rtol must be"):
        function(torch.eye(2), cluster_rtol=1.5)
