"""Pages of text-to-image runs: every judged step, every attack, intervals, and no more."""

from __future__ import annotations

import base64
import copy
from typing import Any

import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from page_parser import ParsedPage
from saved_results import saved

from immunize_ext import report
from immunize_ext.quantities import Spread, corrected_share
from immunize_ext.report.demo import runs_of
from immunize_ext.text_to_image.attacks import AttackCurve
from immunize_ext.text_to_image.comparison import comparison_of, row_of, rows_of
from immunize_ext.text_to_image.comparison import summary as comparison_summary
from immunize_ext.text_to_image.evaluation import Comparison, TextToImageEvaluation
from immunize_ext.text_to_image.plots import grid_entries
from immunize_ext.text_to_image.report import attack_summary, headline, remarks, summary
from immunize_ext.text_to_image.results import Measured


@pytest.fixture
def demo() -> dict[str, Any]:
    """The text-to-image run of a demo: one seed, 16 images of three concepts for each score."""
    return copy.deepcopy(dict(runs_of(saved("demo", schema=1))["mima"]))


def page(results: dict[str, Any]) -> str:
    return ParsedPage(report.render(results)).text


def with_msgr(results: dict[str, Any], **at_threshold: float) -> dict[str, Any]:
    """The same run with other MSGR at the threshold, by attack."""
    for attack, value in at_threshold.items():
        spread = {"values": [value], "mean": value, "sd": None, "min": value, "max": value}
        results["evaluation"]["summary"][attack]["msgr_at_threshold"] = spread
    return results


# --- more than was measured ---------------------------------------------------------------------


def test_msgr_stands_at_every_judged_step_and_for_every_attack(demo: dict[str, Any]) -> None:
    text = page(demo)
    assert "MSGR step 10 step 20 step 40 LoRA 1.00" in text
    found = demo["evaluation"]["summary"]
    for attack in ("lora", "full_fine_tuning"):
        for step in ("10", "20", "40"):
            assert f"{found[attack]['msgr']['at'][step]['mean']:.2f}" in text
    last = found["full_fine_tuning"]["msgr"]["final"]["mean"]
    # The strongest attack at the last step stands beside the first number.
    assert (
        f"{last:.2f} MSGR against Full fine-tuning, the strongest attack, at step 40, the last "
        "that was judged" in text
    )
    assert "1.00 0.98 0.77" in summary(demo)


def test_none_of_48_images_may_be_seven_in_a_hundred(demo: dict[str, Any]) -> None:
    assert "0% 0.0% to 7.4%" in page(demo)
    measured = Measured(demo)
    assert measured.scores("immunized", "lora")[1].interval == pytest.approx(
        (0.0, 0.0740), abs=1e-4
    )
    # So MSGR of 1.00 may be 0.89, and the page says so.
    low, high = measured.msgr_interval("lora", 10)  # type: ignore[misc]
    assert (low, high) == pytest.approx((0.89, 1.0), abs=0.01)
    assert "1.00 0.89 to 1.00" in page(demo)


def test_no_interval_of_a_measure_that_is_no_share(demo: dict[str, Any]) -> None:
    demo["evaluation"]["shares"] = []
    text = page(demo)
    assert "Clopper-Pearson" not in text
    assert Measured(demo).msgr_interval("lora", 10) is None


def with_more_judges(results: dict[str, Any]) -> dict[str, Any]:
    """The same run with a second judge, the errors of the first, and images for other words."""
    evaluation = results["evaluation"]
    errors = {"sensitivity": 0.925, "false_positives": 0.005, "images": 40, "others": 360}
    evaluation["judge_errors"] = dict.fromkeys(evaluation["targets"], errors)
    evaluation["measures"] = ["accuracy", "second judge"]
    evaluation["shares"] = ["accuracy", "second judge"]
    for compared in evaluation["comparisons"]:
        for curves in compared["curves"].values():
            for curve in curves:
                scores = curve["scores"]
                scores["second judge"] = [0.5 * value for value in scores["accuracy"]]
    spread = Spread.of([0.25]).to_dict()
    scores = {"accuracy": spread, "second judge": spread}
    evaluation["step_zero"] = [
        {"wording": wording, "concept": name, "prompt": "", "unprotected": scores}
        | {"immunized": scores}
        for wording in ("own name", "no words")
        for name in evaluation["targets"]
    ]
    return results


def test_intervals_hold_the_errors_of_the_judge(demo: dict[str, Any]) -> None:
    before = Measured(demo).scores("immunized", "lora")[1]
    after = Measured(with_more_judges(demo)).scores("immunized", "lora")[1]
    assert (before.mean, after.mean) == (0.0, 0.0)
    assert after.interval == pytest.approx(
        corrected_share((0, 48), (111, 120), (2, 360))[1:], abs=1e-12
    )
    text = page(demo)
    assert "corrected for the judge's errors on real images" in text
    assert f"0% 0.0% to {after.interval[1]:.1%}" in text  # type: ignore[index]


