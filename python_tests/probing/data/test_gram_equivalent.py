"""Fewer rows, the same attack: what may not change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.probing.attacks import ATTACKS, compare_attack
from immunize_ext.probing.data import Task, gram_equivalent, gram_rows


def long_task(seed: int, n: int = 60, p: int = 4) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, dtype=torch.float64, generator=generator)
    x = x * torch.logspace(0, -1, p, dtype=torch.float64)
    y = torch.where(x.sum(1) + torch.randn(n, dtype=torch.float64, generator=generator) > 0, 1, -1)
    cut = 2 * n // 3
    y = y.to(torch.float64)
    return Task("long", x[:cut], y[:cut], x[cut:], y[cut:])


@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("attacker", ["gradient_descent", "line_search", "momentum", "adam"])
def test_attacks_are_the_same(attacker: str, seed: int) -> None:
    task = long_task(seed)
    short = gram_equivalent(task)
    assert short.x_train.shape == (5, 4)
    curves = [ATTACKS[attacker].run(None, one, steps=20) for one in (task, short)]
    # Rounding of one QR, carried through 20 contractive or tuned steps.
    for name in ("train_loss", "test_loss"):
        first, second = (torch.tensor(c.score(name), dtype=torch.float64) for c in curves)
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)
    assert all("test_accuracy" in curve.scores for curve in curves)
    rates = [curve.config.get("learning_rate") for curve in curves]
    assert rates[0] == rates[1]


def test_gram_is_the_same_and_short_inputs_stay() -> None:
    x = long_task(0).x_train
    torch.testing.assert_close(gram_rows(x).mT @ gram_rows(x), x.mT @ x)
    first = x[:8]
    assert gram_rows(first) is first
    task = Task("short", x[:8], x[:8, 0], x, x[:, 0])
    assert gram_equivalent(task) is task


@pytest.mark.parametrize("attacker", ["whitened", "line_search", "conjugate_gradients"])
def test_rank_deficient_inputs_get_no_new_directions(attacker: str) -> None:
    """Constant pixels are null directions; rounding must not become features of theirs."""
    task = long_task(1, n=120)
    constant = [torch.full((len(x), 6), -0.42421297) for x in (task.x_train, task.x_test)]
    mix = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    x_train, x_test = (
        torch.cat([x, c.to(x)], dim=1) @ mix
        for x, c in zip((task.x_train, task.x_test), constant, strict=True)
    )
    wide = Task("wide", x_train, task.y_train, x_test, task.y_test)
    theta = torch.diag(torch.logspace(0, 2, 10, dtype=torch.float64)) @ mix
    assert gram_rows(x_train).shape == (5, 10)  # four features and the constant
    slowdowns = [compare_attack(t, theta, attacker=attacker) for t in (wide, gram_equivalent(wide))]
    assert slowdowns[0].slowdown == slowdowns[1].slowdown
    torch.testing.assert_close(slowdowns[0].target, slowdowns[1].target, rtol=1e-6, atol=1e-9)
    if attacker == "whitened":
        assert slowdowns[1].slowdown.ratio == 1.0
