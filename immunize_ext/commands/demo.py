"""``immunize demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from immunize_ext._extras import require_extra
from immunize_ext.commands._common import progress_bar, strength, threads

if TYPE_CHECKING:
    from immunize_ext.commands._common import Commands
    from immunize_ext.demo import DemoResult


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="immunize a small real task, attack it and write a report",
        description="Keep one task on handwritten digits, immunize against another, attack both "
        "and write a report. Takes seconds and needs no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="run directory to write")
    parser.add_argument("--force", action="store_true", help="replace an existing run directory")
    parser.add_argument("--seed", type=int, default=0, help="seed of split and immunizer")
    parser.add_argument(
        "--primary",
        default="4,6:2,3,7",
        metavar="DIGITS:DIGITS",
        help="the task to keep: these digits against those",
    )
    parser.add_argument(
        "--harmful",
        default="5,9:0,1,8",
        metavar="DIGITS:DIGITS",
        help="the task to make hard",
    )
    parser.add_argument(
        "--method",
        choices=("closed-form", "condition-number", "condition-number-plain", "whitening"),
        default="closed-form",
        help="how to immunize",
    )
    parser.add_argument(
        "--strength",
        type=strength,
        default="auto",
        metavar="C",
        help="strength of closed-form; auto: the most that leaves the task to keep as fast as it "
        "was",
    )
    parser.add_argument(
        "--ridge", type=float, default=1e-2, help="ridge relative to the largest eigenvalue of K"
    )
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, write its report and print the table."""
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
    with threads(1), progress_bar(arguments.quiet) as progress:
        result = run_demo(config, progress)
        progress("writing the report", 1.0)
        written = result.write(arguments.out, force=arguments.force)
    print(_table(result))
    print(f"\nreport: {written / 'report.html'}  ({result.seconds['total']:.1f} s)")
    return 0


def _table(result: DemoResult) -> str:
    """What a newcomer needs to see, in plain text."""
    from immunize_ext.commands._tables import attack_table
    from immunize_ext.report.html import headline

    evaluation = result.evaluation
    return "\n".join(
        [
            headline(evaluation),
            "",
            f"  harmful task  {evaluation.tasks['harmful'].name}",
            f"  primary task  {evaluation.tasks['primary'].name}",
            "",
            attack_table(evaluation.comparisons),
        ]
    )
