"""PreconditionedLinear with fewer rows than features: derivatives of every order and mode.

What comes out is no gradient of a function: whatever a derivative by the weight is, it arrives
multiplied by K^-1 from the right, with K a constant. So the truth is that of a plain linear layer,
by torch's own rules, times K^-1 wherever a derivative by the weight was taken.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from sample_inputs import gaussian
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops import PreconditionedLinear

N, P, RIDGE = 3, 5, 0.1
OUT = 2  # fewer than rows; test_more_outputs_than_rows has more
X, WEIGHT, BIAS = gaussian(N, P), gaussian(OUT, P, seed=1), gaussian(OUT, seed=2)
OF_X, OF_WEIGHT = gaussian(N, P, seed=3), gaussian(OUT, P, seed=4)
K = X.mT @ X + RIDGE * X.square().sum() / P * torch.eye(P, dtype=torch.float64)
INVERSE = torch.linalg.inv(K)


def layer_of(width: int = P, out: int = OUT, **options) -> PreconditionedLinear:
    return PreconditionedLinear(width, out, ridge=RIDGE, **{"dtype": torch.float64, **options})


LAYER = layer_of()


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return functional_call(LAYER, {"weight": weight, "bias": BIAS}, (x,))


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight, BIAS)


def loss(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: function(x, weight).tanh().square().sum()


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


def on_weights(second: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Second derivatives of the plain layer times K^-1 on these axes, those of weights."""
    for axis in axes:
        second = (second.movedim(axis, -1) @ INVERSE).movedim(-1, axis)
    return second


def test_values_and_first_derivatives():
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    outputs = ours(x, weight)
    assert torch.equal(outputs, plain(X, WEIGHT))
    found = torch.autograd.grad(loss(ours)(x, weight), (x, weight))
    truth = torch.func.grad(loss(plain), (0, 1))(X, WEIGHT)
    close(found[0], truth[0])
    close(found[1], truth[1] @ INVERSE)


SECONDS = {
    "reverse over reverse": lambda f: jacrev(jacrev(f, (0, 1)), (0, 1)),
    "forward over reverse": lambda f: hessian(f, (0, 1)),
    "reverse over forward": lambda f: jacrev(jacfwd(f, (0, 1)), (0, 1)),
    "forward over forward": lambda f: jacfwd(jacfwd(f, (0, 1)), (0, 1)),
}


@pytest.mark.parametrize("order", SECONDS)
def test_second_derivatives_by_every_order_of_modes(order):
    """The mixed ones were cut: features and weight met nowhere in the graph of a gradient."""
    found = SECONDS[order](loss(ours))(X, WEIGHT)
    truth = SECONDS["reverse over reverse"](loss(plain))(X, WEIGHT)
    close(found[0][0], truth[0][0])
    close(found[0][1], on_weights(truth[0][1], (3,)))
    close(found[1][0], on_weights(truth[1][0], (1,)))
    close(found[1][1], on_weights(truth[1][1], (1, 3)))
    assert float(found[0][1].norm()) > 0.1


def test_the_third_derivative():
    found = jacrev(jacfwd(grad(loss(ours), 1), 0), 1)(X, WEIGHT)
    truth = jacrev(jacrev(grad(loss(plain), 1), 0), 1)(X, WEIGHT)
    close(found, on_weights(truth, (1, 5)))


def test_eager_mixed_second_derivatives():
    """As a penalty on the gradient of the features needs them."""
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    truths = []
    for function in (ours, plain):
        (of_x,) = torch.autograd.grad(loss(function)(x, weight), x, create_graph=True)
        truths.append(torch.autograd.grad((of_x * OF_X).sum(), weight)[0])
    close(truths[0], truths[1] @ INVERSE)


def test_gradcheck_by_what_is_a_gradient():
    """Features and bias have ordinary derivatives."""
    inputs = (X.clone().requires_grad_(), BIAS.clone().requires_grad_())

    def function(x: Tensor, bias: Tensor) -> Tensor:
        return functional_call(LAYER, {"weight": WEIGHT, "bias": bias}, (x,)).tanh()

    with_weight = layer_of()
    assert with_weight.weight.requires_grad
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)

    def of_layer(x: Tensor) -> Tensor:  # a weight that requires a gradient: the route in question
        return with_weight(x).tanh()

    assert torch.autograd.gradcheck(of_layer, inputs[:1], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of_layer, inputs[:1])


def test_forward_mode():
    value, tangent = jvp(ours, (X, WEIGHT), (OF_X, OF_WEIGHT))
    assert torch.equal(value, plain(X, WEIGHT))
    close(tangent, OF_X @ WEIGHT.mT + X @ INVERSE @ OF_WEIGHT.mT)
    _, moved = jvp(lambda w: grad(loss(ours), 1)(X, w), (WEIGHT,), (OF_WEIGHT,))
    _, truth = jvp(lambda w: grad(loss(plain), 1)(X, w), (WEIGHT,), (OF_WEIGHT @ INVERSE,))
    close(moved, truth @ INVERSE)


