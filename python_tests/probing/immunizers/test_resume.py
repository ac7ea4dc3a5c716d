"""Every method takes progress and resume; a run that was cut off ends as if it had not been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from immunizer_problems import task

from immunize_ext.probing.data import Problem
from immunize_ext.probing.immunizers import METHODS, BaselineImmunizer, IterativeImmunizer

pytest.importorskip("safetensors")

PROBLEM = Problem.of(task(1), task(2))
ITERATIVE = [name for name, method in METHODS.items() if isinstance(method, IterativeImmunizer)]


def short(name: str) -> Any:
    method: Any = METHODS[name]
    if name == "mini-batch":
        return replace(method, epochs=12, batch_size=10, record_every=1)
    more = {"keep": "last"} if name.startswith("condition-number") else {}
    return replace(method, steps=12, **more) if hasattr(method, "steps") else method


class CutOffError(Exception):
    """Raised where a run is cut off."""


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("at", [1, 7])
def test_a_run_that_was_cut_off_goes_on_to_the_bit(name: str, at: int, tmp_path: Path) -> None:
    immunizer = short(name)
    whole = immunizer.fit(None, PROBLEM)
    calls: list[str] = []

    def stop(text: str, share: float) -> None:
        calls.append(text)
        if len(calls) > at:
            raise CutOffError

    with pytest.raises(CutOffError):
        immunizer.fit(None, PROBLEM, progress=stop, resume=tmp_path)
    seen: list[float] = []
    resumed = immunizer.fit(
        None, PROBLEM, progress=lambda text, share: seen.append(share), resume=tmp_path
    )
    assert seen[0] > 0.0  # it did not begin anew
    assert torch.equal(resumed.theta, whole.theta)
    assert repr(resumed.history) == repr(whole.history)  # NaN included
    assert resumed.config == whole.config


@pytest.mark.parametrize("change", ["settings", "model", "problem", "labels"])
def test_another_run_is_not_gone_on_from(change: str, tmp_path: Path) -> None:
    immunizer = BaselineImmunizer("r_well", steps=5)
    immunizer.fit(None, PROBLEM, resume=tmp_path)
    model, problem = None, PROBLEM
    if change == "settings":
        immunizer = replace(immunizer, steps=6)
    elif change == "model":
        model = 2.0 * torch.eye(5, dtype=torch.float64)
    elif change == "problem":
        problem = Problem.of(task(1), task(3))
    else:
        other = replace(PROBLEM.harmful[0], y_train=-PROBLEM.harmful[0].y_train)
        problem = Problem.of(PROBLEM.primary, other)
    with pytest.raises(ValueError, match="same settings, model and problem, got another's"):
        immunizer.fit(model, problem, resume=tmp_path)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_starts_from_a_given_theta_and_reports(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    theta0 = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    kept, seen = theta0.clone(), []
    immunized = short(name).fit(
        theta0, PROBLEM, progress=lambda text, share: seen.append(share), resume=tmp_path
    )
    assert torch.equal(theta0, kept)
    assert torch.equal(immunized.theta0, theta0)
    assert immunized.history[0]["log_rir"] == 0.0
    assert immunized.method == name
    assert seen[-1] == 1.0
    assert all(0.0 <= share <= 1.0 for share in seen)
    with pytest.raises(ValueError, match=r"model must have shape \(5, 5\), got \(4, 4\)"):
        short(name).fit(torch.eye(4), PROBLEM)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.takes_several])
def test_methods_for_one_harm_refuse_several(name: str) -> None:
    with pytest.raises(ValueError, match="harmful must be one task, got 2"):
        short(name).fit(None, Problem.of(task(1), task(2), task(3)))
