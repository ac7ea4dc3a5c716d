"""The tables of docs/hypergradients.md come from the committed result file, and what it claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from benchmarks import _page
from benchmarks.protection import hypergradients

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "hypergradients.md"


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(hypergradients.OUT.read_text(encoding="utf-8"))
    return found


def rows(**wanted: Any) -> list[dict[str, Any]]:
    return [
        row
        for row in results()["estimators"]
        if all(row[name] == value for name, value in wanted.items())
    ]


def test_page_is_what_the_result_file_says() -> None:
    page, found = PAGE.read_text(encoding="utf-8"), results()
    assert found["quick"] is False
    assert _page.filled(page, hypergradients.blocks(found)) == page
    found["estimators"][0]["seconds"] += 1.0
    assert _page.filled(page, hypergradients.blocks(found)) != page
    with pytest.raises(ValueError, match="must have the marks"):
        _page.filled("no marks", hypergradients.blocks(results()))


def test_what_the_page_claims() -> None:
    for steps in hypergradients.STEPS:
        (swept,), (recorded,), (first,) = (
            rows(rate=10.0, steps=steps, estimator=name)
            for name in ("unrolled", hypergradients.RECORDED, "first order")
        )
        # One graph for any number of steps; time for every step.
        assert swept["bytes"] == rows(rate=10.0, steps=1, estimator="unrolled")[0]["bytes"]
        assert recorded["bytes"] > 2.5 * steps * swept["bytes"]
        assert 2.0 < swept["seconds"] / first["seconds"] < 4.0
        if steps > 1:
            (series,) = rows(rate=10.0, steps=steps, estimator="Neumann, 3 terms")
            assert series["residual"]["min"] > 1.0
        (solved,) = rows(rate=10.0, steps=steps, estimator="Gauss-Newton CG")
        assert solved["residual"]["max"] < 1e-2
    shown = [row for row in results()["estimators"] if len(row["seeds"]) >= 2]
    assert {row["steps"] for row in shown if row["rate"] == 10.0} == set(hypergradients.STEPS)
    for row in shown:
        cosine = row["cosine"]["attn2"]
        assert abs(cosine["mean"]) < 0.05
    # Attacks do not agree with each other either.
    attack = results()["attacks"]["attn2"]
    assert len(attack["seeds"]) >= 3
    assert abs(attack["cosine_between_seeds"]["mean"]) < 0.2
    # The default is far beyond where first order is guaranteed; a hundredth of its rate is not.
    norms = {(row["rate"], row["steps"]): row for row in results()["alpha_j"]}
    assert norms[10.0, 1]["min"] > 10.0
    assert norms[0.1, 1]["max"] < 1.0
    rises = {(row["direction"], row["steps"]): row for row in results()["pushes"]["rise"]}
    ahead = {}
    for steps in (1, 10):
        first, exact = rises["first order", steps], rises["unrolled", steps]
        assert first["seeds"] == exact["seeds"] == [0, 1]
        pairs = zip(first["after"], exact["after"], strict=True)
        ahead[steps] = sum(one > other for one, other in pairs)
    assert ahead == {1: 2, 10: 1}
    at_random = rises[hypergradients.AT_RANDOM, None]["after"]
    assert max(map(abs, at_random)) < 0.1 * min(rises["first order", 1]["after"])


def test_kept_bytes_are_those_that_graphs_hold() -> None:
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    with hypergradients.Kept() as kept:
        for _ in range(3):
            (x * x).exp().sum().backward()  # x twice, and what exp gave
    assert kept.most == 3 * 8000
