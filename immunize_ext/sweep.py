"""Many jobs, one finished file each: over processes or any executor, resumed where cut off.

A folder holds ``NAME.json`` for each finished job, written whole, with a digest of what made it.
Doing the same again does what is missing, or was made of something else. A sweep directory adds
``sweep.json``, what is to be done; its jobs stand in ``points/``.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeAlias

import torch

from immunize_ext.runtime import check_count, threads
from immunize_ext.seams import Progress
from immunize_ext.storage import check_target, clear_abandoned, digest, to_json, write_whole

Job: TypeAlias = Callable[[], dict[str, Any]]
"""A function of a module, or a ``functools.partial`` of one, that gives plain values."""

SWEEP = "sweep.json"
POINTS = "points"

# Key of a job's file: the digest of what made it.
_MADE_OF = "made_of"

# A job that takes this many workers with it is not tried again.
_MOST_LOSSES = 3

# What libraries read when they load; set for worker processes, which load them anew.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# --- jobs -----------------------------------------------------------------------------------------


def _found(folder: Path) -> dict[str, tuple[dict[str, Any], str | None]]:
    """The results that are there, and of what they were made."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found[path.stem] = (result, result.pop(_MADE_OF, None))
        except (ValueError, AttributeError, TypeError):
            continue  # damaged from outside: done again
    return found


def run_jobs(
    jobs: Mapping[str, Job],
    folder: Path,
    *,
    executor: Executor | None = None,
    processes: int = 1,
    threads_each: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Do the jobs whose files are missing, or were made of something else.

    Args:
        jobs: What to do, by a name that is fit for a file; pickled for other processes. A job
            with an attribute ``made_of`` says itself what it was made of.
        folder: Where the files are; it is made.
        executor: Where the jobs run: any executor of ``concurrent.futures``, such as the one that
            ``distributed.Client.get_executor`` gives. It is not shut down.
        processes: Without an executor: how many processes; 1 works in this one.
        threads_each: Threads of each of them; as many as this process uses when omitted.
        progress: Called after each job.

    Returns:
        All results by name, in the order of ``jobs``.

    Raises:
        Exception: What a job raises; jobs that are finished stay. A worker that is killed costs
            its job one more try, and the others nothing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as outer:
        ...     run_jobs({"a": functools.partial(dict, steps=3)}, Path(outer))
        {'a': {'steps': 3}}
    """
    check_count("processes", processes)
    folder.mkdir(parents=True, exist_ok=True)
    clear_abandoned(folder / "*.json")
    made_of = {name: _digest_of(job) for name, job in jobs.items()}
    done = {
        name: result
        for name, (result, made) in _found(folder).items()
        if name in jobs and made == made_of[name]
    }
    missing = {name: job for name, job in jobs.items() if name not in done}
    report = progress or (lambda text, share: None)
    threads_each = torch.get_num_threads() if threads_each is None else threads_each

    def keep(name: str, result: dict[str, Any]) -> None:
        plain = json.loads(json.dumps(to_json(result)))
        write_whole(folder / f"{name}.json", {**plain, _MADE_OF: made_of[name]})
        done[name] = plain
        report(f"{len(done)} of {len(jobs)} done, last {name}", len(done) / len(jobs))

    report(f"{len(done)} of {len(jobs)} are there", len(done) / len(jobs) if jobs else 1.0)
    if executor is not None:
        if lost := _submit(executor, missing, keep):
            raise ChildProcessError(
                f"the executor lost {len(lost)} jobs ({next(iter(lost))} first); run again to do "
                "them"
            )
    elif processes == 1 or len(missing) <= 1:
        with threads(threads_each):
            for name, job in missing.items():
                keep(name, job())
    else:
        _in_processes(missing, min(processes, len(missing)), threads_each, keep)
    return {name: done[name] for name in jobs}


def _digest_of(job: Job) -> str:
    own = getattr(job, "made_of", None)
    if isinstance(own, str):
        return own
    if isinstance(job, functools.partial):
        inner: Any = job.func
        return digest(f"{inner.__module__}.{inner.__qualname__}", job.args, job.keywords)
    made: Any = job
    return digest(f"{made.__module__}.{made.__qualname__}")


Keep: TypeAlias = Callable[[str, dict[str, Any]], None]


def _submit(executor: Executor, missing: Mapping[str, Job], keep: Keep) -> dict[str, Job]:
    """Do jobs with an executor; those that died with a worker are given back."""
    running: dict[Future[dict[str, Any]], str] = {}
    lost: dict[str, Job] = {}
    try:
        for name, job in missing.items():
            try:
                running[executor.submit(job)] = name
            except BrokenExecutor:
                lost[name] = job
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    result = future.result()
                except BrokenExecutor:
                    lost[name] = missing[name]
                    continue
                keep(name, result)
    except BaseException:
        for future in running:
            future.cancel()
        raise
    return lost


def _in_processes(
    missing: Mapping[str, Job], processes: int, threads_each: int, keep: Keep
) -> None:
    """Do jobs in processes of our own; a pool that lost a worker is replaced."""
    context = multiprocessing.get_context("spawn")  # a fork after torch has threads may hang
    left, losses = dict(missing), 0
    while left:
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(processes, context, _start_worker, (threads_each,))
        try:
            with _environment(threads_each):
                left, before = _submit(pool, left, keep), left
        except BaseException:
            # Nobody waits for what is still running: it would be done again anyway.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
        pool.shutdown()
        losses = losses + 1 if len(left) == len(before) else 1
        if left and losses >= _MOST_LOSSES:
            raise ChildProcessError(
                f"the worker processes die: {losses} of them did while none finished a job, with "
                f"{len(left)} left ({next(iter(left))} first); is there enough memory?"
            )


def _start_worker(threads_each: int) -> None:
    # Ctrl-C reaches every process of a terminal; the one that waits for us decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads_each)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


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


# --- sweep directories ----------------------------------------------------------------------------


def run_sweep(
    target: str | Path,
    kind: str,
    points: Mapping[str, Job],
    *,
    force: bool = False,
    executor: Executor | None = None,
    processes: int = 1,
    threads_each: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Make a sweep directory, or go on with one of the same points, and do what is missing.

    Args:
        target: The directory.
        kind: Kind of the sweep, as results.json will name it.
        points: What to do, by a name that is fit for a file.
        force: Whether an existing sweep of other points is replaced.
        executor: As for :func:`run_jobs`, like the rest.
        processes: Without an executor: how many processes.
        threads_each: Threads of each of them.
        progress: Called after each point.

    Returns:
        All results by name.

    Raises:
        FileExistsError: If the target is something else, or a sweep of other points.
    """
    plan = {"kind": kind, "points": {name: _digest_of(job) for name, job in points.items()}}
    return run_jobs(
        points,
        _open_sweep(Path(target), plan, force=force) / POINTS,
        executor=executor,
        processes=processes,
        threads_each=threads_each,
        progress=progress,
    )


def _open_sweep(path: Path, plan: Mapping[str, Any], *, force: bool) -> Path:
    file = path / SWEEP
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found == plan:
            return path
        if not force:
            raise FileExistsError(
                f"{path} holds a sweep with other settings; choose another folder, or drop its "
                "points with --force"
            )
        for point in (path / POINTS).glob("*.json"):
            point.unlink()
    else:
        check_target(path, force=False)
    (path / POINTS).mkdir(parents=True, exist_ok=True)
    write_whole(file, plan)
    return path


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The points of a sweep directory that are there, by name."""
    return {name: result for name, (result, _) in _found(folder / POINTS).items()}
