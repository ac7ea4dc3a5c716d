"""``immunize kappa``: immunize a linear extractor, attack it, write the report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from immunize_ext._extras import require_extra
from immunize_ext.runtime import progress_bar, threads

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    from immunize_ext.probing.tmp_config import add_config_arguments

    parser = commands.add_parser(
        "kappa",
        help="condition-number immunization of features: immunize, attack, write a report",
        description="Make one task slow to learn from linear features while another stays as fast "
        "as it was, attack both, and write a run directory with results.json, the immunized theta "
        "and report.html.",
        epilog="Methods: closed-form, graded, several-harms, whitening, condition-number, "
        "condition-number-plain, r-ill-only, r-well-only, opt-kappa, multiplicative, imma.",
    )
    add_config_arguments(parser)
    parser.add_argument("--out", default="runs/kappa", metavar="DIR", help="run directory to write")
    parser.add_argument("--force", action="store_true", help="replace an existing run directory")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads (default: 1)")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Immunize, write the run and print what a newcomer needs."""
    from immunize_ext.probing.report import summary
    from immunize_ext.probing.run import check_config, run_kappa
    from immunize_ext.probing.tmp_config import config_from
    from immunize_ext.storage import check_target

    # Asked before the work, not after it.
    config = config_from(arguments)
    check_config(config)
    check_target(arguments.out, force=arguments.force)
    if arguments.threads < 1:
        raise ValueError(f"--threads: must be at least 1, got {arguments.threads}")
    require_extra("matplotlib", extra="report", purpose="the plots")
    require_extra("safetensors", extra="report", purpose="the immunized extractor")
    with threads(arguments.threads), progress_bar(arguments.quiet) as progress:
        result = run_kappa(config, progress)
        progress("writing the report", 1.0)
        written = result.write(arguments.out, force=arguments.force)
    print(summary({**result.evaluation.results(), **result.extra()}))
    print(f"\nreport: {written / 'report.html'}  ({result.seconds['total']:.1f} s)")
    return 0
