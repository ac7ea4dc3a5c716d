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
    # Invertible extractors take nothing away from a probe with all data; the lock takes all.
    for row in by_method["closed-form"]:
        assert abs(row["r2_harm"][1] - row["r2_harm"][0]) < 0.1
    locked = sorted(row["r2_harm"][1] for row in by_method["lock"])
    assert locked[len(locked) // 2] < 0.1
