"""Hypergradients: exact values on quadratics, autograd of the recorded steps on a network."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from bilevel_problems import (
    F64,
    Network,
    adam_step,
    normal,
    plain_step,
    quadratic,
    recorded,
    spread_matrix,
)
from torch import Tensor

from immunize_ext.bilevel import SGD, Adam, Hypergradient, InnerOptimizer, adapt
from immunize_ext.errors import NegativeCurvatureError

ALPHA, STEPS = 0.1, 5
EIGENVALUES = (4.0, 2.5, 1.0, 0.3, 0.0, -0.7)
OPTIMIZERS: dict[str, tuple[InnerOptimizer, Any]] = {
    "sgd": (SGD(0.1), plain_step(0.1, 0.0)),
    "momentum": (SGD(0.1, momentum=0.9), plain_step(0.1, 0.9)),
    "adam": (Adam(0.03), adam_step(0.03, 0.0)),
    "adamw": (Adam(0.03, weight_decay=0.1), adam_step(0.03, 0.1)),
}


def of_quadratic(
    h: Tensor, hypergradient: Hypergradient, *, alpha: float = ALPHA, steps: int = STEPS
) -> tuple[Tensor, Tensor, Any]:
    """Of F = c^T theta': what comes, c, and the adaptation."""
    c = normal(len(h), seed=3)
    theta = {"x": normal(len(h), seed=1).requires_grad_()}
    loss = quadratic(h, normal(len(h), seed=2))
    found = adapt(theta, [loss] * steps, SGD(alpha), hypergradient)
    (c @ found.parameters["x"]).backward()
    assert theta["x"].grad is not None
    return theta["x"].grad, c, found


def power(h: Tensor, count: int) -> Tensor:
    return torch.linalg.matrix_power(torch.eye(len(h), dtype=F64) - ALPHA * h, count)


@pytest.mark.parametrize("operator", ["hessian", "secant"])
def test_unrolled_gradient_descent_on_a_quadratic(operator: Any) -> None:
    h = spread_matrix(EIGENVALUES)
    found, c, adapted = of_quadratic(h, Hypergradient("unrolled", operator=operator))
    # A central difference of a linear gradient has rounding alone: eps over h of 1e-5.
    atol = 1e-13 if operator == "hessian" else 1e-8
    torch.testing.assert_close(found, power(h, STEPS) @ c, rtol=0, atol=atol)
    (sweep,) = adapted.sweeps
    assert (sweep.products, sweep.residual) == (STEPS, 0.0)
    assert sweep.contraction == pytest.approx(float(found.norm() / c.norm()))


def test_first_order_is_the_identity() -> None:
    found, c, adapted = of_quadratic(spread_matrix(EIGENVALUES), Hypergradient())
    assert torch.equal(found, c)
    assert adapted.sweeps == []


@pytest.mark.parametrize("kept", [1, 3, 99])
def test_truncated_has_the_last_factors(kept: int) -> None:
    h = spread_matrix(EIGENVALUES)
    found, c, adapted = of_quadratic(h, Hypergradient("truncated", steps=kept))
    right = power(h, min(kept, STEPS)) @ c
    torch.testing.assert_close(found, right, rtol=0, atol=1e-13)
    assert adapted.sweeps[0].products == min(kept, STEPS)


def test_implicit_by_conjugate_gradients_is_the_inverse() -> None:
    h, gamma = spread_matrix(EIGENVALUES), 1.2  # I + gamma H has eigenvalues from 0.16
    settings = Hypergradient("implicit", steps=20, gamma=gamma, tolerance=1e-13)
    found, c, adapted = of_quadratic(h, settings)
    right = torch.linalg.solve(torch.eye(6, dtype=F64) + gamma * h, c)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-11)
    (sweep,) = adapted.sweeps
    # One product for each eigenvalue; rounding may ask for another.
    assert sweep.products <= 7
    assert sweep.residual <= 1e-13


