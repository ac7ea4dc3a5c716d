"""What each optimizer pays for, climbed, under the bound of the primary task."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from immunize_ext.probing.data import Problem, Task, digits_task
from immunize_ext.probing.immunizers import METHODS, ClosedFormImmunizer, OptimizerAwareImmunizer
from immunize_ext.probing.metrics import WHITENING, kappa_under, with_ridge

RIDGE, STRENGTH = 1e-2, 30.0
ALL = ("gradient_descent", "diagonal", "nystrom")


@pytest.fixture(scope="module")
def problem() -> Problem[Task]:
    return Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))


@pytest.fixture(scope="module")
def closed(problem: Problem[Task]) -> dict[str, float]:
    return logs(problem, ClosedFormImmunizer(strength=STRENGTH).fit(None, problem).theta)


def logs(problem: Problem[Task], theta: Tensor) -> dict[str, float]:
    x = with_ridge(problem.harmful[0].x_train.double(), RIDGE) @ theta
    return {
        name: math.log(float(kappa_under(name, x.mT @ x, rank=6 * (name == "nystrom"))))
        for name in ALL
    }


def log_kappa_primary(problem: Problem[Task], theta: Tensor) -> float:
    x = with_ridge(problem.primary.x_train.double(), RIDGE) @ theta
    return math.log(float(kappa_under("gradient_descent", x.mT @ x)))


def test_more_against_each_optimizer_at_the_same_bound(
    problem: Problem[Task], closed: dict[str, float]
) -> None:
    """Known values: 3 units of log kappa against scaling, 1.4 against low rank."""
    found = OptimizerAwareImmunizer(strength=STRENGTH).fit(None, problem)
    after = logs(problem, found.theta)
    assert after["gradient_descent"] >= closed["gradient_descent"] - 1e-3
    assert after["diagonal"] > closed["diagonal"] + 2.0
    assert after["nystrom"] > closed["nystrom"] + 1.0
    assert log_kappa_primary(problem, found.theta) <= math.log(STRENGTH) + 1e-6
    for name in ALL:
        assert found.history[1][f"log_kappa_{name}"] == pytest.approx(after[name], abs=1e-6)


def test_gradient_descent_alone_has_nothing_to_gain(
    problem: Problem[Task], closed: dict[str, float]
) -> None:
    """The closed form is at its ceiling already."""
    found = OptimizerAwareImmunizer(attackers=("gradient_descent",), steps=5).fit(None, problem)
    assert logs(problem, found.theta)["gradient_descent"] == pytest.approx(
        closed["gradient_descent"], abs=1e-6
    )


def test_weights_of_zero_leave_an_optimizer_out(problem: Problem[Task]) -> None:
    one = OptimizerAwareImmunizer(attackers=("nystrom",), steps=5).fit(None, problem)
    other = OptimizerAwareImmunizer(attackers=ALL, weights=(0.0, 0.0, 1.0), steps=5)
    torch.testing.assert_close(other.fit(None, problem).theta, one.theta)


@pytest.mark.parametrize("optimizer", WHITENING)
def test_who_whitens_is_refused_with_the_theorem(optimizer: str) -> None:
    with pytest.raises(
        ValueError, match=r"OptimizerAwareImmunizer: .*takes the very steps it takes without theta"
    ):
        OptimizerAwareImmunizer(attackers=("gradient_descent", optimizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attackers": ()}, "attackers must name at least one"),
        ({"attackers": ("sgdd",)}, "optimizer must be one of gradient_descent"),
        ({"weights": (1.0,)}, "weights must be one number for each of 3"),
        ({"weights": (1.0, -1.0, 1.0)}, "weights must be"),
        ({"weights": (0.0, 0.0, 0.0)}, "weights must be"),
        ({"strength": 0.9}, "strength must be finite and at least 1"),
        ({"nystrom_share": 1.0}, "nystrom_share must be"),
        ({"steps": -1}, "steps must be at least 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerAwareImmunizer(**settings)  # type: ignore[arg-type]


def test_on_top_of_a_model_and_registered(problem: Problem[Task]) -> None:
    model = torch.diag(torch.linspace(1.0, 2.0, 64, dtype=torch.float64))
    found = METHODS.build("optimizer-aware", {"steps": 3}, "test").fit(model, problem)
    assert torch.equal(found.theta0, model)
    x = with_ridge(problem.primary.x_train.double() @ model, RIDGE)
    inner = torch.linalg.solve(model, found.theta)
    assert float(kappa_under("gradient_descent", (x @ inner).mT @ (x @ inner))) <= 30.0 * (1 + 1e-6)