def test_other_measures_stand_beside(demo: dict[str, Any]) -> None:
    shown = Measured(demo).scores("unprotected", "lora")
    text = page(with_more_judges(demo))
    halves = " ".join(f"{0.5 * score.mean:.0%}" for score in shown)
    assert f"LoRA, without: second judge {halves}" in text


def test_words_before_any_attack(demo: dict[str, Any]) -> None:
    assert "Before any attack" not in page(demo)
    with_more_judges(demo)
    demo["mima"]["unattacked"] = [
        {"wording": "no words", "prompt": "", "media": "image/png", "base64": "AAAA"}
    ]
    text = report.render(demo)
    read = ParsedPage(text).text
    assert "Asked by accuracy second judge" in read
    (score,) = {
        by_measure["accuracy"][side].interval
        for by_measure in Measured(demo).unattacked().values()
        for side in ("unprotected", "immunized")
    }
    assert score is not None
    assert f"no words, immunized 25% {score[0]:.1%} to {score[1]:.1%} 25%" in read
    assert 'alt="Images for the no words before' in text


def test_attacks_that_ask_by_the_name_alone_are_called_that(demo: dict[str, Any]) -> None:
    words = "Every attack asked by the concepts' own names"
    assert any(text.startswith(words) for text in remarks(demo))
    for compared in demo["evaluation"]["comparisons"]:
        if (compared["attack"], compared["concept"]) == ("full_fine_tuning", "five"):
            compared["curves"]["immunized"][0]["config"]["prompts"] = ["a photo of a cat"]
    assert not any(text.startswith(words) for text in remarks(demo))


def test_one_seed_has_no_band(demo: dict[str, Any]) -> None:
    text = page(demo)
    assert "Bands" not in text
    assert "One seed: nothing here says how far results scatter" in text
    two = page(saved("mima", schema=1))
    assert "Bands: least and largest of 2 seeds." in two
    assert "One seed" not in two


def test_protection_that_wears_off_is_a_warning_in_page_and_terminal(demo: dict[str, Any]) -> None:
    told = "Protection wears off: MSGR against LoRA is 1.00 at step 10 and 0.77 at step 40."
    assert told in remarks(demo)
    assert told in page(demo)
    assert f"warning: {told}" in summary(demo)


def test_warnings_of_the_run_are_passed_on(demo: dict[str, Any]) -> None:
    demo["warnings"] = ["The merge moves K and V by 18 times their norm."]
    assert "by 18 times their norm" in page(demo)
    assert "warning: The merge moves K and V by 18 times their norm." in summary(demo)


def test_a_baseline_that_does_as_well_is_named(demo: dict[str, Any]) -> None:
    assert not any("loss ascent" in text for text in remarks(demo))
    demo["mima"]["methods"][1]["msgr"] = [1.0]
    assert any("Plain loss ascent does no worse" in text for text in remarks(demo))


@pytest.mark.parametrize(
    ("lora", "full", "words"),
    [
        (1.0, 0.9, "Slower to teach again"),
        (1.0, 0.5, "Slower to teach again, partly"),
        (1.0, 0.1, "Slower to teach again by some attacks, not by all"),
        (0.1, 1.0, "No protection that could be measured"),
        (float("nan"), 1.0, "No protection that could be measured"),
    ],
)
def test_headline_counts_every_attack(
    demo: dict[str, Any], lora: float, full: float, words: str
) -> None:
    assert headline(with_msgr(demo, lora=lora, full_fine_tuning=full)) == words


def test_headline_counts_an_attack_that_stays_just_below_the_threshold(
    demo: dict[str, Any],
) -> None:
    found = demo["evaluation"]["summary"]["full_fine_tuning"]
    with_msgr(demo, lora=1.0, full_fine_tuning=float("nan"))
    found["msgr"]["at"]["40"]["mean"] = 0.0
    for at, mean in enumerate((0.1, 0.5, 0.6, 0.7)):
        found["unprotected"][at]["mean"] = mean
    assert headline(demo) == "Slower to teach again by some attacks, not by all"
    # One that teaches nothing to anyone says nothing.
    for spread in found["unprotected"]:
        spread["mean"] = 0.1
    assert headline(demo) == "Slower to teach again"


def test_headline_of_a_broken_lock(demo: dict[str, Any]) -> None:
    demo["evaluation"]["threshold"] = 0.4
    assert headline(demo) == "Slower to teach again, not locked"


def test_more_than_one_time_is_not_said(demo: dict[str, Any]) -> None:
    delay = demo["evaluation"]["summary"]["lora"]["delay"]
    delay.update(unprotected=40, immunized=None, ratio=1.0, censored=True)
    text = page(demo)
    assert "more than 1 times" not in text
    assert "LoRA is not there within 40 steps; without immunization it needs all of them" in text


def test_one_attack_is_not_the_best_of_several(demo: dict[str, Any]) -> None:
    demo["evaluation"]["attacks"] = ["lora"]
    demo["evaluation"]["strongest"] = "lora"
    assert "LoRA is the only attack that was tried" in page(demo)


