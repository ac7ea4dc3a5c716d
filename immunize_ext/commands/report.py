"""``immunize report``: compare finished runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from immunize_ext.commands._kinds import module_of
from immunize_ext.storage import KINDS, read_results

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "report",
        help="compare finished runs at equal cost to the primary task",
        description="Compare finished runs and sweeps: how much each method slows the harm where "
        "the primary task is equally fast, with frontier plots.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run or sweep directories")
    parser.add_argument("--out", default="runs/report", metavar="DIR", help="directory to write")
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Hand over to the kind of the runs."""
    modules = {KINDS[read_results(folder)["kind"]]: folder for folder in arguments.runs}
    if len(modules) > 1:
        first, second = list(modules.values())[:2]
        raise ValueError(f"report: runs must be of one kind, got {first} beside {second}")
    if len(set(arguments.runs)) < len(arguments.runs):
        raise ValueError("report: no run may be given twice")
    kind = read_results(arguments.runs[0])["kind"]
    status: int = module_of(kind).compare(arguments.runs, arguments)
    return status
