"""The one process pool: files written whole, resumed by what made them, workers that are killed."""

import functools
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from immunize_ext.runtime import Interrupted, interruptible
from immunize_ext.sweep import finished, run_jobs, run_sweep


def square(number: int) -> dict[str, Any]:
    return {"square": number * number}


def counted(number: int, folder: str) -> dict[str, Any]:
    """As ``square``, leaving a trace of every call."""
    with Path(folder, f"calls-{number}").open("a") as file:
        file.write("x")
    return square(number)


def killed_once(number: int, folder: str) -> dict[str, Any]:
    """The first call of job 1 is killed, as the out-of-memory killer does it."""
    mark = Path(folder, "killed")
    if number == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return counted(number, folder)


def killed_always() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def failing(number: int) -> dict[str, Any]:
    if number == 2:
        raise ValueError("job 2 must work")
    return square(number)


def slow(folder: str) -> dict[str, Any]:
    Path(folder, f"started-{os.getpid()}").touch()
    time.sleep(600)
    return {}


def jobs_of(function: Any, *arguments: Any, count: int = 4) -> dict[str, Any]:
    return {f"job-{n}": functools.partial(function, n, *arguments) for n in range(count)}


WANTED = {f"job-{n}": {"square": n * n} for n in range(4)}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_job_is_one_file_and_done_once(processes: int, tmp_path: Path) -> None:
    shares: list[float] = []
    jobs, folder = jobs_of(counted, str(tmp_path)), tmp_path / "done"
    for _ in range(2):
        found = run_jobs(
            jobs, folder, processes=processes, progress=lambda _, share: shares.append(share)
        )
        assert found == WANTED
    assert list(found) == list(jobs)
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json" for name in jobs]
    assert [(tmp_path / f"calls-{n}").read_text() for n in range(4)] == ["x"] * 4
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_what_was_made_of_something_else_is_done_again(tmp_path: Path) -> None:
    run_jobs({"a": functools.partial(square, 2), "b": functools.partial(square, 3)}, tmp_path)
    before = (tmp_path / "b.json").stat().st_ino
    again = {"a": functools.partial(square, 5), "b": functools.partial(square, 3)}
    assert run_jobs(again, tmp_path) == {"a": {"square": 25}, "b": {"square": 9}}
    assert (tmp_path / "b.json").stat().st_ino == before
    (tmp_path / "a.json").write_text("damaged")
    assert run_jobs(again, tmp_path)["a"] == {"square": 25}


def test_any_executor_will_do(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as executor:
        assert run_jobs(jobs_of(square), tmp_path, executor=executor) == WANTED
        assert executor.submit(square, 2).result() == {"square": 4}  # not shut down


@pytest.mark.slow
def test_a_killed_worker_loses_one_job(tmp_path: Path) -> None:
    folder = tmp_path / "done"
    assert run_jobs(jobs_of(killed_once, str(tmp_path)), folder, processes=2) == WANTED
    assert (tmp_path / "killed").exists()


@pytest.mark.slow
def test_a_job_that_kills_every_worker_ends(tmp_path: Path) -> None:
    jobs = {"a": functools.partial(killed_always), "b": functools.partial(killed_always)}
    with pytest.raises(ChildProcessError, match="is there enough memory"):
        run_jobs(jobs, tmp_path, processes=2)


def test_what_a_job_raises_reaches_the_caller_and_the_others_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="job 2 must work"):
        run_jobs(jobs_of(failing), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job-0.json", "job-1.json"]


@pytest.mark.slow
def test_what_a_job_raises_in_another_process_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="job 2 must work"):
        run_jobs(jobs_of(failing), tmp_path, processes=2)
    assert not (tmp_path / "job-2.json").exists()


def _runs(pid: int) -> bool:
    """Whether there is a process; one that the pool itself has waited for leaves no exit code."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_an_interruption_ends_the_workers(tmp_path: Path) -> None:
    started = tmp_path / "started"
    started.mkdir()
    jobs = {name: functools.partial(slow, str(started)) for name in "ab"}
    before = set(multiprocessing.active_children())

    def stop_when_they_work() -> None:
        while len(list(started.iterdir())) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    with interruptible():
        Thread(target=stop_when_they_work, daemon=True).start()
        with pytest.raises(Interrupted) as caught:
            run_jobs(jobs, tmp_path / "done", processes=2)
    assert caught.value.signal == signal.SIGTERM
    for child in set(multiprocessing.active_children()) - before:
        child.join(60)
        assert child.exitcode is not None or not _runs(child.pid)


@pytest.mark.parametrize("count", [0, 100_000])
def test_counts_out_of_range_are_refused(count: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes must be at"):
        run_jobs({}, tmp_path, processes=count)
    with pytest.raises(ValueError, match="threads must be at"):
        run_jobs({"a": functools.partial(square, 1)}, tmp_path, threads_each=count)


def test_a_sweep_directory_is_gone_on_with_and_never_mixed(tmp_path: Path) -> None:
    target = tmp_path / "sweep"
    points = jobs_of(square)
    assert run_sweep(target, "toy", points) == WANTED
    assert finished(target) == WANTED
    assert json.loads((target / "sweep.json").read_text())["kind"] == "toy"
    assert run_sweep(target, "toy", points) == WANTED
    other = {"job-0": functools.partial(square, 7)}
    with pytest.raises(FileExistsError, match="holds a sweep with other settings"):
        run_sweep(target, "toy", other)
    assert run_sweep(target, "toy", other, force=True) == {"job-0": {"square": 49}}
    assert finished(target) == {"job-0": {"square": 49}}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(FileExistsError, match="is not a run directory"):
        run_sweep(tmp_path / "photos", "toy", points, force=True)