# --- what else stands there ---------------------------------------------------------------------


def test_labels_come_with_the_results(demo: dict[str, Any]) -> None:
    demo["attacks"] = {"lora": {"label": "Toy & co"}}
    demo["method_label"] = "A toy method"
    text = page(demo)
    assert "Toy & co, without" in text
    assert "Immunization report · A toy method" in text
    assert "Toy & co" in summary(demo)


def test_page_says_what_was_protected_and_what_was_not(demo: dict[str, Any]) -> None:
    text = page(demo)
    for words in (
        "What was protected",
        "“three”, “five”, “eight”",
        "so the protection is specific",
        "What it shall still draw changed by -3.1% in accuracy.",
        "Whoever trains longer, harder or other layers gets there.",
        "The merge took 0.9% of the immunizer's time.",
    ):
        assert words in text


def test_a_run_that_nothing_judged_claims_nothing(demo: dict[str, Any]) -> None:
    demo["evaluation"] = None
    demo["mima"] = {"seeds": [0], "merge_share": 0.0, "projections": "8 layers", "methods": []}
    assert headline(demo) == "Immunized, not judged"
    text = page(demo)
    assert "Nothing on this page is evidence that the model is protected" in text
    assert "MSGR" not in text
    assert "no attack was judged" in summary(demo)


def test_further_attacks_in_plain_text(demo: dict[str, Any]) -> None:
    told = attack_summary({"evaluation": demo["evaluation"], "config": demo["config"]})
    assert "strongest: Full fine-tuning. A delay of more than 4 times" in told


def test_further_attacks_have_a_page(demo: dict[str, Any]) -> None:
    """It says no better than the page of the run does, and holds the same tables."""
    record = {
        "kind": "mima-attack",
        "evaluation": demo["evaluation"],
        "config": {**demo["config"], "method": "mima <x>"},
        "environment": demo["environment"],
    }
    found = ParsedPage(report.render(record))
    found.check()
    assert headline(demo) in found.text
    assert "mima <x>" in found.text.lower()
    assert "Full fine-tuning does best: it reaches" in found.text
    for words in ("Attacks, step by step", "How much is left at each step", "Attacks in numbers"):
        assert words in found.text
    assert report.render(demo).count("<svg") == report.render(record).count("<svg")


# --- images -------------------------------------------------------------------------------------


def evaluated(side: int, channels: int) -> TextToImageEvaluation:
    curve = AttackCurve("lora", "three", [0, 10], {"accuracy": [0.0, 1.0]}, [], 0.0, 0, {})
    compared = Comparison(
        "lora", "three", "target", {"unprotected": (curve,), "immunized": (curve,)}
    )
    generator = torch.Generator().manual_seed(0)
    shape = (2, channels, side, side)
    grids = {
        ("lora", "three", which): {
            step: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            for step in (0, 10)
        }
        for which in ("unprotected", "immunized")
    }
    return TextToImageEvaluation(
        attacks=("lora",),
        targets=("three",),
        measures=("accuracy",),
        seeds=(0,),
        threshold=0.8,
        comparisons=(compared,),
        retained_before={},
        retained_after={},
        grids=grids,  # type: ignore[arg-type]
    )


def test_images_are_kept_in_results_and_shown(demo: dict[str, Any]) -> None:
    pytest.importorskip("PIL")
    (entry,) = grid_entries(evaluated(8, 1))
    assert (entry["concept"], entry["role"], entry["steps"]) == ("three", "target", [0, 10])
    assert base64.b64decode(entry["base64"]).startswith(b"\x89PNG")
    demo["mima"]["grids"] = [entry, {**entry, "concept": "six", "role": "control"}]
    text = report.render(demo)
    assert text.count('<img src="data:image/png;base64,') == 2
    assert "six (control: not immunized)" in ParsedPage(text).text


def test_photographs_are_kept_small() -> None:
    pytest.importorskip("PIL")
    (entry,) = grid_entries(evaluated(512, 3))
    assert entry["media"] == "image/jpeg"
    assert len(entry["base64"]) < 200_000


# --- several runs -------------------------------------------------------------------------------


def test_rows_of_runs_and_sweeps(demo: dict[str, Any]) -> None:
    row = row_of("demo", demo)
    assert row.msgr == 1.0
    last = demo["evaluation"]["summary"]["full_fine_tuning"]["msgr"]["final"]["mean"]
    assert row.strongest == last
    old = rows_of("sweep", saved("mima-sweep", schema=1))
    assert [one.concepts for one in old] == [1, 2]
    comparison = comparison_of([row, *old])
    text = page(comparison)
    assert "3 runs compared" in text
    assert f"demo mima 3 1.00 {last:.2f}" in text
    assert "MSGR over the number of concepts" in text
    assert "not measured" in comparison_summary(comparison)
    assert "1 run compared" in page(comparison_of([row]))
