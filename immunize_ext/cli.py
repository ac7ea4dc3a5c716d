"""The command ``immunize``.

Exit status: 0 done, 1 ``doctor`` found something wrong, 2 the request cannot be carried out (one
line says what to do, nothing is half-written), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from immunize_ext._extras import MissingExtraError
from immunize_ext._version import __version__
from immunize_ext.commands import COMMANDS
from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.settings import USAGE_ERROR, CommandParser

INTERRUPTED = 130


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="immunize",
        description="Make a model's features slow to misuse, and measure whether they are.",
    )
    parser.add_argument("--version", action="version", version=f"immunize_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


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
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
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
