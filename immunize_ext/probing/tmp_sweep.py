"""``immunize sweep kappa``: pairs of tasks x methods x strengths x seeds."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext._extras import require_extra
from immunize_ext.runtime import progress_bar

if TYPE_CHECKING:
    from immunize_ext.probing.tmp_config import KappaConfig
    from immunize_ext.settings import Commands


def add_parser(kinds: Commands) -> None:
    """Add the kind."""
    from immunize_ext.probing.tmp_config import add_config_arguments

    parser = kinds.add_parser(
        "kappa",
        help="condition-number immunization",
        description="Immunize every pair of tasks with every method, strength and seed. Writes a "
        "file for each point, results.json, heat maps of log RIR and report.html. Without "
        "--attackers only condition numbers are measured.",
    )
    add_config_arguments(parser, leave_out=("primary", "harmful", "method", "seed"))
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=["all"],
        metavar="P/H",
        help="tasks to keep and to make hard, as 4/9 or 4,6:2,3,7/5,9:0,1,8; all: the 90 ordered "
        "pairs of digits (default)",
    )
    parser.add_argument(
        "--methods", nargs="+", default=["closed-form"], metavar="METHOD", help="methods"
    )
    parser.add_argument(
        "--strengths",
        action="append",
        default=[],
        metavar="METHOD=V,V",
        help="values of a method's knob, as closed-form=3,10,30; may be given for each method",
    )
    parser.add_argument(
        "--frontier", action="store_true", help="usual values of every method's knob"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads of each process (default: 1)"
    )
    parser.add_argument("--out", default="runs/sweep-kappa", metavar="DIR", help="sweep directory")
    parser.add_argument("--force", action="store_true", help="drop points of other settings")
    parser.add_argument("--quiet", action="store_true", help="print the summary alone")
    parser.set_defaults(run=run)


def parse_pairs(texts: Sequence[str], data: str) -> list[tuple[str | None, tuple[str, ...]]]:
    """Pairs of tasks as the command line writes them.

    Args:
        texts: ``all``, or ``P/H`` each.
        data: The data set; ``house`` has one pair of its own.

    Returns:
        Primary and harmful task of each pair.

    Raises:
        ValueError: If a text has another form or comes twice.

    Example:
        >>> parse_pairs(["4/9"], "mnist"), len(parse_pairs(["all"], "digits"))
        ([('4', ('9',))], 90)
    """
    if list(texts) == ["all"]:
        if data == "house":
            return [(None, ())]
        if data not in ("digits", "mnist"):
            raise ValueError(f"--pairs: must name pairs for {data}, got all")
        return [(str(a), (str(b),)) for a, b in product(range(10), repeat=2) if a != b]
    found: list[tuple[str | None, tuple[str, ...]]] = []
    for text in texts:
        sides = text.split("/")
        if len(sides) != 2 or not all(sides):
            raise ValueError(f"--pairs: a pair must look like 4/9 or 3:8/4:9, got {text!r}")
        found.append((sides[0], (sides[1],)))
    if len(set(found)) < len(found):
        raise ValueError("--pairs: no pair may come twice")
    return found


def parse_strengths(
    texts: Sequence[str], methods: Sequence[str], frontier: bool
) -> dict[str, tuple[float | None, ...]]:
    """Values of the knob by method; ``None`` stands for the setting as it is.

    Raises:
        ValueError: If a method is unknown, not swept or has no knob, or a value is no number.
    """
    from immunize_ext.probing.tmp_methods import METHODS

    for name in methods:
        if name not in METHODS:
            raise ValueError(f"--methods: must be among {', '.join(METHODS)}, got {name!r}")
    if len(set(methods)) < len(methods):
        raise ValueError("--methods: no method may come twice")
    found: dict[str, tuple[float | None, ...]] = {
        name: METHODS[name].grid if frontier and METHODS[name].grid else (None,) for name in methods
    }
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or name not in methods:
            raise ValueError(
                f"--strengths: must look like METHOD=1,3,10 for a method of the sweep, got {text!r}"
            )
        if METHODS[name].knob is None:
            raise ValueError(f"--strengths: {name} has no knob; leave it out")
        try:
            found[name] = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"--strengths: values must be numbers, got {text!r}") from None
        if len(set(found[name])) < len(found[name]):
            raise ValueError(f"--strengths: no value may come twice, got {text!r}")
    return found


def plan_points(
    base: KappaConfig,
    pairs: Sequence[tuple[str | None, tuple[str, ...]]],
    strengths: dict[str, tuple[float | None, ...]],
    seeds: Sequence[int],
) -> dict[str, KappaConfig]:
    """The settings of every point, by a name that is fit for a file."""
    from immunize_ext.probing.tmp_methods import METHODS

    points = {}
    for (primary, harmful), (method, values), seed in product(pairs, strengths.items(), seeds):
        for value in values:
            config = replace(base, primary=primary, harmful=harmful, method=method, seed=seed)
            name = [base.data if primary is None else f"{primary}_{'+'.join(harmful)}", method]
            if value is not None:
                knob = METHODS[method].knob
                assert knob is not None  # parse_strengths asked
                whole = knob == "steps"
                if whole and value != int(value):
                    raise ValueError(f"--strengths: {method} takes whole steps, got {value}")
                chosen: dict[str, Any] = {knob: int(value) if whole else value}
                config = replace(config, **chosen)
                name.append(f"{knob}={value:g}")
            name.append(f"seed={seed}")
            points[re.sub(r"[^A-Za-z0-9=.,+_-]", "-", "__".join(name))] = config
    return points


def run(arguments: argparse.Namespace) -> int:
    """Do what is missing of the sweep, and make its summary."""
    from immunize_ext.probing.comparison import summarise, write_summary
    from immunize_ext.probing.run import KIND, check_config, short_results
    from immunize_ext.probing.tmp_config import config_from
    from immunize_ext.sweep import run_sweep

    base = config_from(arguments)
    if base.primary is not None or base.harmful:
        raise ValueError("--config: must not name tasks for a sweep; give --pairs")
    if arguments.jobs < 1 or arguments.threads < 1:
        raise ValueError("--jobs and --threads must be at least 1")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError("--seeds: no seed may come twice")
    pairs = parse_pairs(arguments.pairs, base.data)
    strengths = parse_strengths(arguments.strengths, arguments.methods, arguments.frontier)
    points = plan_points(base, pairs, strengths, arguments.seeds)
    for config in points.values():
        check_config(config)
    require_extra("matplotlib", extra="report", purpose="the heat maps")
    folder = Path(arguments.out)
    with progress_bar(arguments.quiet) as progress:
        results = run_sweep(
            folder,
            f"{KIND}-sweep",
            {name: partial(short_results, config) for name, config in points.items()},
            force=arguments.force,
            processes=arguments.jobs,
            threads_each=arguments.threads,
            progress=progress,
        )
    summary = summarise(results)
    write_summary(folder, summary, results)
    print(_table(summary))
    print(f"\nsummary: {folder / 'results.json'}\nreport: {folder / 'report.html'}")
    return 0


def _table(summary: dict[str, Any]) -> str:
    from immunize_ext.report.tables import text_table

    rows = [("method", "points", "RIR official: mean", "least", "below 1", "share of ceiling")]
    for name, entry in summary["methods"].items():
        official = entry["rir"]["official"]
        rows.append(
            (
                name,
                str(entry["points"]),
                f"{official['mean']:.4g}",
                f"{official['min']:.4g}",
                str(official["below_1"]),
                f"{entry['share_of_ceiling']['mean']:.3g}",
            )
        )
    return text_table(rows)
