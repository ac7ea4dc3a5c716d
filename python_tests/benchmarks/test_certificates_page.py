"""The table of docs/certificates.md comes from the committed result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "certificates.md"
certificates = pytest.importorskip("benchmarks.protection.certificates")


def results() -> dict[str, object]:
    return json.loads(certificates.OUT.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_page_is_what_the_result_file_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert certificates.filled(page, results()) == page


def test_a_changed_number_is_found() -> None:
    page, changed = PAGE.read_text(encoding="utf-8"), results()
    for row in changed["rows"]:  # type: ignore[attr-defined]
        row["r2_harm"][1] += 0.5
    assert certificates.filled(page, changed) != page


def test_missing_marks_are_refused() -> None:
    with pytest.raises(ValueError, match="must have the marks"):
        certificates.filled("no marks", results())


def test_what_the_page_claims() -> None:
    rows = results()["rows"]
    by_method: dict[str, list[dict[str, list[float]]]] = {}
    for row in rows:  # type: ignore[attr-defined]
        by_method.setdefault(row["method"], []).append(row)
    assert len(by_method["lock"]) >= 20
    # Invertible extractors take nothing away from a probe with all data; the lock takes all. (Of
    # House Prices an attacker has four samples a feature: there is no "all data".)
    for row in by_method["closed-form"]:
        if str(row["problem"]).startswith("house"):
            continue
        assert abs(row["r2_harm"][1] - row["r2_harm"][0]) < 0.1
    locked = sorted(row["r2_harm"][1] for row in by_method["lock"])
    assert locked[len(locked) // 2] < 0.1


def test_a_public_model_undoes_a_price_and_earlier_layers_keep_the_harm() -> None:
    found = results()
    for row in found["rows"]:  # type: ignore[attr-defined]
        if row["method"] == "label-direction" and not row["problem"].startswith("house"):
            assert row["samples_harm_sibling"] == pytest.approx(1.0, abs=0.05), row["problem"]
    locked = [row for row in found["layers"] if "r2_locked" in row]  # type: ignore[attr-defined]
    assert locked
    for row in locked:
        assert row["r2_locked"] < 0.1 < 0.7 < row["r2"]


def test_the_interval_of_a_median_is_over_pairs() -> None:
    page = pytest.importorskip("benchmarks.protection.certificates_page")
    rows = [
        {"problem": f"digits {pair} {seed}", "x": float(pair)}
        for pair in range(9)
        for seed in "012"
    ]
    # Seeds of one pair tell nothing new: as wide as that of nine numbers.
    low, high = page.interval([[float(pair)] * 3 for pair in range(9)])
    assert (low, high) == page.interval([[float(pair)] for pair in range(9)])
    assert low < 4.0 < high
    assert page.cell(rows, "x", digits=0) == f"4 (2 to 6) [{low:.0f}, {high:.0f}]"
    assert page.cell([{**row, "x": "inf"} for row in rows], "x").startswith("never (never to")
