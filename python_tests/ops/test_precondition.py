"""Preconditioned gradient: values, derivatives, transforms, the layer, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import OperatorContract, Refusal
from sample_inputs import EPS, column_major, gaussian, half_examples
from torch import Tensor, nn

from immunize_ext import reference, testing
from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops import PreconditionedLinear, Preconditioner, precondition_gradient
from immunize_ext.testing import strategies

# (samples, features, relative ridge); fewer samples than features take the Woodbury identity.
SHAPES = [(9, 4, 0.0), (9, 4, 0.1), (4, 4, 0.1), (2, 5, 0.1), (1, 6, 0.5), (3, 1, 0.0)]


def preconditioner_of(n: int, p: int, ridge: float, seed: int = 0) -> Preconditioner:
    return Preconditioner.from_features(gaussian(n, p, seed=seed), ridge=ridge)


class PreconditionContract(OperatorContract):
    """Gradients (*, out, p) times the inverse of K of the features ``x``, a constant."""

    x = gaussian(9, 4)
    routes_rtol = 1e-12
    poisons = dict.fromkeys(("zero", "rank_one", "huge", "tiny", "nan"), "independent")
    # Linear: every higher derivative is zero.
    test_second_derivative_equals_the_reference = None
    test_second_derivative_is_refused_at_kinks = None
    test_third_derivative_is_refused = None
    test_second_derivatives_by_every_order_of_modes = None
    test_meta_tensors_tell_shapes_and_dtypes = None  # refused: the factor is on another device
    test_jacobian_and_hessian = None
    test_something_that_is_no_tensor_is_refused = None

    def __init_subclass__(cls):
        p = cls.x.shape[1]
        cls.preconditioner = Preconditioner.from_features(cls.x, ridge=0.1)
        cls.smooth = {"matrix": (gaussian(3, p, seed=1),), "batch": (gaussian(2, 3, p, seed=2),)}
        cls.large = (gaussian(2, 30, p, seed=3),)

    def sample(self, *batch, seed=1, dtype=torch.float64):
        return (gaussian(*batch, 3, self.x.shape[1], seed=seed, dtype=dtype),)

    def solved(self, grad: Tensor) -> np.ndarray:
        return reference.preconditioned_gradient(grad.numpy(), self.x.numpy(), ridge=0.1)


class TestApply(PreconditionContract):
    argument = "grad"
    poisons = {**PreconditionContract.poisons, "nan": "raised"}
    name = "Preconditioner.apply"
    node = "Linear"
    function = staticmethod(Preconditioner.from_features(gaussian(9, 4), ridge=0.1).apply)
    refusals = [
        Refusal((gaussian(4, 3),), "grad .*the features on the last axis"),
        Refusal((gaussian(4),), "grad .*shape"),
        Refusal((torch.ones(3, 4, dtype=torch.int64),), "grad .*floating-point dtype"),
        Refusal((gaussian(3, 4).to("meta"),), "grad .*must be on the device of"),
    ]

    def call(self, grad):
        return self.preconditioner.apply(grad)

    def truth(self, grad):
        return (self.solved(grad),)

    def true_gradients(self, inputs, cotangents):
        return (self.solved(cotangents[0]),)  # its own adjoint

    def composition(self, grad):
        p = self.x.shape[1]
        ridge = 0.1 * self.x.square().sum() / p
        return (grad @ torch.linalg.inv(self.x.mT @ self.x + ridge * torch.eye(p).double()),)


# Rounded to a half type, a gradient lies beside the rows of the features by little more than that.
@pytest.mark.filterwarnings("ignore:.*beside the rows of the features")
class TestApplyToFewSamples(TestApply):
    """By the Woodbury identity."""

    x = gaussian(2, 4)


class TestPreconditionGradient(PreconditionContract):
    """The identity, whose backward multiplies: not the derivative of anything."""

    node = "Linear"
    test_non_finite_input_is_named = None  # passed on: test_non_finite_gradient_stays_in_its_row
    contiguous_outputs = False  # the identity keeps the strides of the weight
    function = staticmethod(
        lambda weight: precondition_gradient(weight, preconditioner_of(9, 4, 0.1))
    )
    name = "precondition_gradient"
    refusals = [
        Refusal((weight,), "weight must")
        for weight in (gaussian(4, 3), gaussian(4), gaussian(3, 4).to("meta"))
    ]
    test_gradcheck = test_gradgradcheck = None
    test_gradient_equals_the_one_through_the_composition = None

    def call(self, weight):
        return precondition_gradient(weight, self.preconditioner)

    def truth(self, weight):
        return (weight.numpy(),)

    def true_gradients(self, inputs, cotangents):
        return (self.solved(cotangents[0]),)


class TestPreconditionGradientOfFewSamples(TestPreconditionGradient):
    x = gaussian(2, 4)


# --- values ---------------------------------------------------------------------------------------


@half_examples
@given(
    sample=strategies.well_conditioned(max_kappa=1e4, max_side=9),
    ridge=st.sampled_from([0.0, 1e-8, 1e-3, 1.0]),
    rows=st.integers(1, 4),
)
def test_equals_the_reference(route, sample, ridge, rows):
    x = sample.matrix
    n, p = x.shape
    if n < p and ridge == 0.0:
        ridge = 1e-6
    grad = gaussian(rows, p, seed=1)
    found = Preconditioner.from_features(x, ridge=ridge).apply(grad)
    truth = reference.preconditioned_gradient(grad.numpy(), x.numpy(), ridge=ridge)
    absolute = reference.absolute_ridge(x.numpy(), ridge)
    sigma = torch.linalg.svdvals(x)
    least = float(sigma[-1]) ** 2 if n >= p else 0.0
    kappa = (float(sigma[0]) ** 2 + absolute) / (least + absolute)
    # One solve with K in float64, after K was formed from x.
    error = np.linalg.norm(found.numpy() - truth)
    assert error <= 100 * EPS * kappa * np.linalg.norm(truth)


@pytest.mark.parametrize(("n", "p", "ridge"), SHAPES)
def test_multiplies_by_the_inverse_from_the_right(route, n, p, ridge):
    """On the input side: theta stored as nn.Linear.weight is theta^T."""
    x, grad = gaussian(n, p), gaussian(3, p, seed=1)
    k = x.mT @ x + reference.absolute_ridge(x.numpy(), ridge) * torch.eye(p).double()
    found = Preconditioner.from_features(x, ridge=ridge).apply(grad)
    torch.testing.assert_close(found @ k, grad, rtol=1e-9, atol=1e-10)
    if p == 4:
        square = gaussian(4, 4, seed=2)
        other = Preconditioner.from_features(x, ridge=ridge).apply(square)
        assert not torch.allclose(k @ other, square), "the other side is another matrix"


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_both_sides_of_the_woodbury_identity_agree(route, ridge):
    few = gaussian(3, 6)
    padded = torch.cat([few, torch.zeros(5, 6).double()])
    grad = gaussian(2, 6, seed=1)
    thin = Preconditioner.from_features(few, ridge=ridge)
    full = Preconditioner.from_features(padded, ridge=ridge)
    assert (len(thin.basis), len(full.basis)) == (3, 0)
    torch.testing.assert_close(thin.apply(grad), full.apply(grad), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize(("n", "p", "ridge"), [(9, 4, 0.0), (2, 4, 0.1)])
def test_batches_and_dtypes(route, dtype, batch, n, p, ridge):
    preconditioner = preconditioner_of(n, p, ridge)
    grad = gaussian(*batch, 3, p, seed=1, dtype=dtype)
    found = preconditioner.apply(grad)
    exact = preconditioner.apply(grad.double())
    assert found.shape == grad.shape
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype)), "solved in float64, rounded once"


def test_identity_forward(route):
    weight = gaussian(3, 4)
    found = precondition_gradient(weight, preconditioner_of(9, 4, 0.0))
    assert torch.equal(found, weight)
    assert found.data_ptr() != weight.data_ptr()


def test_ridge_is_relative_unless_said(route):
    x, grad = gaussian(9, 4), gaussian(3, 4, seed=1)
    for scale in (1e-6, 1.0, 1e6):
        relative = Preconditioner.from_features(scale * x, ridge=0.3).apply(grad)
        unit = Preconditioner.from_features(x, ridge=0.3).apply(grad)
        torch.testing.assert_close(relative * scale**2, unit, rtol=1e-12, atol=1e-14)
    absolute = Preconditioner.from_features(x, ridge=0.3, relative=False)
    assert absolute.ridge == 0.3
    assert Preconditioner.from_features(x, ridge=0.3).ridge == pytest.approx(
        reference.absolute_ridge(x.numpy(), 0.3)
    )


def test_step_in_the_metric_of_the_features_is_exact_for_least_squares(route):
    """L = |X W^T - Y|^2 / 2 has gradient K-linear in W: one preconditioned step of 1 solves it."""
    x, y = gaussian(20, 4), gaussian(20, 3, seed=1)
    weight = gaussian(3, 4, seed=2).requires_grad_()
    held = precondition_gradient(weight, Preconditioner.from_features(x))
    (step,) = torch.autograd.grad((x @ held.mT - y).square().sum() / 2, weight)
    solution = torch.linalg.lstsq(x, y).solution.mT
    torch.testing.assert_close(weight.detach() - step, solution, rtol=1e-11, atol=1e-12)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "ridge"), SHAPES)
def test_backward_multiplies_by_the_inverse(route, n, p, ridge):
    weight = gaussian(3, p).requires_grad_()
    upstream = gaussian(3, p, seed=1)
    preconditioner = preconditioner_of(n, p, ridge, seed=2)
    (found,) = torch.autograd.grad(precondition_gradient(weight, preconditioner), weight, upstream)
    truth = preconditioner.apply(upstream)
    assert torch.equal(found, truth)


@pytest.mark.parametrize(("n", "p", "ridge"), SHAPES)
def test_apply_is_linear_and_its_own_adjoint(route, n, p, ridge):
    grad = gaussian(2, 3, p).requires_grad_()
    preconditioner = preconditioner_of(n, p, ridge, seed=2)
    assert torch.autograd.gradcheck(preconditioner.apply, (grad,))
    assert torch.autograd.gradgradcheck(preconditioner.apply, (grad,))
    left = (preconditioner.apply(grad[0]) * grad[1]).sum()
    right = (grad[0] * preconditioner.apply(grad[1])).sum()
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


def test_second_derivative_through_the_layer(route):
    """d/dW of <G K^-1, Z> with G = dL/dW: the Hessian of L, then K^-1 once more on the outside."""
    preconditioner = preconditioner_of(9, 4, 0.1)
    weight, z = gaussian(3, 4, seed=1).requires_grad_(), gaussian(3, 4, seed=2)
    held = precondition_gradient(weight, preconditioner)
    (grad,) = torch.autograd.grad(held.pow(4).sum() / 4, weight, create_graph=True)
    (found,) = torch.autograd.grad((grad * z).sum(), weight)
    inner = 3 * weight.detach().square() * preconditioner.apply(z)
    truth = preconditioner.apply(inner)
    testing.assert_gradients_close(found, truth, rtol=1e-11)


def test_features_are_constants():
    """K gets no gradient, and later changes of the features do not reach it."""
    x = gaussian(9, 4).requires_grad_()
    preconditioner = Preconditioner.from_features(x)
    assert not preconditioner.factor.requires_grad
    before = preconditioner.factor.clone()
    with torch.no_grad():
        x.zero_()
    assert torch.equal(preconditioner.factor, before)
    few = gaussian(2, 4)
    thin = Preconditioner.from_features(few, ridge=0.1)
    truth = thin.apply(gaussian(3, 4))
    few.zero_()
    assert torch.equal(thin.apply(gaussian(3, 4)), truth), "the stored features are its own"


# --- transforms -----------------------------------------------------------------------------------


def test_jacobian_is_the_inverse():
    x = gaussian(9, 4)
    jacobian = torch.func.jacrev(Preconditioner.from_features(x).apply)(gaussian(2, 4, seed=1))
    inverse = torch.linalg.inv(x.mT @ x)
    truth = torch.einsum("ik,lj->ijkl", torch.eye(2).double(), inverse)
    torch.testing.assert_close(jacobian, truth, rtol=1e-11, atol=1e-13)


# --- memory, determinism, independence ------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "ridge"), [(9, 4, 0.0), (2, 4, 0.1)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_stays_in_its_row(route, n, p, ridge, bad):
    """It is passed on, not refused: a scaler of losses looks for it behind the backward pass."""
    preconditioner = preconditioner_of(n, p, ridge)
    grad = gaussian(2, 3, p, seed=3)
    spoiled = grad.clone()
    spoiled[1, 2, 0] = bad
    weight = torch.zeros_like(grad).requires_grad_()
    held = precondition_gradient(weight, preconditioner)
    found, truth = (torch.autograd.grad(held, weight, g, True)[0] for g in (spoiled, grad))
    assert not torch.isfinite(found[1, 2]).any()
    found[1, 2] = truth[1, 2]
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13)


def test_features_of_any_layout(route):
    x, grad = gaussian(9, 4), gaussian(3, 4, seed=1)
    truth = Preconditioner.from_features(x).apply(grad)
    turned = Preconditioner.from_features(column_major(x)).apply(column_major(grad))
    torch.testing.assert_close(turned, truth, rtol=1e-12, atol=1e-14)


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_layer_with_the_batch_as_features(route, bias):
    layer = PreconditionedLinear(4, 3, bias=bias, ridge=1e-3, dtype=torch.float64)
    plain = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = gaussian(2, 5, 4)
    found, truth = layer(x), plain(x)
    assert torch.equal(found, truth)
    upstream = gaussian(2, 5, 3, seed=1)
    found.backward(upstream)
    truth.backward(upstream)
    preconditioner = Preconditioner.from_features(x.reshape(-1, 4), ridge=1e-3)
    expected = preconditioner.apply(plain.weight.grad)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-11, atol=1e-13)
    if bias:
        assert torch.equal(layer.bias.grad, plain.bias.grad)


def test_layer_with_a_preconditioner_of_the_full_data():
    data = gaussian(50, 4)
    preconditioner = Preconditioner.from_features(data)
    layer = PreconditionedLinear(4, 3, preconditioner=preconditioner, dtype=torch.float64)
    x = gaussian(1, 4, seed=1).requires_grad_()
    layer(x).sum().backward()
    expected = preconditioner.apply(x.detach().expand(3, 4))
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-11, atol=1e-13)
    # The gradient of the input is that of a plain layer.
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0, keepdim=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_layer_without_gradients_needs_no_features(frozen):
    """At inference, or with a frozen weight, one sample is enough: K is never applied."""
    layer = PreconditionedLinear(4, 3, dtype=torch.float64)
    x = gaussian(1, 4)
    if frozen:
        layer.weight.requires_grad_(False)
        found = layer(x)
    else:
        with torch.no_grad():
            found = layer(x)
    assert torch.equal(found, nn.functional.linear(x, layer.weight, layer.bias))


def test_layer_refuses_too_small_a_batch():
    layer = PreconditionedLinear(4, 3, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="2 samples for 4 features"):
        layer(gaussian(2, 4))


@pytest.mark.parametrize("n", [3, 9])
def test_layer_multiplies_from_the_left_on_the_output_side(n):
    layer = PreconditionedLinear(4, 4, side="output", ridge=1e-2, dtype=torch.float64)
    plain = nn.Linear(4, 4, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x, upstream = gaussian(n, 4), gaussian(n, 4, seed=1)
    layer(x).backward(upstream)
    plain(x).backward(upstream)
    k = x.mT @ x
    k += 1e-2 * k.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(k, plain.weight.grad)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(layer.bias.grad, plain.bias.grad)


def test_gradient_preconditioned_from_the_left_is_that_of_the_transpose(route):
    preconditioner = preconditioner_of(9, 4, 0.0)
    weight, upstream = gaussian(4, 3).requires_grad_(), gaussian(4, 3, seed=1)
    moved = precondition_gradient(weight, preconditioner, side="output")
    assert torch.equal(moved, weight)
    moved.backward(upstream)
    expected = preconditioner.apply(upstream.mT).mT
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"shape \(\*, 4, p\), the output side"):
        precondition_gradient(gaussian(3, 4), preconditioner, side="output")
    with pytest.raises(ValueError, match="side must be 'input' or 'output', got 'left'"):
        precondition_gradient(weight, preconditioner, side="left")


def grad_of(layer, x, **options):
    layer.weight.grad = None
    layer(x, **options).square().sum().backward()
    return layer.weight.grad


@pytest.mark.parametrize("n", [3, 9])
def test_layer_with_an_absolute_ridge_and_one_of_a_call(n):
    x = gaussian(n, 4)
    mean = float(x.square().sum()) / 4
    layer = PreconditionedLinear(4, 2, ridge=1e-2, dtype=torch.float64)
    other = PreconditionedLinear(4, 2, ridge=1e-2 * mean, relative=False, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(grad_of(other, x), grad_of(layer, x), rtol=1e-11, atol=1e-13)
    of_call = grad_of(other, x, ridge=3e-2 * mean)
    torch.testing.assert_close(of_call, grad_of(layer, x, ridge=3e-2), rtol=1e-11, atol=1e-13)
    assert not torch.allclose(of_call, grad_of(layer, x))
    # Off: the gradient of a plain layer, and a batch of any size.
    plain = nn.Linear(4, 2, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(grad_of(layer, x, precondition=False), grad_of(plain, x))


def test_layer_refuses_a_second_ridge_and_a_side_that_does_not_fit():
    layer = PreconditionedLinear(4, 3, preconditioner=preconditioner_of(9, 4, 0.0))
    with pytest.raises(ValueError, match="ridge must not be given where a preconditioner is set"):
        layer(torch.zeros(5, 4), ridge=1.0)
    with pytest.raises(ValueError, match=r"as many outputs as inputs.* got 4 and 3"):
        PreconditionedLinear(4, 3, side="output")
    with pytest.raises(ValueError, match="side must be"):
        PreconditionedLinear(4, 4, side="left")


def test_a_preconditioner_says_in_a_line_what_it_is():
    text = repr(Preconditioner.from_features(torch.eye(3), ridge=0.5, relative=False))
    assert text == "Preconditioner(features=3, ridge=0.5, device=cpu)"


@pytest.mark.usefixtures("fresh_compiler")
def test_layer_compiles():
    preconditioner = preconditioner_of(20, 4, 0.0)
    layer = PreconditionedLinear(4, 3, preconditioner=preconditioner, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = gaussian(5, 4)
    layer(x).sum().backward()
    truth, layer.weight.grad = layer.weight.grad, None
    compiled(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, truth)


def test_layer_in_half_precision():
    layer = PreconditionedLinear(4, 3, ridge=1e-2, dtype=torch.bfloat16)
    layer(gaussian(9, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16


def test_layer_state_is_that_of_a_linear_layer():
    layer = PreconditionedLinear(4, 3, preconditioner=preconditioner_of(9, 4, 0.0))
    factor = {"preconditioner_factor", "preconditioner_basis", "preconditioner_ridge"}
    assert set(layer.state_dict()) == {"weight", "bias", *factor}
    layer.preconditioner = None
    nn.Linear(4, 3).load_state_dict(layer.state_dict())


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(3), {}, "shape"),
        (gaussian(2, 3, 4), {}, r"x must have shape \(n, p\)"),
        (torch.zeros(0, 4), {}, "n >= 1"),
        (torch.ones(3, 2, dtype=torch.int64), {}, "floating-point dtype"),
        (torch.full((5, 2), float("nan")), {}, "x must be finite"),
        (torch.full((1, 2), float("inf")), {"ridge": 1.0}, "x must be finite"),
        (gaussian(5, 2), {"ridge": -1.0}, "ridge must be finite and not negative"),
        (gaussian(5, 2), {"ridge": float("nan")}, "ridge must be finite and not negative"),
    ],
)
def test_bad_features_are_named(x, options, message):
    with pytest.raises(ValueError, match=f"Preconditioner.from_features: .*{message}"):
        Preconditioner.from_features(x, **options)


@pytest.mark.parametrize(
    ("x", "ridge", "rank"),
    [
        (gaussian(2, 5), 0.0, 2),
        (torch.ones(6, 3).double(), 0.0, 1),
        (torch.zeros(6, 3).double(), 0.0, 0),
        (torch.zeros(6, 3).double(), 1.0, 0),  # a share of nothing is nothing
        (torch.zeros(2, 3).double(), 1.0, 0),
        (torch.ones(6, 3).double(), 1e-18, 1),
    ],
)
def test_singular_features_are_refused(x, ridge, rank):
    with pytest.raises(NotPositiveDefiniteError) as caught:
        Preconditioner.from_features(x, ridge=ridge)
    assert isinstance(caught.value, torch.linalg.LinAlgError)
    assert caught.value.rank == rank


def test_ridge_that_the_error_names_is_enough():
    x = torch.ones(6, 3).double()
    with pytest.raises(NotPositiveDefiniteError) as caught:
        Preconditioner.from_features(x)
    Preconditioner.from_features(x, ridge=caught.value.needed_ridge, relative=False)
