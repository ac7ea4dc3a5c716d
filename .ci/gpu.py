"""Runs on a machine with a GPU what cannot run anywhere else; one line where something is missing.

``run``         builds the operators in place and leaves tests and timings in ``--out``: unattended,
                ten minutes at most, the most valuable first
``sanitizer``   a reduced suite under ``compute-sanitizer``, once for each tool named

The machine need not reach anything: torch with CUDA, nvcc of the same major release, setuptools,
numpy, scipy, pytest and hypothesis are there already, and nothing is installed. Every phase of
``run`` has a limit of its own; one that fails or hangs does not stop the next, except the build.
All that came out so far is packed into one archive as each phase starts, so that a machine that is
taken away leaves what was finished.

``run --rehearse`` does the same on a machine without a GPU, with the CPU in its place: whether the
script itself works should not be found out on borrowed time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_SECONDS = 1200
NEEDS = ("setuptools", "numpy", "scipy", "pytest", "hypothesis")
ARCHIVE, SUMMARY = "gpu-results.tar.gz", "summary.json"

# What a build for a device must have kernels for; asked before anything is measured.
KERNELS = (
    "extremal_singular_values",
    "extremal_singular_values_backward",
    "gram_extremes",
    "gram_extremes_backward",
    "symmetric_extremes",
    "symmetric_extremes_backward",
    "merge_solve",
    "merge_apply",
    "merge_apply_backward",
    "precondition",
    "regularizer",
    "regularizer_backward",
)
# Prints the kernels of a device that are registered.
REGISTERED = """
from immunize_ext.ops import operators
print(*(name for name in operators.OPERATORS if operators.has_kernel(name, "{device}")))
"""


def fail(message: str) -> NoReturn:
    """End the program with one line and status 2."""
    print(f"gpu: {message}", file=sys.stderr)
    sys.exit(2)


@dataclass(frozen=True)
class Phase:
    """One step of the run.

    Attributes:
        name: What its log is called.
        command: What is run, in the repository.
        seconds: Its limit.
        environment: Variables on top.
        essential: Whether nothing after it makes sense without it.
        check: Looks at what it printed; returns what is wrong, or nothing.
    """

    name: str
    command: Sequence[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    essential: bool = False
    check: Callable[[str], str] = lambda printed: ""


def check_machine() -> str:
    """A GPU that torch sees, an nvcc, what tests need; gives the architecture."""
    try:
        import torch
    except ImportError:
        fail("torch is not installed; pip install a build of it for your CUDA release")
    if torch.version.cuda is None:
        fail(f"torch {torch.__version__} is a build without CUDA; install one for your release")
    if not torch.cuda.is_available():
        fail("torch sees no GPU; look at nvidia-smi")
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        fail(f"nvcc not found; install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME")
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{', '.join(missing)} not installed; pip install {' '.join(missing)}")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def pytest(*arguments: str) -> list[str]:
    """A pytest command."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def sanitized(tool: str, *arguments: str) -> list[str]:
    """A pytest command under compute-sanitizer."""
    options = [f"--tool={tool}", "--error-exitcode=3", "--target-processes=all"]
    return ["compute-sanitizer", *options, *pytest(*arguments)]


