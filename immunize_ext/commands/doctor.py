"""``immunize doctor``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, what is wrong and how to mend it",
        description="Say what is installed, what is wrong and how to mend it.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if something is wrong."""
    from immunize_ext._doctor import diagnose, doctor_report

    print(doctor_report())
    return 0 if diagnose().ok else 1
