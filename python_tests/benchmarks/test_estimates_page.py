"""Pages of estimates, the corridor, kernels of gradients and deep extractors say what was found."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_page = pytest.importorskip("benchmarks._page")
corridor = pytest.importorskip("benchmarks.protection.corridor")
estimates = pytest.importorskip("benchmarks.protection.estimates")
deep = pytest.importorskip("benchmarks.protection.deep")
ntk = pytest.importorskip("benchmarks.protection.ntk")
PAGES = {"estimates": estimates, "corridor": corridor, "deep": deep, "ntk": ntk}


def results(name: str) -> dict[str, Any]:
    return json.loads(PAGES[name].OUT.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_page_is_what_the_result_file_says(name: str) -> None:
    assert _page.filled(page(name), PAGES[name].parts(results(name))) == page(name)
    with pytest.raises(ValueError, match="must have the marks"):
        _page.filled("no marks", PAGES[name].parts(results(name)))


def test_a_changed_number_is_found() -> None:
    changed = copy.deepcopy(results("estimates"))
    for row in changed["rows"]:
        row["rir_known_base"]["bias"] += 0.5
    assert _page.filled(page("estimates"), estimates.parts(changed)) != page("estimates")
    changed = copy.deepcopy(results("corridor"))
    for row in changed["deep"]:
        row["inside"] -= 0.1
    assert _page.filled(page("corridor"), corridor.parts(changed)) != page("corridor")


@pytest.mark.parametrize(("tasks", "estimator"), [("gaussian", "matched"), ("cosines", "spiked")])
def test_what_the_estimates_page_claims(tasks: str, estimator: str) -> None:
    rows = results("estimates")["rows"]
    assert estimates.worst(rows, tasks, "plain") > 1.0
    assert estimates.worst(rows, tasks, estimator) <= estimates.GOAL
    # The floor: what samples have not seen.
    assert estimates.worst(rows, "rectified", estimator) > 1.0


def test_what_the_corridor_page_claims() -> None:
    found = results("corridor")
    best = found["linear"]["best_log_kappa_harmful"]
    linear = {row["controller"]: row for row in found["linear"]["rows"]}
    assert linear["sqp"]["log_kappa_harmful"] == pytest.approx(best, abs=1e-2)
    assert linear["sqp"]["kappa_last"] == pytest.approx(30.0, rel=1e-3)
    assert linear["dual"]["kappa_largest"] > 2 * linear["sqp"]["kappa_largest"]
    kept = [
        row["inside"]
        for row in found["deep"]
        if row["controller"] == "sqp" and row["measured"] == "all samples, every step"
    ]
    assert min(kept) >= corridor.GOAL


def test_a_small_run_measures_what_the_page_holds() -> None:
    population = estimates.gaussian("log-uniform")
    small = population._replace(
        rows={role: rows[::10, ::10] for role, rows in population.rows.items()}
    )
    rows = list(estimates.rows_of(small, 60, 3))
    assert {row["estimator"] for row in rows} == set(estimates.ESTIMATORS)
    found = {"rows": [{**row, "samples": estimates.ENOUGH} for row in rows]}
    assert estimates.table(found, "rir_known_base").count("\n") == 1 + len(estimates.STRENGTHS)


def test_a_small_deep_run_is_judged_on_all_samples() -> None:
    settings = corridor.DeepExtractorImmunizer(
        ("2",), objective="r_ill", steps=corridor.BURN_IN + 3, learning_rate=3e-3
    )
    row = corridor.deep_row(settings, 0)
    assert row["kappa_start"] > corridor.DEEP_HIGH
    assert 0.0 <= row["inside"] <= 1.0


def test_what_the_ntk_page_claims() -> None:
    found = ntk.summaries(results("ntk"))
    for (_, attacker), numbers in found.items():
        if attacker == "probe":  # nothing moves the kernel: the prediction is the run
            assert numbers["spearman"] > 0.99
            assert numbers["kernel_change"] == 0.0
        if attacker in ("probe", "last block"):
            assert numbers["spearman"] >= ntk.GOAL
    changed = copy.deepcopy(results("ntk"))
    for row in changed["rows"]:
        row["predicted"] = 1.0
    assert _page.filled(page("ntk"), ntk.parts(changed)) != page("ntk")


def test_attackers_of_the_ntk_page_train_what_they_say() -> None:
    """The adapter starts at nothing; what is cut off in front changes no output and no kernel."""
    torch.manual_seed(0)
    family = next(family for family in ntk.FAMILIES if family.name == "small ViT")
    backbone = torch.nn.Sequential(ntk.Tokens(32), ntk.Ending(32))
    network = ntk.Network(backbone, torch.eye(32), torch.ones(32)).double()
    x = torch.randn(3, 784, dtype=torch.float64)
    for attacker in ntk.ATTACKERS:
        held, names = ntk.attacked(family, network, attacker)
        short, given = ntk.shortened(held, names, x)
        torch.testing.assert_close(short(given), network(x))
        weights = [n for n, _ in held.named_parameters() if n.startswith(tuple(names))]
        assert {n for n, _ in short.named_parameters()} >= set(weights)
        steps, _ = ntk.measured(short, names, given, -short(given).detach(), 1e-6, 1)
        assert steps == float("inf")


def test_costs_of_a_step_are_those_of_four_kinds_of_training() -> None:
    row = deep.costs(lambda: deep.perceptron(64, 64), quick=True)
    assert set(row["seconds"]) == set(row["bytes"]) == set(deep.KINDS)
    assert row["bytes"]["plain"] < row["bytes"]["two batches"] <= row["bytes"]["ours"]
    # The same gradient by other means: the published terms are ours, in another precision.
    net = deep.perceptron(8, 40)
    for published, ours in (
        (deep.published_r_well, deep.gram_r_well),
        (deep.published_r_ill, deep.gram_r_ill),
    ):
        features = net.body(net.batches[0]).double()
        assert float(published(features)) == pytest.approx(float(ours(features)), rel=1e-3)


def test_an_interval_is_students() -> None:
    found = deep.Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.302652729911275 / 3**0.5)
    spread = deep.spread_of({"a": 1.0, "b": 3.0, "c": 5.0}, ["a", "b"])
    assert spread["trained"] == {"least": 1.0, "least_fifth": 1.0, "mean": 2.0}
    assert spread["unseen"]["least"] == 5.0


def test_cells_of_few_seeds_are_values_and_shares_end_at_one() -> None:
    assert deep._cell([0.9, 1.0], ".1f", share=True) == "0.9, 1.0"
    assert deep._cell([1.0, 1.0, 0.7], ".1f", share=True) == "0.9 (0.5 to 1.0)"
    assert deep._cell([1.0, 1.0, 0.7], ".1f") == "0.9 (0.5 to 1.3)"
    assert deep.Interval.of_logs([1.0, 100.0]).mean == pytest.approx(10.0)


def test_the_verdict_on_deep_extractors_follows_the_numbers() -> None:
    found = results("deep")
    assert deep.answer(found).startswith("Only whom it was made for")
    rows = found["attackers"]["R_well and R_ill"]
    for row in rows.values():
        row["slowdown_harmful"]["gradient_descent"] = 1.0
    assert deep.answer(found).startswith("Nobody that could be shown")
    for row in rows.values():
        row["fine_tuned"]["full"][-1] = 0.0
    assert deep.answer(found).startswith("Others than whom it was made for")


def test_a_run_that_ran_away_goes_again_and_a_wrong_setting_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, rates = SimpleNamespace(samples=lambda pair: pair), []

    def fails(_: Any, settings: Any, *__: Any) -> None:
        rates.append(settings.learning_rate)
        raise ValueError(words)

    monkeypatch.setattr(deep, "immunized", fails)
    words = "step sizes must keep the features finite, got NaN"
    assert "diverged" in deep.harms(task, "mean", 0, True)
    assert rates == [deep.SETTINGS.learning_rate / 2.0**k for k in range(deep.HALVINGS)]
    words = "k must be positive"
    with pytest.raises(ValueError, match="k must be positive"):
        deep.harms(task, "mean", 0, True)


def test_ratios_of_the_ntk_page_say_what_they_leave_out() -> None:
    steps = [(10.0, 10.0), (40.0, 20.0), (300.0, 30.0), (400.0, math.inf)]
    rows = [
        {
            "predicted": predicted,
            "measured": measured,
            "primary": "0:1",
            "harm": str(number),
            "kernel_change": 0.0,
            "halved": 0,
        }
        for number, (predicted, measured) in enumerate(steps)
    ]
    found = ntk.summary(rows, 100)
    assert (found["points"], found["beyond"], found["foretold_beyond"]) == (4, 1, 2)
    assert (found["in_ratio"], found["ratio"], found["ratio_ended"]) == (2, 1.5, 2.0)
    assert "only for a head alone" in page("ntk")
    exact = {(name, who): found for name in ("a", "b") for who in ntk.ATTACKERS}
    assert "see the ratios" in ntk.answer(exact)
    assert "do not all meet" in ntk.goal({key: {**found, "spearman": 0.5} for key in exact})
