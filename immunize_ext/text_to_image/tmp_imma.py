"""``immunize imma``: immunization of a text-to-image model against one concept."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    from immunize_ext.text_to_image.tmp_config import add_config_arguments
    from immunize_ext.text_to_image.tmp_mima import add_run_arguments

    parser = commands.add_parser(
        "imma",
        help="immunize a text-to-image model against one concept, attack it, report",
        description="As `immunize mima`, for one concept: give it with --targets.",
    )
    add_config_arguments(parser, method=False)
    add_run_arguments(parser, "runs/imma")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it and print what a newcomer needs."""
    from immunize_ext.text_to_image.tmp_config import DIGITS, config_from
    from immunize_ext.text_to_image.tmp_mima import execute

    config = config_from(arguments, method="imma")
    if len(config.targets) != 1 and (config.model == DIGITS or config.targets):
        raise ValueError(
            f"--targets: must be one concept, got {len(config.targets)}; use `immunize mima` for "
            "several"
        )
    return execute(config, arguments)
