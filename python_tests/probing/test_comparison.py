"""Several runs: lower bounds stay lower bounds, the worst attacker counts everybody."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from page_parser import ParsedPage
from saved_results import saved

from immunize_ext import report
from immunize_ext.probing.comparison import (
    WORST,
    WORST_STEPWISE,
    Point,
    bounded_quantile,
    compare,
    equal_cost,
    point_of,
    summarise,
)
from immunize_ext.probing.comparison_report import summary, sweep_summary
from immunize_ext.probing.results import AttackerInfo
from immunize_ext.quantities import Slowdown
from immunize_ext.storage import migrate, to_json

INFOS = {
    "gradient_descent": AttackerInfo("Gradient descent"),
    "adam": AttackerInfo("Adam"),
    "whitened": AttackerInfo("Whitens the features first", sees_theta=False),
}


def exact(**ratios: float) -> dict[str, Slowdown]:
    return {name: Slowdown(ratio, False) for name, ratio in ratios.items()}


def point(
    harmful: dict[str, Slowdown],
    primary: dict[str, Slowdown],
    *,
    method: str = "m",
    tasks: str = "t",
    seed: int = 0,
) -> Point:
    infos = {name: INFOS[name] for name in harmful}
    rir = dict.fromkeys(("official", "ridge", "rank_aware"), 2.0)
    slowdown = {"harmful": harmful, "primary": primary}
    return Point("run", method, None, tasks, seed, slowdown, infos, rir, 0.5, 1.0)


def page(results: dict[str, Any]) -> str:
    return ParsedPage(report.render(json.loads(json.dumps(to_json(results))))).text


# --- quantiles of lower bounds ------------------------------------------------------------------


def test_quantiles_of_lower_bounds() -> None:
    cut = [Slowdown(64.0, True)] * 3
    assert all(bounded_quantile(cut, share) == (64.0, True) for share in (0.0, 0.25, 0.5, 1.0))
    # Above all that the median rests on: however large it is, the median stays.
    above = [Slowdown(1.0, False), Slowdown(2.0, False), Slowdown(64.0, True)]
    assert bounded_quantile(above, 0.5) == (2.0, False)
    assert bounded_quantile(above, 0.75) == (33.0, True)
    # Below it: with more steps it might be above.
    below = [Slowdown(1.0, True), Slowdown(20.0, False), Slowdown(30.0, False)]
    assert bounded_quantile(below, 0.5) == (20.0, True)
    assert bounded_quantile(below, 0.0) == (1.0, True)
    # Of equals one that got there settles the least, and not the largest.
    tie = [Slowdown(5.0, True), Slowdown(5.0, False)]
    assert bounded_quantile(tie, 0.0) == (5.0, False)
    assert bounded_quantile(tie, 1.0) == (5.0, True)


def test_an_infinite_slow_down_is_no_quantile_of_nothing() -> None:
    values = [Slowdown(1.0, False), Slowdown(math.inf, False), Slowdown(math.inf, False)]
    assert bounded_quantile(values, 0.5) == (math.inf, False)


# --- equal cost ---------------------------------------------------------------------------------


def test_cells_keep_the_lower_bound() -> None:
    points = [
        point({"gradient_descent": Slowdown(64.0, True)}, exact(gradient_descent=1.0), tasks=tasks)
        for tasks in ("a", "b")
    ]
    cell = equal_cost(points, "gradient_descent")["m"]["1"]
    assert cell["is_lower_bound"] == {"median": True, "min": True, "max": True}
    assert "≥ 64× ≥ 64× to ≥ 64×, 2 of 2" in page(compare(points))
    assert "≥ 64× (2 of 2)" in summary(compare(points))


def test_the_best_within_a_budget_may_rest_on_another_that_was_cut_off() -> None:
    runs = [
        point({"gradient_descent": Slowdown(10.0, True)}, exact(gradient_descent=1.0)),
        point(exact(gradient_descent=20.0), exact(gradient_descent=1.0)),
    ]
    cell = equal_cost(runs, "gradient_descent")["m"]["1"]
    assert (cell["median"], cell["is_lower_bound"]["median"]) == (20.0, True)


def test_a_primary_attack_that_was_cut_off_is_within_no_budget() -> None:
    run = point(exact(gradient_descent=20.0), {"gradient_descent": Slowdown(0.9, True)})
    assert equal_cost([run], "gradient_descent")["m"]["1"]["median"] is None


def test_the_worst_attacker_counts_every_attacker() -> None:
    harmful = exact(gradient_descent=30.0, adam=3.5, whitened=1.0)
    run = point(harmful, exact(gradient_descent=0.6, adam=0.9, whitened=1.0))
    assert run.pair(WORST) == (Slowdown(0.6, False), Slowdown(1.0, False))
    assert run.pair(WORST_STEPWISE) == (Slowdown(0.6, False), Slowdown(3.5, False))
    results = compare([run])
    assert list(results["equal_primary_slowdown"])[-2:] == [WORST_STEPWISE, WORST]
    assert results["equal_primary_slowdown"][WORST]["m"]["1"]["median"] == 1.0
    text = page(results)
    assert "An attacker who may choose among all that were tried is slowed 1×." in text
    assert "The worst of these attackers Method" in text
    rows = [line for line in summary(results).splitlines() if "worst" in line]
    assert [row.split()[-1] for row in rows] == ["3.5×", "1×"]


@pytest.mark.parametrize("cost", [0.5, 1.2, 50.0])
def test_one_attacker_more_never_makes_a_run_too_expensive(cost: float) -> None:
    """Adam on the primary task may be as slow as it likes: the owner has gradient descent."""
    before = point(exact(gradient_descent=30.0), exact(gradient_descent=0.9))
    after = point(exact(gradient_descent=30.0, adam=9.0), exact(gradient_descent=0.9, adam=cost))
    for attacker in ("gradient_descent", WORST, WORST_STEPWISE):
        cells = [equal_cost([run], attacker)["m"]["1"] for run in (before, after)]
        assert [cell["cells"] for cell in cells] == [1, 1]
        assert cells[1]["median"] <= cells[0]["median"]
    assert "-" not in [cell.strip() for cell in summary(compare([after])).split("  ")]


def test_who_attacked_some_runs_only_is_named() -> None:
    both = point(exact(gradient_descent=30.0, adam=2.0), exact(gradient_descent=1.0, adam=1.0))
    one = point(exact(gradient_descent=8.0), exact(gradient_descent=1.0), tasks="u")
    told = "Adam attacked 1 of 2 runs and is left out of the comparison; the least slow-down"
    assert told in page(compare([both, one]))
    assert told in summary(compare([both, one]))


def test_grammar_of_one() -> None:
    text = page(compare([point(exact(gradient_descent=8.0), exact(gradient_descent=1.0))]))
    assert "Methods at equal cost · 1 run · 1 pair of tasks" in text
    assert "m: 8 times slower to misuse by gradient descent, no slower to use" in text


def test_runs_come_back_from_results() -> None:
    harmful = {"gradient_descent": Slowdown(64.0, True), "whitened": Slowdown(1.0, False)}
    run = point(harmful, exact(gradient_descent=0.9, whitened=1.0))
    assert Point.from_dict(json.loads(json.dumps(to_json(run.to_dict())))) == run


def test_a_run_becomes_a_point_and_a_sweep_does_not() -> None:
    found = point_of("run", saved("kappa"))
    assert found.slowdown["harmful"]["gradient_descent"] == Slowdown(16.0, True)
    assert not found.attackers["whitened"].sees_theta
    # Schema 1 names no labels; those that there were are known.
    old = point_of("run", saved("kappa", schema=1))
    assert old.attackers["line_search"] == AttackerInfo("Gradient descent with line search")
    assert not old.attackers["whitened"].sees_theta
    with pytest.raises(ValueError, match="must be of a finished kappa run"):
        point_of("sweep", saved("kappa-sweep"))


def test_runs_that_share_no_attacker_are_refused() -> None:
    runs = [point(exact(adam=1.0), exact(adam=1.0)), point({}, {})]
    with pytest.raises(ValueError, match="must share an attacker"):
        compare(runs)


@pytest.mark.parametrize("read", [dict, migrate])
def test_a_comparison_of_schema_1_says_what_it_does_not_know(read: Any) -> None:
    text = page(read(saved("kappa-comparison", schema=1)))
    assert "did not keep which slow-downs of single runs are lower bounds" in text
    # Its worst attacker was that of those who train step by step.
    assert "The worst of those who train step by step" in text
    assert "The worst of these attackers" not in text


# --- sweeps -------------------------------------------------------------------------------------


def sweep_point(ratio: float, cut: bool, *, log_rir: float = 1.0) -> dict[str, Any]:
    values = dict.fromkeys(("official", "ridge", "rank_aware"), math.exp(log_rir))
    return {
        "method_label": "closed-form",
        "knob": None,
        "request": {"primary": "4", "harmful": ["9"]},
        "attackers": {"adam": {"label": "Adam", "sees_theta": True}},
        "rir": values,
        "log_rir": dict.fromkeys(values, log_rir),
        "share_of_ceiling": 1.0,
        "seconds": {"immunize": 1.0, "total": 2.0},
        "slowdown": {"harmful": {"adam": ratio}, "primary": {"adam": 1.0}},
        "slowdown_is_lower_bound": {"harmful": {"adam": cut}, "primary": {"adam": False}},
        "environment": {"python": "3"},
    }


def test_a_sweep_keeps_the_lower_bounds() -> None:
    points = {str(i): sweep_point(64.0, True) for i in range(3)}
    found = summarise(points)
    harm = found["methods"]["closed-form"]["slowdown"]["harmful"]["adam"]
    assert harm["is_lower_bound"] == {
        "mean": True, "min": True, "max": True, "quartiles": [True] * 3,
    }  # fmt: skip
    text = page(found)
    assert "closed-form, adam ≥ 64× ≥ 64× to ≥ 64×" in text
    # 0 of 3 points: up to 71 %.
    assert "0 of 3 0% to 71% at 95%" in text
    assert "3 immunizations" in text


def test_a_sweep_counts_who_is_not_slowed() -> None:
    points = {
        "a": sweep_point(1.0, False),
        "b": sweep_point(1.0, True),
        "c": sweep_point(8.0, False),
    }
    harm = summarise(points)["methods"]["closed-form"]["slowdown"]["harmful"]["adam"]
    # One that was cut off did not get there: it is slowed, if nobody knows by how much.
    assert harm["not_slower"] == 1
    assert "1 immunization " in page(summarise({"a": sweep_point(2.0, False)}))


def test_a_sweep_has_its_map() -> None:
    found = summarise({"a": sweep_point(2.0, False, log_rir=3.0)})
    assert found["maps"]["closed-form"] == {"rows": ["9"], "columns": ["4"], "log_rir": [[3.0]]}
    assert "closed-form: mean RIR 20.1, least 20.1." in page(found)
    assert "closed-form  1       20.1" in sweep_summary(found)


@pytest.mark.parametrize("read", [dict, migrate])
def test_a_sweep_of_schema_1_says_what_it_does_not_know(read: Any) -> None:
    text = page(read(saved("kappa-sweep", schema=1)))
    assert "read each as “at least”" in text
    assert "By pair of tasks" not in text
    assert "read each" not in page(saved("kappa-sweep"))


def test_a_sweep_without_attacks_says_so() -> None:
    bare = sweep_point(2.0, False)
    bare |= {key: {"harmful": {}, "primary": {}} for key in ("slowdown", "slowdown_is_lower_bound")}
    assert "RIR alone does not tell who is slowed" in page(summarise({"a": bare}))