def test_vmap_over_weights_and_its_refusal_over_features():
    weights = torch.stack([WEIGHT, OF_WEIGHT])
    found = vmap(lambda w: grad(loss(ours), 1)(X, w))(weights)
    for one, weight in zip(found, weights, strict=True):
        close(one, grad(loss(ours), 1)(X, weight))
    with pytest.raises(NotImplementedError, match="input must be no batch of vmap"):
        vmap(LAYER)(torch.stack([X, OF_X]))


def test_compiled_layers(fresh_compiler):
    """K is read on the host, so there is a break in the graph; the numbers are the same."""
    layer = layer_of()
    truth = torch.autograd.grad(layer(X).tanh().sum(), layer.weight)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.compile(layer, backend="aot_eager")(X).tanh().sum()
    close(torch.autograd.grad(found, layer.weight)[0], truth)


def test_an_output_that_overflows_stays_infinite():
    """Infinity minus itself made it NaN."""
    layer = layer_of(dtype=torch.float32, bias=False)
    with torch.no_grad():
        layer.weight.fill_(3e38)
    x = torch.ones(2, P)
    found = layer(x)
    assert torch.equal(found, torch.full((2, OUT), math.inf))
    assert torch.isfinite(torch.autograd.grad(found.sum(), layer.weight)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_solved_in_float64(dtype):
    layer = layer_of(dtype=dtype)
    x = X.to(dtype)
    layer(x).sum().backward()
    wide = layer_of()
    wide(x.double()).sum().backward()
    torch.testing.assert_close(layer.weight.grad, wide.weight.grad.to(dtype))


def test_autocast_as_a_plain_layer_has_it():
    layer = layer_of(dtype=torch.float32)
    x = X.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        assert torch.equal(found, nn.functional.linear(x, layer.weight, layer.bias))
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("outputs", [4, 40])
def test_an_ill_conditioned_batch_in_float32(outputs):
    """kappa 1e3 in x is 1e6 in K: formed in float32, dY^T X had lost what K^-1 asks for."""
    u, _ = torch.linalg.qr(gaussian(16, 16, seed=5))
    v, _ = torch.linalg.qr(gaussian(64, 16, seed=6))
    x = ((u * torch.logspace(0, -3, 16, dtype=torch.float64)) @ v.mT).float()
    layer = layer_of(64, outputs, relative=False, dtype=torch.float32)
    upstream = gaussian(16, outputs, seed=7)
    layer(x, ridge=1e-9).backward(upstream.float())
    wide = x.double()
    s = wide @ wide.mT + 1e-9 * torch.eye(16, dtype=torch.float64)
    truth = torch.linalg.solve(s, upstream.float().double()).mT @ wide
    error = float((layer.weight.grad - truth).norm() / truth.norm())
    assert error <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, P), r"input must have shape \(\*, 5\) with at least one row.* got \(0, 5\); skip"),
        ((2, 0, P), r"with at least one row.* got \(2, 0, 5\)"),
        ((2, P + 1), r"input must have shape \(\*, 5\).* got \(2, 6\)"),
    ],
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_refusals_of_shapes_speak_of_the_input(shape, message, side):
    with pytest.raises(ValueError, match=f"PreconditionedLinear: .*{message}"):
        layer_of(P, P, side=side)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("rows", [2, 9])
def test_refusals_of_numbers_speak_of_the_input(rows):
    for scale in (1e200, 1e-200):
        with pytest.raises(ValueError, match=r"PreconditionedLinear: input must have squares"):
            layer_of()(scale * gaussian(rows, P))
    with pytest.raises(ValueError, match="PreconditionedLinear: input must be finite"):
        layer_of()(torch.full((rows, P), math.nan, dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError, match=r"K = input\^T input .* input holds only"):
        layer_of()(torch.zeros(rows, P, dtype=torch.float64))
    # Beside an absolute ridge small features do not matter.
    layer = layer_of(relative=False)
    layer(1e-200 * gaussian(rows, P)).sum().backward()


def test_few_rows_in_more_dimensions_and_without_bias():
    layer = layer_of(7, bias=False)
    x = gaussian(2, 3, 7, seed=8)
    found = layer(x)
    assert torch.equal(found, nn.functional.linear(x, layer.weight))
    flat = layer(x.reshape(6, 7))
    assert torch.equal(found.reshape(6, OUT), flat)
    first, second = (torch.autograd.grad(y.square().sum(), layer.weight)[0] for y in (found, flat))
    assert torch.equal(first, second)


def test_more_outputs_than_rows():
    """The product of the gradient is taken in another order."""
    weight = gaussian(6, P, seed=9)

    def with_layer(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(LAYER, {"weight": weight, "bias": torch.zeros(6).double()}, (x,))

    def with_linear(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)

    close(grad(loss(with_layer), 1)(X, weight), grad(loss(with_linear), 1)(X, weight) @ INVERSE)
    mixed, truth = (
        jacrev(grad(loss(function), 1), 0)(X, weight) for function in (with_layer, with_linear)
    )
    close(mixed, on_weights(truth, (1,)))
