"""Progress where nobody looks at a terminal."""

from __future__ import annotations

import pytest

from immunize_ext.runtime import progress_bar


def test_a_log_gets_a_line_a_stage_and_one_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(quiet=False) as progress:
        progress("loading the data", 0.0)
        for step in range(1, 61):
            progress(f"mima, step {step} of 60: loss {0.5 / step:.3f}", step / 60)
        progress("writing the report", 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[  0%] loading the data"
    assert lines[-1] == "[100%] writing the report"
    steps = [line for line in lines if "step" in line]
    assert 8 <= len(steps) <= 12
    assert "step 1 of 60" in steps[0]
    assert "step 60 of 60" in steps[-1]


def test_a_stage_that_is_new_is_always_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(quiet=False) as progress:
        for name in ("lora, 3 steps", "dreambooth, 3 steps", "lora, 4 steps"):
            progress(name, 0.01)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(quiet=True) as progress:
        progress("anything", 0.5)
    assert capsys.readouterr() == ("", "")
