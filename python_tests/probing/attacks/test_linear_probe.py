"""The attack: curves, budgets, and the comparison without and with immunization."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from immunize_ext.probing.attacks import (
    ATTACKS,
    STANDARD,
    AttackCurve,
    compare_attack,
    compare_features,
)
from immunize_ext.probing.attacks.losses import LOSSES
from immunize_ext.probing.data import Task


def task(n: int = 40, p: int = 4, *, labels: bool = True) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n + 20, p, dtype=torch.float64, generator=generator)
    y = x @ torch.arange(1.0, p + 1, dtype=torch.float64) + 0.5 * torch.randn(
        n + 20, dtype=torch.float64, generator=generator
    )
    y = y.sign() if labels else y
    return Task("toy", x[:n], y[:n], x[n:], y[n:])


def attack(
    toy: Task, theta: torch.Tensor | None = None, *, attacker: str = "gradient_descent", **more: Any
) -> AttackCurve:
    """One attack; with ``stop_at`` it may end early."""
    found: AttackCurve = ATTACKS[attacker].run(theta, toy, **more)
    return found


def scores(curve: AttackCurve, name: str = "test_loss") -> torch.Tensor:
    return torch.tensor(curve.score(name), dtype=torch.float64)


@pytest.mark.parametrize("name", STANDARD)
def test_curve_is_what_the_weights_say(name: str) -> None:
    toy = task()
    theta = torch.randn(4, 4, dtype=torch.float64)
    curve = attack(toy, theta, attacker=name, steps=7)
    assert curve.attack == name
    assert curve.target == "toy"
    assert curve.steps == list(range(8))
    iterates = ATTACKS[name].iterates(toy.x_train @ theta, toy.y_train, LOSSES["squared"])
    head = next(itertools.islice(iterates, 7, None))[:, 0]
    predicted = toy.x_test @ theta @ head
    assert scores(curve)[-1] == pytest.approx(float((predicted - toy.y_test).square().mean()))
    expected = (predicted.sign() == toy.y_test).double().mean()
    assert curve.score("test_accuracy")[-1] == pytest.approx(float(expected))
    # The start is the head 0.
    assert curve.score("train_loss")[0] == 1.0
    assert curve.score("test_accuracy")[0] == 0.0
    assert AttackCurve.from_dict(curve.to_dict()) == curve


def test_a_curve_says_in_a_line_what_it_is() -> None:
    text = repr(attack(task(labels=False), steps=3))
    assert text == "AttackCurve('gradient_descent' on 'toy', 3 steps, train_loss, test_loss)"


def test_regression_has_no_accuracy() -> None:
    assert "test_accuracy" not in attack(task(labels=False), steps=3).scores


def test_no_theta_is_the_identity() -> None:
    toy = task()
    plain = attack(toy, steps=9)
    identity = attack(toy, torch.eye(4), steps=9)
    assert plain.scores == identity.scores


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attack(task(), steps=20)
    monkeypatch.setattr("immunize_ext.probing.attacks.linear_probe._CHUNK", 4)
    pieces = attack(task(), steps=20)
    torch.testing.assert_close(scores(whole), scores(pieces))
    assert pieces.steps[-1] == 20


def test_stop_at_ends_the_attack_once_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("immunize_ext.probing.attacks.linear_probe._CHUNK", 4)
    whole = attack(task(), steps=40)
    target = whole.score("test_loss")[5]
    stopped = attack(task(), steps=40, stop_at=target)
    assert stopped.steps[-1] < 12
    reached = [c.steps_to("test_loss", target, below=True) for c in (stopped, whole)]
    assert reached[0] == reached[1]


def test_float32_task_is_attacked_in_float64() -> None:
    toy = task().to(dtype=torch.float32)
    exact = attack(toy.to(dtype=torch.float64), steps=3)
    assert attack(toy, steps=3).scores == exact.scores


def test_extractor_may_change_the_number_of_features() -> None:
    assert attack(task(), torch.randn(4, 2), steps=3).steps == [0, 1, 2, 3]


def test_comparison_without_change_is_one() -> None:
    for name in STANDARD:
        result = compare_attack(task(), torch.eye(4), attacker=name)
        assert result.slowdown == (1.0, False)
        assert result.steps == result.base_steps


def test_comparison_counts_steps_to_the_target() -> None:
    toy = task(labels=False)
    theta = torch.diag(torch.tensor([5.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    result = compare_attack(toy, theta, tolerance=0.05, base_budget=300, stop_early=False)
    base, found = scores(result.base), scores(result.immunized)
    lowest = float(base.min())
    assert result.target == pytest.approx(1.05 * lowest)
    assert result.base_steps == int(torch.nonzero(base <= result.target)[0])
    assert result.steps == int(torch.nonzero(found <= result.target)[0])
    assert result.slowdown.ratio == result.steps / result.base_steps
    assert result.slowdown.ratio > 1.5
    assert result.immunized.steps[-1] == 128 * result.base_steps


def test_comparison_says_when_the_budget_ran_out() -> None:
    theta = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-6], dtype=torch.float64))
    result = compare_attack(task(labels=False), theta, limit=4.0)
    assert result.steps is None
    assert result.slowdown == (4.0, True)


def test_two_extractors_are_compared_by_their_features() -> None:
    toy = task(labels=False)
    theta = torch.diag(torch.tensor([5.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    theta0 = torch.eye(4, dtype=torch.float64)[:, :3]

    def features(extractor: torch.Tensor) -> Task:
        return replace(toy, x_train=toy.x_train @ extractor, x_test=toy.x_test @ extractor)

    found = compare_features(features(theta), features(theta0), base_budget=300)
    expected = compare_attack(toy, theta, theta0, base_budget=300)
    assert found.slowdown == expected.slowdown
    assert found.target == pytest.approx(expected.target)
    other = replace(features(theta0), y_train=-toy.y_train)
    with pytest.raises(ValueError, match="base must have the targets y_train of immunized"):
        compare_features(features(theta), other)
    with pytest.raises(ValueError, match="compare_features: base_budget must be at least 1"):
        compare_features(toy, toy, base_budget=0)


def test_comparison_against_theta0() -> None:
    theta = torch.randn(4, 4, dtype=torch.float64)
    result = compare_attack(task(), theta, theta)
    assert result.slowdown == (1.0, False)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="compare_attack: sgd is no attack; "):
        compare_attack(task(), torch.eye(4), attacker="sgd")
    with pytest.raises(ValueError, match="gradient_descent: steps must be at least 1"):
        attack(task(), steps=0)
    with pytest.raises(ValueError, match=r"theta must have shape \(4, q\)"):
        attack(task(), torch.eye(3), steps=1)
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


@pytest.mark.parametrize("attacker", list(ATTACKS))
@pytest.mark.parametrize("scale", [2.0**-600, 2.0**600])
def test_no_scale_of_theta_looks_like_protection(attacker: str, scale: float) -> None:
    """Squares of such features overflow or vanish; an attacker who stops short is an artefact."""
    theta = scale * torch.eye(4, dtype=torch.float64)
    result = compare_attack(task(), theta, attacker=attacker, base_budget=100)
    assert result.slowdown == (1.0, False)
    pairs = zip(result.immunized.score("test_loss"), result.base.score("test_loss"), strict=False)
    assert all(found == pytest.approx(expected, rel=1e-9) for found, expected in pairs)


def test_losses_that_overflow_are_neither_protection_nor_none() -> None:
    wild = replace(ATTACKS["momentum"], learning_rates=(1e3, 1e4))  # type: ignore[type-var]
    with pytest.raises(ValueError, match="losses finite without immunization, got NaN or infinity"):
        compare_attack(task(), torch.eye(4), attacker=wild)
    with pytest.raises(ValueError, match=r"x @ theta must be finite, got an overflow"):
        compare_attack(task(), 1e308 * torch.ones(4, 4, dtype=torch.float64))


def test_a_kernel_probe_learns_what_no_linear_one_does() -> None:
    """The sign of a product, before and after a lock on the linear direction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    y = torch.where(x[:, 0] * x[:, 1] > 0, 1.0, -1.0).double()
    product = Task("product", x[:300], y[:300], x[300:], y[300:])
    best = {
        name: max(ATTACKS[name].run(None, product, steps=30).score("test_accuracy"))
        for name in ("kernel", "closed_form_ridge")
    }
    assert best["kernel"] > 0.9
    assert best["closed_form_ridge"] < 0.7
    few = replace(ATTACKS["kernel"], centres=5)  # type: ignore[type-var]
    assert max(few.run(None, product, steps=30).score("test_accuracy")) < best["kernel"]
    again = [few.run(None, product, steps=5, seed=s).score("test_loss") for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    with pytest.raises(ValueError, match="centres must be at least 1"):
        replace(ATTACKS["kernel"], centres=0)  # type: ignore[type-var]
