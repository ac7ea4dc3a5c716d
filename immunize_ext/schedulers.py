"""Where the jobs of a sweep run: processes of this machine, a Dask cluster, or Slurm by submitit.

Each is an executor of ``concurrent.futures``, which is all that a sweep asks for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from immunize_ext._extras import require_extra

_DASK = ("dask", "tcp", "tls", "ucx", "ws", "wss")

# Seconds between two looks at the files of jobs that a cluster runs.
_POLL = 1.0


@contextmanager
def executor_of(scheduler: str, folder: str | Path) -> Iterator[Executor | None]:
    """The executor that a scheduler's name means.

    Args:
        scheduler: ``"local"`` for processes of this machine; ``"dask://HOST:PORT"``, or an address
            as Dask writes it (``tcp://...``); ``"submitit"`` for Slurm where it is there, and for
            processes that submitit starts elsewhere.
        folder: Where submitit keeps its scripts and logs; seen by all machines.

    Yields:
        The executor; ``None`` for ``"local"``, which sweeps know how to do.

    Raises:
        MissingExtraError: If the package that talks to the scheduler is not installed.
        OSError: If a cluster does not answer.
        ValueError: If there is no such scheduler.

    Example:
        >>> with executor_of("local", "runs") as executor:
        ...     print(executor)
        None
    """
    kind, _, address = scheduler.partition("://")
    if scheduler == "local":
        yield None
    elif scheduler == "submitit":
        submitit = require_extra("submitit", extra="cluster", purpose="--scheduler submitit")
        inner = submitit.AutoExecutor(folder=Path(folder))
        with _Submitit(inner, submitit.core.utils) as executor:
            yield executor
    elif kind in _DASK and address:
        distributed = require_extra("distributed", extra="cluster", purpose="--scheduler dask://")
        place = f"tcp://{address}" if kind == "dask" else scheduler
        with distributed.Client(place) as client, client.get_executor() as executor:
            yield executor
    else:
        raise ValueError(
            f"scheduler: must be local, dask://HOST:PORT or submitit, got {scheduler!r}"
        )


class _Submitit(Executor):
    """submitit's executor as others are: its jobs are files, looked at once a second."""

    def __init__(self, inner: Any, errors: Any) -> None:
        self._inner, self._errors = inner, errors
        self._jobs: dict[Future[Any], Any] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand a job to the cluster."""
        future: Future[Any] = Future()
        with self._lock:
            self._jobs[future] = self._inner.submit(fn, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for what runs, or cancel it."""
        if cancel_futures:
            with self._lock:
                for future in self._jobs:
                    future.cancel()
        self._closing.set()
        if wait:
            self._watch.join()

    def _look(self) -> None:
        while not (self._closing.wait(_POLL) and not self._jobs):
            with self._lock:
                pairs = list(self._jobs.items())
            for future, job in pairs:
                if not (future.cancelled() or job.done()):
                    continue
                if future.set_running_or_notify_cancel():  # from here on nobody can cancel it
                    self._settle(future, job)
                else:
                    job.cancel()
                with self._lock:
                    del self._jobs[future]

    def _settle(self, future: Future[Any], job: Any) -> None:
        try:
            result = job.result()
        except self._errors.FailedJobError as error:  # raised by the job itself
            future.set_exception(RuntimeError(str(error)))
        except self._errors.UncompletedJobError as error:  # it died with its machine
            future.set_exception(BrokenExecutor(str(error)))
        else:
            future.set_result(result)
