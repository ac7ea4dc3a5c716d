"""Functional steps are those of torch; the pullback of Adam is autograd's, without its NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bilevel_problems import F64, normal

from immunize_ext.bilevel import SGD, Adam, InnerOptimizer, adam_step_vjp

PAIRS: dict[str, tuple[InnerOptimizer, Any]] = {
    "sgd": (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "adam": (Adam(0.1), lambda p: torch.optim.Adam(p, 0.1)),
    "adamw": (Adam(0.1, weight_decay=0.3), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_those_of_torch(name: str) -> None:
    ours, theirs = PAIRS[name]
    x = {"x": normal(7, seed=0)}
    parameter = x["x"].clone().requires_grad_()
    optimizer = theirs([parameter])
    state = ours.start(x)
    for count in range(1, 6):
        parameter.grad = normal(7, seed=count)
        optimizer.step()
        x, state = ours.step(x, {"x": parameter.grad}, state, count)
        torch.testing.assert_close(x["x"], parameter.detach(), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_the_pullback_of_adam_is_autograds(count: int) -> None:
    g, m, x_bar, m_bar, v_bar = (normal(9, seed=seed) for seed in range(5))
    v = normal(9, seed=5).square()
    if count == 1:
        m, v = torch.zeros_like(m), torch.zeros_like(v)
    inputs = [t.requires_grad_() for t in (g, m, v)]
    adam = Adam(0.1, betas=(0.8, 0.95), epsilon=1e-3)
    tables = ({"x": inputs[1]}, {"x": inputs[2]})
    # Out of place, so that autograd follows: the formulas of Algorithm 1.
    m1 = 0.8 * inputs[1] + 0.2 * inputs[0]
    v1 = 0.95 * inputs[2] + 0.05 * inputs[0] ** 2
    x1 = -0.1 * (m1 / (1 - 0.8**count)) / ((v1 / (1 - 0.95**count)).sqrt() + 1e-3)
    with torch.no_grad():
        step = adam.step({"x": torch.zeros_like(g)}, {"x": g}, tables, count)
    torch.testing.assert_close(step.parameters["x"], x1.detach(), rtol=1e-13, atol=1e-15)
    right = torch.autograd.grad([x1, m1, v1], inputs, [x_bar, m_bar, v_bar])
    found = adam_step_vjp(
        x_bar,
        m_bar,
        v_bar,
        g.detach(),
        m1.detach(),
        v1.detach(),
        rate=0.1,
        betas=(0.8, 0.95),
        epsilon=1e-3,
        count=count,
    )
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_parameter_that_never_had_a_gradient_gives_no_nan() -> None:
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    of_gradient, of_first, of_second = adam_step_vjp(
        one, zero, zero, zero, zero, zero, rate=0.1, epsilon=0.01, count=1
    )
    # x' = -alpha g / (|g| + eps) near 0: slope -alpha / eps.
    assert float(of_gradient) == pytest.approx(-0.1 / 0.01, rel=1e-12)
    assert float(of_first) == pytest.approx(-0.9 * 0.1 / 0.01 / 0.1, rel=1e-12)
    assert float(of_second) == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGD(0.0), "SGD: rate must be positive"),
        (lambda: SGD(0.1, momentum=1.0), "SGD: momentum must be 0 to 1, below 1"),
        (lambda: Adam(float("nan")), "Adam: rate must be positive"),
        (lambda: Adam(0.1, betas=(1.0, 0.9)), "Adam: betas must be 0 to 1"),
        (lambda: Adam(0.1, epsilon=0.0), "Adam: epsilon must be positive"),
        (lambda: Adam(0.1, weight_decay=-1.0), "Adam: weight_decay must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
