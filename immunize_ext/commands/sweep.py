"""``immunize sweep``: many runs of one kind, resumable and parallel. A subcommand for each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from immunize_ext.probing import tmp_sweep as _sweep_kappa
from immunize_ext.text_to_image import tmp_sweep as _sweep_mima

if TYPE_CHECKING:
    from immunize_ext.settings import Commands

# Modules with ``add_parser(kinds)``, as those of ``COMMANDS``.
KINDS = (_sweep_kappa, _sweep_mima)


def add_parser(commands: Commands) -> None:
    """Add the subcommand with its kinds."""
    parser = commands.add_parser(
        "sweep",
        help="many runs: over tasks, methods, strengths and seeds; resumable, parallel",
        description="Do many runs. Each finished point is a file; the same command goes on where "
        "the last one stopped.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind in KINDS:
        kind.add_parser(kinds)
