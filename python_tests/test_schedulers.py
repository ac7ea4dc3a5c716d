"""Schedulers of sweeps, on clusters of this machine where their packages are installed."""

from __future__ import annotations

import functools
import os
import signal
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from typing import Any

import pytest

from immunize_ext._extras import MissingExtraError
from immunize_ext.schedulers import _Submitit, executor_of
from immunize_ext.sweep import run_jobs

JOBS = {f"job-{n}": functools.partial(dict, number=n) for n in range(3)}
WANTED = {f"job-{n}": {"number": n} for n in range(3)}


@pytest.mark.parametrize("name", ["slurm", "dask", "dask://", "ftp://host", ""])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"must be local, dask://HOST:PORT or submitit, got"),
        executor_of(name, tmp_path),
    ):
        pass


@pytest.mark.parametrize("name", ["dask://127.0.0.1:9", "submitit"])
def test_missing_packages_are_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, *, extra: str, purpose: str) -> Any:
        raise MissingExtraError(module, extra=extra, purpose=purpose)

    monkeypatch.setattr("immunize_ext.schedulers.require_extra", missing)
    with (
        pytest.raises(MissingExtraError, match=r"pip install 'immunize_ext\[cluster\]'"),
        executor_of(name, tmp_path),
    ):
        pass


class Errors:
    class UncompletedJobError(RuntimeError):
        pass

    class FailedJobError(UncompletedJobError):
        pass


class Cluster:
    """A cluster as the adapter knows it: a job ends when it is looked at the second time."""

    def __init__(self) -> None:
        self.cancelled: list[Any] = []

    def submit(self, fn: Any, *args: Any) -> Any:
        cluster = self

        class Job:
            looks = 0

            def done(self) -> bool:
                self.looks += 1
                return self.looks > 1

            def result(self) -> Any:
                return fn(*args)

            def cancel(self) -> None:
                cluster.cancelled.append(self)

        return Job()


def failing() -> None:
    raise Errors.FailedJobError("job must work")


def dying() -> None:
    raise Errors.UncompletedJobError("no output")


def test_jobs_of_submitit_are_futures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("immunize_ext.schedulers._POLL", 0.01)
    cluster = Cluster()
    with _Submitit(cluster, Errors) as executor:
        assert run_jobs(JOBS, tmp_path, executor=executor) == WANTED
        failed: Future[Any] = executor.submit(failing)
        with pytest.raises(RuntimeError, match="job must work") as caught:
            failed.result(10)
        assert not isinstance(caught.value, BrokenExecutor)
        with pytest.raises(BrokenExecutor, match="no output"):
            executor.submit(dying).result(10)
        with pytest.raises(ChildProcessError, match="the executor lost 1 jobs"):
            run_jobs({"x": dying}, tmp_path / "lost", executor=executor)
        waiting = executor.submit(dict)
        waiting.cancel()
        executor.shutdown()
        # Told to the cluster, unless it was done already.
        assert waiting.cancelled() == bool(cluster.cancelled)


@pytest.mark.slow
def test_submitit_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with executor_of("submitit", tmp_path / "logs") as executor:
        assert run_jobs(JOBS, tmp_path / "done", executor=executor) == WANTED


@pytest.mark.slow
def test_dask_on_this_machine(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    options: dict[str, Any] = {"processes": False, "dashboard_address": None, "n_workers": 1}
    with distributed.LocalCluster(protocol="tcp", **options) as cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        with executor_of(f"dask://{address}", tmp_path) as executor:
            assert run_jobs(JOBS, tmp_path / "done", executor=executor) == WANTED
    assert os.listdir(tmp_path / "done")


def dies_once(marker: str) -> dict[str, int]:
    """Takes its worker with it the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": 3}


@pytest.mark.slow
def test_a_worker_of_dask_that_is_killed_costs_one_job(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    options: dict[str, Any] = {"processes": True, "dashboard_address": None, "n_workers": 1}
    jobs = {**JOBS, "job-3": functools.partial(dies_once, str(tmp_path / "died"))}
    with (
        distributed.LocalCluster(protocol="tcp", threads_per_worker=1, **options) as cluster,
        executor_of(cluster.scheduler_address, tmp_path) as executor,
    ):
        found = run_jobs(jobs, tmp_path / "done", executor=executor)
    assert found == {**WANTED, "job-3": {"number": 3}}
    assert (tmp_path / "died").exists()
