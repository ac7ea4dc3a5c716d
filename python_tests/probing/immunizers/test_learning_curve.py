"""The learning curve of the harm, under conditions on those of other tasks."""

from __future__ import annotations

import math

import pytest
import torch

from immunize_ext.probing.certificates import Spectrum, best_risk
from immunize_ext.probing.data import Problem, Task, digits_task
from immunize_ext.probing.immunizers import (
    METHODS,
    LabelDirectionImmunizer,
    LearningCurveImmunizer,
)


@pytest.fixture(scope="module")
def problem() -> Problem[Task]:
    return Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))


def risk(task: Task, theta: torch.Tensor, samples: int) -> float:
    """By the eigenvalues of the covariance, another route than the one that was climbed."""
    return best_risk(Spectrum.of(task, theta), samples)


def test_the_harm_costs_more_samples_and_the_primary_task_does_not(problem: Problem[Task]) -> None:
    found = LearningCurveImmunizer(steps=60).fit(None, problem)
    harm, primary = problem.harmful[0], problem.primary
    before, after = found.theta0.double(), found.theta
    ratios = [risk(harm, after, n) / risk(harm, before, n) for n in (40, 80, 160)]
    assert math.prod(ratios) ** (1 / 3) > 1.5
    kept = [risk(primary, after, n) / risk(primary, before, n) for n in (40, 80, 160)]
    # The grids of ridges of the two routes differ.
    assert math.prod(kept) ** (1 / 3) < 1.01
    start, end = found.history
    assert end["risk_harmful"] / start["risk_harmful"] == pytest.approx(
        math.prod(ratios) ** (1 / 3), rel=0.02
    )
    assert end["risk_primary"] <= start["risk_primary"] * (1 + 1e-8)
    assert int(torch.linalg.matrix_rank(found.theta)) == 64


def test_no_worse_than_its_start_where_that_is_allowed(problem: Problem[Task]) -> None:
    """With room for what ``label-direction`` costs, it is where the ascent starts."""
    mild = LabelDirectionImmunizer(strength=3.0).fit(None, problem)
    settings = {"strength": 3.0, "tolerance": 1.0}
    start, climbed = (
        LearningCurveImmunizer(steps=steps, **settings).fit(None, problem) for steps in (0, 20)
    )
    metric = mild.theta @ mild.theta.mT
    torch.testing.assert_close(start.theta @ start.theta.mT, metric, rtol=1e-9, atol=1e-10)
    assert climbed.history[1]["risk_harmful"] > start.history[1]["risk_harmful"]


def test_benign_tasks_are_kept(problem: Problem[Task]) -> None:
    """A task beside the harm, that suffers unless it is listed."""
    other = digits_task((4,), (7,))
    listed = Problem(problem.primary, problem.harmful, benign=(other,))
    found = LearningCurveImmunizer(steps=40).fit(None, listed)
    start, end = found.history
    assert end["risk_benign_0"] <= start["risk_benign_0"] * (1 + 1e-8)
    alone = LearningCurveImmunizer(steps=40).fit(None, problem)
    risks = [
        math.prod(risk(other, t, n) for n in (40, 80, 160)) for t in (alone.theta, found.theta)
    ]
    assert risks[0] > 1.05 * risks[1]
    part = torch.ones(4, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    narrow = Task("narrow", *part, *part)
    with pytest.raises(ValueError, match="benign must have the 64 features of primary, got 3"):
        Problem(problem.primary, problem.harmful, benign=(narrow,))
    assert listed.digest() != problem.digest()


@pytest.mark.parametrize("objective", ["exponentiated", "cvar"])
def test_of_several_harms_the_least_protected_counts(
    problem: Problem[Task], objective: str
) -> None:
    """The mean is raised by one harm; the objectives of the worst case raise the least."""
    several = Problem(problem.primary, (*problem.harmful, digits_task((0,), (2,))))
    least = {}
    for name in ("mean", objective):
        fit = LearningCurveImmunizer(steps=30, objective=name, eta=30.0, samples=(20,))  # type: ignore[arg-type]
        start, end = fit.fit(None, several).history
        least[name] = min(end["risk_harmful"], end["risk_harmful_1"])
        assert end["risk_primary"] <= start["risk_primary"] * (1 + 1e-8)
    assert least[objective] > 1.05 * least["mean"]


def test_on_top_of_an_extractor(problem: Problem[Task]) -> None:
    """Risks before are those of the model, and theta is that of the composition."""
    model = torch.diag(torch.logspace(0, -2, 64, dtype=torch.float64))
    found = LearningCurveImmunizer(steps=10, samples=(20,)).fit(model, problem)
    primary = problem.primary
    assert found.history[0]["risk_primary"] == pytest.approx(risk(primary, model, 20), rel=0.02)
    assert found.history[1]["risk_primary"] == pytest.approx(
        risk(primary, found.theta, 20), rel=0.02
    )
    assert found.history[1]["risk_primary"] <= found.history[0]["risk_primary"] * (1 + 1e-8)


def test_deterministic_and_registered(problem: Problem[Task]) -> None:
    immunizer = LearningCurveImmunizer(steps=5)
    one, other = (immunizer.fit(None, problem) for _ in range(2))
    assert torch.equal(one.theta, other.theta)
    assert METHODS["learning-curve"].method == one.method
    assert one.config["samples"] == [40, 80, 160]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": ()}, "samples must be numbers of at least 1"),
        ({"samples": (0,)}, "samples must be numbers of at least 1"),
        ({"tolerance": -0.1}, "tolerance must be at least 0"),
        ({"objective": "worst"}, "objective must be one of exponentiated, cvar, mean"),
        ({"eta": -1.0}, "eta must be finite"),
        ({"objective": "cvar", "share": 0.0}, "share must be above 0"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate positive"),
        ({"strength": 0.5}, "strength must be finite and at least 1"),
        ({"ridge": 0.0}, "ridge must be positive"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningCurveImmunizer(**settings)  # type: ignore[arg-type]
