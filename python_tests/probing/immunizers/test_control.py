"""Feedback on log kappa_P: known right values, and runs of linear and deep extractors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from immunizer_problems import kappa, task
from torch import nn

from immunize_ext.probing.data import Problem, gram_equivalent, load_problem
from immunize_ext.probing.immunizers import (
    METHODS,
    ConditionNumberImmunizer,
    ControllerName,
    CorridorController,
    DeepExtractorImmunizer,
    MultiplicativeImmunizer,
    WhiteningImmunizer,
)
from immunize_ext.probing.metrics import pencil

logs = st.floats(-3.0, 6.0)


@given(x=logs, slope=st.floats(-2.0, 2.0), low=st.floats(0.0, 2.0), width=st.floats(0.0, 2.0))
def test_sqp_is_the_nearest_step_that_keeps_to_the_corridor(
    x: float, slope: float, low: float, width: float
) -> None:
    """Where log kappa is linear, against the projection onto a slab; with rho = 1 in one step."""
    square, reach = 2.5, 20.0
    controller = CorridorController((math.exp(low), math.exp(low + width)), reach=reach)
    share = controller.correction(x, slope, square, 1.0, {})
    after = x + slope + share * square
    assert low - 1e-9 <= after <= low + width + 1e-9
    if low <= x + slope <= low + width:
        assert share == pytest.approx(0.0, abs=1e-12)
    else:
        nearest = min(max(x + slope, low), low + width)
        assert after == pytest.approx(nearest, abs=1e-9)


def test_an_excess_falls_geometrically_and_by_no_more_than_the_reach() -> None:
    controller = CorridorController((1.0, math.e), gain=0.5, reach=0.3)
    x, seen, state = 2.0, [], {}
    for _ in range(12):
        x += controller.correction(x, 0.0, 4.0, 1.0, state) * 4.0
        seen.append(x - 1.0)
    assert seen[:2] == [pytest.approx(0.7), pytest.approx(0.4)]
    assert [b / a for a, b in itertools.pairwise(seen[1:])] == pytest.approx([0.5] * 10)
    # Below the corridor it climbs.
    assert controller.correction(-1.0, 0.0, 4.0, 1.0, {}) == pytest.approx(0.3 / 4.0)
    # A step that leads back by itself is left alone.
    assert controller.correction(2.0, -0.4, 4.0, 1.0, {}) == 0.0


def test_a_harm_along_the_normal_is_taken_out_whole() -> None:
    normal = torch.tensor([3.0, -4.0], dtype=torch.float64)
    for size in (0.01, 1.0):
        step = size * normal
        share = CorridorController((1.0, 5.0)).correction(
            math.log(5.0), float(normal @ step), float(normal @ normal), float(step.norm()), {}
        )
        assert float((step + share * normal).norm()) < 1e-12


def test_what_the_first_order_left_out_becomes_a_margin() -> None:
    controller, state = CorridorController((1.0, math.exp(2.0))), {}
    controller.correction(2.0, 0.1, 1.0, 1.0, state)
    # It was to be 2.0 and is 2.1.
    share = controller.correction(2.1, 0.0, 1.0, 1.0, state)
    assert (state["margin"], 2.1 + share) == (pytest.approx(0.15), pytest.approx(1.85))
    # As expected: nothing is learnt, the margin stays.
    assert controller.correction(2.1 + share, 0.0, 1.0, 1.0, state) == pytest.approx(0.0)
    # In a corridor of no width there is none.
    narrow, state = CorridorController((5.0, 5.0)), {"expected": 0.0}
    assert narrow.correction(math.log(5.0), 0.0, 1.0, 1.0, state) == 0.0


def test_multipliers_of_pi_and_dual() -> None:
    corridor = (math.exp(1.0), math.exp(2.0))
    dual, state = CorridorController(corridor, "dual", rate=0.5), {}
    found = [-dual.correction(x, 0.0, 4.0, 3.0, state) for x in (3.0, 3.0, 1.5, 0.0, 0.0)]
    # upper 0.5, 1.0, 0.75, 0, 0; lower 0, 0, 0, 0.5, 1.0; times |d| / |n| = 1.5.
    assert found == pytest.approx([0.75, 1.5, 1.125, -0.75, -1.5])
    pi, state = CorridorController(corridor, "pi", proportional=1.0, integral=0.1), {}
    found = [-pi.correction(x, 0.0, 1.0, 1.0, state) for x in (3.0, 3.0, 2.0, 1.9)]
    assert found == pytest.approx([1.1, 1.2, 0.2, 0.09])
    # Cut off at the most: the integral is held.
    state = {}
    for _ in range(3):
        assert pi.correction(500.0, 0.0, 1.0, 1.0, state) == -100.0
    assert state.get("upper", 0.0) == 0.0
    for kind in get_args(ControllerName):
        assert CorridorController(corridor, kind).correction(9.0, 1.0, 0.0, 1.0, {}) == 0.0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="corridor must be two numbers 1 <= low <= high"):
        CorridorController((3.0, 2.0))
    with pytest.raises(ValueError, match="kind must be one of sqp, pi, dual, got 'pid'"):
        CorridorController((1.0, 2.0), "pid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reach must be finite and positive"):
        CorridorController((1.0, 2.0), reach=0.0)
    with pytest.raises(ValueError, match="corridor must be given for controller 'sqp'"):
        MultiplicativeImmunizer(controller="sqp")
    with pytest.raises(ValueError, match=r"got 1\.0 and 2\.0 and 3\.0"):
        MultiplicativeImmunizer(corridor=(1.0, 2.0, 3.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="controller must be one of"):
        DeepExtractorImmunizer(corridor=(1.0, 2.0), controller="projection")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eta_primary must be finite and not negative"):
        MultiplicativeImmunizer(eta_primary=-1.0)


def test_tangent_and_normal_reach_the_closed_form_on_mnist(shared_data: Path) -> None:
    """kappa_P = 30 and the largest log kappa_H there is; dual ascent swings."""
    problem = load_problem("mnist", "3:8", ("4:9",), data_dir=str(shared_data / "mnist"), size=7)
    tasks = gram_equivalent(problem.primary), gram_equivalent(problem.harmful[0])
    small = Problem.of(*tasks)
    values = pencil(*(t.x_train for t in tasks), ridge=1e-3).values
    best = math.log(30.0) + float((values[0] / values[-1]).log())
    assert best == pytest.approx(10.135, abs=1e-3)
    white = WhiteningImmunizer(ridge=1e-3, rotate=False).fit(None, small).theta
    immunizer = MultiplicativeImmunizer(
        200, 0.0, 0.05, ridge=1e-3, corridor=(1.0, 30.0), controller="sqp"
    )
    found = immunizer.fit(white, small).history
    assert found[-1]["log_kappa_harmful"] == pytest.approx(best, abs=1e-3)
    assert math.exp(found[-1]["log_kappa_primary"]) == pytest.approx(30.0, rel=1e-4)
    assert all(r["log_kappa_primary"] <= math.log(30.0) + 1e-6 for r in found)
    swung = replace(immunizer, steps=100, controller="dual").fit(white, small).history
    assert max(r["log_kappa_primary"] for r in swung) > math.log(45.0)


@pytest.mark.parametrize("kind", get_args(ControllerName))
def test_linear_runs_steer_whatever_moves_theta(kind: ControllerName, tmp_path: Path) -> None:
    problem = Problem.of(task(1), task(2))
    immunizer = ConditionNumberImmunizer(
        steps=60, corridor=(1.0, 5.0), controller=kind, keep="last", optimizer="adam"
    )
    free = replace(immunizer, corridor=None, controller="projection").fit(None, problem)
    found = immunizer.fit(None, problem)
    last = [math.exp(run.history[-1]["log_kappa_primary"]) for run in (found, free)]
    assert {"multiplier"} == set(found.history[0]) - set(free.history[0])
    assert abs(math.log(last[0] / 5.0)) < abs(math.log(last[1] / 5.0))
    if kind == "sqp":
        assert last[0] <= 5.0 * (1 + 1e-6)
        # From where the run starts, which a projection would have moved.
        assert math.exp(found.history[0]["log_kappa_primary"]) > 5.0


def test_every_iterative_method_takes_a_controller() -> None:
    problem = Problem.of(task(1), task(2))
    for name in ("mini-batch", "imma", "opt-kappa", "multiplicative"):
        short = {"epochs": 4, "batch_size": 10} if name == "mini-batch" else {"steps": 12}
        method = replace(METHODS[name], corridor=(1.0, 20.0), controller="sqp", **short)  # type: ignore[type-var]
        found = method.fit(None, problem)
        assert kappa(problem.primary.x_train, found.theta) > 1.0
        assert "multiplier" in found.history[-1]


# --- deep extractors ------------------------------------------------------------------------------


def deep_problem(n: int = 120) -> tuple[nn.Module, Problem]:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5, 1.0, 1.0])
    x = torch.randn(n, 6, generator=generator) * scales
    h = torch.randn(n, 6, generator=generator) * scales.flip(0)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    return body, Problem.of((x, y), (h, y))


DEEP = DeepExtractorImmunizer(
    ("2",), steps=40, batch_size=40, learning_rate=0.01, corridor=(1.0, 6.0)
)


def log_kappa_of(model: nn.Module, x: torch.Tensor, floor: float) -> float:
    with torch.no_grad():
        values = torch.linalg.svdvals(model(x).double()).square() + floor
    return float((values[0] / values[-1]).log())


def floor_of(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return 1e-4 * float(torch.linalg.svdvals(model(x).double())[0]) ** 2


@pytest.mark.parametrize("every", [1, 5])
def test_deep_runs_come_into_the_corridor_and_stay(every: int) -> None:
    body, problem = deep_problem()
    found = replace(DEEP, corridor_every=every).fit(body, problem)
    values = [math.exp(r["log_kappa_corridor"]) for r in found.history]
    assert values[0] > 20.0
    assert all(v <= 6.0 * 1.01 for v in values[15:])
    free = replace(DEEP, corridor=None).fit(body, problem)
    x = problem.primary[0]
    floor = floor_of(body, x)
    assert log_kappa_of(found.extractor, x, floor) <= math.log(6.2)
    assert log_kappa_of(free.extractor, x, floor) > math.log(8.0)


def test_what_is_measured_is_all_data_and_its_gradient() -> None:
    body, problem = deep_problem()
    found = replace(DEEP, steps=1, momentum=0.0, lambda_ill=0.0, lambda_well=0.0).fit(body, problem)
    x = problem.primary[0]
    floor = floor_of(body, x)
    start = log_kappa_of(body, x, floor)
    assert found.history[0]["log_kappa_corridor"] == pytest.approx(start, abs=1e-4)
    # The step takes back as much as its reach, but for the second order.
    after = log_kappa_of(found.extractor, x, floor)
    assert after == pytest.approx(start - 0.3, abs=0.05)
    few = replace(DEEP, steps=1, corridor_samples=30).fit(body, problem)
    assert few.history[0]["log_kappa_corridor"] != found.history[0]["log_kappa_corridor"]


def test_a_deep_run_with_a_corridor_goes_on_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    body, problem = deep_problem()
    settings = replace(DEEP, corridor_every=7, steps=25)
    whole = settings.fit(body, problem)
    replace(settings, steps=10).fit(body, problem, resume=tmp_path)
    resumed = settings.fit(body, problem, resume=tmp_path)
    assert resumed.history == whole.history
    for a, b in zip(resumed.extractor.parameters(), whole.extractor.parameters(), strict=True):
        assert torch.equal(a, b)
