"""The script for a borrowed GPU: its order, its limits, and what it leaves behind."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from immunize_ext import _load
from immunize_ext.ops import operators

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu() -> Any:
    module = type(sys)("gpu_script")
    # Registered by name: dataclasses look their module up.
    sys.modules["gpu_script"] = module
    source = (ROOT / ".ci" / "gpu.py").read_text(encoding="utf-8")
    module.__file__ = str(ROOT / ".ci" / "gpu.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    yield module
    del sys.modules["gpu_script"]


def say(text: str, status: int = 0) -> list[str]:
    return [sys.executable, "-c", f"print({text!r}); raise SystemExit({status})"]


def outcomes(folder: Path) -> dict[str, str]:
    return {
        row["phase"]: row["outcome"]
        for row in json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    }


def names(folder: Path, gpu: Any) -> set[str]:
    with tarfile.open(folder / gpu.ARCHIVE) as archive:
        return {Path(name).name for name in archive.getnames()}


def test_the_build_is_first_and_the_operators_are_counted_before_anything_is_measured(
    gpu: Any, tmp_path: Path
) -> None:
    order = [phase.name for phase in gpu.phases("9.0", tmp_path)]
    assert order[:4] == ["machine", "build", "operators", "small-suite"]
    assert order.index("memcheck") < order.index("spectrum") < order.index("spectrum-suite")
    assert order.index("merge") < order.index("spectrum-suite") < order.index("racecheck")
    assert [p.name for p in gpu.phases("9.0", tmp_path) if p.essential] == ["build", "operators"]


def test_nothing_is_installed_and_the_operators_are_built_in_place(
    gpu: Any, tmp_path: Path
) -> None:
    steps = {phase.name: phase for phase in gpu.phases("9.0", tmp_path)}
    assert not any("pip" in word for phase in steps.values() for word in phase.command)
    assert steps["build"].command[1:] == ["setup.py", "--quiet", "build_ext", "--inplace"]
    assert steps["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert steps["build"].environment["IMMUNIZE_EXT_CUDA"] == "1"


def test_the_caps_of_what_matters_most_fit_into_ten_minutes(gpu: Any, tmp_path: Path) -> None:
    steps = gpu.phases("9.0", tmp_path)
    until = next(i for i, phase in enumerate(steps) if phase.name == "spectrum-suite")
    assert sum(phase.seconds for phase in steps[: until + 1]) <= 600


def test_every_row_of_a_benchmark_exists(gpu: Any, tmp_path: Path) -> None:
    for phase in gpu.phases("9.0", tmp_path):
        if "--rows" not in phase.command:
            continue
        rows = [b for a, b in zip(phase.command, phase.command[1:], strict=False) if a == "--rows"]
        module = phase.command[2].removeprefix("benchmarks.")
        content = (ROOT / "benchmarks" / "results" / f"{module}-cpu.json").read_text()
        known = {row["id"] for row in json.loads(content)["rows"]}
        assert set(rows) <= known


def test_every_kernel_that_is_asked_for_is_an_operator_with_a_kernel_here(gpu: Any) -> None:
    for name in gpu.KERNELS:
        assert name in operators.OPERATORS
        assert operators.has_kernel(name, "cpu") or not _load.available()


def test_a_build_without_a_kernel_is_told_from_a_whole_one(gpu: Any, tmp_path: Path) -> None:
    (asked,) = (phase for phase in gpu.phases("9.0", tmp_path) if phase.name == "operators")
    assert asked.check("\n".join(["+ python", " ".join(gpu.KERNELS)])) == ""
    assert asked.check(" ".join(gpu.KERNELS[1:])) == f"no cuda kernels of {gpu.KERNELS[0]}"


def test_a_failure_stops_nothing_but_what_needs_it(gpu: Any, tmp_path: Path) -> None:
    staging, out = tmp_path / "staging", tmp_path / "out"
    staging.mkdir()
    steps = [
        gpu.Phase("missing", ["/nonexistent/tool"], 10),
        gpu.Phase("red", say("one failed", 1), 10),
        gpu.Phase("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1),
        gpu.Phase("green", say("measured"), 10),
    ]
    assert gpu.run(steps, staging, out, 60.0) == 1
    found = outcomes(out)
    assert found["missing"].startswith("cannot be run")
    assert found["red"] == "status 1"
    assert found["slow"] == "stopped after 1 s"
    assert found["green"] == "ok"
    assert {"01-red.txt", "03-green.txt", "summary.json"} <= names(out, gpu)
    assert {path.name for path in out.iterdir()} == {gpu.ARCHIVE, gpu.SUMMARY}


def test_without_operators_nothing_is_measured(gpu: Any, tmp_path: Path) -> None:
    staging, out = tmp_path / "staging", tmp_path / "out"
    staging.mkdir()
    wrong = gpu.Phase(
        "operators", say("3"), 10, essential=True, check=lambda printed: "13 wanted, 3 registered"
    )
    assert gpu.run([wrong, gpu.Phase("bench", say("1 ms"), 10)], staging, out, 60.0) == 1
    assert outcomes(out) == {"operators": "13 wanted, 3 registered", "bench": "not run"}


def test_the_archive_holds_what_was_finished_when_the_machine_is_taken_away(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, out = tmp_path / "staging", tmp_path / "out"
    staging.mkdir()
    real = gpu.run_phase

    def taken(phase: Any, limit: float, log: Path) -> tuple[str, float]:
        if phase.name == "second":
            raise KeyboardInterrupt
        return real(phase, limit, log)

    monkeypatch.setattr(gpu, "run_phase", taken)
    steps = [gpu.Phase("first", say("kept"), 10), gpu.Phase("second", say("lost"), 10)]
    with pytest.raises(KeyboardInterrupt):
        gpu.run(steps, staging, out, 60.0)
    assert "00-first.txt" in names(out, gpu)


def test_the_whole_time_is_a_limit_too(gpu: Any, tmp_path: Path) -> None:
    staging, out = tmp_path / "staging", tmp_path / "out"
    staging.mkdir()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    steps = [gpu.Phase("first", sleep, 50), gpu.Phase("second", sleep, 50)]
    gpu.run(steps, staging, out, 1.5)
    assert outcomes(out)["second"] == "not run"


@pytest.mark.slow
def test_the_rehearsal_runs_the_script_as_far_as_it_goes_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / ".ci" / "gpu.py"), "run", "--rehearse", "--minutes", "60"]
    # What comes after is the same programs with more rows.
    shown = ["machine", "build", "operators", "small-suite", "memcheck", "spectrum", "merge"]
    command += ["--phases", *shown, "--out", str(tmp_path)]
    subprocess.run(command, check=False, capture_output=True)
    found = outcomes(tmp_path)
    assert list(found) == shown
    assert found["build"] == "ok"
    assert found["operators"] == "ok"
    assert found["small-suite"] == "ok"
    assert found["spectrum"] == "ok"
    assert found["merge"] == "ok"


def test_a_phase_that_is_not_there_is_refused(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["run", "--rehearse", "--phases", "merg", "--out", str(tmp_path)])
    assert "no such phase: merg; there are machine, build" in capsys.readouterr().err


def test_the_script_runs_as_a_program(gpu: Any) -> None:
    assert runpy.run_path(str(ROOT / ".ci" / "gpu.py"))["TOOLS"] == gpu.TOOLS
