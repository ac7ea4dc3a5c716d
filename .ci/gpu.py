"""Runs on a machine with a GPU what cannot run anywhere else; one line where something is missing.

``run``         builds the package against the torch that is installed, runs ``pytest -m gpu`` and
                the benchmarks, and leaves the results in ``results/``: unattended, ten minutes
``sanitizer``   a reduced suite under ``compute-sanitizer``, once for each tool named

The Python that runs this file needs a CUDA build of torch; nvcc must be of the same major release.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Seconds for each step, so that a hang ends by itself and the whole takes ten minutes at most.
BUILD_SECONDS, TEST_SECONDS, BENCH_SECONDS, SANITIZER_SECONDS = 600, 240, 300, 1200
# One small case of every kernel: the sanitizer slows a kernel by a factor of 10 to 100.
REDUCED = "sanitizer"
BUILD_NEEDS = ("setuptools", "wheel", "ninja", "numpy")


def fail(message: str) -> NoReturn:
    """End the program with one line and status 2."""
    print(f"gpu: {message}", file=sys.stderr)
    sys.exit(2)


def run(command: Sequence[str], seconds: int, **environment: str) -> None:
    """Run a command in the repository; exit with its status if it fails or takes too long."""
    print("+", " ".join(command), flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"gpu: {command[0]} took more than {seconds} seconds", file=sys.stderr)
        sys.exit(1)
    if done.returncode != 0:
        sys.exit(done.returncode)


def check_machine() -> None:
    """A GPU that torch sees, and an nvcc."""
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


def build() -> None:
    """Install the package with its CUDA operators and what its tests need; torch stays as it is."""
    import torch

    python = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    missing = [name for name in BUILD_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        run([*python, *missing], BUILD_SECONDS)
    major, minor = torch.cuda.get_device_capability()
    run(
        [*python, "--no-build-isolation", ".[data,report,test]", f"torch=={torch.__version__}"],
        BUILD_SECONDS,
        IMMUNIZE_EXT_BUILD="1",
        IMMUNIZE_EXT_CUDA="1",
        TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
        MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
    )


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    command, *tools = arguments or ["--help"]
    if command not in ("run", "sanitizer"):
        sys.exit(__doc__)
    if unknown := set(tools) - set(TOOLS):
        fail(f"no such tool: {', '.join(sorted(unknown))}; there are {', '.join(TOOLS)}")
    check_machine()
    if command == "sanitizer" and shutil.which("compute-sanitizer") is None:
        fail("compute-sanitizer not found; it comes with the CUDA toolkit")
    build()
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-p", "no:cacheprovider", "-q"]
    if command == "run":
        run([*pytest, "-m", "gpu", "python_tests"], TEST_SECONDS)
        bench = [*python, "benchmarks.run", "--device", "cuda", "--out", "results/"]
        run(bench, BENCH_SECONDS)
        return
    for tool in tools or TOOLS:
        run(
            [
                "compute-sanitizer",
                f"--tool={tool}",
                "--error-exitcode=3",
                "--target-processes=all",
                *pytest,
                "-k",
                REDUCED,
                "-m",
                "gpu",
                "python_tests/gpu",
            ],
            SANITIZER_SECONDS,
            # Freed memory goes back to CUDA, so that what is read from it is seen.
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )


if __name__ == "__main__":
    main(sys.argv[1:])
