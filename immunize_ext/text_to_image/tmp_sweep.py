"""``immunize sweep mima``: text-to-image runs over the number of concepts, C_reg, steps, ridge."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext.runtime import progress_bar
from immunize_ext.sweep import run_sweep

if TYPE_CHECKING:
    from immunize_ext.settings import Commands


OUT = "runs/mima-sweep"


def add_parser(kinds: Commands) -> None:
    """Add the kind."""
    from immunize_ext.text_to_image.tmp_config import add_config_arguments

    parser = kinds.add_parser(
        "mima",
        help="text-to-image runs over the number of concepts, C_reg, inner steps and ridge",
        description="Run `immunize mima` at every combination of the given values. Each finished "
        "point is a file; the same command goes on where the last one stopped.",
    )
    add_config_arguments(parser)
    parser.add_argument("--counts", nargs="+", type=int, default=[], metavar="N", help="concepts")
    parser.add_argument(
        "--captions", nargs="+", type=int, default=[], metavar="M", help="captions of C_reg"
    )
    parser.add_argument("--inner-steps", nargs="+", type=int, default=[], metavar="N")
    parser.add_argument("--ridges", nargs="+", type=float, default=[], metavar="X")
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"folder (default: {OUT})")
    parser.add_argument("--force", action="store_true", help="drop points of another sweep")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each")
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do what is missing, and compare the points."""
    from immunize_ext import report
    from immunize_ext.storage import run_directory, write_json
    from immunize_ext.text_to_image.comparison import Row, comparison_of, summary
    from immunize_ext.text_to_image.tmp_config import config_from
    from immunize_ext.text_to_image.tmp_task import check_config

    config = config_from(arguments)
    for flag in ("jobs", "threads"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag}: must be at least 1, got {getattr(arguments, flag)}")
    points = _points(config, arguments)
    for payload in points.values():
        check_config(_config(payload))
    folder = Path(arguments.out)
    with progress_bar(arguments.quiet) as progress:
        found = run_sweep(
            folder,
            "mima-sweep",
            {name: functools.partial(point, payload) for name, payload in points.items()},
            force=arguments.force,
            processes=arguments.jobs,
            threads_each=arguments.threads,
            progress=progress,
        )
    rows = [Row(**result) for result in found.values()]
    comparison = comparison_of(rows)
    # Points stay where they are, so that the sweep can be widened.
    with run_directory(folder / "report", force=True) as writing:
        report.write(comparison, writing)
        write_json(writing / "results.json", comparison)
    print(summary(comparison))
    print(f"\nreport: {folder / 'report' / 'report.html'}")
    return 0


def _points(config: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is to be done, by name: plain values, for files and other processes."""
    axes = {
        "count": arguments.counts or [None],
        "captions": arguments.captions or [None],
        "inner_steps": arguments.inner_steps or [None],
        "ridge": arguments.ridges or [None],
    }
    found: dict[str, Any] = {}
    for values in itertools.product(*axes.values()):
        chosen = {k: v for k, v in zip(axes, values, strict=True) if v is not None}
        for seed in config.seeds:
            name = "-".join([*(f"{k}{v:g}" for k, v in chosen.items()), f"seed{seed}"])
            found[name] = {"name": name, "config": config.to_dict(), "seed": seed, **chosen}
    return found


def _config(payload: dict[str, Any]) -> Any:
    """The settings of one point."""
    from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
    from immunize_ext.text_to_image.tmp_config import DIGITS, TextToImageConfig, checked

    config = dataclasses.replace(TextToImageConfig(), **checked(payload["config"], "sweep"))
    settings = dict(config.settings)
    for name in ("inner_steps", "ridge"):
        if name in payload:
            settings[name] = payload[name]
    count = payload.get("count")
    targets = config.targets
    if count is not None:
        available = targets or (tuple(DIGIT_NAMES) if config.model == DIGITS else ())
        if not 1 <= count <= len(available or range(count)):
            raise ValueError(f"--counts: must be 1 to {len(available)} concepts, got {count}")
        targets = tuple(available[:count])
    return dataclasses.replace(config, settings=settings, targets=targets, seeds=(payload["seed"],))


def point(payload: dict[str, Any]) -> dict[str, Any]:
    """Do one point."""
    from immunize_ext.text_to_image.comparison import row_of
    from immunize_ext.text_to_image.run import run_text_to_image
    from immunize_ext.text_to_image.tmp_results import results_of

    config = _config(payload)
    with tempfile.TemporaryDirectory() as work:
        found = run_text_to_image(
            config, Path(work), lambda text, share: None, captions=payload.get("captions")
        )
    return asdict(row_of(payload["name"], results_of(found)))
