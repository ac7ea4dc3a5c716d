"""What a process is while it works: progress, threads, signals, randomness, time and memory.

torch is imported on use: what only parses a command line shall not wait for it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from immunize_ext.seams import Progress
from immunize_ext.settings import hint

if TYPE_CHECKING:
    import torch

# Linux: writing 5 resets the peak resident size of the process, which then stands in `VmHWM`.
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _process_peak() -> int:
    """Peak resident bytes of this process since the last reset; 0 where nobody says."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Meter:
    """Adds up wall-clock seconds, and keeps the peak memory, of the blocks it is put around.

    Args:
        device: Where the work runs. On an accelerator the allocator's peak is taken; on the CPU
            the resident size of the whole process (since the block began, where Linux allows the
            reset; since the start of the process elsewhere).

    Attributes:
        seconds: Sum over blocks.
        peak_memory: Largest over blocks, in bytes.

    Example:
        >>> import torch
        >>> meter = Meter(torch.device("cpu"))
        >>> with meter.measure():
        ...     _ = torch.ones(10).sum()
        >>> meter.seconds > 0.0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0
        self.peak_memory = 0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure what the block does."""
        import torch

        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Where this is not Linux, or not allowed, the peak is that of the process so far.
            with suppress(OSError):
                _RESET.write_text("5")
        start = time.perf_counter()
        try:
            yield
        finally:
            if cuda:
                torch.cuda.synchronize(self._device)
            self.seconds += time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated(self._device) if cuda else _process_peak()
            self.peak_memory = max(self.peak_memory, peak)


def named_device(name: str, *, here: bool = True) -> torch.device:
    """A device by its name, where work can be done on it.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` or another that torch knows.
        here: Whether this machine has to have it.

    Returns:
        The device.

    Raises:
        ValueError: If there is none of that name; one line says what to do.

    Example:
        >>> named_device("cpu")
        device(type='cpu')
        >>> named_device("cdua")
        Traceback (most recent call last):
        ValueError: device must be cpu, cuda, cuda:N, mps or xpu, got 'cdua'; did you mean cuda
    """
    import torch

    known = ("cpu", "cuda", "mps", "xpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in known:
        raise ValueError(
            f"device must be cpu, cuda, cuda:N, mps or xpu, got {name!r}{hint(name, known)}"
        )
    if not here or device.type == "cpu":
        return device
    module = torch.get_device_module(device.type)
    if not module.is_available():
        raise ValueError(
            f"device must be one of this machine, got {name}, which torch {torch.__version__} does "
            "not find; use --device cpu, or install a torch for that device"
        )
    count = module.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"device must be one of {count} here, got {name}; counting starts at 0")
    return device


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators within the block, and put them back as they were.

    Some code of others draws from them (layers that initialise themselves, autoencoders that
    sample); what stands around the block shall not notice.
    """
    import torch

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """A bar on standard error where rich can draw one, else few lines: a log is read later.

    Args:
        quiet: Show nothing.

    Yields:
        The function to call with a text and a share between 0 and 1.
    """
    if quiet:
        yield lambda text, share: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        yield _Lines()
        return
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _Lines()
        return
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, share: bar.update(task, completed=share, description=text)


class _Lines:
    """Progress as lines of a log: what is new, and from time to time how far it is.

    Texts that differ in their numbers alone (``mima, step 3 of 60``) are the same stage.
    """

    # A stage that is known is told of again after so much of the whole.
    _STRIDE = 0.1

    def __init__(self) -> None:
        self._stages: set[str] = set()
        self._told = -1.0

    def __call__(self, text: str, share: float) -> None:
        stage = re.sub(r"\d+(\.\d+)?", "#", text)
        if stage in self._stages and share < min(self._told + self._STRIDE, 1.0):
            return
        self._stages.add(stage)
        self._told = share
        print(f"[{share:4.0%}] {text}", file=sys.stderr, flush=True)


# More only wait for each other, and far more end the process: each has a stack of megabytes.
_MOST_THREADS = max(256, os.cpu_count() or 1)


def check_count(name: str, count: int) -> int:
    """A number of threads or processes that a machine can be asked for.

    Raises:
        ValueError: If it is none.

    Example:
        >>> check_count("--threads", 0)
        Traceback (most recent call last):
        ValueError: --threads must be at least 1, got 0
    """
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    if count > _MOST_THREADS:
        raise ValueError(
            f"{name} must be at most {_MOST_THREADS}, got {count}; this machine has "
            f"{os.cpu_count()} processors"
        )
    return count


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use this many threads in the block, and as many as before after it.

    Raises:
        ValueError: If ``count`` is no number of threads that a machine can be asked for.
    """
    import torch

    check_count("threads", count)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Interrupted(KeyboardInterrupt):
    """A signal asks the process to stop.

    Attributes:
        signal: Its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise :class:`Interrupted` in the block.

    Also where the process was started in the background of a shell, which then ignores SIGINT.
    Outside the main thread, which alone receives signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
