"""docs/local_control.md comes from its result file, and says what that holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

_page = pytest.importorskip("benchmarks._page")
local_control = pytest.importorskip("benchmarks.protection.local_control")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "local_control.md"


def results() -> dict[str, Any]:
    return json.loads(local_control.OUT.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_page_is_what_the_result_file_says_and_a_changed_number_is_found() -> None:
    page, found = PAGE.read_text(encoding="utf-8"), results()
    assert _page.filled(page, local_control.parts(found)) == page
    for part in ("deep", "layers", "gauge", "linear"):
        changed = copy.deepcopy(found)
        for row in changed[part]:
            for key, value in row.items():
                if isinstance(value, float):
                    row[key] = value * 1.2
        assert _page.filled(page, local_control.parts(changed)) != page


def test_what_the_page_claims() -> None:
    found = results()
    for row in found["deep"]:
        if "certified train" in row:  # what was promised holds
            assert row["certified train"] <= row["kept train"]
            assert row["certified test"] <= row["kept test"]
            assert max(row["share of bound train"], row["share of bound test"]) <= 1.0
        if row["rule"] == "null space":
            assert (row["changed answers"], row["drift"] < 1e-6) == (0.0, True)
    for row in found["linear"]:
        assert row["reached"] <= row["bound"] * (1 + 1e-9) + 1e-12
    strongest = {
        rule: [local_control.strongest(row)[0] for row in found["deep"] if row["rule"] == rule]
        for rule in ("before", "null space", "certified for 99 %", "certified for 90 %")
    }
    means = {rule: sum(values) / len(values) for rule, values in strongest.items()}
    assert max(abs(mean - means["before"]) for mean in means.values()) < 0.005
    # The basis of the heads is no defence: it is undone without data.
    best = {
        basis: [r["attacks"]["adamw"]["best"][-1] for r in found["gauge"] if r["basis"] == basis]
        for basis in ("as trained", "balanced")
    }
    kept = [sum(values) / len(values) for values in best.values()]
    assert abs(kept[0] - kept[1]) < 0.02
