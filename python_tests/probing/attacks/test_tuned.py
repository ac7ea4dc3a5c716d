"""Attackers with a learning rate against torch's own optimizers, and the harness around them."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from immunize_ext.probing.attacks import (
    ATTACKS,
    AttackCurve,
    TunedAttack,
    attack_at_budgets,
    compare_attack,
    knows,
)
from immunize_ext.probing.attacks.losses import LOSSES
from immunize_ext.probing.attacks.probes import safe_step
from immunize_ext.probing.data import Task

TUNED = [name for name, attack in ATTACKS.items() if isinstance(attack, TunedAttack)]


def with_(name: str, **settings: Any) -> Any:
    return replace(ATTACKS[name], **settings)  # type: ignore[type-var]


def run(task: Task, theta: torch.Tensor | None = None, **more: Any) -> AttackCurve:
    """An attack by name, with settings of its own."""
    steps, name = more.pop("budget"), more.pop("attacker")
    found: AttackCurve = with_(name, **more).run(theta, task, steps=steps)
    return found


def lowest(curve: AttackCurve) -> float:
    losses = torch.tensor(curve.score("test_loss"), dtype=torch.float64)
    return float(losses.nan_to_num(nan=torch.inf).min())


def toy(n: int = 60, p: int = 4, *, labels: bool = True) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, p, dtype=torch.float64, generator=generator)
    noise = torch.randn(2 * n, dtype=torch.float64, generator=generator)
    y = x @ torch.arange(1.0, p + 1, dtype=torch.float64) + 2.0 * noise
    y = torch.where(y > 0, 1.0, -1.0).double() if labels else y
    return Task("toy", x[:n], y[:n], x[n:], y[n:])


def torch_run(
    name: str, z: torch.Tensor, y: torch.Tensor, loss: str, rate: float, steps: int
) -> torch.Tensor:
    w = torch.zeros(z.shape[1], dtype=z.dtype, requires_grad=True)
    scale = 1.0 / z.square().mean().sqrt()
    if name == "momentum":
        rate = rate * float(safe_step(z, LOSSES[loss]))
        optimizer: torch.optim.Optimizer = torch.optim.SGD([w], lr=rate, momentum=0.9)
        features, mean = z, 1.0
    else:
        kind = torch.optim.Adam if name == "adam" else torch.optim.Adagrad
        eps = 1e-8
        optimizer = kind([w], lr=rate, eps=eps)
        features, mean = z * scale, 1.0 / len(y)
    for _ in range(steps):
        optimizer.zero_grad()
        (mean * LOSSES[loss].total(features @ w, y)).backward()
        optimizer.step()
    return w.detach() * (1.0 if name == "momentum" else scale)


@pytest.mark.parametrize("name", ["momentum", "adam", "adagrad"])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_each_column_is_what_torch_does(name: str, loss: str) -> None:
    task, rates = toy(), (0.03, 0.3)
    attack = with_(name, learning_rates=rates)
    runs = attack.iterates(task.x_train, task.y_train, LOSSES[loss])
    found = next(itertools.islice(runs, 25, None))
    for column, rate in enumerate(rates):
        expected = torch_run(name, task.x_train, task.y_train, loss, rate, 25)
        torch.testing.assert_close(found[:, column], expected, rtol=1e-8, atol=1e-10)


def test_one_batch_of_sgd_is_momentum() -> None:
    task, rates = toy(n=40), (0.1,)
    pair = [
        list(
            itertools.islice(
                with_(name, learning_rates=rates).iterates(
                    task.x_train, task.y_train, LOSSES["squared"]
                ),
                9,
            )
        )
        for name in ("momentum", "sgd_momentum")
    ]
    torch.testing.assert_close(torch.stack(pair[0]), torch.stack(pair[1]))


def test_sgd_is_the_same_every_time_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    runs = [ATTACKS["sgd_momentum"].run(None, toy(200), steps=30, seed=s) for s in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].scores != runs[2].scores
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", TUNED)
def test_harness_keeps_the_best_learning_rate(name: str) -> None:
    curve = run(toy(), attacker=name, budget=50)
    singles = [
        run(toy(), attacker=name, budget=50, learning_rates=[rate]) for rate in with_(name).rates
    ]
    least = [lowest(single) for single in singles]
    assert lowest(curve) == pytest.approx(min(least))
    assert curve.config["learning_rate"] == with_(name).rates[least.index(min(least))]


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_nothing_changed_gives_one(name: str, loss: str) -> None:
    if not knows(ATTACKS[name], loss):
        return
    result = compare_attack(toy(), torch.eye(4), attacker=with_(name, loss=loss), base_budget=60)
    assert result.slowdown == (1.0, False)
    assert result.base.config["loss"] == loss
    assert result.base.config.get("learning_rate") == result.immunized.config.get("learning_rate")


def test_the_fastest_learning_rate_counts_on_both_sides() -> None:
    theta = torch.diag(torch.tensor([9.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    task = toy(labels=False)
    result = compare_attack(task, theta, attacker="momentum", base_budget=200, stop_early=False)
    for extractor, steps in ((None, result.base_steps), (theta, result.steps)):
        singles = [
            run(task, extractor, attacker="momentum", budget=400, learning_rates=[rate])
            for rate in with_("momentum").rates
        ]
        reached = [single.steps_to("test_loss", result.target, below=True) for single in singles]
        assert steps == min(found for found in reached if found is not None)


def test_budgets_tune_each_budget_and_agree_with_single_runs() -> None:
    task = toy()
    theta = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    rows = attack_at_budgets(task, theta, attacker="adam", budgets=(20, 2, 5))
    assert [row.steps for row in rows] == [2, 5, 20]
    for row in rows:
        for extractor, loss in ((None, row.loss_without), (theta, row.loss_with)):
            singles = [
                run(task, extractor, attacker="adam", budget=row.steps, learning_rates=[rate])
                for rate in with_("adam").rates
            ]
            assert loss == pytest.approx(min(s.score("test_loss")[-1] for s in singles))
        assert row.accuracy_with is not None
    plain = attack_at_budgets(toy(labels=False), theta, budgets=[3])[0]
    assert plain.accuracy_without is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="loss must be one that it can minimise, squared"):
        with_("closed_form_ridge", loss="logistic")
    with pytest.raises(ValueError, match="loss must be one of squared, logistic"):
        with_("adam", loss="hinge")
    with pytest.raises(ValueError, match="'squared' for a regression task"):
        run(toy(labels=False), attacker="adam", budget=3, loss="logistic")
    for rates in ((0.0,), (), (float("nan"),)):
        with pytest.raises(ValueError, match="learning_rates must be positive numbers"):
            with_("adam", learning_rates=rates)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        with_("sgd_momentum", batch_size=0)
    with pytest.raises(ValueError, match="base_budget must be at least 1"):
        compare_attack(toy(), torch.eye(4), base_budget=0)
    with pytest.raises(ValueError, match="budgets must be numbers of at least 1 step"):
        attack_at_budgets(toy(), torch.eye(4), budgets=[])


def matrix(n: int = 30, p: int = 6, seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, p, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, p)
    return z, torch.randn(n, generator=generator, dtype=torch.float64)


def weights(name: str, z: torch.Tensor, y: torch.Tensor, steps: int, **settings: object):
    iterates = with_(name, **settings).iterates(z, y, LOSSES["squared"])
    return torch.stack(list(itertools.islice(iterates, steps + 1)))


def test_shampoo_takes_a_step_of_the_rate_first_and_knows_no_rotation() -> None:
    """L and R of one gradient g give L^(-1/4) g R^(-1/4) = g / |g|."""
    z, y = matrix()
    rates = [0.1, 0.3]
    plain = weights("shampoo", z, y, 12, learning_rates=rates)
    size = float(z.square().mean().sqrt())
    gradient = z.mT @ y
    first = torch.outer(gradient / gradient.norm(), torch.tensor(rates, dtype=torch.float64)) / size
    torch.testing.assert_close(plain[1], first, rtol=1e-9, atol=0)
    q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()).Q
    turned = weights("shampoo", z @ q, y, 12, learning_rates=rates)
    torch.testing.assert_close(q @ turned, plain, rtol=1e-6, atol=1e-8)


def test_a_cosine_schedule_ends_at_its_horizon() -> None:
    z, y = matrix()
    found = weights("adam_cosine", z, y, 50, learning_rates=[0.1], horizons=(10, 40))
    assert torch.equal(found[10:, :, 0], found[10:11, :, 0].expand(41, -1))
    assert float((found[11, :, 1] - found[10, :, 1]).norm()) > 0.0
    assert torch.equal(found[40:, :, 1], found[40:41, :, 1].expand(11, -1))
    # Warm-up over a twentieth: the first of 40 steps has half of the rate, the second all of it.
    scale = float(z.square().mean().sqrt())
    assert float(found[1, :, 1].abs().max()) * scale == pytest.approx(0.05, rel=1e-4)
    assert float(found[1, :, 0].abs().max()) * scale == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(ValueError, match="horizons must be numbers of at least 1"):
        with_("adam_cosine", horizons=(0,))


def test_a_low_rank_preconditioner_takes_the_leading_directions_away() -> None:
    """Whatever the first r are scaled by, the steps are those of the rest."""
    generator = torch.Generator().manual_seed(2)
    u = torch.linalg.qr(torch.randn(40, 6, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    y = torch.randn(40, generator=generator, dtype=torch.float64)
    curves = []
    for large in (10.0, 1e5):
        sigma = torch.tensor([3 * large, large, 1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
        z = (u * sigma) @ v.mT
        curves.append(weights("nystrom_cg", z, y, 6, rank=2)[..., 0] @ z.mT)
    torch.testing.assert_close(*curves, rtol=1e-6, atol=1e-7)
    whole = weights("nystrom_cg", z, y, 1, rank=99)[1, :, 0]
    torch.testing.assert_close(z @ whole, u @ (u.mT @ y), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="rank must not be negative"):
        with_("nystrom_cg", rank=-1)
