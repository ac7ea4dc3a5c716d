"""Every number of ours in docs/reproduction.md comes from a committed result file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reproduction.md"
reproduction = pytest.importorskip("benchmarks.protection.reproduction")


def test_page_is_what_the_result_files_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert reproduction.filled(page, reproduction.load()) == page


def test_a_changed_number_is_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    files = reproduction.load()
    files["mnist_pairs"]["closed_form"]["official_rir"]["mean"] += 1.0
    assert reproduction.filled(page, files) != page


def test_missing_marks_are_refused() -> None:
    with pytest.raises(ValueError, match="must have the marks"):
        reproduction.filled("no marks", reproduction.load())


def test_targets_of_the_paper_are_reached() -> None:
    files = reproduction.load()
    house, mnist = files["house_prices"], files["mnist_pairs"]
    target = house["paper"]["Ours (theirs)"]["rir"]
    for name in ("Algorithm 1, full data", "closed form, c = 30"):
        assert house["ours"][name]["summary"]["official"]["rir"]["min"] >= target
    closed = mnist["closed_form"]
    assert len(closed["pairs"]) == 90
    ratios = [pair["rir"] for pair in closed["pairs"]]
    assert sum(ratios) / 90 >= mnist["paper"]["Ours (theirs)"]
    assert min(ratios) >= 1.0
    assert mnist["closed_form"]["below_1"] == 0
    assert mnist["speed"]["speed_up"] > 1.0


def test_every_discrepancy_has_a_line() -> None:
    lines = reproduction.effects(reproduction.load())
    numbered = [line for line in lines if re.match(r"\| \d+ \|", line)]
    assert len(numbered) == 15