def benchmark(
    module: str, device: str, staging: Path, *rows: str, quick: bool = False
) -> list[str]:
    """A benchmark of some rows; each row is in its file as soon as it is measured."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--device", device, "--no-sweeps"]
    command += ["--quick"] if quick else ["--seconds", "2"]
    for row in rows:
        command += ["--rows", row]
    return [*command, "--out", str(staging / "benchmarks" / rows[0])]


def phases(architecture: str | None, staging: Path) -> list[Phase]:
    """The run in its order: what would be missed most stands first.

    Args:
        architecture: Of the card, ``"9.0"``; ``None`` rehearses on the CPU.
        staging: Where logs and results are gathered.
    """
    rehearsal = architecture is None
    device = "cpu" if rehearsal else "cuda"
    build = {"IMMUNIZE_EXT_BUILD": "1", "IMMUNIZE_EXT_CUDA": "0" if rehearsal else "1"}
    build |= {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))}
    if architecture is not None:
        build["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", architecture)
    # Freed memory goes back to CUDA, so that what is read from it is seen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = "python_tests/gpu/test_gpu_sanitizer.py"
    importable = {"PYTHONPATH": str(ROOT)}

    def complete(printed: str) -> str:
        missing = [name for name in KERNELS if name not in printed.splitlines()[-1].split()]
        return f"no {device} kernels of {', '.join(missing)}" if missing else ""

    def bench(name: str, module: str, seconds: int, *rows: str) -> Phase:
        return Phase(name, benchmark(module, device, staging, *rows, quick=rehearsal), seconds)

    in_place = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return [
        Phase("machine", ["nvidia-smi"], 10),
        # A rehearsal may find the machine busy; nothing is lost by waiting.
        Phase("build", in_place, 3000 if rehearsal else 150, build, essential=True),
        Phase(
            "operators",
            [sys.executable, "-c", REGISTERED.format(device=device)],
            30,
            essential=True,
            check=complete,
        ),
        Phase("small-suite", pytest(small), 60),
        Phase("memcheck", sanitized("memcheck", "-x", small), 90, uncached),
        bench("spectrum", "spectrum", 60, "pair-64x784", "batch-90x64x784"),
        bench("merge", "merge", 50, "sd14-weights"),
        Phase(
            "profile", [sys.executable, ".ci/gpu_profile.py", "--device", device], 70, importable
        ),
        # A process each: one that crashes takes no other tests along.
        *(
            Phase(f"{part}-suite", pytest(f"python_tests/gpu/test_gpu_{part}.py"), 60)
            for part in ("spectrum", "regularizers", "merge", "symmetric", "precondition")
        ),
        Phase("racecheck", sanitized("racecheck", "-x", small, "-k", "float64"), 60, uncached),
        bench("spectrum-more", "spectrum", 60, "side-32-33", "hessian-2048", "groups-20x100x768"),
        bench("merge-more", "merge", 60, "sd14-embeddings", "sdxl-weights"),
        bench(
            "spectrum-most",
            "spectrum",
            90,
            *("pair-64x784-float32", "digit-5949x784", "tiny-8x8", "tiny-32x32", "one-8x8"),
            "hessian-768",
        ),
    ]


def run_phase(phase: Phase, limit: float, log: Path) -> tuple[str, float]:
    """Run one phase; gives ``ok`` or what went wrong, and its seconds."""
    started = time.monotonic()
    outcome = "ok"
    with log.open("w", encoding="utf-8") as file:
        print("+", " ".join(phase.command), file=file, flush=True)
        try:
            done = subprocess.run(
                phase.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **phase.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=limit,
                check=False,
            )
            if done.returncode != 0:
                outcome = f"status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        except OSError as error:
            outcome = f"cannot be run: {error}"
    printed = log.read_text(encoding="utf-8", errors="replace")
    if outcome == "ok" and (wrong := phase.check(printed)):
        outcome = wrong
    return outcome, time.monotonic() - started


def trace(phase: Phase, limit: float, log: Path) -> None:
    """Run a phase that crashed again under a debugger, for the stack below Python."""
    debugger = ["cuda-gdb", "-batch", "-ex", "run", "-ex", "bt", "--args", *phase.command]
    again = replace(phase, command=debugger)
    run_phase(again, max(limit, 1.0), log.with_stem(f"{log.stem}-backtrace"))


def pack(staging: Path, out: Path) -> None:
    """Everything so far in one archive, which is whole at any time."""
    partial = out / f".{ARCHIVE}"
    with tarfile.open(partial, "w:gz") as archive:
        archive.add(staging, arcname="gpu-results")
    partial.replace(out / ARCHIVE)


def run(steps: Sequence[Phase], staging: Path, out: Path, seconds: float) -> int:
    """Run all phases within a time.

    Returns:
        0 if all went well, 1 if something failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    found: list[dict[str, object]] = []
    stopped = False
    for number, phase in enumerate(steps):
        pack(staging, out)
        left = end - time.monotonic()
        if stopped or left < 1.0:
            outcome, took = "not run", 0.0
        else:
            print(f"== {phase.name}", flush=True)
            log = staging / f"{number:02d}-{phase.name}.txt"
            outcome, took = run_phase(phase, min(phase.seconds, left), log)
            if outcome == f"status {-signal.SIGSEGV}" and shutil.which("cuda-gdb"):
                trace(phase, min(phase.seconds, end - time.monotonic()), log)
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-4:]
            print("\n".join(tail), f"\n-- {phase.name}: {outcome}, {took:.1f} s", flush=True)
        stopped = stopped or (phase.essential and outcome != "ok")
        found.append({"phase": phase.name, "outcome": outcome, "seconds": round(took, 1)})
        (staging / SUMMARY).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    pack(staging, out)
    shutil.copy(staging / SUMMARY, out / SUMMARY)
    return int(any(row["outcome"] != "ok" for row in found))


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    full = commands.add_parser("run", help="build, test and measure")
    full.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "results")))
    full.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    full.add_argument("--rehearse", action="store_true", help="with the CPU in place of a GPU")
    full.add_argument("--phases", nargs="+", metavar="PHASE", help="only these; all of them")
    tools = commands.add_parser("sanitizer", help="a reduced suite under compute-sanitizer")
    tools.add_argument("tools", nargs="*", metavar="TOOL", help=", ".join(TOOLS))
    chosen = parser.parse_args(arguments)
    if chosen.command == "sanitizer":
        if unknown := set(chosen.tools) - set(TOOLS):
            fail(f"no such tool: {', '.join(sorted(unknown))}; there are {', '.join(TOOLS)}")
        check_machine()
        if shutil.which("compute-sanitizer") is None:
            fail("compute-sanitizer not found; it comes with the CUDA toolkit")
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for tool in chosen.tools or TOOLS:
            command = sanitized(tool, "-k", "sanitizer", "-m", "gpu", "python_tests/gpu")
            print("+", " ".join(command), flush=True)
            status = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=SANITIZER_SECONDS, check=False
            ).returncode
            if status != 0:
                return status
        return 0
    architecture = None if chosen.rehearse else check_machine()
    with tempfile.TemporaryDirectory() as folder:
        steps = phases(architecture, Path(folder))
        names = [phase.name for phase in steps]
        if unknown := set(chosen.phases or ()) - set(names):
            fail(f"no such phase: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        steps = [phase for phase in steps if phase.name in (chosen.phases or names)]
        return run(steps, Path(folder), chosen.out.absolute(), 60.0 * chosen.minutes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
