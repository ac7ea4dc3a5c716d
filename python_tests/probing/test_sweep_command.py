"""``immunize sweep kappa``: resumed with nothing lost, equal in any number of processes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import immunize_ext.probing.run
from immunize_ext.cli import main
from immunize_ext.probing.comparison import heat_map
from immunize_ext.probing.run import SweepSettings, parse_pairs

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SWEEP = [
    *["sweep", "kappa", "--pairs", "3:8/4:9", "1:7/2:5", "--methods", "closed-form", "whitening"],
    *["--strengths", "closed-form=3,30", "--quiet"],
]
POINTS = 6


def points_of(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "points").iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sweep") / "sweep"
    assert main([*SWEEP, "--out", str(target)]) == 0
    return target


def test_summary_and_heat_map(finished: Path) -> None:
    points = points_of(finished)
    assert len(points) == POINTS
    summary = json.loads((finished / "results.json").read_text())
    assert summary["kind"] == "kappa-sweep"
    assert set(summary["methods"]) == {
        "closed-form, strength = 3",
        "closed-form, strength = 30",
        "whitening",
    }
    for entry in summary["methods"].values():
        assert entry["points"] == 2
        # All of these are on the ceiling.
        assert entry["share_of_ceiling"]["min"] == pytest.approx(1.0, abs=1e-6)
        low, median, high = entry["rir"]["ridge"]["quartiles"]
        assert entry["rir"]["ridge"]["min"] <= low <= median <= high
    rows, columns, matrix = heat_map(points, "whitening", "ridge")
    assert (rows, columns) == (["2:5", "4:9"], ["1:7", "3:8"])
    # A pair that was not asked for has no value.
    assert np.isnan(matrix).tolist() == [[False, True], [True, False]]
    for name in ("heatmaps.png", "report.html"):
        assert (finished / name).stat().st_size > 1000


def test_an_interrupted_sweep_goes_on_with_nothing_lost(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "sweep"
    done: list[object] = []
    measure_point = immunize_ext.probing.run.measure_point

    @functools.wraps(measure_point)  # by its name: files are kept for the function that made them
    def interrupted(config: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(config)
        return measure_point(config)

    monkeypatch.setattr("immunize_ext.probing.run.measure_point", interrupted)
    assert main([*SWEEP, "--out", str(target)]) == 130
    assert "2 points are kept" in capsys.readouterr().err
    assert not (target / "results.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (target / "points").iterdir()}
    assert len(kept) == 2

    counted: list[object] = []

    @functools.wraps(measure_point)
    def counting(config: Any) -> dict[str, Any]:
        counted.append(config)
        return measure_point(config)

    monkeypatch.setattr("immunize_ext.probing.run.measure_point", counting)
    assert main([*SWEEP, "--out", str(target)]) == 0
    assert len(counted) == POINTS - 2
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    whole, resumed = points_of(finished), points_of(target)
    assert {n: p["rir"] for n, p in resumed.items()} == {n: p["rir"] for n, p in whole.items()}


def test_a_damaged_point_is_done_again(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "sweep"
    (target / "points").mkdir(parents=True)
    for path in [finished / "sweep.json", *(finished / "points").iterdir()]:
        (target / path.relative_to(finished)).write_bytes(path.read_bytes())
    damaged = next((target / "points").iterdir())
    damaged.write_text("{")
    assert main([*SWEEP, "--out", str(target)]) == 0
    assert json.loads(damaged.read_text())["kind"] == "kappa"


def test_other_settings_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main([*SWEEP, "--ridge", "1e-3", "--out", str(finished)]) == 2
    assert "holds a sweep with other settings" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_sweep_without_attacks_is_not_compared(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished), "--out", str(tmp_path / "report")]) == 2
    assert "must share an attacker" in capsys.readouterr().err
    assert main(["attack", str(finished)]) == 2
    assert "sweep again with --attacks" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_give_the_same_points(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "sweep"
    assert main([*SWEEP, "--jobs", "2", "--out", str(target)]) == 0
    one, two = points_of(finished), points_of(target)
    assert {n: p["rir"] for n, p in one.items()} == {n: p["rir"] for n, p in two.items()}


def test_all_pairs_of_digits() -> None:
    pairs = parse_pairs(["all"], "mnist")
    assert len(set(pairs)) == 90
    assert all(primary != harmful[0] for primary, harmful in pairs)
    with pytest.raises(ValueError, match="pairs must be given, none of them twice"):
        SweepSettings(pairs=("4/9", "4/9"))
