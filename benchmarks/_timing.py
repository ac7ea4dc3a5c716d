"""The timing harness: contenders that do the same work, measured alike.

Rules it keeps, so that a script cannot forget them:

- nothing is timed before its result was checked in the same run;
- the torch-only fallback is never timed under the name of the kernels;
- contenders take turns, in an order shuffled anew each round, so that drift of the machine hits
  all alike and nobody always comes after the same one;
- the first calls are dropped, and so is the first call of each turn, which finds the caches full
  of another contender's data (a contender slower than a turn has one call a turn, and keeps it);
- forward and backward are timed apart within one call, and together as their sum;
- medians and quartiles are reported, never the best of several;
- threads are fixed for torch and for the BLAS of numpy and scipy, and recorded.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from immunize_ext import _load
from immunize_ext.ops.operators import has_kernel

Role = Literal["ours", "baseline", "floor", "rival"]
Tensors = tuple[Tensor, ...]

MAX_CALLS_PER_TURN = 100


class IncorrectContenderError(AssertionError):
    """A contender that must be right is not; its time would be of no interest."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a row.

    Attributes:
        name: Short, unique within the row; targets refer to it.
        label: What it is, in words.
        role: ``ours``; ``baseline`` (A, B); ``floor`` (work that nobody can avoid, no result);
            ``rival`` (anything else one might use: left out, with the reason, when it is wrong).
        forward: Returns the values, with the graph attached where there is a backward.
        backward: Takes the values, returns the gradients. None: there is only a forward.
        check: Takes values and gradients, returns the relative error against the reference of the
            row. None for a floor.
        tolerance: Largest relative error at which the contender counts as right.
        items: A call does the work of this many calls of the row (times are divided by it).
    """

    name: str
    label: str
    role: Role
    forward: Callable[[], Tensors]
    backward: Callable[[Tensors], Tensors] | None = None
    check: Callable[[Tensors, Tensors], float] | None = None
    tolerance: float = 1e-8
    items: int = 1


class Statistic(NamedTuple):
    """Times of one phase in milliseconds."""

    median: float
    q25: float
    q75: float
    minimum: float
    samples: int


@dataclass
class Measurement:
    """What was found about one contender.

    ``forward``, ``backward`` and ``both`` are None where the contender was not timed (then
    ``refused`` says why) or has no such phase.
    """

    contender: Contender
    relative_error: float | None = None
    forward: Statistic | None = None
    backward: Statistic | None = None
    both: Statistic | None = None
    peak_mib: float | None = None
    refused: str | None = None
    samples: list[tuple[float, float]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Budget:
    """How long a row may take: rounds go on until ``seconds`` are spent, within the bounds.

    A turn of one contender takes ``turn_seconds`` or one call, whichever is longer, so that the
    dropped call and the switch cost little.
    """

    seconds: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 200
    turn_seconds: float = 0.05


def refuse_fallback(what: str, device: torch.device) -> None:
    """Raise ``RuntimeError`` where the operators to be timed are not the compiled ones."""
    _load.require_compiled(what)
    if not has_kernel("merge_apply", device.type):
        raise RuntimeError(
            f"{what} needs compiled operators for {device.type}, and they were built without; "
            f"build them again with: {_load.build_command()}"
        )


@contextlib.contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Run torch and the BLAS of numpy and scipy with ``threads`` threads; restore afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(limits=threads):
            yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector from running inside a timed call."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_call(contender: Contender, device: torch.device) -> tuple[float, float]:
    """Milliseconds of forward and of backward in one call.

    On a GPU the marks are events on the current stream, so that launch gaps count and the host's
    wait for the result does not.
    """
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize(device)
        marks[0].record()
        values = contender.forward()
        marks[1].record()
        gradients = contender.backward(values) if contender.backward is not None else ()
        marks[2].record()
        torch.cuda.synchronize(device)
        del values, gradients
        return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
    start = time.perf_counter_ns()
    values = contender.forward()
    middle = time.perf_counter_ns()
    gradients = contender.backward(values) if contender.backward is not None else ()
    end = time.perf_counter_ns()
    del values, gradients
    return (middle - start) * 1e-6, (end - middle) * 1e-6


def summarise(times: Sequence[float]) -> Statistic:
    """Median, quartiles and minimum of times in milliseconds."""
    if len(times) == 1:
        only = times[0]
        return Statistic(only, only, only, only, 1)
    q25, median, q75 = statistics.quantiles(times, n=4, method="inclusive")
    return Statistic(median, q25, q75, min(times), len(times))


def _check(contender: Contender) -> Measurement:
    """Run once, compare with the reference, refuse or raise where it is wrong."""
    measurement = Measurement(contender)
    try:
        values = contender.forward()
        gradients = contender.backward(values) if contender.backward is not None else ()
    except RuntimeError as failure:  # no convergence, no memory: torch and ARPACK derive from it
        if contender.role != "rival":
            raise
        measurement.refused = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        return measurement
    if contender.check is None:
        if contender.role != "floor":
            raise ValueError(f"contender {contender.name} has no check; only a floor may lack one")
        return measurement
    error = float(contender.check(values, gradients))
    measurement.relative_error = error
    # Not >: a NaN is wrong too.
    if not error <= contender.tolerance:
        message = f"relative error {error:.1e} exceeds {contender.tolerance:.0e}"
        if contender.role != "rival":
            raise IncorrectContenderError(f"{contender.name} ({contender.label}): {message}")
        measurement.refused = message
    return measurement


def measure(
    contenders: Sequence[Contender], device: torch.device, budget: Budget
) -> list[Measurement]:
    """Check every contender, then time those that are right, taking turns.

    Args:
        contenders: With distinct names.
        device: Where they run.
        budget: How long to go on.

    Returns:
        One measurement per contender, in the given order.

    Raises:
        IncorrectContenderError: If one that is not a rival misses its tolerance. Nothing has been
            timed then.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"measure: contenders must have distinct names, got {names}")
    measurements = [_check(contender) for contender in contenders]
    running = [entry for entry in measurements if entry.refused is None]
    with _no_garbage_collection():
        calls = {}
        for entry in running:
            once = sum(time_call(entry.contender, device)) * 1e-3
            fit = int(budget.turn_seconds / max(once, 1e-9))
            calls[entry.contender.name] = min(max(fit, 1), MAX_CALLS_PER_TURN)
        started = time.perf_counter()
        shuffler = random.Random(0)
        for done in range(budget.max_rounds):
            if done >= budget.min_rounds and time.perf_counter() - started > budget.seconds:
                break
            for entry in shuffler.sample(running, len(running)):
                if calls[entry.contender.name] > 1:
                    time_call(entry.contender, device)
                for _ in range(calls[entry.contender.name]):
                    entry.samples.append(time_call(entry.contender, device))
        for entry in running:
            _finish(entry)
            entry.peak_mib = peak_memory_mib(entry.contender, device)
    return measurements


