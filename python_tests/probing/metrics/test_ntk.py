"""The kernel of a network's gradients: against its Jacobian, and what it foretells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from immunize_ext.probing.metrics import (
    empirical_ntk,
    kernel_descent_steps,
    ntk_log_condition_number,
)


class Attention(nn.Module):
    """One block of a ViT: tokens, a layer used twice, an embedding, a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(4, 6))
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.twice = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6, bias=False)
        self.other.weight = self.tied.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + (q @ k.mT).softmax(-1) @ v
        x = self.twice(self.twice(x).tanh())
        return self.head(self.other(self.tied(x)).mean(1))


class Convolutions(nn.Module):
    """Strides and paddings, by channel, a norm; what comes after changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=4, padding=1),
            nn.Conv2d(4, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((1, 2, 3))


def network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "attention":
        return Attention().double(), torch.randn(5, 4, 6, dtype=torch.float64)
    if kind == "convolutions":
        return Convolutions().double().eval(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model.double(), torch.randn(5, 3, dtype=torch.float64)


def jacobian(model: nn.Module, inputs: Tensor, layers: list[str] | None) -> Tensor:
    weights = {
        name: p
        for name, p in model.named_parameters()
        if layers is None or any(name == x or name.startswith(f"{x}.") for x in layers)
    }

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (inputs,)).flatten()

    found = torch.func.jacrev(outputs)(weights)
    return torch.cat([j.flatten(1) for j in found.values()], dim=1)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("perceptron", None),
        ("perceptron", ["0"]),
        ("perceptron", ["0.bias"]),
        ("attention", None),
        ("attention", ["qkv", "tied"]),
        ("attention", ["place", "twice"]),
        ("convolutions", None),
        ("convolutions", ["body.0", "body.4"]),
    ],
)
def test_the_kernel_is_that_of_the_jacobian(kind, layers):
    model, inputs = network(kind)
    j = jacobian(model, inputs, layers)
    found = empirical_ntk(model, inputs, layers)
    torch.testing.assert_close(found, j @ j.mT, rtol=1e-10, atol=1e-10)
    assert not found.requires_grad
    assert all(p.grad is None for p in model.parameters())
    wide = empirical_ntk(model.float(), inputs.float(), layers)
    torch.testing.assert_close(wide, found, rtol=1e-4, atol=1e-4)


def test_frozen_weights_do_not_count():
    model, inputs = network("perceptron")
    model[0].requires_grad_(False)
    torch.testing.assert_close(
        empirical_ntk(model, inputs), empirical_ntk(model, inputs, ["2"]), rtol=1e-12, atol=0
    )
    with pytest.raises(ValueError, match=r"layers must name modules or weights .* got '0'"):
        empirical_ntk(model, inputs, ["0"])
    with pytest.raises(ValueError, match="must have weights that require gradients"):
        empirical_ntk(model.requires_grad_(False), inputs)


def test_what_mixes_samples_is_refused():
    model, inputs = network("convolutions")
    with pytest.raises(ValueError, match=r"got 'body\.1' in training mode"):
        empirical_ntk(model.train(), inputs)
    with pytest.raises(ValueError, match=r"must give \(n,\) or \(n, k\)"):
        empirical_ntk(nn.Linear(6, 6), torch.ones(5, 2, 6))


@pytest.mark.parametrize("kind", ["perceptron", "attention", "convolutions"])
def test_its_condition_number_is_a_loss(kind):
    """Second derivatives of the network and of the operator, against differences."""
    model, inputs = network(kind)
    layers = {"perceptron": ["0"], "attention": ["qkv"], "convolutions": ["body"]}[kind]
    names = [name for name, _ in model.named_parameters()]
    weights = dict(model.named_parameters())
    name = next(n for n in names if n.startswith(layers[0]))

    def value(step: float) -> Tensor:
        with torch.no_grad():
            weights[name].add_(step * direction)
        found = ntk_log_condition_number(model, inputs, layers, floor=1e-2)
        with torch.no_grad():
            weights[name].sub_(step * direction)
        return found

    direction = torch.randn_like(weights[name])
    (grad,) = torch.autograd.grad(
        ntk_log_condition_number(model, inputs, layers, floor=1e-2), weights[name]
    )
    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="floor must be at least 0"):
        ntk_log_condition_number(model, inputs, floor=-1.0)


def test_gradcheck_of_the_kernel_by_the_inputs():
    model, inputs = network("perceptron")

    def value(x: Tensor) -> Tensor:
        return empirical_ntk(model, x, create_graph=True)

    assert torch.autograd.gradcheck(value, inputs.requires_grad_())


def test_predicted_steps_of_a_linear_probe_are_those_of_a_run():
    torch.manual_seed(1)
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    y = x.sum(1) + 0.1 * y
    kernel, w = x @ x.mT, torch.zeros(5, dtype=torch.float64)
    rate = 0.9 / float(torch.linalg.eigvalsh(kernel)[-1])
    share = 0.02
    predicted = kernel_descent_steps(kernel, -y, share=share)
    steps = 0
    while (x @ w - y).square().sum() > share * y.square().sum() and steps < 10**4:
        w = w - rate * x.mT @ (x @ w - y)
        steps += 1
    assert predicted == steps > 1


def test_what_the_kernel_cannot_fit_takes_for_ever():
    kernel = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    residual = torch.ones(2)
    assert kernel_descent_steps(kernel, residual, share=0.35) == math.inf
    assert kernel_descent_steps(kernel, residual, share=0.6) == 1.0
    assert kernel_descent_steps(kernel, residual, rate=3.0, share=0.6) == math.inf
    assert kernel_descent_steps(0.0 * kernel, residual) == math.inf
    with pytest.raises(ValueError, match="kernel_descent_steps: kernel and residual"):
        kernel_descent_steps(kernel, torch.ones(3))
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\)"):
        kernel_descent_steps(kernel, residual, share=1.0)
