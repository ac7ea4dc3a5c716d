"""The scripts for machines with nvcc or a GPU: what they say where one is missing."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"name": "sum<float>", "arch": "sm_90", "registers": 32, "stack": 0}


def run(script: str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr."""
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stderr.splitlines()


@pytest.fixture(scope="module")
def build() -> Any:
    return runpy.run_path(str(ROOT / ".ci" / "cuda_build.py"))


def test_equal_tables_do_not_differ(build: Any) -> None:
    assert build["differences"]([KERNEL], [dict(KERNEL)]) == []


def test_every_difference_of_two_tables_is_named(build: Any) -> None:
    other = {**KERNEL, "name": "max<float>"}
    found = build["differences"]([{**KERNEL, "registers": 40}, other], [KERNEL])
    assert found == [
        "max<float> (sm_90) is missing from the committed table",
        "sum<float> (sm_90) has registers 40, the committed table says 32",
    ]
    assert build["differences"]([], [KERNEL]) == ["sum<float> (sm_90) is missing from the build"]


def test_the_committed_table_and_page_hold_the_same_kernels(build: Any) -> None:
    page = build["TABLE"].read_text(encoding="utf-8")
    report = runpy.run_path(str(ROOT / "csrc" / "cuda" / "ptxas_report.py"))
    record = build["json"].loads(build["RECORD"].read_text(encoding="utf-8"))
    rows = [report["Usage"](**row) for row in record]
    nvcc = build["re"].search(r"nvcc release [^)]*", page)[0]
    assert page == build["page"](nvcc, record)
    assert {row.arch for row in rows} == {code for code in build["EXPECTED_CODE"] if "sm" in code}
    assert report["complaints"]([row for row in rows if row.arch in {"sm_80", "sm_90"}]) == []
    assert {row.name.split("::")[1] for row in rows} == {
        "merge",
        "precondition",
        "spectrum",
        "regularizer",
        "triangular",
    }


def test_spills_are_tolerated_on_blackwell_as_far_as_they_are_known(build: Any) -> None:
    known = {**KERNEL, "arch": "sm_120", "spill_stores": 4, "spill_loads": 8}
    is_tolerated = build["is_tolerated"]
    assert is_tolerated(known, [KERNEL, known])
    for more in ("stack", "spill_stores", "spill_loads"):
        assert not is_tolerated({**known, more: 99}, [known])
    assert not is_tolerated(known, [KERNEL])
    assert not is_tolerated({**known, "arch": "sm_90"}, [{**known, "arch": "sm_90"}])


def test_no_nvcc_is_one_line() -> None:
    status, lines = run("cuda_build.py", PATH="/nonexistent")
    assert status == 1
    assert lines == [
        "cuda_build: nvcc not found; install the CUDA toolkit that torch was built for"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["run", "sanitizer"])
def test_no_gpu_is_one_line(command: str) -> None:
    status, lines = run("gpu.py", command)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("gpu: torch ")


def test_an_unknown_sanitizer_tool_is_one_line() -> None:
    status, lines = run("gpu.py", "sanitizer", "leakcheck")
    assert status == 2
    assert lines[0].startswith("gpu: no such tool: leakcheck")
