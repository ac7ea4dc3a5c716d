"""The closed form: on the ceiling for every strength, calibrated on training data alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.probing.attacks import compare_attack
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.immunizers import (
    ClosedFormImmunizer,
    calibrate_strength,
    closed_form_theta,
)
from immunize_ext.probing.metrics import log_rir_ceiling, relative_immunization_ratio


def features(rows: int, p: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, p, dtype=torch.float64, generator=generator)


def task(seed: int, p: int = 6, n: int = 120) -> Task:
    """A task whose labels depend on all directions, also on those that vary little."""
    scales = torch.linspace(0.3, 3.0, p, dtype=torch.float64)
    whitened = features(n, p, seed)
    x = whitened * (scales if seed % 2 else scales.flip(0))
    y = (whitened.sum(-1) + 0.3 * features(n, 1, seed + 100)[:, 0]).sign()
    return Task(f"task {seed}", x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :])


@given(
    seed=st.integers(0, 2**31 - 1),
    p=st.integers(2, 6),
    strength=st.floats(1.0, 1e4),
    ridge=st.sampled_from([1e-4, 1e-2]),
    rotate=st.booleans(),
)
def test_kappa_of_the_primary_is_the_strength_and_rir_the_ceiling(
    seed: int, p: int, strength: float, ridge: float, rotate: bool
) -> None:
    x_primary, x_harmful = features(3 * p, p, seed), features(3 * p, p, seed + 1)
    theta = closed_form_theta(
        x_primary, x_harmful, strength=strength, ridge=ridge, rotate=rotate, seed=seed
    )
    ratio = relative_immunization_ratio(x_primary, x_harmful, theta, ridge=ridge)
    assert ratio.log_kappa_primary == pytest.approx(math.log(strength), abs=1e-6)
    ceiling = log_rir_ceiling(x_primary, x_harmful, ridge=ridge)
    assert ratio.log_rir == pytest.approx(ceiling, abs=1e-6)
    assert float(torch.linalg.matrix_norm(theta)) == pytest.approx(math.sqrt(p))


def test_strength_one_uses_no_harmful_data_but_a_rotation() -> None:
    x_primary = features(20, 4, 0)
    grams = []
    for seed in (1, 2):
        theta = closed_form_theta(x_primary, features(20, 4, seed), strength=1.0, ridge=1e-3)
        grams.append(theta @ theta.mT)
    torch.testing.assert_close(*grams)


def test_harmful_data_with_missing_directions() -> None:
    theta = closed_form_theta(features(20, 6, 0), features(2, 6, 1), strength=10.0, ridge=0.0)
    assert torch.isfinite(theta).all()
    assert float(torch.linalg.cond(theta)) < 1e6


def test_equal_tasks_cannot_be_told_apart() -> None:
    x = torch.eye(4, dtype=torch.float64)
    theta = closed_form_theta(x, 2.0 * x, strength=10.0, ridge=0.0, rotate=False)
    ratio = relative_immunization_ratio(x, x, theta)
    assert ratio.log_rir == pytest.approx(0.0, abs=1e-9)


def test_rotation_has_a_seed_and_changes_no_condition_number() -> None:
    x_primary, x_harmful = features(20, 4, 0), features(20, 4, 1)
    state = torch.get_rng_state()
    first, again, other = (
        closed_form_theta(x_primary, x_harmful, strength=9.0, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    torch.testing.assert_close(first @ first.mT, other @ other.mT)


def test_calibration_keeps_the_primary_task_fast_on_its_folds() -> None:
    primary, harmful = task(1), task(2)
    strength = calibrate_strength(primary, harmful.x_train)
    assert strength > 1.0
    costs = []
    for fold in primary.folds(3):
        theta = closed_form_theta(fold.x_train, harmful.x_train, strength=strength)
        costs.append(compare_attack(fold, theta).slowdown)
    # The median over the folds: at least two of them pay nothing.
    assert sum(not c.censored and c.ratio <= 1.0 for c in costs) >= 2


def test_calibration_allows_more_where_more_may_be_paid() -> None:
    primary, harmful = task(1), task(2)
    assert calibrate_strength(
        primary, harmful.x_train, max_primary_slowdown=4.0
    ) > calibrate_strength(primary, harmful.x_train, max_primary_slowdown=1.0)


def test_calibration_does_not_see_test_data_or_harmful_labels() -> None:
    primary, harmful = task(1), task(2)
    flipped = Task("flipped", harmful.x_train, -harmful.y_train, harmful.x_test, harmful.y_test)
    noise = Task("noise", primary.x_train, primary.y_train, 9 * primary.x_test, -primary.y_test)
    first = ClosedFormImmunizer().fit(None, Problem.of(primary, harmful))
    second = ClosedFormImmunizer().fit(None, Problem.of(noise, flipped))
    assert torch.equal(first.theta, second.theta)


def test_fit_records_before_and_after() -> None:
    immunized = ClosedFormImmunizer(strength=20.0).fit(None, Problem.of(task(1), task(2)))
    before, after = immunized.history
    assert before["log_rir"] == 0.0
    assert after["log_kappa_primary"] == pytest.approx(math.log(20.0))
    assert immunized.config == {
        "strength": 20.0,
        "ridge": 1e-2,
        "rotate": True,
        "seed": 0,
        "grading": "log",
        "calibrated": False,
    }
    assert torch.equal(immunized.theta0, torch.eye(6, dtype=torch.float64))


def test_refusals() -> None:
    x = features(20, 4, 0)
    for strength in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="strength must be finite and at least 1"):
            closed_form_theta(x, x, strength=strength)
    with pytest.raises(ValueError, match="strength must be a number or 'auto'"):
        ClosedFormImmunizer(strength="much").fit(None, Problem.of(task(1), task(2)))
    with pytest.raises(ValueError, match="max_primary_slowdown must be positive"):
        calibrate_strength(task(1), x, max_primary_slowdown=0.0)
    with pytest.raises(NotPositiveDefiniteError, match="rank 3 of 4"):
        closed_form_theta(features(3, 4, 0), x, strength=2.0, ridge=0.0)
