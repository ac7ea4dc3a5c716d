"""The command ``immunize``.

Exit status: 0 done, 1 ``doctor`` found something wrong, 2 the request cannot be carried out (one
line says what to do, nothing is half-written), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch

from immunize_ext._extras import MissingExtraError, require_extra
from immunize_ext._version import __version__
from immunize_ext.errors import NotPositiveDefiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from immunize_ext.demo import DemoResult

    Progress = Callable[[str, float], None]

USAGE_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def _strength(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or 'auto', got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="immunize",
        description="Make a model's features slow to misuse, and measure whether they are.",
    )
    parser.add_argument("--version", action="version", version=f"immunize_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="immunize a small real task, attack it and write a report",
        description="Keep one task on handwritten digits, immunize against another, attack both "
        "and write a report. Takes seconds and needs no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="run directory to write")
    demo.add_argument("--force", action="store_true", help="replace an existing run directory")
    demo.add_argument("--seed", type=int, default=0, help="seed of split and immunizer")
    demo.add_argument(
        "--primary",
        default="4,6:2,3,7",
        metavar="DIGITS:DIGITS",
        help="the task to keep: these digits against those",
    )
    demo.add_argument(
        "--harmful",
        default="5,9:0,1,8",
        metavar="DIGITS:DIGITS",
        help="the task to make hard",
    )
    demo.add_argument(
        "--method",
        choices=("closed-form", "condition-number", "condition-number-plain", "whitening"),
        default="closed-form",
        help="how to immunize",
    )
    demo.add_argument(
        "--strength",
        type=_strength,
        default="auto",
        metavar="C",
        help="strength of closed-form; auto: the most that leaves the task to keep as fast as it "
        "was",
    )
    demo.add_argument(
        "--ridge", type=float, default=1e-2, help="ridge relative to the largest eigenvalue of K"
    )
    demo.add_argument("--quiet", action="store_true", help="print the table alone")

    commands.add_parser(
        "doctor",
        help="say what is installed, what is wrong and how to mend it",
        description="Say what is installed, what is wrong and how to mend it.",
    )
    return parser


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on standard error where rich can draw one, else a line per stage."""
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


def _table(result: DemoResult) -> str:
    """What a newcomer needs to see, in plain text."""
    from immunize_ext.report import ATTACKER_NAMES
    from immunize_ext.report.html import headline, times, unchanged

    evaluation = result.evaluation
    lines = [
        headline(evaluation),
        "",
        f"  harmful task  {evaluation.tasks['harmful'].name}",
        f"  primary task  {evaluation.tasks['primary'].name}",
        "",
    ]
    rows = [("attacker", "harmful task", "primary task")]
    for name, label in ATTACKER_NAMES.items():
        cells = []
        for role in ("harmful", "primary"):
            slowdown = evaluation.comparisons[role][name].slowdown
            if unchanged(slowdown):
                words = "as fast as before"
            elif slowdown.censored or slowdown.ratio > 1.0:
                words = f"{times(slowdown)} slower"
            else:
                words = f"{1.0 / slowdown.ratio:.1f}× faster"
            cells.append(words)
        rows.append((label, cells[0], cells[1]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for index, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
        if index == 0:
            lines.append("  " + "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _demo(arguments: argparse.Namespace) -> int:
    # Imported here: `immunize doctor` has to work where these do not.
    from immunize_ext.demo import DemoConfig, run_demo
    from immunize_ext.report import check_target

    # Asked before the work, not after it.
    check_target(arguments.out, force=arguments.force)
    require_extra("sklearn", extra="data", purpose="the digits data set")
    require_extra("matplotlib", extra="report", purpose="the plots")

    config = DemoConfig(
        primary=arguments.primary,
        harmful=arguments.harmful,
        method=arguments.method.replace("-", "_"),
        strength=arguments.strength,
        ridge=arguments.ridge,
        seed=arguments.seed,
    )
    # At 64 features a second thread only waits for the first.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _progress(arguments.quiet) as progress:
            result = run_demo(config, progress)
            progress("writing the report", 1.0)
            written = result.write(arguments.out, force=arguments.force)
    finally:
        torch.set_num_threads(threads)
    print(_table(result))
    print(f"\nreport: {written / 'report.html'}  ({result.seconds['total']:.1f} s)")
    return 0


def _doctor() -> int:
    from immunize_ext._doctor import diagnose, doctor_report

    print(doctor_report())
    return 0 if diagnose().ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process when omitted.

    Returns:
        The exit status.

    Example:
        >>> main(["--version"])
        immunize_ext 0.1.0
        0
    """
    try:
        arguments = _parser().parse_args(argv)
        return _doctor() if arguments.command == "doctor" else _demo(arguments)
    except SystemExit as exit_request:  # argparse: --help, --version and usage errors
        return exit_request.code if isinstance(exit_request.code, int) else USAGE_ERROR
    except KeyboardInterrupt:
        print("immunize: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, MissingExtraError, NotPositiveDefiniteError) as error:
        # Bad values, files that are missing or in the way, missing extras: their messages say what
        # to do. Anything else is a defect and deserves its traceback.
        print(f"immunize: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
