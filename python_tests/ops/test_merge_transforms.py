"""Second derivatives of the merge in every order of forward and reverse, against their values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sample_inputs import gaussian, taking_route
from torch import Tensor

from immunize_ext.ops import RegularizationFactor, merge_kv

jvp, grad, vmap = torch.func.jvp, torch.func.grad, torch.func.vmap
INF = float("inf")

C = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
TANGENT = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
SECOND = {
    "jvp of jvp": lambda f, x, t: jvp(lambda y: jvp(f, (y,), (t,))[1], (x,), (t,))[1],
    "grad of jvp": lambda f, x, t: (grad(lambda y: jvp(f, (y,), (t,))[1])(x) * t).sum(),
    "jvp of grad": lambda f, x, t: (jvp(grad(f), (x,), (t,))[1] * t).sum(),
    "grad of grad": lambda f, x, t: (grad(lambda y: (grad(f)(y) * t).sum())(x) * t).sum(),
}


def total(c: Tensor, hardness: float | Tensor = INF) -> Tensor:
    """Sum of W for W0 = 0 (2 x 2), V = [1, 2] and Q = I: 3 (c_1 + c_2) / (|c|^2 + 1/mu)."""
    factor = RegularizationFactor.identity(2)
    base, value = torch.zeros(2, 2).double(), torch.tensor([[1.0], [2.0]]).double()
    return merge_kv([base], None, [c], factor, values=[value], hardness=hardness)[0].sum()


@pytest.mark.parametrize("order", SECOND)
def test_second_derivative_by_hand(route: str, order: str) -> None:
    """Was 0: rules for forward mode used a residual that was marked not differentiable."""
    with taking_route(route):
        found = SECOND[order](total, C, TANGENT)
    assert float(found) == pytest.approx(0.624, rel=1e-12)


@pytest.mark.parametrize("order", SECOND)
def test_second_derivative_in_the_hardness(route: str, order: str) -> None:
    """9 mu / (5 mu + 1) at mu = 2."""
    with taking_route(route):
        mu, one = torch.tensor(2.0).double(), torch.tensor(1.0).double()
        found = SECOND[order](lambda m: total(C, m), mu, one)
    assert float(found) == pytest.approx(-90 / 11**3, rel=1e-12)


def everything(hardness: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A scalar of one vector that holds base, concepts, embeddings, C_reg and ridge."""
    shapes = [(2, 3), (2, 3), (2, 3), (1, 3), (1, 3), (4, 3), ()]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    weight = gaussian(2, 3, seed=9)

    def function(x: Tensor) -> Tensor:
        parts = [p.reshape(s) for p, s in zip(x.split(sizes), shapes, strict=True)]
        base, first, second, one, other, c_reg, ridge = parts
        factor = RegularizationFactor.from_embeddings(c_reg, ridge=ridge, relative=False)
        concepts = [[first], [second]]
        (merged,) = merge_kv([base], concepts, [one, other], factor, hardness=hardness)
        return (merged.sin() * weight).sum()

    x = gaussian(sum(sizes), seed=4)
    x[-1] = 0.4
    return function, x


@pytest.mark.parametrize("hardness", [INF, 3.0])
def test_every_order_agrees_in_every_argument(hardness: float) -> None:
    """The Hessian times a vector, of weights, tokens, captions and ridge together."""
    function, x = everything(hardness)
    t = gaussian(len(x), seed=5)
    truth = torch.autograd.functional.vhp(function, x, t)[1]
    of_grad = jvp(grad(function), (x,), (t,))[1]
    torch.testing.assert_close(of_grad, truth, rtol=1e-9, atol=1e-10)
    of_jvp = grad(lambda y: jvp(function, (y,), (t,))[1])(x)
    torch.testing.assert_close(of_jvp, truth, rtol=1e-9, atol=1e-10)
    twice = jvp(lambda y: jvp(function, (y,), (t,))[1], (x,), (t,))[1]
    torch.testing.assert_close(twice, truth @ t, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("hardness", [INF, 3.0])
def test_hessians_and_vmap_of_jvp(hardness: float) -> None:
    weights = gaussian(2, 3, seed=1)
    factor = RegularizationFactor.from_embeddings(gaussian(9, 3, seed=2))

    base, value = gaussian(2, 3, seed=3), gaussian(2, 2, seed=5)

    def function(c: Tensor) -> Tensor:
        (merged,) = merge_kv([base], None, [c], factor, values=[value], hardness=hardness)
        return (merged * weights).sum()

    c = gaussian(2, 3, seed=6)
    truth = torch.autograd.functional.hessian(function, c)
    for found in (
        torch.func.hessian(function)(c),
        torch.func.jacrev(torch.func.jacfwd(function))(c),
        torch.func.jacfwd(torch.func.jacfwd(function))(c),
    ):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
    directions = torch.eye(6).double().reshape(6, 2, 3)
    pushed = vmap(lambda t: jvp(function, (c,), (t,))[1])(directions)
    torch.testing.assert_close(pushed, grad(function)(c).reshape(6), rtol=1e-11, atol=1e-12)


def test_forward_mode_of_compiled_code() -> None:
    """The tangent was 0 there: right, or refused."""
    compiled = torch.compile(lambda c: jvp(total, (c,), (TANGENT,))[1], backend="aot_eager")
    # d/dc_1 of 3 (c_1 + c_2) / |c|^2 at (2, 1): 3 / 5 - 9 * 4 / 25.
    assert float(compiled(C)) == pytest.approx(-0.84, rel=1e-12)


@pytest.mark.parametrize("fault", ["not finite", "contradiction"])
def test_compiled_code_refuses_what_eager_code_refuses(fault: str) -> None:
    """A graph has no names to tell, but it must not go on with the numbers either."""
    factor = RegularizationFactor.identity(2)
    base, values = torch.zeros(2, 2).double(), torch.tensor([[1.0, 1.0], [2.0, 2.0]]).double()

    def function(v: Tensor) -> Tensor:
        return merge_kv([base], None, [C, C], factor, values=[v])[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values), function(values))
    values[0, 1] = float("nan") if fault == "not finite" else 3.0
    with pytest.raises(ValueError, match="merge_kv"):
        function(values)
    with pytest.raises(RuntimeError, match="merge_kv: a layer cannot be merged"):
        compiled(values)
