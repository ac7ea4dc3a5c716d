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


def rows(found: dict[str, Any], rule: str) -> list[dict[str, Any]]:
    return [row for row in found["deep"] if row["rule"] == rule]


def test_what_the_null_space_promises_is_of_the_network_before() -> None:
    found = results()
    table = local_control.kept_table(found)
    for row in rows(found, "null space"):
        row["kept train"] = 0.25
    assert "| null space | 1.000 | none | 0.250 |" in local_control.kept_table(found)
    for row in rows(found, "before"):
        row["kept train"] = 0.75
    assert "| null space | 0.750 | none | 0.250 |" in local_control.kept_table(found)
    assert "| null space | 1.000 | none | 1.000 |" in table


def test_verdict_follows_from_the_numbers() -> None:
    found = results()
    assert local_control.answer(found).startswith("Yes, but with a certificate by so little")
    slowed, level = copy.deepcopy(found), copy.deepcopy(found)
    for row in rows(slowed, "certified for 99 %"):
        row["attacks"]["probe"]["sgd"]["best"][0] -= 0.3
    assert local_control.answer(slowed).startswith("Yes, with a certificate, and attackers are")
    assert "for 1 of 19 attackers" in local_control.answer(slowed)
    for i, row in enumerate(rows(level, "certified for 99 %")):
        row["log kappa harm"] = rows(level, "before")[i]["log kappa harm"]
    assert local_control.answer(level).startswith("No: ")


def test_intervals_are_of_the_seeds_there_are_and_of_pairs() -> None:
    assert local_control._mean([0.0, 1.0], ".2f") == "0.50 ± 6.35"  # t of one degree: 12.706
    assert local_control._mean([0.0, 1.0, 2.0], "+.2f") == "+1.00 ± 2.48"  # of two: 4.303
    assert local_control._mean([0.5], ".2f") == local_control._mean([0.5, 0.5], ".2f") == "0.50"
    found = results()
    said = local_control.answer(found)
    assert "+0.52 ± 0.09, and in the null space by +0.04 ± 0.04" in said
    assert "log kappa_H by +5.1 ± 2.9" in said
    assert "5 seeds" in said
    turned = {**found, "deep": found["deep"][:8] + found["deep"][8:][::-1]}
    assert local_control.answer(turned) == said


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
