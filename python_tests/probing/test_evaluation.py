"""What is measured of an immunized extractor: plain values, thinned curves, honest warnings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from immunize_ext.probing.attacks import ATTACKS, compare_attack
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.evaluation import (
    Evaluation,
    accuracy_at,
    evaluate,
    log_spaced_steps,
    warnings_of,
)
from immunize_ext.probing.immunizers import (
    ClosedFormImmunizer,
    ConditionNumberImmunizer,
    Immunized,
    LinearLock,
)
from immunize_ext.storage import to_json


def task(seed: int, *, labels: bool = True, n: int = 80, p: int = 5) -> Task:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.3, 3.0, p, dtype=torch.float64)
    whitened = torch.randn(n, p, dtype=torch.float64, generator=generator)
    x = whitened * (scales if seed % 2 else scales.flip(0))
    y = whitened.sum(-1) + 0.3 * torch.randn(n, dtype=torch.float64, generator=generator)
    y = y.sign() if labels else y
    return Task(f"task {seed}", x[:50], y[:50], x[50:], y[50:])


PROBLEM = Problem.of(task(1), task(2))


@pytest.fixture(scope="module")
def immunized() -> Immunized:
    return ClosedFormImmunizer(strength=10.0).fit(None, PROBLEM)


@pytest.fixture(scope="module")
def evaluation(immunized: Immunized) -> Evaluation:
    return evaluate(immunized, task(1), task(2), base_budget=200, limit=16.0)


def warned(evaluation: Evaluation, **changes: Any) -> list[str]:
    return warnings_of({**evaluation.to_dict(), **changes}, dict(ATTACKS))


def slowed(evaluation: Evaluation, role: str, ratio: float) -> dict[str, Any]:
    """The slow-down of gradient descent as it might have been, the attack not cut off."""
    by_role = {r: dict(found) for r, found in evaluation.slowdown.items()}
    bounds = {r: dict(found) for r, found in evaluation.slowdown_is_lower_bound.items()}
    by_role[role]["gradient_descent"], bounds[role]["gradient_descent"] = ratio, False
    return {"slowdown": by_role, "slowdown_is_lower_bound": bounds}


def test_values_hold_what_a_report_needs(evaluation: Evaluation) -> None:
    found = evaluation.to_dict()
    assert set(found["rir"]) == {"official", "ridge", "rank_aware"}
    assert found["rir"]["ridge"] == pytest.approx(found["i"] / found["ii"])
    assert found["ceiling"] == pytest.approx(found["rir"]["ridge"], rel=1e-6)
    assert found["share_of_ceiling"] == pytest.approx(1.0, rel=1e-6)
    for role in ("harmful", "primary"):
        assert found["slowdown"][role]["whitened"] == 1.0
        assert found["slowdown"][role]["closed_form_ridge"] == 1.0
        assert found["tasks"][role]["kind"] == "classification"
    assert found["attackers"]["whitened"]["sees_theta"] is False


def test_json_both_ways(evaluation: Evaluation) -> None:
    read = json.loads(json.dumps(to_json(evaluation.to_dict()), allow_nan=False))
    assert Evaluation.from_dict({**read, "kind": "kappa"}) == evaluation
    infinite = replace(evaluation, ceiling=math.inf)
    again = Evaluation.from_dict(json.loads(json.dumps(to_json(infinite.to_dict()))))
    assert again.ceiling == math.inf
    del read["spectra"], read["ridge"]
    with pytest.raises(ValueError, match="values must hold ridge"):
        Evaluation.from_dict(read)


def test_evaluation_on_each_device(device: torch.device) -> None:
    problem = Problem.of(task(1).to(device), task(2).to(device))
    for immunizer in (
        ClosedFormImmunizer(strength=10.0),
        ConditionNumberImmunizer(steps=3, preconditioner="explicit", keep="last"),
    ):
        immunized = immunizer.fit(None, problem)
        assert immunized.theta.device.type == device.type
        found = evaluate(immunized, problem.primary, problem.harmful[0], base_budget=50, limit=2.0)
        assert found.slowdown["harmful"]["whitened"] == 1.0


def test_curves_are_thinned_and_keep_what_sentences_quote(
    evaluation: Evaluation, immunized: Immunized
) -> None:
    whole = compare_attack(task(2), immunized.theta, base_budget=200, limit=16.0, stop_early=False)
    facts = evaluation.attacks["harmful"]["gradient_descent"]
    for side, curve in (("without", whole.base), ("with", whole.immunized)):
        kept = facts["curves"][side]
        assert kept["steps"] == sorted(set(kept["steps"]))
        quoted = {0, 1, 10, 100, facts["steps_without"], curve.steps[-1]}
        assert {step for step in quoted if step <= curve.steps[-1]} <= set(kept["steps"])
        assert len(kept["steps"]) <= 130
        for name in ("train_loss", "test_loss", "test_accuracy"):
            expected = [curve.score(name)[step] for step in kept["steps"]]
            assert kept[name] == pytest.approx(expected, rel=1e-5)
    sides = whole.base, whole.immunized
    at = tuple(curve.score("test_accuracy")[min(100, curve.steps[-1])] for curve in sides)
    assert accuracy_at(facts, 100) == pytest.approx(at, rel=1e-5)


def test_regression_has_no_accuracy() -> None:
    problem = Problem.of(task(1, labels=False), task(2, labels=False))
    immunized = ClosedFormImmunizer(strength=5.0).fit(None, problem)
    found = evaluate(immunized, problem.primary, problem.harmful[0], base_budget=50, limit=4.0)
    facts = found.attacks["harmful"]["gradient_descent"]
    assert accuracy_at(facts, 10) is None
    assert not any("accuracy" in key for key in facts)
    assert "test_accuracy" not in found.details["rfd"]["harmful"]


def test_spectra_are_thinned(monkeypatch: pytest.MonkeyPatch, immunized: Immunized) -> None:
    monkeypatch.setattr("immunize_ext.probing.evaluation._EIGENVALUES", 3)
    found = evaluate(immunized, task(1), task(2), base_budget=5, limit=1.0).details["spectra"]
    assert found["harmful"]["places"] == [1, 3, 5]
    assert found["harmful"]["before"] == sorted(found["harmful"]["before"], reverse=True)
    kappa = found["primary"]["after"][0] / found["primary"]["after"][-1]
    assert kappa == pytest.approx(10.0, rel=1e-4)  # the strength


def test_metrics_rows_are_the_curves(evaluation: Evaluation) -> None:
    curve = evaluation.attacks["primary"]["whitened"]["curves"]["without"]
    mine = [
        row
        for row in evaluation.metrics()
        if (row["role"], row["attacker"], row["immunized"]) == ("primary", "whitened", False)
    ]
    assert [row["step"] for row in mine] == curve["steps"]
    assert [row["train_loss"] for row in mine] == curve["train_loss"]


def test_warnings_name_what_is_wrong(evaluation: Evaluation) -> None:
    same = warned(evaluation, **slowed(evaluation, "harmful", 1.0))
    assert any("does not work" in text for text in same)
    costly = warned(evaluation, **slowed(evaluation, "primary", 3.0))
    assert any("primary task is slowed as well (3.0x" in text for text in costly)
    few = {**evaluation.tasks, "harmful": {**evaluation.tasks["harmful"], "train_samples": 3}}
    scarce = warned(evaluation, tasks=few, ceiling_growth=50.0)
    assert any("fewer training samples (3) than features (5)" in text for text in scarce)
    assert any("grows 50 times" in text for text in scarce)
    constant = {**few, "harmful": {**few["harmful"], "kind": "constant labels"}}
    assert any("one class" in text for text in warned(evaluation, tasks=constant))


def test_the_way_out_is_named_where_there_is_one(evaluation: Evaluation) -> None:
    """A closed form may take a lower strength; what a lock takes away, no setting brings back."""
    facts = {**evaluation.to_dict(), **slowed(evaluation, "primary", 3.0)}
    said = [warnings_of(facts, dict(ATTACKS), milder) for milder in (None, "ill_share")]
    assert any(text.endswith("(3.0x for gradient descent).") for text in said[0])
    assert any(text.endswith("a lower ill share would avoid that.") for text in said[1])
    for immunizer in (ClosedFormImmunizer(strength=1e3), LinearLock()):
        immunized = immunizer.fit(None, PROBLEM)
        found = evaluate(immunized, task(1), task(2), base_budget=50, limit=4.0, details=False)
        costly = [text for text in found.warnings if "slowed as well" in text]
        assert costly
        assert all(("strength" in text) == (immunized.method == "closed-form") for text in costly)


def test_a_harm_that_nobody_learns_is_said_to_be_one() -> None:
    """Targets that the inputs do not tell: the untrained head is as good as any."""
    harm = task(2, labels=False)
    noise = torch.randn(80, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    blind = replace(harm, y_train=noise[:50], y_test=noise[50:])
    immunized = ClosedFormImmunizer(strength=5.0).fit(None, Problem.of(task(1), harm))
    found = evaluate(immunized, task(1), blind, base_budget=50, limit=4.0)
    assert found.attacks["harmful"]["gradient_descent"]["steps_without"] == 0
    said = [text for text in found.warnings if "harmful task" in text and "slow" in text]
    assert any(
        "hardly learnt by gradient descent even without immunization" in text for text in said
    )
    assert not any("is not slowed" in text for text in said)
    assert found.details["worst_case"]["harmful"] == {}


def test_warning_when_rir_is_high_for_the_wrong_reason(evaluation: Evaluation) -> None:
    # kappa_H fell by e, kappa_P by e^3: RIR is e^2.
    found = warned(
        evaluation,
        i=math.exp(-1.0),
        rir={**evaluation.rir, "ridge": math.exp(2.0)},
        log_rir={**evaluation.log_rir, "ridge": 2.0},
    )
    assert any("although RIR is 7.39" in text for text in found)


def test_warning_when_the_grid_of_learning_rates_ends_too_soon(immunized: Immunized) -> None:
    few = replace(ATTACKS["adam"], learning_rates=(1e-4, 3e-4))  # type: ignore[type-var]
    found = evaluate(immunized, task(1), task(2), attacks=[few], base_budget=50, limit=2.0)
    assert any("Adam on the harmful task does best at 0.0003" in text for text in found.warnings)


def test_an_untouched_extractor_is_said_to_be_one() -> None:
    theta = torch.eye(5, dtype=torch.float64)
    untouched = Immunized("none", theta, theta, {}, [])
    found = evaluate(untouched, task(1), task(2), base_budget=20, limit=2.0, details=False)
    assert "nothing was immunized" in found.warnings[0]
    assert found.details == {}


def test_log_spaced_steps() -> None:
    assert log_spaced_steps(0, 5) == [0]
    steps = log_spaced_steps(1000, 20)
    assert steps[0] == 0
    assert steps[-1] == 1000
    assert steps == sorted(set(steps))
