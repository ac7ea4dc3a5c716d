"""The attack: curves, budgets, and the comparison without and with immunization."""

import pytest
import torch

from immunize_ext.probing.attacks import PROBES, attack, compare_attack
from immunize_ext.probing.data import Task


def task(n: int = 40, p: int = 4, *, labels: bool = True) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n + 20, p, dtype=torch.float64, generator=generator)
    y = x @ torch.arange(1.0, p + 1, dtype=torch.float64) + 0.5 * torch.randn(
        n + 20, dtype=torch.float64, generator=generator
    )
    y = y.sign() if labels else y
    return Task("toy", x[:n], y[:n], x[n:], y[n:])


@pytest.mark.parametrize("name", PROBES)
def test_curve_is_what_the_weights_say(name: str) -> None:
    toy = task()
    theta = torch.randn(4, 4, dtype=torch.float64)
    curve = attack(toy, theta, attacker=name, budget=7)
    assert curve.attacker == name
    assert curve.steps == 7
    predicted = toy.x_test @ theta @ curve.weights
    assert float(curve.test_loss[-1]) == pytest.approx(
        float((predicted - toy.y_test).square().mean())
    )
    assert curve.test_accuracy is not None
    expected = (predicted.sign() == toy.y_test).double().mean()
    assert float(curve.test_accuracy[-1]) == pytest.approx(float(expected))
    # The start is the head 0.
    assert float(curve.train_loss[0]) == 1.0
    assert float(curve.test_accuracy[0]) == 0.0


def test_regression_has_no_accuracy() -> None:
    assert attack(task(labels=False), budget=3).test_accuracy is None


def test_no_theta_is_the_identity() -> None:
    toy = task()
    plain = attack(toy, budget=9)
    identity = attack(toy, torch.eye(4), budget=9)
    assert torch.equal(plain.test_loss, identity.test_loss)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attack(task(), budget=20)
    monkeypatch.setattr("immunize_ext.probing.attacks.linear_probe._CHUNK", 4)
    pieces = attack(task(), budget=20)
    torch.testing.assert_close(whole.test_loss, pieces.test_loss)
    assert pieces.steps == 20


def test_stop_at_ends_the_attack_once_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("immunize_ext.probing.attacks.linear_probe._CHUNK", 4)
    whole = attack(task(), budget=40)
    target = float(whole.test_loss[5])
    stopped = attack(task(), budget=40, stop_at=target)
    assert stopped.steps < 12
    assert stopped.steps_to(target) == whole.steps_to(target)


def test_float32_task_is_attacked_in_float64() -> None:
    curve = attack(task().to(dtype=torch.float32), budget=3)
    assert curve.test_loss.dtype == torch.float64


def test_extractor_may_change_the_number_of_features() -> None:
    assert attack(task(), torch.randn(4, 2), budget=3).weights.shape == (2,)


def test_comparison_without_change_is_one() -> None:
    for name in PROBES:
        result = compare_attack(task(), torch.eye(4), attacker=name)
        assert result.slowdown == (1.0, False)
        assert result.steps == result.base_steps


def test_comparison_counts_steps_to_the_target() -> None:
    toy = task(labels=False)
    theta = torch.diag(torch.tensor([5.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    result = compare_attack(toy, theta, tolerance=0.05, base_budget=300, stop_early=False)
    lowest = float(result.base.test_loss.min())
    assert result.target == pytest.approx(1.05 * lowest)
    assert result.base_steps == int(torch.nonzero(result.base.test_loss <= result.target)[0])
    assert result.steps == int(torch.nonzero(result.immunized.test_loss <= result.target)[0])
    assert result.slowdown.ratio == result.steps / result.base_steps
    assert result.slowdown.ratio > 1.5
    assert result.immunized.steps == 128 * result.base_steps


def test_comparison_says_when_the_budget_ran_out() -> None:
    theta = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-6], dtype=torch.float64))
    result = compare_attack(task(labels=False), theta, limit=4.0)
    assert result.steps is None
    assert result.slowdown == (4.0, True)


def test_comparison_against_theta0() -> None:
    theta = torch.randn(4, 4, dtype=torch.float64)
    result = compare_attack(task(), theta, theta)
    assert result.slowdown == (1.0, False)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="attacker must be one of gradient_descent, line_search"):
        attack(task(), attacker="sgd")
    with pytest.raises(ValueError, match="budget must be at least 1"):
        attack(task(), budget=0)
    with pytest.raises(ValueError, match=r"theta must have shape \(4, q\)"):
        attack(task(), torch.eye(3))
    for arguments in ({"tolerance": -0.1}, {"limit": 0.5}):
        with pytest.raises(ValueError, match="tolerance must be at least 0 and limit at least 1"):
            compare_attack(task(), torch.eye(4), **arguments)


@pytest.mark.parametrize("attacker", ["whitened", "closed_form_ridge"])
def test_a_task_that_is_solved_exactly_is_no_protection(attacker: str) -> None:
    # One class beside a constant feature: the head that reads it makes no error at all.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    x[:, 0] = -0.42421297
    y = torch.ones(60, dtype=torch.float64)
    x[:, 4] = 0.0
    x[40:, 4] = 1e-3  # a direction that training has not: who meets it depends on theta
    square = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    theta = torch.diag(torch.logspace(0, 6, 5, dtype=torch.float64)) @ torch.linalg.qr(square).Q
    task = Task("constant", x[:40], y[:40], x[40:], y[40:])
    assert str(compare_attack(task, theta, attacker=attacker).slowdown) == "1.0x"
