"""What several subcommands share: the parser class, argument types, the progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import torch

USAGE_ERROR = 2

# What a long piece of work calls: what it is doing, and the share that is done.
Progress: TypeAlias = Callable[[str, float], None]

if TYPE_CHECKING:
    Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and how to get help, and leave with status 2."""
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def strength(text: str) -> float | str:
    """Argument type: a number, or ``auto``."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or 'auto', got {text!r}") from None


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
