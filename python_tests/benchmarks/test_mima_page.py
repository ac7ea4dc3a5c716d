"""Every number in the tables of docs/mima.md comes from a committed result file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from immunize_ext.text_to_image.digits.judge import DigitJudge

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "protection"
mima_page = pytest.importorskip("benchmarks.protection.mima_page")


def test_page_is_what_the_result_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mima_page", "--check", str(ROOT / "docs" / "mima.md")])
    assert mima_page.main() == 0


def test_a_changed_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "mima.md").read_text(encoding="utf-8")
    number = re.search(r"\| MIMA \| (0\.\d\d|1\.00) \(", text)
    assert number is not None
    changed = text.replace(number[0], number[0].replace(number[1], "0.12"), 1)
    assert changed != text
    page = tmp_path / "mima.md"
    page.write_text(changed, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["mima_page", "--check", str(page)])
    assert mima_page.main() == 1
    monkeypatch.setattr("sys.argv", ["mima_page", "--write", str(page)])
    assert mima_page.main() == 0
    assert page.read_text(encoding="utf-8") == text
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="the marks"):
        mima_page.main()


def test_the_worst_case_is_the_largest_number_of_its_table() -> None:
    found = result("mima_attackers")
    attacks = mima_page.tried(found)
    lines = mima_page.worst().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == [
        mima_page._named(attack) for attack in attacks
    ]
    for name in mima_page.HEADLINE:
        (told,) = (x for x in lines if x.startswith(f"**{mima_page.NAMES[name]}, worst case: "))
        for at, step in ((1, 10), (2, 20), (3, 40)):
            met = [mima_page.Attacked(found, name, attack) for attack in attacks]
            largest = max(one.share(at) for one in met if one.seeds)
            assert f"{largest:.2f} after {step} (" in told


def test_shares_are_those_of_the_counted_images() -> None:
    """Two seeds of two images, three targets."""
    row = {"recognised": [0, 2], "second judge": [0, 1], "any digit": [2, 2]}
    none = {"recognised": [0, 0], "second judge": [0, 0], "any digit": [0, 1]}
    counts = {"three": row, "five": none, "eight": row}
    judges = [{"sensitivity": [1.0] * 10, "false_positives": [0.0] * 10, "images": 10**6}]
    found = {
        "counts": {"mima": {"lora": {"0": counts, "1": counts}}},
        "judges": judges,
        "images": 2,
    }
    one = mima_page.Attacked(found, "mima", "lora")
    assert one.seeds == [0, 1]
    assert one.counts(1) == [4, 4]
    assert one.share(1) == pytest.approx(8 / 12)
    assert one.share(1, "second judge") == pytest.approx(4 / 12)
    low, high = one.corrected(1)
    assert low < 8 / 12 < high
    assert mima_page.reached(found, "mima", ["lora", "locon"], 1) == (one.share(1), "lora")
    assert mima_page.Attacked(found, "mima", "locon").cell() == ""


def test_attackers_are_complete_and_at_their_rates() -> None:
    """Every row has all targets at all steps; nothing was tuned on its seeds."""
    found, tuning = result("mima_attackers"), result("mima_tuning")
    attackers = pytest.importorskip("benchmarks.protection.mima_attackers")
    for model, rows in found["counts"].items():
        for attack, by_seed in rows.items():
            assert found["rates"][attack] == attackers.attacker(attack).learning_rate, model
            assert not set(map(int, by_seed)) & set(tuning["seeds"])
            for row in by_seed.values():
                assert sorted(row) == sorted(found["targets"])
                for counts in row.values():
                    for score in attackers.SCORES:
                        assert len(counts[score]) == len(found["steps"])
                        assert all(0 <= count <= found["images"] for count in counts[score])
                    recognised, digits = counts["recognised"], counts["any digit"]
                    assert all(a <= b for a, b in zip(recognised, digits, strict=True))
    assert attackers.attacker("lora:rare_token").prompt == "rare_token"


def test_useful_is_the_smaller_gap() -> None:
    def made(*gaps: float) -> dict[str, Any]:
        at = {str(s): {"mean": gap} for s, gap in zip((10, 20, 40), gaps, strict=True)}
        return {"summary": {"lora": {"msgr": {"at": at}}}}

    found = mima_page._useful(made(1.0, 0.5, 0.2), {"evaluation": made(0.9, 0.6, 0.1)})
    assert found == "0.90, 0.50, 0.10"


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_nothing_was_tuned_on_seeds_of_the_results_and_results_use_what_was_tuned() -> None:
    tuning = result("mima_tuning")
    used = set()
    for method, row in result("mima_digits")["methods"].items():
        used |= set(row["evaluation"]["seeds"])
        config = row["config"]
        if method == "never_learnt":  # the outside option is trained as the bundled one was
            assert config["without"] == ["three", "five", "eight", "six"]
            continue
        assert config["learning_rate"] == tuning["methods"][method]["rate"]
        for comparison in row["evaluation"]["comparisons"]:
            rate = tuning["attacks"][comparison["attack"]]["rate"]
            for curves in comparison["curves"].values():
                assert {curve["config"]["learning_rate"] for curve in curves} == {rate}
    assert not used & set(tuning["seeds"])
    counts = [
        {len(row["table"]) for row in tuning[kind].values()} for kind in ("methods", "attacks")
    ]
    assert [len(found) for found in counts] == [1, 1], "all get the same number of rates"


def test_the_rate_taken_is_the_best_that_keeps_what_has_to_stay() -> None:
    mima_tuning = pytest.importorskip("benchmarks.protection.mima_tuning")
    table = {
        0.1: {"msgr": 0.5, "retained_change": 0.0},
        0.2: {"msgr": 0.9, "retained_change": -0.05},
        0.4: {"msgr": 0.9, "retained_change": 0.01},
        0.8: {"msgr": 1.0, "retained_change": -0.06},
    }
    assert mima_tuning.best_rate(table) == 0.2
    spoiled = {rate: row | {"retained_change": -rate} for rate, row in table.items()}
    assert mima_tuning.best_rate({rate: spoiled[rate] for rate in (0.2, 0.1)}) == 0.1
    for found in result("mima_tuning")["methods"].values():
        assert (
            mima_tuning.best_rate({float(r): v for r, v in found["table"].items()}) == found["rate"]
        )


def test_the_judges_of_the_attackers_are_those_of_the_package() -> None:
    pytest.importorskip("sklearn")
    for judge in result("mima_attackers")["judges"]:
        now = DigitJudge(judge["family"])
        assert now.bound == pytest.approx(judge["bound"], rel=1e-6)
        assert list(now.errors.sensitivity) == pytest.approx(judge["sensitivity"])
