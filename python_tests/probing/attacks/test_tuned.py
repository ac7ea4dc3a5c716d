"""Attackers with a learning rate against torch's own optimizers, and the harness around them."""

import itertools

import pytest
import torch

from immunize_ext.probing.attacks import ATTACKERS, attack, attack_at_budgets, compare_attack
from immunize_ext.probing.attacks.losses import LOSSES
from immunize_ext.probing.attacks.probes import safe_step
from immunize_ext.probing.data import Task

TUNED = [name for name, attacker in ATTACKERS.items() if attacker.tuned is not None]


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
    runs = ATTACKERS[name].run(task.x_train, task.y_train, LOSSES[loss], rates)
    found = next(itertools.islice(runs, 25, None))
    for column, rate in enumerate(rates):
        expected = torch_run(name, task.x_train, task.y_train, loss, rate, 25)
        torch.testing.assert_close(found[:, column], expected, rtol=1e-8, atol=1e-10)


def test_one_batch_of_sgd_is_momentum() -> None:
    task, rates = toy(n=40), (0.1,)
    pair = [
        list(
            itertools.islice(
                ATTACKERS[name].run(task.x_train, task.y_train, LOSSES["squared"], rates), 9
            )
        )
        for name in ("momentum", "sgd_momentum")
    ]
    torch.testing.assert_close(torch.stack(pair[0]), torch.stack(pair[1]))


def test_sgd_is_the_same_every_time_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    runs = [attack(toy(200), attacker="sgd_momentum", budget=30) for _ in range(2)]
    assert torch.equal(runs[0].test_loss, runs[1].test_loss)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", TUNED)
def test_harness_keeps_the_best_learning_rate(name: str) -> None:
    curve = attack(toy(), attacker=name, budget=50)
    singles = [
        attack(toy(), attacker=name, budget=50, learning_rates=[rate])
        for rate in ATTACKERS[name].learning_rates
    ]
    lowest = [float(single.test_loss.nan_to_num(nan=torch.inf).min()) for single in singles]
    assert float(curve.test_loss.min()) == pytest.approx(min(lowest))
    assert curve.learning_rate == ATTACKERS[name].learning_rates[lowest.index(min(lowest))]


@pytest.mark.parametrize("name", ATTACKERS)
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_nothing_changed_gives_one(name: str, loss: str) -> None:
    if not ATTACKERS[name].knows(loss):
        return
    result = compare_attack(toy(), torch.eye(4), attacker=name, loss=loss, base_budget=60)  # type: ignore[arg-type]
    assert result.slowdown == (1.0, False)
    assert result.base.loss_name == loss
    assert result.base.learning_rate == result.immunized.learning_rate


def test_the_fastest_learning_rate_counts_on_both_sides() -> None:
    theta = torch.diag(torch.tensor([9.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    task = toy(labels=False)
    result = compare_attack(task, theta, attacker="momentum", base_budget=200, stop_early=False)
    for extractor, steps in ((None, result.base_steps), (theta, result.steps)):
        singles = [
            attack(task, extractor, attacker="momentum", budget=400, learning_rates=[rate])
            for rate in ATTACKERS["momentum"].learning_rates
        ]
        reached = [single.steps_to(result.target) for single in singles]
        assert steps == min(found for found in reached if found is not None)


def test_budgets_tune_each_budget_and_agree_with_single_runs() -> None:
    task = toy()
    theta = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    rows = attack_at_budgets(task, theta, attacker="adam", budgets=(20, 2, 5))
    assert [row.steps for row in rows] == [2, 5, 20]
    for row in rows:
        for extractor, loss in ((None, row.loss_without), (theta, row.loss_with)):
            singles = [
                attack(task, extractor, attacker="adam", budget=row.steps, learning_rates=[rate])
                for rate in ATTACKERS["adam"].learning_rates
            ]
            assert loss == pytest.approx(min(float(s.test_loss[-1]) for s in singles))
        assert row.accuracy_with is not None
    plain = attack_at_budgets(toy(labels=False), theta, budgets=[3])[0]
    assert plain.accuracy_without is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="able to minimise the logistic loss"):
        attack(toy(), attacker="closed_form_ridge", loss="logistic")
    with pytest.raises(ValueError, match="'squared' for a regression task"):
        attack(toy(labels=False), loss="logistic")
    with pytest.raises(ValueError, match="learning_rates must be positive numbers"):
        attack(toy(), attacker="adam", learning_rates=[0.0])
    with pytest.raises(ValueError, match="learning_rates must be positive numbers"):
        attack(toy(), learning_rates=[0.1])
    with pytest.raises(ValueError, match="base_budget must be at least 1"):
        compare_attack(toy(), torch.eye(4), base_budget=0)
    with pytest.raises(ValueError, match="budgets must be numbers of at least 1 step"):
        attack_at_budgets(toy(), torch.eye(4), budgets=[])
