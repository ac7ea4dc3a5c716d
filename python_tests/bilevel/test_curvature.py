"""Products with second derivatives are those of the dense matrices; theorem on first order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bilevel_problems import F64, Network, normal, quadratic, spread_matrix
from torch import Tensor

from immunize_ext.bilevel import (
    SGD,
    GaussNewton,
    Hessian,
    Hypergradient,
    Parameters,
    Secant,
    adapt,
    displacement_norm,
    dot,
    gradient,
    operator_norm,
)


def flat(table: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in table.values()])


def split(vector: Tensor, like: Mapping[str, Tensor]) -> Parameters:
    parts = vector.split([value.numel() for value in like.values()])
    return {n: part.view_as(like[n]) for n, part in zip(like, parts, strict=True)}


def dense(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, at)


@pytest.fixture
def network() -> Network:
    return Network(steps=1)


def test_products_of_a_network(network: Network) -> None:
    (loss,), theta = network.losses, network.theta()
    point = flat(theta).detach()
    hessian = torch.autograd.functional.hessian(lambda x: loss(split(x, theta)), point)
    j = dense(lambda x: loss.outputs(split(x, theta)).flatten(), point)
    gauss_newton = j.mT @ j * (2.0 / len(j))  # mean of squares: second derivative 2 / n
    direction = split(normal(len(point), seed=7), theta)
    slope = gradient(loss(theta), theta)
    for operator, matrix, tolerance in (
        (Hessian, hessian, 1e-12),
        (GaussNewton, gauss_newton, 1e-12),
        # h = eps^(1/3): h^2 of a third derivative around 1.
        (Secant, hessian, 1e-7),
    ):
        built = operator(loss, theta)
        found = built(direction)
        torch.testing.assert_close(
            flat(found.moved), matrix @ flat(direction), rtol=0, atol=tolerance
        )
        assert found.held == {}
        torch.testing.assert_close(flat(built.gradient), flat(slope), rtol=0, atol=1e-14)
        again = built(direction)
        assert torch.equal(flat(found.moved), flat(again.moved))
    assert float(torch.linalg.eigvalsh(hessian)[0]) < -1e-3  # they differ where it matters


def test_products_by_what_is_held(network: Network) -> None:
    (loss,), theta = network.losses, network.theta()
    gain = torch.tensor([1.3], dtype=F64, requires_grad=True)
    direction = split(normal(len(flat(theta)), seed=7), theta)
    slope = gradient(loss({**theta, "gain": gain}), theta, create_graph=True)
    along = torch.stack([(slope[n] * direction[n]).sum() for n in theta]).sum()
    (right,) = torch.autograd.grad(along, gain)
    for operator, tolerance in ((Hessian, 1e-13), (Secant, 1e-7)):
        found = operator(loss, theta, {"gain": gain, "fixed": torch.ones(1)})(direction)
        assert set(found.held) == {"gain"}
        torch.testing.assert_close(found.held["gain"], right, rtol=0, atol=tolerance)


def test_what_enters_linearly_has_no_second_derivative() -> None:
    at = {"x": torch.ones(2, dtype=F64), "unused": torch.ones(3, dtype=F64)}
    for operator in (Hessian, Secant):
        found = operator(lambda p: 3.0 * p["x"].sum(), at)({n: v.clone() for n, v in at.items()})
        assert float(flat(found.moved).abs().max()) < 1e-9
        still = operator(lambda p: 3.0 * p["x"].sum(), at)({n: 0 * v for n, v in at.items()})
        assert not flat(still.moved).any()


def test_gauss_newton_needs_to_see_the_outputs() -> None:
    with pytest.raises(ValueError, match=r"loss must be Composed\(outputs, criterion\), got func"):
        GaussNewton(lambda p: p["x"].sum(), {"x": torch.ones(1)})


def test_inner_products_are_summed_in_float64() -> None:
    # In float32 the small part is lost beside the large one.
    table = {"large": torch.tensor([1e4]), "small": torch.full((100,), 1e-2)}
    assert dot(table, table) == pytest.approx(1e8 + 1e-2, rel=1e-12)
    assert dot({}, {}) == 0.0


def test_a_norm_is_met_from_below() -> None:
    a = normal(5, 5, seed=1)
    right = float(torch.linalg.matrix_norm(a, ord=2))

    def bound(pairs: int) -> float:
        start = {"x": normal(5, seed=2)}
        return operator_norm(
            lambda v: {"x": a @ v["x"]}, lambda u: {"x": a.mT @ u["x"]}, start, pairs=pairs
        )

    assert bound(1) <= bound(5) <= right * (1 + 1e-12)
    assert bound(60) == pytest.approx(right, rel=1e-6)
    nothing = {"x": torch.zeros(2)}
    assert operator_norm(lambda v: v, lambda u: u, nothing, pairs=3) == 0.0


# Two adaptations and a linear merge that is not symmetric: theta' = theta - alpha sum P_n g_n.

ALPHA = 0.2


def merged(settings: Hypergradient) -> tuple[Callable[[Parameters], Parameters], Tensor]:
    """The map, and J."""
    hessians = [spread_matrix([3.0, 1.0, -2.0, 0.5], seed=n) for n in (1, 2)]
    parts = [normal(4, 4, seed=n + 10) for n in (1, 2)]
    losses = [quadratic(h, normal(4, seed=n)) for n, h in enumerate(hessians)]

    def move(p: Parameters) -> Parameters:
        total = p["x"]
        for part, loss in zip(parts, losses, strict=True):
            end = adapt(p, [loss], SGD(ALPHA), settings).parameters
            total = total + part @ (end["x"] - p["x"])
        return {"x": total}

    return move, sum(p @ h for p, h in zip(parts, hessians, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("operator", ["hessian", "secant"])
def test_the_displacement_of_a_merge_is_alpha_j(operator: Any) -> None:
    move, j = merged(Hypergradient("unrolled", operator=operator))
    right = ALPHA * float(torch.linalg.matrix_norm(j, ord=2))
    theta = {"x": normal(4, seed=3)}
    assert displacement_norm(move, theta, pairs=40) == pytest.approx(right, rel=1e-5)
    assert displacement_norm(move, theta, pairs=2) <= right * (1 + 1e-5)


def test_first_order_ascends_below_one_and_may_descend_above() -> None:
    # <g, grad F> >= (1 - |E|) |g|^2 for F = L after one step, L = h x^2 / 2, E = alpha h.
    for h, ascends in ((0.5 / ALPHA, True), (3.0 / ALPHA, False)):
        theta = {"x": torch.tensor([2.0], dtype=F64, requires_grad=True)}
        loss = quadratic(torch.tensor([[h]], dtype=F64), torch.zeros(1, dtype=F64))
        found = {}
        for kind in ("first_order", "unrolled"):
            end = adapt(theta, [loss], SGD(ALPHA), Hypergradient(kind)).parameters
            (found[kind],) = torch.autograd.grad(loss(end), theta["x"])

        def move(p: Parameters, loss: Any = loss) -> Parameters:
            return adapt(p, [loss], SGD(ALPHA), Hypergradient("unrolled")).parameters

        size = displacement_norm(move, theta)
        g, exact = found["first_order"], found["unrolled"]
        assert float(g @ exact) >= (1.0 - size) * float(g @ g) - 1e-9
        assert (float(g @ exact) > 0.0) is ascends
        assert (size < 1.0) is ascends
