"""R_ill only, R_well only, Opt kappa: each moves what it is made of."""

import math

import pytest
import torch
from immunizer_problems import kappa, task

from immunize_ext.probing.data import Problem
from immunize_ext.probing.immunizers import BaselineImmunizer
from immunize_ext.probing.metrics import log_rir_ceiling, with_ridge

OBJECTIVES = ("r_ill", "r_well", "kappa_difference", "kappa_log_ratio")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_small_steps_lower_the_objective(objective: str, optimizer: str) -> None:
    immunizer = BaselineImmunizer(objective, steps=15, optimizer=optimizer, first_change=0.005)  # type: ignore[arg-type]
    history = immunizer.fit(None, Problem.of(task(1), task(2))).history
    assert len(history) == 16
    assert history[-1]["objective"] < history[0]["objective"]
    assert [record["step"] for record in history] == list(range(16))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_first_update_has_the_size_asked_for(objective: str) -> None:
    for optimizer in ("gd", "adam"):
        immunizer = BaselineImmunizer(objective, steps=1, optimizer=optimizer, first_change=0.03)  # type: ignore[arg-type]
        fitted = immunizer.fit(None, Problem.of(task(1), task(2)))
        change = float((fitted.theta - fitted.theta0).norm() / fitted.theta0.norm())
        assert change == pytest.approx(0.03, rel=1e-3)


def test_each_moves_its_own_condition_number() -> None:
    primary, harmful = task(1), task(2)
    last = {
        name: BaselineImmunizer(name, steps=100, first_change=0.01).fit(
            None, Problem.of(primary, harmful)
        )  # type: ignore[arg-type]
        for name in ("r_ill", "r_well")
    }
    ill, well = last["r_ill"].history, last["r_well"].history
    assert ill[-1]["log_kappa_harmful"] > ill[0]["log_kappa_harmful"]
    assert well[-1]["log_kappa_primary"] < well[0]["log_kappa_primary"]


def test_log_ratio_is_minus_log_rir_and_below_the_ceiling() -> None:
    primary, harmful = task(1), task(2)
    immunizer = BaselineImmunizer("kappa_log_ratio", steps=300, optimizer="adam")
    history = immunizer.fit(None, Problem.of(primary, harmful)).history
    for record in history:
        risen = history[0]["objective"] - record["objective"]
        assert record["log_rir"] == pytest.approx(risen, abs=1e-7)
    ceiling = log_rir_ceiling(primary.x_train, harmful.x_train, ridge=1e-2)
    assert max(record["log_rir"] for record in history) <= ceiling + 1e-8
    assert history[-1]["log_rir"] > 0.5 * ceiling


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_corridor_is_held_at_every_step(objective: str) -> None:
    immunizer = BaselineImmunizer(objective, steps=25, corridor=(5.0, 8.0))  # type: ignore[arg-type]
    fitted = immunizer.fit(None, Problem.of(task(1), task(2)))
    for record in fitted.history:
        assert 5.0 * (1 - 1e-6) <= math.exp(record["log_kappa_primary"]) <= 8.0 * (1 + 1e-6)
    rows = with_ridge(task(1).x_train, 1e-2)
    assert 5.0 * (1 - 1e-6) <= kappa(rows, fitted.theta) <= 8.0 * (1 + 1e-6)
    assert fitted.config["corridor"] == [5.0, 8.0]


def test_start_and_refusals() -> None:
    theta0 = 2.0 * torch.eye(5)
    fitted = BaselineImmunizer("r_well", steps=2).fit(theta0, Problem.of(task(1), task(2)))
    assert torch.equal(fitted.theta0, theta0.double())
    with pytest.raises(ValueError, match="objective must be one of r_ill, r_well"):
        BaselineImmunizer("kappa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first_change must be finite and positive, got nan"):
        BaselineImmunizer(first_change=math.nan)
    with pytest.raises(ValueError, match="corridor must be two numbers"):
        BaselineImmunizer(corridor=(3.0, 2.0))
    with pytest.raises(ValueError, match="harmful must have the 5 features of primary, got 4"):
        BaselineImmunizer().fit(None, Problem.of(task(1), task(2, p=4)))
    with pytest.raises(ValueError, match=r"model must have shape \(5, 5\)"):
        BaselineImmunizer().fit(torch.eye(4), Problem.of(task(1), task(2)))
