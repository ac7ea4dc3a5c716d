"""Algebraic extremes of a symmetric matrix: values, derivatives, transforms, refusals."""

from __future__ import annotations

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
    symmetric,
    taking_route,
)
from spectrum_bounds import VALUE_UNITS, assert_within
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.ops import symmetric_extremes

every_route = pytest.mark.parametrize("route", ROUTES)


def with_eigenvalues(values, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    h = (q * np.asarray(values)) @ q.T
    return torch.from_numpy((h + h.T) / 2)


def of_any(a: Tensor) -> tuple[Tensor, Tensor]:
    """As a function of all entries: the operator takes symmetric matrices only."""
    found = symmetric_extremes((a + a.mT) / 2)
    return found.lambda_max, found.lambda_min


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


@every_route
@half_examples
@given(data=st.data())
def test_values_are_the_chosen_ones(route, data):
    """Definite, indefinite and singular, kappa to 1e12, at scales of 1e-30 to 1e30."""
    p = data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    values = rng.choice([-1, 1, 0], p) * np.logspace(0, -data.draw(st.floats(0, 12)), p)
    h = with_eigenvalues(values * 10.0 ** data.draw(st.integers(-30, 30)), seed)
    with taking_route(route):
        found = symmetric_extremes(h)
    assert_equals_reference(h, found)
    assert bool(found.lambda_min <= found.lambda_max)


@every_route
def test_smallest_by_sign_not_by_magnitude(route):
    with taking_route(route):
        found = symmetric_extremes(diagonal(-5, 0.1, 4))
    assert (found.lambda_max, found.lambda_min) == (4, -5)
    assert (found.multiplicity_max, found.multiplicity_min) == (1, 1)


@every_route
@pytest.mark.parametrize("p", [1, 2, 3, 13, 33, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sides(route, p, dtype):
    h = symmetric(p, seed=p, dtype=dtype)
    with taking_route(route):
        assert_equals_reference(h, symmetric_extremes(h))


@every_route
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_batches_and_dtypes(route, batch, dtype):
    h = symmetric(*batch, 4, seed=1, dtype=dtype)
    with taking_route(route):
        found = symmetric_extremes(h)
    assert all(value.shape == batch for value in found)
    assert {value.dtype for value in found[:2]} == {dtype}
    assert {value.dtype for value in found[2:]} == {torch.int64}
    if h.numel():
        assert_equals_reference(h, found)


@every_route
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
    with taking_route(route):
        found = symmetric_extremes(h)
    for value, right in zip(found[:2], expected[:2], strict=True):
        assert_within(value, right, 8 * EPS * float(h.abs().sum()))
    assert [value.item() for value in found[2:]] == list(expected[2:])


# --- gradients ------------------------------------------------------------------------------------

SIMPLE = [
    pytest.param(symmetric(4, seed=11), id="square"),
    pytest.param(symmetric(1, seed=12), id="one"),
    pytest.param(symmetric(2, 3, seed=13), id="batch"),
]


@every_route
@pytest.mark.parametrize("h", SIMPLE)
def test_gradcheck_and_gradgradcheck(route, h):
    with taking_route(route):
        assert torch.autograd.gradcheck(of_any, (h.clone().requires_grad_(),))
        assert torch.autograd.gradgradcheck(of_any, (h.clone().requires_grad_(),))


@every_route
@fewer_examples
@given(data=st.data())
def test_gradient_is_symmetric_and_equals_the_closed_form(route, data):
    p = data.draw(st.integers(2, 9))
    seed = data.draw(st.integers(0, 1000))
    values = np.linspace(-1, 1, p) + 0.2 / p * np.random.default_rng(seed).uniform(-1, 1, p)
    h = with_eigenvalues(values, seed)
    with taking_route(route):
        grads = gradients_of(h)
    truth = reference.symmetric_extremes_gradient(h.numpy())
    for grad, right in zip(grads, truth, strict=True):
        assert torch.equal(grad, grad.mT)
        # eps over the gap, which is 1.6 / p at least.
        testing.assert_gradients_close(grad, torch.from_numpy(right), rtol=100 * p**2 * EPS)


@every_route
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
    with taking_route(route):
        grads = gradients_of(h)
    for grad, entries in zip(grads, (of_max, of_min), strict=True):
        assert_within(grad, diagonal(*entries), 4 * EPS)


@every_route
@pytest.mark.parametrize("exponent", [-14, -10, -6, -2])
def test_closing_gap_keeps_the_gradient_bounded(route, exponent):
    h = with_eigenvalues([3.0, 3.0 - 10.0**exponent, 1.0, -1.0, -1.0 - 10.0**exponent])
    with taking_route(route):
        for grad in gradients_of(h):
            assert_within(grad.trace(), 1.0, 100 * EPS)
            assert float(grad.norm()) <= 1 + 100 * EPS


@every_route
@pytest.mark.parametrize("which", ["max", "min"])
def test_second_derivative_equals_the_closed_form(route, which):
    h = symmetric(5, seed=3).requires_grad_()
    direction = symmetric(5, seed=4)
    with taking_route(route):
        value = symmetric_extremes(h)[0 if which == "max" else 1]
        (grad,) = torch.autograd.grad(value, h, create_graph=True)
        (found,) = torch.autograd.grad((grad * direction).sum(), h)
    truth = reference.symmetric_extremes_hvp(h.detach().numpy(), direction.numpy(), which=which)
    testing.assert_gradients_close(found, torch.from_numpy(truth), rtol=1e-11)


@every_route
def test_second_derivative_is_refused_at_clusters(route):
    with taking_route(route):
        for which in (0, 1):
            testing.check_double_backward(
                lambda a, which=which: of_any(a)[which], [diagonal(1, 1, 2, 3, 3)], expect="raises"
            )


def test_third_derivative_is_refused():
    h = symmetric(3).requires_grad_()
    grad = torch.autograd.grad(of_any(h)[0], h, create_graph=True)[0]
    second = torch.autograd.grad(grad.square().sum() + grad[0, 0], h, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(second.sum(), h)


@pytest.mark.parametrize("h", SIMPLE)
def test_forward_mode(h):
    assert testing.check_forward_mode(of_any, [h], required=True) == "supported"


@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_equals_float64(route, dtype):
    """Powers of two on the way in: the mean with the transpose stays exact."""
    with taking_route(route):
        testing.check_float32_against_float64(of_any, [symmetric(2, 4, seed=5)], dtype=dtype)


# --- registration ---------------------------------------------------------------------------------


def test_own_derivative_is_used():
    node = symmetric_extremes(symmetric(3).requires_grad_()).lambda_max.grad_fn
    while node.name() == "ToCopyBackward0":
        node = node.next_functions[0][0]
    assert node.name() == "ValuesBackward"


def test_routes_agree():
    for h in (symmetric(2, 4), diagonal(1, 1, 2, 3, 3), torch.zeros(3, 3).double()):
        found = []
        for route in ROUTES:
            with taking_route(route):
                found.append((*symmetric_extremes(h), *gradients_of(h)))
        for kernel, composite in zip(*found, strict=True):
            assert kernel.dtype == composite.dtype
            torch.testing.assert_close(kernel, composite, rtol=1e-12, atol=1e-12)


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_vmap_func_grad_and_compile(shape):
    testing.check_transforms(of_any, [symmetric(*shape, seed=7)], compile="aot_eager")


def test_hessian_is_symmetric():
    hessian = torch.func.hessian(lambda a: of_any(a)[1])(symmetric(3)).reshape(9, 9)
    assert_within(hessian, hessian.T, 1e-12 * float(hessian.abs().max()))


@every_route
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(route, dtype, input_dtype):
    h = symmetric(4, dtype=input_dtype).requires_grad_()
    with taking_route(route):
        plain = symmetric_extremes(h)
        (truth,) = torch.autograd.grad(plain.lambda_max, h)
        with torch.autocast("cpu", dtype=dtype):
            cast = symmetric_extremes(h)
            (found,) = torch.autograd.grad(cast.lambda_max, h)
    for a, b in ((cast.lambda_max, plain.lambda_max), (cast.lambda_min, plain.lambda_min)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(found, truth)


# --- memory, determinism, independence ------------------------------------------------------------


@every_route
def test_layouts_and_determinism(route):
    with taking_route(route):
        testing.check_layouts(of_any, [symmetric(2, 4, seed=9)])
        testing.check_determinism(of_any, [symmetric(3, 30, seed=10)])


def test_batch_independence():
    outcome = testing.check_batch_independence(of_any, [symmetric(4, 3, seed=11)])
    assert outcome["zero"] == outcome["huge"] == "independent"
    assert outcome["nan"] == "raised"


# --- refusals -------------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize(
    ("h", "message"),
    [
        (torch.full((3, 3), float("nan")), "finite"),
        (diagonal(1, float("inf")), "finite"),
        (gaussian(2, 3), "shape"),
        (torch.zeros(3), "shape"),
        (torch.zeros(0, 0), "n >= 1"),
        (torch.eye(2, dtype=torch.int64), "floating-point dtype"),
        (gaussian(3, 3), "symmetric"),
    ],
)
def test_bad_input_is_refused(route, h, message):
    pattern = f"^symmetric_extremes: h must.*{message}"
    with taking_route(route), pytest.raises(ValueError, match=pattern):
        symmetric_extremes(h)


@every_route
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_asymmetry_of_rounding_is_no_error(route, dtype):
    h = symmetric(6, dtype=dtype)
    eps = EPS if dtype == torch.float64 else EPS32
    with taking_route(route):
        found = symmetric_extremes(h * (1 + eps * torch.triu(torch.ones(6, 6), 1).to(dtype)))
    assert_within(found.lambda_max, symmetric_extremes(h).lambda_max, 20 * eps)


def test_bad_tolerance_is_refused():
    with pytest.raises(ValueError, match="symmetric_extremes: cluster_rtol must be"):
        symmetric_extremes(torch.eye(2), cluster_rtol=1.0)
