"""Sweeps of any kind: many points, one finished file each, over processes, resumed where cut off.

A sweep directory holds ``sweep.json`` (what is to be done), ``points/NAME.json`` (a finished point,
written whole) and, once all are there, what its kind makes of them. Running the same command again
does what is missing; running another one into the same directory is refused.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from immunize_ext.runtime import threads
from immunize_ext.seams import Progress
from immunize_ext.storage import check_target, to_json, write_file

Worker = Callable[[Any], dict[str, Any]]


SWEEP = "sweep.json"


POINTS = "points"


# What libraries read when they load; set for worker processes, which load them anew.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def write_whole(path: Path, value: Any) -> None:
    """Write one JSON document whole or not at all."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(path, text.encode())


def open_sweep(target: str | Path, plan: Mapping[str, Any], *, force: bool = False) -> Path:
    """Make a sweep directory, or go on with one that has the same plan.

    Args:
        target: The directory.
        plan: What is to be done, as plain values.
        force: Whether an existing sweep of another plan is replaced.

    Returns:
        The directory.

    Raises:
        FileExistsError: If the target is something else, or a sweep with another plan.
    """
    path = Path(target)
    wanted = json.loads(json.dumps(to_json(plan)))
    file = path / SWEEP
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found == wanted:
            return path
        if not force:
            raise FileExistsError(
                f"{target} holds a sweep with other settings; choose another folder, or drop its "
                "points with --force"
            )
        for point in (path / POINTS).glob("*.json"):
            point.unlink()
    else:
        check_target(path, force=False)
    (path / POINTS).mkdir(parents=True, exist_ok=True)
    write_whole(file, wanted)
    return path


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The points that are there, by name."""
    found = {}
    for path in sorted((folder / POINTS).glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # damaged from outside: done again
    return found


def run_points(
    folder: Path,
    points: Mapping[str, Any],
    worker: Worker,
    *,
    jobs: int,
    threads_each: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Do the points that are missing.

    Args:
        folder: The sweep directory.
        points: What ``worker`` is given, by name of the point; pickled for other processes.
        worker: A function of a module, which gives plain values.
        jobs: Processes; 1 works in this one.
        threads_each: Threads of each process.
        progress: Called after each point.

    Returns:
        All points by name, in the order of ``points``.

    Raises:
        Exception: What a point raises; points that are finished stay.
    """
    done = {name: value for name, value in finished(folder).items() if name in points}
    missing = {name: value for name, value in points.items() if name not in done}
    total = len(points)

    def keep(name: str, result: dict[str, Any]) -> None:
        write_whole(folder / POINTS / f"{name}.json", result)
        done[name] = json.loads(json.dumps(to_json(result)))
        progress(f"{len(done)} of {total} points, last {name}", len(done) / total)

    progress(f"{len(done)} of {total} points are there", len(done) / total if total else 1.0)
    if jobs == 1 or len(missing) <= 1:
        with threads(threads_each):
            for name, payload in missing.items():
                keep(name, worker(payload))
    else:
        _parallel(missing, worker, min(jobs, len(missing)), threads_each, keep)
    return {name: done[name] for name in points}


def _parallel(
    missing: Mapping[str, Any],
    worker: Worker,
    jobs: int,
    threads_each: int,
    keep: Callable[[str, dict[str, Any]], None],
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork after torch has threads may hang
    with (
        _environment(threads_each),
        ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads_each,)) as pool,
    ):
        # A few more than there are processes: those handed out are finished, also after Ctrl-C.
        waiting = iter(missing.items())
        running: dict[Future[dict[str, Any]], str] = {}
        try:
            while True:
                for name, payload in waiting:
                    running[pool.submit(worker, payload)] = name
                    if len(running) >= jobs + 1:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    keep(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _environment(threads_each: int) -> Iterator[None]:
    """Thread counts for processes that start in the block."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads_each)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
