"""Time and memory of the parts of a run that are worth measuring."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from immunize_ext.seams import Progress

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


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators within the block, and put them back as they were.

    Some code of others draws from them (layers that initialise themselves, autoencoders that
    sample); what stands around the block shall not notice.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """A bar on standard error where rich can draw one, else a line per stage.

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
        yield _print_stage
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_stage
        return
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, share: bar.update(task, completed=share, description=text)


def _print_stage(text: str, share: float) -> None:
    print(f"[{share:4.0%}] {text}", file=sys.stderr, flush=True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use this many threads in the block, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
