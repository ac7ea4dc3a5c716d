"""``immunize mima``: multi-concept immunization of a text-to-image model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from immunize_ext._extras import require_extra
from immunize_ext.runtime import progress_bar, threads

if TYPE_CHECKING:
    from immunize_ext.settings import CommandParser, Commands
    from immunize_ext.text_to_image.tmp_config import TextToImageConfig


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    from immunize_ext.text_to_image.tmp_config import add_config_arguments

    parser = commands.add_parser(
        "mima",
        help="immunize a text-to-image model against several concepts, attack it, report",
        description="Erase concepts from a text-to-image model, make them hard to teach again, "
        "attack the result and its unprotected twin, and write a run directory with the immunized "
        "pipeline, results.json and report.html. Run it again to go on where it was cut off.",
    )
    add_config_arguments(parser)
    add_run_arguments(parser, "runs/mima")
    parser.set_defaults(run=run)


def add_run_arguments(parser: CommandParser, out: str) -> None:
    """Add the flags of every text-to-image run."""
    parser.add_argument("--out", default=out, metavar="DIR", help=f"run directory (default: {out})")
    parser.add_argument("--force", action="store_true", help="replace an existing run directory")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: 1 for the digits, else torch's)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes for attacks")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")


def run(arguments: argparse.Namespace) -> int:
    """Do it and print what a newcomer needs."""
    from immunize_ext.text_to_image.tmp_config import config_from

    return execute(config_from(arguments), arguments)


def execute(config: TextToImageConfig, arguments: argparse.Namespace) -> int:
    """Run a configuration and write it."""
    import torch

    from immunize_ext.storage import check_target
    from immunize_ext.text_to_image import run as runs
    from immunize_ext.text_to_image import tmp_results as outcome
    from immunize_ext.text_to_image.report import summary
    from immunize_ext.text_to_image.tmp_config import DIGITS
    from immunize_ext.text_to_image.tmp_task import check_config

    # Asked before the work, not after it.
    check_config(config)
    check_target(arguments.out, force=arguments.force)
    for flag in ("threads", "jobs"):
        if getattr(arguments, flag) is not None and getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag}: must be at least 1, got {getattr(arguments, flag)}")
    require_extra("matplotlib", extra="report", purpose="the plots")
    require_extra("accelerate", extra="diffusion", purpose="the immunizers")
    work = runs.work_folder(arguments.out)
    # Layers of the digits are so small that a second thread only waits for the first.
    count = arguments.threads or (1 if config.model == DIGITS else torch.get_num_threads())
    with threads(count), progress_bar(arguments.quiet) as progress:
        found = runs.run_text_to_image(config, work, progress, jobs=arguments.jobs)
        progress("writing the report", 1.0)
        written = outcome.write(found, arguments.out, force=arguments.force)
    runs.forget_work(work)
    print(summary(outcome.results_of(found)))
    print(f"\nreport: {written / 'report.html'}  ({found.seconds['total']:.0f} s)")
    return 0
