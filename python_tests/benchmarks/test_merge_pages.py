"""docs/merge.md and its picture come from their result files, and say what these hold."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sensitivity = pytest.importorskip("benchmarks.merge_sensitivity")
choice = pytest.importorskip("benchmarks.merge_choice")
picture = pytest.importorskip("benchmarks.merge_picture")
_page = pytest.importorskip("benchmarks._page")
protection = pytest.importorskip("benchmarks.protection.mima_merges")
PROGRAMS = {"sensitivity": sensitivity, "choice": choice}


def results(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / f"merge_{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def page() -> str:
    return (ROOT / "docs" / "merge.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PROGRAMS)
def test_page_is_what_the_result_file_says(name: str) -> None:
    assert _page.filled(page(), PROGRAMS[name].parts(results(name))) == page()


def test_protection_by_each_merge_is_what_was_counted() -> None:
    found = json.loads(protection.OUT.read_text(encoding="utf-8"))
    assert _page.filled(page(), protection.parts(found)) == page()
    seeds = sorted(found["counts"]["mean"])
    assert len(seeds) >= 3
    ends = {
        name: [protection.row(found, name, seed)[1] for seed in seeds]
        for name in (protection.PUBLISHED, "mean", "moments", "own_copies")
    }
    # Only what every seed says is said, of ten steps: the merge by moments delays least, and no
    # merge less than the closed form and the mean do.
    assert min(ends["moments"]) > max(ends["mean"] + ends[protection.PUBLISHED])
    noise = max(protection.floor(found)[1])
    for name in (protection.PUBLISHED, "mean"):
        assert all(
            alone > one + noise for alone, one in zip(ends["own_copies"], ends[name], strict=True)
        )


def test_picture_is_what_the_result_files_say() -> None:
    found = picture.picture(results("sensitivity"), results("choice"))
    assert (ROOT / "docs" / "merge.svg").read_text(encoding="utf-8") == found


def test_a_changed_number_is_found() -> None:
    changed = copy.deepcopy(results("sensitivity"))
    for row in changed["captions"]:
        if row["found"] is not None:
            row["found"]["inflation"]["mean"] *= 1.5
    assert _page.filled(page(), sensitivity.parts(changed)) != page()
    drawn = picture.picture(results("sensitivity"), results("choice"))
    assert picture.picture(changed, results("choice")) != drawn


def test_captions_cost_what_is_expected_of_them() -> None:
    """Without a ridge (m - 1) / (m - d + s - 1), whatever the spectrum, and not its square."""
    for row in results("sensitivity")["captions"]:
        if row["ridge"] == 0.0 and row["share"] >= 1.5:
            found = row["found"]["inflation"]
            assert found["mean"] == pytest.approx(row["predicted"], rel=0.25)
            assert found["mean"] < (1 - 1 / row["share"]) ** -2
        if row["ridge"] == 0.0 and row["share"] < 1:
            assert row["found"] is None


def test_overlap_costs_what_the_condition_number_says() -> None:
    for row in results("sensitivity")["overlap"]:
        assert row["found"]["overlap"]["mean"] == pytest.approx(row["rho"], abs=0.15)
        assert row["found"]["moved"]["mean"] == pytest.approx(row["moved"], rel=0.35)
        assert row["found"]["residual"]["largest"] < 1e-4


def test_nothing_leaves_less_than_the_merge_and_scores_choose_best() -> None:
    found = results("choice")
    whole = {name: one["left"]["mean"] for name, one in found["whole"].items()}
    assert min(whole, key=whole.__getitem__) == "moments (the least there is)"
    for row in found["parts"]:
        parts = {name: one["left"]["mean"] for name, one in row["found"].items()}
        assert parts["rows, by score"] < parts["rows, by size of their change"]
        assert parts["rows, by score"] < parts["rows, at random"]


def test_a_small_run_measures_what_the_page_holds() -> None:
    cell = sensitivity.over_seeds(2, 1e2, lambda p: p.rows(2 * sensitivity.D), 0.0)
    assert cell["inflation"]["least"] > 1.0
    assert cell["residual"]["largest"] < 1e-4
    assert sensitivity.over_seeds(1, 1e2, lambda p: p.rows(8), 0.0) is None
    (row,) = (r for r in sensitivity.overlap(1, (2,)) if r["rho"] == 0.9)
    assert row["kappa_t"] == pytest.approx(19.0)
