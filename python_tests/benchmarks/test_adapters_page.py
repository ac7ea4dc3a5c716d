"""Adapters merged: the page's numbers are those of the committed file, and what it claims holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")

from benchmarks import _page, adapters

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "adapters-cpu.json"


def test_page_holds_the_measured_numbers() -> None:
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "merge.md").read_text(encoding="utf-8")
    assert _page.filled(page, {"adapters": adapters.table(content)}) == page


def test_dense_and_factored_merges_agreed_before_they_were_timed() -> None:
    speed = json.loads(RESULTS.read_text(encoding="utf-8"))["speed"]
    differences = speed["relative_difference_of_dense_and_factored_in_float64"]
    assert max(differences.values()) < 1e-11


def test_objectives() -> None:
    """The exact merge leaves least, and of rank 8 the one cut in the metric of the objective."""
    found = adapters.objectives([0])
    least = {name: one["mean"] for name, one in found.items()}
    assert min(least, key=least.__getitem__) == "moments, full rank (24)"
    cut = {name: value for name, value in least.items() if "rank 8" in name}
    assert min(cut, key=cut.__getitem__) == "moments, rank 8, in the metric"
