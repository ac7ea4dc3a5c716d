"""The attacker chooses the harm: the task that is slowed least, and what runs say of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from immunize_ext import report
from immunize_ext.probing.attacks import choose_harm, compare_attack
from immunize_ext.probing.data import Problem, Task, digits_task, gram_equivalent, other_pairs
from immunize_ext.probing.immunizers import METHODS
from immunize_ext.probing.run import RunSettings, run
from immunize_ext.storage import to_json


@pytest.fixture(scope="module")
def theta() -> torch.Tensor:
    problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)), digits_task((1,), (7,)))
    several = METHODS.build("several-harms", {"strength": 100.0}, "test")
    return several.fit(None, problem).theta


def test_the_choice_is_the_least_slowed(theta: torch.Tensor) -> None:
    pool = [digits_task((4,), (9,)), digits_task((0,), (1,)), digits_task((2,), (5,))]
    found = choose_harm(theta, pool, limit=64.0)
    each = {t.name: compare_attack(gram_equivalent(t), theta, limit=64.0).slowdown for t in pool}
    assert found.slowdowns == each
    assert found.slowdown == min(each.values())
    assert each[found.name] == found.slowdown
    assert found.tail(0.2) == pytest.approx(found.slowdown.ratio)
    ratios = torch.tensor([one.ratio for one in each.values()], dtype=torch.float64)
    assert found.tail(1.0) == pytest.approx(float(ratios.log().mean().exp()))
    # One that the method was made for is protected better than one that it was not.
    assert each["digit 4 against 9"].ratio > 2.0 * found.slowdown.ratio


def test_who_learns_nothing_is_left_out(theta: torch.Tensor) -> None:
    task = digits_task((4,), (9,))
    generator = torch.Generator().manual_seed(0)
    noise = (
        torch.randn(len(x), generator=generator, dtype=torch.float64)
        for x in (task.x_train, task.x_test)
    )
    blind = Task("blind", task.x_train, next(noise), task.x_test, next(noise))
    assert choose_harm(theta, [blind, task]).name == task.name
    assert choose_harm(theta, [blind]).slowdowns == {}
    with pytest.raises(ValueError, match="pool must hold at least one task"):
        choose_harm(theta, [])


def test_pairs_that_are_neither_primary_nor_trained() -> None:
    found = other_pairs("digits", "3:8", ("4:9", "1:7"))
    assert len(found) == 45 - 3
    names = {task.name for task in found}
    assert "digit 0 against 1" in names
    assert "digit 4 against 9" not in names
    assert other_pairs("house", None, ()) == []
    assert len(other_pairs("digits", None, ())) == 45


def test_runs_with_several_harms_say_what_an_attacker_chooses(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(300) % 4
    centres = np.array([[3.0, 0, 0, 0, 0], [0, 3, 0, 0, 0], [0, 0, 2, 0, 1], [-2, 0, 0, 2, 0]])
    x = rng.normal(size=(300, 5)) * np.logspace(0.2, -0.5, 5) + centres[y]
    np.savez(tmp_path / "features.npz", x=x, y=y)
    common = {"data": str(tmp_path / "features.npz"), "primary": "0:1", "base_budget": 100}
    common |= {"limit": 8.0}
    several = {"harmful": ("0:2", "0:3"), "method": "several-harms"}
    found = {
        name: run(RunSettings(**common, **more)).results()  # type: ignore[arg-type]
        for name, more in (
            ("several", several),
            ("asked", {"harmful": ("0:2",), "unseen": True}),
            ("one", {"harmful": ("0:2",)}),
        )
    }
    assert "unseen_harms" not in found["one"]
    assert found["several"]["unseen_harms"]["tasks"] == 3  # 1:2, 1:3, 2:3
    assert found["asked"]["unseen_harms"]["tasks"] == 4
    least = found["several"]["unseen_harms"]
    assert least["slowdown"] <= least["least_fifth"] * (1 + 1e-9) <= least["mean"] * (1 + 2e-9)
    page = report.render(json.loads(json.dumps(to_json(found["several"]))))
    assert "Of 3 pairs of classes that the method did not see" in page
