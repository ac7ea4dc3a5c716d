"""Several harms at once, and the graded variants of the closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from immunizer_problems import kappa, task

from immunize_ext.probing.data import Problem
from immunize_ext.probing.immunizers import (
    ClosedFormImmunizer,
    SeveralHarmsImmunizer,
    closed_form_theta,
    several_harms_theta,
)
from immunize_ext.probing.immunizers.closed_form import grades
from immunize_ext.probing.metrics import (
    log_rir_ceiling,
    pencil,
    relative_immunization_ratio,
    with_ridge,
)

seeds = st.integers(0, 999)
strengths = st.floats(1.0, 1e3)
gradings = st.sampled_from(["top", "log"])
RIDGE = 1e-2


@given(seed=seeds, strength=strengths, count=st.integers(1, 3), grading=gradings)
def test_kappa_p_is_the_strength(seed: int, strength: float, count: int, grading: str) -> None:
    x = task(seed).x_train
    harms = [task(seed + 1 + h).x_train for h in range(count)]
    theta = several_harms_theta(x, harms, strength=strength, ridge=RIDGE, grading=grading)  # type: ignore[arg-type]
    assert kappa(with_ridge(x, RIDGE), theta) == pytest.approx(strength, rel=1e-6)
    assert float(theta.norm()) == pytest.approx(math.sqrt(5))


@given(seed=seeds, strength=strengths, grading=gradings)
def test_one_harm_is_at_its_ceiling(seed: int, strength: float, grading: str) -> None:
    x, h = task(seed).x_train, task(seed + 1).x_train
    theta = several_harms_theta(x, [h], strength=strength, ridge=RIDGE, grading=grading)  # type: ignore[arg-type]
    ratio = relative_immunization_ratio(x, h, theta, ridge=RIDGE)
    assert ratio.log_rir == pytest.approx(log_rir_ceiling(x, h, ridge=RIDGE), abs=1e-6)
    assert math.exp(ratio.log_ii) * kappa(with_ridge(x, RIDGE), torch.eye(5).double()) == (
        pytest.approx(strength, rel=1e-6)
    )


@given(seed=seeds, strength=strengths)
def test_graded_with_one_harm_is_the_closed_form(seed: int, strength: float) -> None:
    x, h = task(seed).x_train, task(seed + 1).x_train
    several = several_harms_theta(
        x, [h], strength=strength, ridge=RIDGE, grading="log", rotate=False
    )
    single = closed_form_theta(x, h, strength=strength, ridge=RIDGE, rotate=False)
    # Equal up to a rotation of the features.
    torch.testing.assert_close(several @ several.mT, single @ single.mT, rtol=1e-6, atol=1e-7)


@given(seed=seeds, strength=st.floats(1.5, 1e3), count=st.integers(2, 3))
def test_top_boosts_the_largest_eigenvalue_of_every_harm_by_the_strength(
    seed: int, strength: float, count: int
) -> None:
    x = task(seed).x_train
    harms = [task(seed + 1 + h).x_train for h in range(count)]
    thetas = [several_harms_theta(x, harms, strength=c, ridge=RIDGE) for c in (1.0, strength)]
    for h in harms:
        rows = with_ridge(h, RIDGE)
        # Of unit size on the primary task's weakest direction, theta's scale drops out.
        white, boosted = (
            float(torch.linalg.svdvals(rows @ theta)[0])
            / float(torch.linalg.svdvals(with_ridge(x, RIDGE) @ theta)[-1])
            for theta in thetas
        )
        assert (boosted / white) ** 2 >= strength * (1 - 1e-6)


def test_immunizer_reports_each_harm() -> None:
    harms = [task(2, p=12, n=60), task(3, p=12, n=60)]
    fitted = SeveralHarmsImmunizer(strength=50.0).fit(None, Problem.of(task(1, p=12, n=60), *harms))
    before, after = fitted.history
    assert before["log_rir"] == 0.0
    assert after["log_kappa_primary"] == pytest.approx(math.log(50.0))
    assert after["log_rir"] == min(after["log_rir_1"], after["log_rir_2"])
    for number in (1, 2):
        assert 0.9 < after[f"share_of_log_ceiling_{number}"] <= 1.0 + 1e-9
    single = SeveralHarmsImmunizer().fit(None, Problem.of(task(1), task(2)))
    assert single.history[1]["share_of_log_ceiling_1"] == pytest.approx(1.0)
    assert fitted.method == "several-harms"


def test_equal_harms_count_once() -> None:
    x, h = task(1).x_train, task(2).x_train
    first = several_harms_theta(x, [h], strength=9.0)
    same = several_harms_theta(x, [h, h, h, h, h], strength=9.0)
    torch.testing.assert_close(first @ first.mT, same @ same.mT, rtol=1e-6, atol=1e-7)


def test_refusals() -> None:
    x = task(1, p=2).x_train
    harms = [task(seed, p=2).x_train for seed in (2, 3)]
    with pytest.raises(ValueError, match="top directions span all 2; use grading='log'"):
        several_harms_theta(x, harms, strength=2.0)
    assert several_harms_theta(x, harms, strength=2.0, grading="log").shape == (2, 2)
    with pytest.raises(ValueError, match="at least one task, got none"):
        several_harms_theta(x, [], strength=2.0)
    with pytest.raises(ValueError, match="strength must be finite and at least 1"):
        several_harms_theta(x, harms, strength=0.5)
    with pytest.raises(ValueError, match="grading must be 'top' or 'log'"):
        several_harms_theta(x, harms, strength=2.0, grading="linear")  # type: ignore[arg-type]


@given(seed=seeds, strength=strengths, grading=st.sampled_from(["log", "linear", "top"]))
def test_every_grading_of_the_closed_form_is_at_the_ceiling(
    seed: int, strength: float, grading: str
) -> None:
    x, h = task(seed).x_train, task(seed + 1).x_train
    theta = closed_form_theta(x, h, strength=strength, ridge=RIDGE, grading=grading)  # type: ignore[arg-type]
    ratio = relative_immunization_ratio(x, h, theta, ridge=RIDGE)
    assert ratio.log_kappa_primary == pytest.approx(math.log(strength), abs=1e-6)
    assert ratio.log_rir == pytest.approx(log_rir_ceiling(x, h, ridge=RIDGE), abs=1e-6)


@given(seed=seeds, grading=st.sampled_from(["log", "linear", "top"]))
def test_grades_rise_from_zero_to_one(seed: int, grading: str) -> None:
    values = pencil(task(seed).x_train, task(seed + 1).x_train, ridge=RIDGE).values
    found = grades(values, grading)  # type: ignore[arg-type]
    assert float(found[0]) == 1.0
    assert float(found[-1]) == 0.0
    assert bool((found.diff() <= 1e-12).all())
    assert not grades(torch.ones(3, dtype=torch.float64), grading).any()  # type: ignore[arg-type]


def test_grading_refusals() -> None:
    x, h = task(1), task(2)
    with pytest.raises(ValueError, match="grading must be one of log, linear, top"):
        closed_form_theta(x.x_train, h.x_train, strength=2.0, grading="square")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grading must be 'log' for strength='auto'"):
        ClosedFormImmunizer(grading="top").fit(None, Problem.of(x, h))