def _finish(entry: Measurement) -> None:
    items = entry.contender.items
    forward = [sample[0] / items for sample in entry.samples]
    entry.forward = summarise(forward)
    if entry.contender.backward is not None:
        backward = [sample[1] / items for sample in entry.samples]
        entry.backward = summarise(backward)
        entry.both = summarise([sum(pair) for pair in zip(forward, backward, strict=True)])
    else:
        entry.both = entry.forward


def peak_memory_mib(contender: Contender, device: torch.device) -> float | None:
    """Memory that one call needs on top of its inputs at its highest point, in MiB.

    On a GPU from torch's allocator. On Linux from the high-water mark of the resident set, which
    includes the workspace of LAPACK; memory that the C library keeps is given back first. None
    where the mark cannot be reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        time_call(contender, device)
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    status = Path("/proc/self/status")
    mark = Path("/proc/self/clear_refs")
    if not (status.is_file() and mark.exists()):
        return None
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        mark.write_text("5", encoding="ascii")  # 5: reset the peak of the resident set
    except OSError:
        return None
    before_kib = _status_kib(status, "VmRSS")
    time_call(contender, device)
    return max(_status_kib(status, "VmHWM") - before_kib, 0.0) / 1024


def _status_kib(status: Path, key: str) -> float:
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1])
    raise ValueError(f"{status} has no line {key}")


def copy_bandwidth(device: torch.device, mebibytes: int = 256, repeats: int = 9) -> float:
    """Bytes per second that a large copy moves, reading and writing counted; the median."""
    source = torch.ones(mebibytes * 2**18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def forward() -> Tensors:
        target.copy_(source)
        return ()

    copy = Contender("copy", "copy of one large buffer", "floor", forward)
    times = [time_call(copy, device)[0] for _ in range(repeats + 2)][2:]
    return 2 * source.numel() * source.element_size() / (statistics.median(times) * 1e-3)
