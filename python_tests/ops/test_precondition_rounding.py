"""The preconditioner with fewer samples than features, and what of it belongs to the module."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from sample_inputs import gaussian, taking_route
from torch import nn

from immunize_ext.errors import NumericalWarning
from immunize_ext.ops import PreconditionedLinear, Preconditioner, precondition_gradient


def exact(x, grad, ridge):
    """Grad K^-1 for grad = A^T x, in the row space: A^T S^-1 x, where nothing cancels."""
    x, grad = x.double(), grad.double()
    a = torch.linalg.lstsq(x.mT, grad.mT).solution
    s = x @ x.mT + ridge * torch.eye(len(x)).double()
    return torch.linalg.solve(s, a).mT @ x


def beside(x, grad):
    """Share of the norm outside the row space of x."""
    q, _ = torch.linalg.qr(x.double().mT)
    wide = grad.double()
    return float((wide - wide @ q @ q.mT).norm() / wide.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [1e-6, 1e-9])
@pytest.mark.parametrize("tracked", [False, True], ids=["data", "activations"])
def test_layer_does_not_amplify_rounding(route, dtype, ridge, tracked):
    """64 x 784 with the ridge its own message proposes: the gradient was off by 160 %."""
    x, upstream = gaussian(64, 784, dtype=dtype), gaussian(64, 5, seed=1, dtype=dtype)
    layer = PreconditionedLinear(784, 5, ridge=ridge, dtype=dtype)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    inputs = x.clone().requires_grad_(tracked)
    with taking_route(route):
        outputs = layer(inputs)
        outputs.backward(upstream)
    assert torch.equal(outputs, plain)
    absolute = ridge * float(x.double().square().sum()) / 784
    s = x.double() @ x.double().mT + absolute * torch.eye(64).double()
    truth = torch.linalg.solve(s, upstream.double()).mT @ x.double()
    eps = torch.finfo(dtype).eps
    assert float((layer.weight.grad - truth).norm() / truth.norm()) <= 100 * eps
    assert beside(x, layer.weight.grad) <= 100 * eps
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))
    if tracked:
        torch.testing.assert_close(inputs.grad, upstream @ layer.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_from_the_data_lose_no_digits(route, dtype):
    """The published ridge for MNIST: the Woodbury identity left two digits of float64."""
    x = gaussian(64, 784)
    grad = (gaussian(5, 64, seed=1) @ x).to(dtype)
    with taking_route(route), warnings.catch_warnings():
        warnings.simplefilter("error")
        preconditioner = Preconditioner.from_features(x, ridge=1e-7)
        found = preconditioner.apply(grad)
        weight = torch.zeros(5, 784, dtype=dtype, requires_grad=True)
        precondition_gradient(weight, preconditioner).backward(grad)
    truth = exact(x, gaussian(5, 64, seed=1) @ x, preconditioner.ridge)
    eps = torch.finfo(dtype).eps
    assert float((found - truth).norm() / truth.norm()) <= 200 * eps
    assert torch.equal(weight.grad, found)


def test_a_gradient_beside_the_data_is_divided_by_the_ridge():
    x = torch.eye(2, 4, dtype=torch.float64)
    grad = torch.tensor([[0.0, 0.0, 3.0, 0.0], [1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    preconditioner = Preconditioner.from_features(x, ridge=0.5, relative=False)
    expected = [[0.0, 0.0, 6.0, 0.0], [1 / 1.5, 0.0, 0.0, 4.0]]
    torch.testing.assert_close(preconditioner.apply(grad), torch.tensor(expected).double())


def test_a_gradient_that_is_beside_by_little_more_than_rounding_warns():
    x = gaussian(8, 40)
    grad = gaussian(3, 8, seed=1) @ x
    noisy = (grad + 3e-5 * gaussian(3, 40, seed=2) * grad.norm() / 120**0.5).float()
    preconditioner = Preconditioner.from_features(x, ridge=1e-6)
    with pytest.warns(NumericalWarning, match="3 rows of grad"):
        preconditioner.apply(noisy)


def test_what_is_cut_beside_the_data_warns_where_it_would_rule(route):
    """Ten eps of the row, cut as rounding: divided by a small ridge it were all of the result."""
    x = torch.eye(2, 4, dtype=torch.float32)
    size = 10 * torch.finfo(torch.float32).eps
    grad = torch.tensor([[1.0, 0.0, size, 0.0], [1.0, 0.0, 0.0, 0.0]])
    small = Preconditioner.from_features(x, ridge=1e-9, relative=False)
    large = Preconditioner.from_features(x, ridge=1e-3, relative=False)
    with pytest.warns(NumericalWarning, match="1 rows of grad .* is cut"):
        found = small.apply(grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.apply(grad[1:])
        large.apply(grad)
    torch.testing.assert_close(found, torch.eye(1, 4).expand(2, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [9, 2])
def test_apply_refuses_what_is_not_finite(n, bad):
    grad = gaussian(3, 4)
    grad[1, 2] = bad
    with pytest.raises(ValueError, match=r"Preconditioner.apply: grad must be finite"):
        Preconditioner.from_features(gaussian(n, 4), ridge=0.1).apply(grad)


# --- what belongs to the module -------------------------------------------------------------------


def layer_with(n: int = 9, dtype: torch.dtype = torch.float64) -> PreconditionedLinear:
    preconditioner = Preconditioner.from_features(gaussian(n, 4), ridge=0.1)
    return PreconditionedLinear(4, 3, preconditioner=preconditioner, dtype=dtype)


def gradient_of(layer: PreconditionedLinear):
    layer.zero_grad()
    layer(gaussian(5, 4, seed=1, dtype=layer.weight.dtype)).square().sum().backward()
    return layer.weight.grad


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = PreconditionedLinear(4, 3, dtype=torch.float64)
    other.load_state_dict(torch.load(buffer), strict=True)
    return other


@pytest.mark.parametrize("n", [9, 2])
@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_layer_carries_its_preconditioner(n, way):
    layer = layer_with(n)
    truth = gradient_of(layer).clone()
    again = way(layer)
    assert torch.equal(gradient_of(again), truth)
    assert again.preconditioner.factor.data_ptr() != layer.preconditioner.factor.data_ptr()


def test_layer_moves_with_its_preconditioner_and_keeps_its_digits():
    layer = layer_with().half()
    assert layer.weight.dtype == torch.float16
    assert layer.preconditioner.factor.dtype == torch.float64
    moved = layer_with().to("meta")
    assert {b.device.type for b in moved.buffers()} == {"meta"}
    sequence = nn.Sequential(layer_with())
    assert "0.preconditioner_factor" in sequence.state_dict()


def test_loading_is_strict():
    plain = nn.Linear(4, 3, dtype=torch.float64).state_dict()
    with pytest.raises(RuntimeError, match="preconditioner_factor"):
        layer_with().load_state_dict(plain)
    PreconditionedLinear(4, 3, dtype=torch.float64).load_state_dict(plain)
    layer = layer_with()
    layer.preconditioner = None
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_made_in_inference_mode_used_in_training():
    with torch.inference_mode():
        preconditioner = Preconditioner.from_features(gaussian(2, 4), ridge=0.1)
    layer = PreconditionedLinear(4, 3, preconditioner=preconditioner, dtype=torch.float64)
    assert torch.equal(gradient_of(layer), gradient_of(layer))
    layer.weight.data.fill_(1.0)
    assert gradient_of(layer).shape == (3, 4)


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, 2])
def test_gradients_of_any_scale(route, n):
    """Squares of 1e160 are infinite, and all that is beside the data was cut as rounding."""
    preconditioner = Preconditioner.from_features(gaussian(n, 4), ridge=0.1)
    grad = gaussian(3, 4, seed=1)
    unit = preconditioner.apply(grad)
    for exponent in (-1000, -600, 600, 1000):
        scale = 2.0**exponent
        assert torch.equal(preconditioner.apply(grad * scale), unit * scale)


@pytest.mark.parametrize("n", [9, 2])
def test_features_whose_squares_leave_the_range_are_refused_by_name(n):
    """Ridge and K were zero or infinite: "x holds only zeros", or a result of zeros."""
    x, grad = gaussian(n, 4), gaussian(3, 4, seed=1)
    for scale in (1e-300, 1e-160, 1e155, 1e300):
        with pytest.raises(ValueError, match=r"x must have squares that float64 holds.* divide x"):
            Preconditioner.from_features(scale * x, ridge=0.1)
    unit = Preconditioner.from_features(x, ridge=0.1).apply(grad)
    for scale in (2.0**-480, 2.0**490):
        found = Preconditioner.from_features(scale * x, ridge=0.1).apply(grad * scale)
        torch.testing.assert_close(found * scale, unit, rtol=1e-11, atol=0.0)
