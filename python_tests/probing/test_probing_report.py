"""Reports: complete run directories, honest sentences, a page that stands alone."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from page_parser import ParsedPage
from saved_results import saved

from immunize_ext import report
from immunize_ext.probing import attack_report
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.evaluation import evaluate
from immunize_ext.probing.immunizers import ClosedFormImmunizer
from immunize_ext.probing.report import describe_attack, headline, summary, verdict
from immunize_ext.probing.results import Attacked, AttackerInfo
from immunize_ext.quantities import Slowdown
from immunize_ext.storage import check_target, environment, run_directory, to_json


def task(seed: int, *, labels: bool = True, n: int = 80, p: int = 5) -> Task:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.3, 3.0, p, dtype=torch.float64)
    whitened = torch.randn(n, p, dtype=torch.float64, generator=generator)
    x = whitened * (scales if seed % 2 else scales.flip(0))
    y = whitened.sum(-1) + 0.3 * torch.randn(n, dtype=torch.float64, generator=generator)
    y = y.sign() if labels else y
    # A name that would break the page if it were not escaped.
    return Task(f"task <{seed}> & more", x[:50], y[:50], x[50:], y[50:])


def measured(*, labels: bool = True) -> dict[str, Any]:
    """Results of a run, as they stand in a file."""
    problem = Problem.of(task(1, labels=labels), task(2, labels=labels))
    immunized = ClosedFormImmunizer(strength=10.0).fit(None, problem)
    found = evaluate(
        immunized, problem.primary, problem.harmful[0], base_budget=200, limit=16.0
    ).to_dict()
    more = {"kind": "kappa", "method": "closed-form", "config": immunized.config}
    results: dict[str, Any] = json.loads(
        json.dumps(to_json({**found, **more, "environment": environment()}))
    )
    return results


# --- words --------------------------------------------------------------------------------------


def attack(base_steps: int, steps: int | None, ratio: float, budget: int = 1280) -> Attacked:
    facts = {"steps_without": base_steps, "steps_with": steps, "budget_with": budget}
    slowdown = Slowdown(ratio, steps is None)
    return Attacked("harmful", AttackerInfo("Gradient descent"), slowdown, facts)


@pytest.mark.parametrize(
    ("base_steps", "steps", "ratio", "sentence"),
    [
        (10, 345, 34.5, "34 times slower: 345 steps instead of 10."),
        (10, 25, 2.5, "2.5 times slower: 25 steps instead of 10."),
        (10, 10, 1.0, "Not slowed at all: 10 steps, 10 before."),
        (1, 1, 1.0, "Not slowed at all: 1 step, 1 before."),
        (100, 50, 0.5, "2.0 times faster: 50 steps instead of 100."),
        (
            10,
            None,
            128.0,
            "Not there after 1,280 steps: more than 128 times the 10 steps before.",
        ),
        (900, None, 1.42, "Not there after 1,280 steps: more than 1.4 times the 900 steps before."),
        (0, 0, 1.0, "Hardly anything is learnt, even without immunization."),
        (0, None, 64.0, "Hardly anything is learnt, even without immunization."),
        # "More than 1 times" says nothing.
        (1280, None, 1.0, "Not there after 1,280 steps; without immunization it took 1,280."),
    ],
)
def test_sentences(base_steps: int, steps: int | None, ratio: float, sentence: str) -> None:
    assert describe_attack(attack(base_steps, steps, ratio)) == sentence


def results_with(**harmful: tuple[float, bool]) -> dict[str, Any]:
    """A run whose attackers on the harmful task came out so; the primary task is as it was."""
    return results_of_roles(harmful, dict.fromkeys(harmful, (1.0, False)))


def results_of_roles(
    harmful: dict[str, tuple[float, bool]], primary: dict[str, tuple[float, bool]]
) -> dict[str, Any]:
    results = saved("kappa")
    for role, found in (("harmful", harmful), ("primary", primary)):
        results["slowdown"][role] = {name: ratio for name, (ratio, _) in found.items()}
        results["slowdown_is_lower_bound"][role] = {name: cut for name, (_, cut) in found.items()}
        facts = results["attacks"][role]
        results["attacks"][role] = {name: facts.get(name, facts["whitened"]) for name in found}
    return results


@pytest.mark.parametrize(
    ("harmful", "primary", "words"),
    [
        ((30.0, False), 1.0, "Slower to misuse, not locked"),
        ((1.5, False), 1.0, "Slightly slower to misuse"),
        ((1.0, False), 1.0, "No protection on these tasks"),
        ((0.5, False), 0.1, "No protection on these tasks"),
        ((30.0, False), 4.0, "Slower to misuse, and slower to use"),
        ((1.0, True), 0.9, "Slower to misuse, not locked"),
    ],
)
def test_headline_is_no_better_than_the_numbers(
    harmful: tuple[float, bool], primary: float, words: str
) -> None:
    results = results_of_roles(
        {"gradient_descent": harmful}, {"gradient_descent": (primary, False)}
    )
    assert headline(results) == words


def test_verdict_counts_every_attacker() -> None:
    two_free = results_with(
        gradient_descent=(30.0, False),
        conjugate_gradients=(3.5, False),
        adam=(64.0, True),
        whitened=(1.0, False),
        closed_form_ridge=(1.0, False),
    )
    expected = (
        "Of 5 attackers, 3 are slowed, by 3.5× to >64×; not slowed: whitens the features first, "
        "solves in closed form."
    )
    assert verdict(two_free) == expected
    page = ParsedPage(report.render(two_free)).text
    assert expected in page
    # The card of the attacker who minds it least shows one who is not slowed, not the 3.5x.
    assert "1.0× the steps to learn the harmful task for the attacker who minds it least" in page
    assert expected in summary(two_free)


def test_an_optimizer_that_is_not_slowed_is_in_the_headline() -> None:
    results = results_with(gradient_descent=(30.0, False), adam=(1.0, False))
    assert headline(results) == "Slower to misuse for some optimizers, not for all"
    one = results_with(gradient_descent=(30.0, False))
    assert verdict(one) == "Of 1 attacker, 1 is slowed, by 30×; none gets round it."
    none = results_with(gradient_descent=(1.0, False), adam=(0.5, False))
    assert verdict(none) == "None of 2 attackers is slowed."


def test_who_learns_nothing_is_not_counted_as_free() -> None:
    results = results_with(
        gradient_descent=(64.0, True), whitened=(1.0, False), closed_form_ridge=(1.0, False)
    )
    for name in ("whitened", "closed_form_ridge"):
        results["attacks"]["harmful"][name] = {
            **results["attacks"]["harmful"][name],
            "steps_without": 0,
            "steps_with": 0,
        }
    expected = (
        "Of 3 attackers, 1 is slowed, by >64×; none gets round it; learning hardly anything even "
        "without immunization: whitens the features first, solves in closed form."
    )
    assert verdict(results) == expected
    text = ParsedPage(report.render(results)).text
    assert "learns hardly anything from these samples, immunized or not" in text
    assert ">64× the steps to learn the harmful task for the attacker who minds it least" in text
    assert "hardly learnt, even before" in summary(results)
    results["attacks"]["harmful"]["gradient_descent"]["steps_without"] = 0
    assert headline(results) == "The harm is hardly learnt, immunized or not"


def test_a_lock_is_not_said_to_be_undone_by_whitening() -> None:
    results = {**saved("kappa"), "dimensions": [64, 40]}
    text = ParsedPage(report.render(results)).text
    assert "Of 64 dimensions 40 are left" in text
    assert "One factorisation of the features undoes this protection" not in text
    results = {**saved("kappa"), "dimensions": [64, 64]}
    assert "One factorisation" in ParsedPage(report.render(results)).text


def test_the_best_constant_stands_beside_few_samples() -> None:
    results = saved("kappa")
    assert "the best constant answer" not in ParsedPage(report.render(results)).text
    results["few_samples"]["without"] |= {"constant_error_rate": 0.44, "constant_loss": 0.9}
    assert "the best constant answer 44%" in ParsedPage(report.render(results)).text


def test_every_attacker_has_its_row_and_its_name() -> None:
    """Also one that this package does not know: results bring the label."""
    results = results_with(gradient_descent=(30.0, False), patient=(2.0, False))
    results["attackers"]["patient"] = {"label": "Waits for better times", "sees_theta": True}
    text = ParsedPage(report.render(results)).text
    assert "Waits for better times 2.0×" in text
    assert "Other optimizers: waits for better times, 2.0×." in text
    assert "Waits for better times" in summary(results)


def test_warnings_stand_in_the_page_and_reach_the_terminal() -> None:
    results = {**saved("kappa"), "warnings": ["The ceiling is a lie."], "notes": ["Chosen tasks."]}
    text = ParsedPage(report.render(results)).text
    assert "Before you quote these numbers The ceiling is a lie. Chosen tasks." in text
    assert "warning: The ceiling is a lie." in summary(results)


def test_shares_of_test_samples_have_their_intervals() -> None:
    text = ParsedPage(report.render(saved("kappa"))).text
    assert re.search(
        r"Its test accuracy at the end is 99.7% \(98.5% to 100.0% at 95%, n = 360", text
    )
    assert len(re.findall(r"% to [\d.]+% at 95%, n = 358\)", text)) == 2


def test_page_says_it_all() -> None:
    results = saved("kappa")
    results["alternatives"] = [
        {
            "name": "Other & co",
            "rir": 1234567.0,
            "share_of_ceiling": 0.5,
            "harmful": [128.0, True],
            "primary": [0.5, False],
        }
    ]
    results["harmful_tasks"] = [
        {
            "name": "one more harm",
            "rir": {"ridge": 3.0},
            "share_of_ceiling": 0.25,
            "slowdown": {"gradient_descent": 16.0, "whitened": 1.0},
            "slowdown_is_lower_bound": {"gradient_descent": True, "whitened": False},
        }
    ]
    text = ParsedPage(report.render(results)).text
    for words in (
        "What was protected",
        "Against whom",
        "At what cost",
        "whitens the features first, or solves for the head in closed form, is not slowed at all",
        "Other & co 1.23·10⁶ 50% >128× 0.50×",
        "one more harm >16× 1.0× 3 25%",
        "Slow-down on the training loss from the spectrum alone",
    ):
        assert words in text


def test_results_without_curves_have_a_page_without_plots() -> None:
    text = report.render(saved("kappa", schema=1))
    assert "<svg" not in text
    assert "Watching the attackers learn" not in text
    assert "The ceiling of RIR, by ridge" in text


def further(
    attacker: str, role: str = "harmful", ratio: float = 64.0, task: str = "4 against 9"
) -> dict[str, Any]:
    """One attack of a record: without steps where nothing is learnt, cut off beyond 60."""
    censored = ratio > 60.0
    return {
        "attacker": attacker,
        "role": role,
        "task": task,
        "slowdown": ratio,
        "is_lower_bound": censored,
        "steps_without": 10,
        "steps_with": None if censored else round(10 * ratio),
        "learning_rate_without": 0.5,
        "learning_rate_with": 0.25,
        "budgets": [{"steps": 1, "loss_with": 0.25, "loss_without": 0.125}],
    }


def record_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "kappa-attack", "attacks": list(rows), "environment": {"threads": 1}}


def test_further_attacks_in_plain_text() -> None:
    told = attack_report.summary(record_of(further("lbfgs")))
    assert "L-BFGS" in told
    assert ">64× slower" in told
    assert "1 step: test loss 0.25, 0.125 without" in told


def test_further_attacks_have_a_page() -> None:
    """Of several harmful tasks the least slowed one is in the verdict; all are in the table."""
    record = record_of(
        further("lbfgs"),
        further("lbfgs", ratio=3.0, task="two <b>"),
        further("lbfgs", "primary", 1.0),
        further("nesterov", ratio=20.0),
        further("whitened", ratio=1.0),
    )
    page = ParsedPage(report.render(record))
    page.check()
    assert "Slower to misuse, not locked" in page.text
    assert "2 are slowed, by 3.0× to 20×; not slowed: whitens the features first" in page.text
    assert "harmful task: two <b>" in page.text
    assert "10 → 30" in page.text
    assert "10 → not there" in page.text
    assert page.text.count("How many times the steps each attacker needs") >= 2
    (panel,) = report.page.page_of(record).panels["slowdowns"]
    drawn = report.plots.panel_svg(panel.draw, "x", size=panel.size)
    order = [drawn.index(name) for name in ("L-BFGS", "Nesterov", "Whitens")]
    assert order == sorted(order)


def test_further_attacks_on_the_primary_task_alone_claim_nothing() -> None:
    page = ParsedPage(report.render(record_of(further("lbfgs", "primary", 1.0))))
    assert "nothing here says whether it is protected" in page.text
    assert "None of" not in page.text


# --- a run from end to end ------------------------------------------------------------------------


def test_a_run_is_drawn_from_what_was_measured() -> None:
    page = ParsedPage(report.render(measured()))
    page.check()
    assert "task <2> & more" in page.text  # escaped once, not twice
    assert "Right answers while the attack runs" in page.text


def test_regression_has_no_accuracy_plot() -> None:
    results = measured(labels=False)
    page = report.page.page_of(results)
    assert page.panels["accuracy"] == []
    assert page.panels["convergence"]
    assert "Right answers" not in report.render(results)


# --- run directories ----------------------------------------------------------------------------


def test_a_page_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("immunize_ext.report.page.write_file", fail)
    with (
        pytest.raises(OSError, match="disk full"),
        run_directory(tmp_path / "run") as folder,
    ):
        report.write(saved("kappa"), folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interruption_keeps_the_old_run(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "run"

    def write(text: str, raised: type[BaseException] | None = None) -> None:
        with run_directory(target, force=True) as writing:
            (writing / "results.json").write_text(text)
            if raised is not None:
                raise raised

    write("old")
    with pytest.raises(error):
        write("new", error)
    assert (target / "results.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_force_replaces_all_of_the_old_run(tmp_path: Path) -> None:
    target = tmp_path / "run"
    for name in ("old", "new"):
        with run_directory(target, force=True) as writing:
            (writing / "results.json").write_text(name)
            (writing / f"{name}.png").write_text("")
    assert sorted(path.name for path in target.iterdir()) == ["new.png", "results.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_existing_run_is_refused_without_force(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    with pytest.raises(FileExistsError, match=r"exists; choose another folder, or .*--force"):
        check_target(target, force=False)
    check_target(target, force=True)  # empty: nothing to lose


def test_force_never_deletes_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for name in ("photos", "file", "link"):
        with pytest.raises(FileExistsError, match="is not a run directory"):
            check_target(tmp_path / name, force=True)


def test_run_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with run_directory(tmp_path / "run") as writing:
        (writing / "results.json").write_text("")
    assert (tmp_path / "run").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_json_is_strict() -> None:
    value = {"a": [math.inf, -math.inf, math.nan, 1.0], 2: (True, None)}
    assert to_json(value) == {"a": ["inf", "-inf", None, 1.0], "2": [True, None]}
    json.dumps(to_json(value), allow_nan=False)
