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
    text = mima_page.worst()
    found = list(mima_page.attackers())
    assert len(found) + len(mima_page.earlier()) == len(re.findall(r"(?m)^\| [A-Z]", text))
    for at, step in ((1, 10), (2, 20), (3, 40)):
        largest = max(one.shares("with")[at] for one in found)
        assert f"{largest:.2f} after {step} (" in text.split("**Worst case: ")[1]


def test_what_only_the_earlier_judge_has_seen_is_called_that() -> None:
    by_all = ["accuracy", "second judge", "any digit"]
    assert all(
        row["evaluation"]["measures"] == by_all for row in result("mima_digits")["methods"].values()
    )
    row = result("mima_digits_attackers")["methods"]["mima"]["evaluation"]
    told = mima_page.earlier()
    assert len(told) == (0 if row["measures"] == by_all else len(row["attacks"]))
    assert all("earlier judge" in line for line in told)
    names = {line.split(",")[0].strip("| ") for line in told}
    assert not names & {one.name for one in mima_page.attackers()}


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
    for name in ("mima_digits", "mima_digits_attackers"):
        for method, row in result(name)["methods"].items():
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


def test_the_table_of_other_words_is_what_its_file_says() -> None:
    words = pytest.importorskip("benchmarks.protection.mima_words")
    page = (ROOT / "docs" / "mima.md").read_text(encoding="utf-8")
    found = json.loads(words.OUT.read_text(encoding="utf-8"))
    assert words.filled(page, found) == page
    found["counts"][0]["own name"]["with"]["five"]["recognised"][-1] += 1
    assert words.filled(page, found) != page
    with pytest.raises(ValueError, match="the marks"):
        words.filled("no marks", found)


def test_the_judges_of_that_table_are_those_of_the_package() -> None:
    pytest.importorskip("sklearn")
    words = pytest.importorskip("benchmarks.protection.mima_words")
    found = json.loads(words.OUT.read_text(encoding="utf-8"))
    for judge in found["judges"]:
        now = DigitJudge(judge["family"])
        assert now.bound == pytest.approx(judge["bound"], rel=1e-6)
        assert list(now.errors.sensitivity) == pytest.approx(judge["sensitivity"])