def test_implicit_by_neumann_is_the_partial_sum() -> None:
    h, gamma = spread_matrix(EIGENVALUES), 0.2
    settings = Hypergradient("implicit", steps=3, gamma=gamma, solver="neumann")
    found, c, adapted = of_quadratic(h, settings)
    terms = [torch.linalg.matrix_power(-gamma * h, j) @ c for j in range(4)]
    torch.testing.assert_close(found, torch.stack(terms).sum(0), rtol=0, atol=1e-13)
    (sweep,) = adapted.sweeps
    assert sweep.products == 3
    assert sweep.residual == pytest.approx(float(terms[-1].norm() / c.norm()))


def test_an_indefinite_system_is_a_named_error() -> None:
    h = torch.tensor([[-0.5]], dtype=F64)
    with pytest.raises(
        NegativeCurvatureError, match=r"got curvature -0\.5 with gamma = 3"
    ) as caught:
        of_quadratic(h, Hypergradient("implicit", gamma=3.0))
    assert caught.value.products == 1


def test_one_implicit_step_agrees_with_the_unroll_to_second_order() -> None:
    # (1 + alpha H)^-1 - (1 - alpha H) = alpha^2 H^2 + ..., gamma = alpha being what None means.
    h, gaps = spread_matrix(EIGENVALUES), []
    for alpha in (0.02, 0.01):
        settings = Hypergradient("implicit", steps=20, tolerance=1e-14)
        implicit, c, _ = of_quadratic(h, settings, alpha=alpha, steps=1)
        unrolled, _, _ = of_quadratic(h, Hypergradient("unrolled"), alpha=alpha, steps=1)
        torch.testing.assert_close(unrolled, c - alpha * h @ c, rtol=0, atol=1e-14)
        gaps.append(float((implicit - unrolled).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.05)


def test_implicit_adaptation_descends_on_the_proximal_objective() -> None:
    h, b = spread_matrix([1.0, 2.0]), normal(2, seed=2)
    theta = {"x": normal(2, seed=1)}
    gamma = 0.5
    end = adapt(theta, [quadratic(h, b)] * 400, SGD(0.2), Hypergradient("implicit", gamma=gamma))
    # H (x - b) + (x - theta) / gamma = 0
    right = torch.linalg.solve(h + torch.eye(2, dtype=F64) / gamma, h @ b + theta["x"] / gamma)
    torch.testing.assert_close(end.parameters["x"], right, rtol=0, atol=1e-13)


def hypergradients(
    network: Network, optimizer: InnerOptimizer, hypergradient: Hypergradient
) -> tuple[dict[str, Tensor], Any]:
    theta, gain = network.theta(), torch.tensor([1.3], dtype=F64, requires_grad=True)
    held = {"gain": gain, "fixed": torch.zeros(1)}
    found = adapt(theta, network.losses, optimizer, hypergradient, held=held)
    network.after(found.parameters).backward()
    return {**{n: p.grad for n, p in theta.items()}, "gain": gain.grad}, found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_sweep_is_autograd_of_the_recorded_steps(name: str) -> None:
    network = Network(steps=4)
    optimizer, step = OPTIMIZERS[name]
    found, adapted = hypergradients(network, optimizer, Hypergradient("unrolled"))
    theta, gain = network.theta(), torch.tensor([1.3], dtype=F64, requires_grad=True)
    end = recorded(theta, network.losses, step, {"gain": gain})
    for key, value in end.items():
        torch.testing.assert_close(adapted.parameters[key], value, rtol=0, atol=1e-13)
    right = torch.autograd.grad(network.after(end), [*theta.values(), gain])
    for key, value in zip([*theta, "gain"], right, strict=True):
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
    assert adapted.sweeps[0].products == 4


def test_a_scale_changes_nothing_but_the_range() -> None:
    network = Network(steps=3)
    plain, _ = hypergradients(network, SGD(0.1), Hypergradient("unrolled"))
    theta = network.theta()
    held = {"gain": torch.tensor([1.3], dtype=F64, requires_grad=True)}
    for operator in ("hessian", "gauss_newton"):
        for settings in (
            Hypergradient("unrolled", operator=operator),
            Hypergradient("implicit", operator=operator, gamma=0.1),
        ):
            ends = []
            for scale in (1.0, 1024.0):
                end = adapt(theta, network.losses, SGD(0.1), settings, held=held, scale=scale)
                value = network.after(end.parameters)
                ends.append(torch.autograd.grad(value, [*theta.values(), held["gain"]]))
            for one, other in zip(*ends, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
            if settings == Hypergradient("unrolled"):
                for one, key in zip(ends[0], plain, strict=True):
                    assert torch.equal(one, plain[key])


def test_gradients_by_what_is_held_of_an_implicit_end() -> None:
    # theta' = argmin h (x - b)^2 / 2 + (x - theta)^2 / (2 gamma) by b: gamma h / (1 + gamma h).
    h, gamma = 2.0, 0.7

    def loss(p: Mapping[str, Tensor]) -> Tensor:
        return h * (p["x"] - p["b"]).square().sum() / 2

    theta = {"x": torch.ones(1, dtype=F64, requires_grad=True)}
    b = torch.zeros(1, dtype=F64, requires_grad=True)
    settings = Hypergradient("implicit", gamma=gamma)
    end = adapt(theta, [loss], SGD(0.1), settings, held={"b": b})
    end.parameters["x"].sum().backward()
    assert theta["x"].grad is not None
    assert b.grad is not None
    assert float(theta["x"].grad) == pytest.approx(1 / (1 + gamma * h), rel=1e-12)
    assert float(b.grad) == pytest.approx(gamma * h / (1 + gamma * h), rel=1e-12)


class _Held:
    """A tensor that autograd keeps, and its size for as long as it is kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that kept its node would never go


def most_bytes_of_graphs(steps: int, record: bool) -> int:
    """The most that graphs keep at once while a hypergradient is made."""
    now = most = 0

    def forget(size: int) -> None:
        nonlocal now
        now -= size

    def pack(tensor: Tensor) -> _Held:
        nonlocal now, most
        held, size = _Held(tensor), tensor.numel() * tensor.element_size()
        weakref.finalize(held, forget, size)
        now += size
        most = max(most, now)
        return held

    network = Network(steps)
    theta = network.theta()
    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        if record:
            end = recorded(theta, network.losses, plain_step(0.1, 0.0))
        else:
            end = adapt(theta, network.losses, SGD(0.1), Hypergradient("unrolled")).parameters
        network.after(end).backward()
    return most


def test_the_sweep_keeps_one_graph_where_the_record_keeps_all() -> None:
    assert most_bytes_of_graphs(12, record=True) > 5 * most_bytes_of_graphs(1, record=True)
    assert most_bytes_of_graphs(12, record=False) <= most_bytes_of_graphs(1, record=False)


def test_parameters_changed_before_the_backward_pass_are_noticed() -> None:
    theta = {"x": torch.ones(2, dtype=F64, requires_grad=True)}
    loss = quadratic(spread_matrix([1.0, 2.0]), torch.zeros(2, dtype=F64))
    end = adapt(theta, [loss], SGD(0.1), Hypergradient("unrolled"))
    with torch.no_grad():
        theta["x"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.parameters["x"].sum().backward()


def test_no_step_and_no_gradient() -> None:
    theta = {"x": torch.ones(2, dtype=F64, requires_grad=True)}
    end = adapt(theta, [], SGD(0.1), Hypergradient("implicit"))
    (3.0 * end.parameters["x"]).sum().backward()
    assert torch.equal(theta["x"].grad, torch.full((2,), 3.0, dtype=F64))  # type: ignore[arg-type]
    loss = quadratic(spread_matrix([1.0, 2.0]), torch.zeros(2, dtype=F64))
    for optimizer in (SGD(0.1, momentum=0.5), Adam(0.1)):
        with torch.no_grad():
            end = adapt(theta, [loss], optimizer, Hypergradient("unrolled"))
        assert not end.parameters["x"].requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "second_order"}, "kind must be one of first_order, unrolled"),
        ({"solver": "lu"}, "solver must be one of neumann, cg"),
        ({"operator": "fisher"}, "operator must be one of hessian"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"gamma": -1.0}, "gamma must be positive and finite, got -1"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Hypergradient(**change)


def test_names_must_be_of_one_kind() -> None:
    x = torch.ones(1)
    with pytest.raises(ValueError, match="held must have other names than parameters, got 'x'"):
        adapt({"x": x}, [], SGD(0.1), held={"x": x})
