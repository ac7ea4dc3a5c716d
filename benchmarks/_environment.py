"""What a number was measured on: machine, libraries, threads, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from immunize_ext._version import __version__

# Load per core above which other work is likely to have disturbed a measurement.
BUSY_LOAD_PER_CORE = 0.5


def cpu_model() -> str:
    """Name of the processor as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def blas_configuration() -> list[dict[str, Any]]:
    """BLAS and OpenMP libraries of this process with their threads; no file paths."""
    kept = ("user_api", "internal_api", "version", "threading_layer", "architecture", "num_threads")
    return [{key: pool[key] for key in kept if key in pool} for pool in threadpool_info()]


def source_commit() -> dict[str, Any]:
    """``{"commit": hash or None, "modified": bool or None}`` of the tree the package lies in."""
    tree = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=tree, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # Results are written during a run and are no change of the code that was measured.
    changes = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    return {"commit": commit, "modified": None if changes is None else bool(changes)}


def device_name(device: torch.device) -> str:
    """Name of the device that the contenders run on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def environment_record(
    device: torch.device, threads: int, module: str, arguments: Sequence[str]
) -> dict[str, Any]:
    """The environment block of a result file. ``module`` and ``arguments`` make the command."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cores = os.cpu_count() or 1
    return {
        "command": " ".join(["python", "-m", module, *map(_without_machine, arguments)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device.type,
        "device_name": device_name(device),
        "cpu": cpu_model(),
        "cores": cores,
        "threads": threads,
        "load_at_start": load,
        "busy_at_start": None if load is None else load > BUSY_LOAD_PER_CORE * cores,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "immunize_ext": __version__,
        "blas": blas_configuration(),
        "torch_parallel": _torch_parallel(),
        "environment_variables": {
            name: os.environ[name]
            for name in (
                "OMP_NUM_THREADS",
                "MKL_NUM_THREADS",
                "OPENBLAS_NUM_THREADS",
                "KMP_AFFINITY",
            )
            if name in os.environ
        },
        **source_commit(),
    }


def _without_machine(argument: str) -> str:
    """A command-line argument with folders of this machine left out."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{'PATH' if Path(value).is_absolute() else value}"


def _torch_parallel() -> list[str]:
    """The lines of torch's own description that name its BLAS and its backend."""
    wanted = ("Intel", "MKL", "OpenMP", "OpenBLAS", "parallel backend")
    lines = torch.__config__.parallel_info().splitlines()
    return [line.strip() for line in lines if any(word in line for word in wanted)]
