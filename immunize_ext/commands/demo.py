"""``immunize demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from immunize_ext._extras import require_extra
from immunize_ext.runtime import progress_bar, threads
from immunize_ext.settings import strength

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="both jobs on small real data: immunize, attack, one report",
        description="Both jobs of the package on handwritten digits: make one task slow to learn "
        "from features while another stays fast, and make erased concepts hard to teach a "
        "text-to-image model again; attack both, write one report. Takes two to three minutes on "
        "two cores and needs no network.",
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
    parser.add_argument(
        "--skip-mima", action="store_true", help="leave out the text-to-image half; takes seconds"
    )
    parser.add_argument("--quiet", action="store_true", help="print the tables alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run both jobs of the package, write one report and print the tables."""
    # Imported here: `immunize doctor` has to work where these do not.
    from immunize_ext.commands import _demo_pages
    from immunize_ext.demo import DemoConfig, run_demo
    from immunize_ext.probing.report import summary as kappa_summary
    from immunize_ext.storage import check_target
    from immunize_ext.text_to_image import run as _text_to_image_run
    from immunize_ext.text_to_image import tmp_results as _text_to_image_results
    from immunize_ext.text_to_image.report import summary as mima_summary

    # Asked before the work, not after it.
    check_target(arguments.out, force=arguments.force)
    require_extra("sklearn", extra="data", purpose="the digits data set")
    require_extra("matplotlib", extra="report", purpose="the plots")
    if not arguments.skip_mima:
        for package in ("diffusers", "transformers", "peft", "accelerate"):
            require_extra(
                package, extra="diffusion", purpose="the text-to-image half (or --skip-mima)"
            )

    config = DemoConfig(
        primary=arguments.primary,
        harmful=arguments.harmful,
        method=arguments.method.replace("-", "_"),
        strength=arguments.strength,
        ridge=arguments.ridge,
        seed=arguments.seed,
    )
    share = 1.0 if arguments.skip_mima else 0.1
    # At these sizes a second thread only waits for the first.
    with threads(1), progress_bar(arguments.quiet) as progress:
        kappa = run_demo(config, lambda text, done: progress(text, share * done))
        if arguments.skip_mima:
            progress("writing the report", 1.0)
            written = kappa.write(arguments.out, force=arguments.force)
            print(kappa_summary({**kappa.evaluation.results(), **kappa.extra()}))
            print(f"\nreport: {written / 'report.html'}  ({kappa.seconds['total']:.0f} s)")
            return 0
        work = _text_to_image_run.work_folder(arguments.out)
        mima = _text_to_image_run.run_text_to_image(
            _demo_pages.mima_config(arguments.seed),
            work,
            lambda text, done: progress(text, share + (1.0 - share) * done),
        )
        progress("writing the report", 1.0)
        written = _demo_pages.write(kappa, mima, arguments.out, force=arguments.force)
    _text_to_image_run.forget_work(work)
    kappa_results = {**kappa.evaluation.results(), **kappa.extra()}
    print(f"Condition number: {kappa_summary(kappa_results)}")
    print(f"\nText to image: {mima_summary(_text_to_image_results.results_of(mima))}")
    total = kappa.seconds["total"] + mima.seconds["total"]
    print(f"\nreport: {written / 'report.html'}  ({total:.0f} s)")
    return 0
