"""``immunize build-pipeline``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from immunize_ext._extras import require_extra
from immunize_ext.runtime import progress_bar, threads

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "build-pipeline",
        help="train the small Stable Diffusion pipeline of digits that comes with the package",
        description="Train a complete Stable Diffusion pipeline on 8 x 8 handwritten digits, in "
        "diffusers' layout. A few minutes on two cores; the same seed and threads give the same "
        "bytes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="runs/digits", metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads")
    parser.add_argument("--force", action="store_true", help="replace an existing pipeline")
    parser.add_argument("--quiet", action="store_true", help="print the result alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, write, judge and say what came out."""
    require_extra("diffusers", extra="diffusion", purpose="the digits pipeline")
    require_extra("sklearn", extra="data", purpose="the digits data set")
    from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
    from immunize_ext.text_to_image.digits.judge import DigitJudge
    from immunize_ext.text_to_image.digits.pipeline import build_digits_pipeline
    from immunize_ext.text_to_image.model import TextToImage

    if arguments.threads < 1:
        raise ValueError(f"--threads: must be at least 1, got {arguments.threads}")
    with threads(arguments.threads), progress_bar(arguments.quiet) as progress:
        pipeline = build_digits_pipeline(
            arguments.out,
            seed=arguments.seed,
            steps=arguments.steps,
            overwrite=arguments.force,
            progress=lambda text, share: progress(text, 0.95 * share),
        )
        progress("judging", 0.95)
        model, judge = TextToImage(pipeline), DigitJudge()
        scores = [
            judge.score(model.generate([f"a photo of the digit {name}"] * 32), digit)
            for digit, name in enumerate(DIGIT_NAMES)
        ]
    print(
        f"{sum(scores) / 10:.1%} of images show the digit that was asked for (least "
        f"{min(scores):.1%}); the judge itself gets {judge.accuracy:.1%} of real images right"
    )
    print(f"pipeline: {arguments.out}")
    return 0
