"""``immunize attack``: more attacks on a finished run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from immunize_ext.commands._kinds import module_of
from immunize_ext.storage import read_results

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "attack",
        help="attack a finished run with other attackers or budgets",
        description="Attack a finished run again: both tasks of `immunize kappa`, the concepts of "
        "`immunize mima` and `imma`. The results are added as a file of their own under "
        "RUN/attacks; nothing of the run is changed.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="run directory")
    parser.add_argument(
        "--attackers", nargs="+", default=["all"], metavar="NAME", help="attackers (default: all)"
    )
    parser.add_argument("--tasks", nargs="+", choices=("harmful", "primary"), help="default: both")
    parser.add_argument("--loss", choices=("squared", "logistic"), help="default: that of the run")
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="also report what attackers have after these numbers of steps",
    )
    parser.add_argument("--base-budget", type=int, help="steps without immunization")
    parser.add_argument("--limit", type=float, help="largest slow-down looked for")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data is now")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Hand over to the kind of the run."""
    results = read_results(arguments.run_folder)
    status: int = module_of(results["kind"]).attack(arguments.run_folder, results, arguments)
    return status
