"""Plots of cost against size from the result files, and of ours against a few lines.

``python -m benchmarks.plots [--results benchmarks/results] [--out benchmarks/results]``
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import _results
from ._session import RESULTS, machine_in_words

STYLES = {
    "ours": ("tab:blue", "-"),
    "ours_cached": ("tab:blue", "--"),
    "published": ("tab:red", "-"),
    "composite": ("tab:green", "-"),
    "bare": ("tab:olive", "-"),
    "bare_cached": ("tab:olive", "--"),
    "svdvals": ("tab:purple", "-"),
    "lobpcg": ("tab:brown", "-"),
    "eigsh": ("tab:pink", "-"),
    "floor": ("tab:gray", "-"),
    "floor_cached": ("tab:gray", "--"),
}


class Curve(NamedTuple):
    """Times of one contender against a size; all of one length, ordered by size."""

    sizes: list[float]
    medians: list[float]
    q25: list[float]
    q75: list[float]


class Sweep(NamedTuple):
    """One plot: the name of the size, the unit of the times, a curve per contender."""

    x: str
    per: str
    curves: dict[str, Curve]


def sweeps(content: Mapping[str, Any]) -> dict[str, Sweep]:
    """The plots that a result file holds, by name."""
    found: dict[str, Sweep] = {}
    rows = [row for row in content["rows"] if row["sweep"] is not None]
    for row in sorted(rows, key=lambda row: float(row["sweep"]["value"])):
        sweep = found.setdefault(
            row["sweep"]["name"], Sweep(row["sweep"]["x"], row["per"], curves={})
        )
        for entry in row["contenders"]:
            if entry["both"] is None:
                continue
            curve = sweep.curves.setdefault(entry["name"], Curve([], [], [], []))
            curve.sizes.append(float(row["sweep"]["value"]))
            curve.medians.append(entry["both"]["median"])
            curve.q25.append(entry["both"]["q25"])
            curve.q75.append(entry["both"]["q75"])
    return found


def file_name(content: Mapping[str, Any], sweep: str) -> str:
    """Name of a plot's file."""
    words = re.sub(r"[^a-z0-9]+", "-", sweep.lower()).strip("-")
    return f"{content['benchmark']}-{content['environment']['device']}-{words}.svg"


def draw(content: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw all plots of a result file; returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    # A fixed salt and no date: the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "immunize_ext", "font.size": 9}):
        for name, sweep in sweeps(content).items():
            figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
            for contender, curve in sweep.curves.items():
                color, line = STYLES.get(contender, ("black", ":"))
                axes.plot(
                    curve.sizes, curve.medians, line, color=color, marker="o", ms=3, label=contender
                )
                axes.fill_between(curve.sizes, curve.q25, curve.q75, color=color, alpha=0.2, lw=0)
            sizes = [size for curve in sweep.curves.values() for size in curve.sizes]
            # Sizes double, condition numbers go by powers of ten.
            axes.set_xscale("log", base=10 if max(sizes) > 1e6 * min(sizes) else 2)
            axes.set_yscale("log")
            axes.set_xlabel(sweep.x)
            axes.set_ylabel(f"forward + backward, ms per {sweep.per}")
            axes.set_title(f"{name}\n{machine_in_words(content['environment'])}", fontsize=9)
            axes.grid(visible=True, which="both", alpha=0.2)
            axes.legend(fontsize=8)
            out.mkdir(parents=True, exist_ok=True)
            path = out / file_name(content, name)
            figure.savefig(path, metadata={"Date": None})
            pyplot.close(figure)
            written.append(path)
    return written


def ratios(content: Mapping[str, Any]) -> dict[str, tuple[Sweep, dict[str, Curve]]]:
    """How many times longer a few lines take, along every plot that has them.

    The quartiles of ours and of the other are set against each other, the widest way.
    """
    found = {}
    for name, sweep in sweeps(content).items():
        curves = {}
        for ours, bare in (("ours", "bare"), ("ours_cached", "bare_cached")):
            if ours in sweep.curves and bare in sweep.curves:
                a, b = sweep.curves[ours], sweep.curves[bare]
                sizes = [size for size in b.sizes if size in a.sizes]
                at = [(a.sizes.index(size), b.sizes.index(size)) for size in sizes]
                curves[ours] = Curve(
                    sizes,
                    [b.medians[j] / a.medians[i] for i, j in at],
                    [b.q25[j] / a.q75[i] for i, j in at],
                    [b.q75[j] / a.q25[i] for i, j in at],
                )
        if curves:
            found[name] = (sweep, curves)
    return found


def draw_ratios(content: Mapping[str, Any], out: Path) -> list[Path]:
    """One figure of a result file: where ours wins against a few lines, and where it loses."""
    found = ratios(content)
    if not found:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2
    rows = -(-len(found) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "immunize_ext", "font.size": 8}):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(7.0, 2.3 * rows), layout="constrained", squeeze=False
        )
        for axes, (name, (sweep, curves)) in zip(grid.flat, found.items(), strict=False):
            for contender, curve in curves.items():
                color, line = STYLES[contender]
                axes.plot(
                    curve.sizes, curve.medians, line, color=color, marker="o", ms=3, label=contender
                )
                axes.fill_between(curve.sizes, curve.q25, curve.q75, color=color, alpha=0.2, lw=0)
            axes.axhline(1.0, color="black", lw=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_title(name)
            axes.set_xlabel(sweep.x)
            axes.set_ylabel("a few lines / ours")
            axes.grid(visible=True, which="both", alpha=0.2)
            if len(curves) > 1:
                axes.legend(fontsize=7)
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
        figure.suptitle(machine_in_words(content["environment"]), fontsize=8)
        out.mkdir(parents=True, exist_ok=True)
        environment = content["environment"]
        path = out / f"{content['benchmark']}-{environment['device']}-ratios.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return [path]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=None, help="default: the folder of the results")
    arguments = parser.parse_args(argv)
    try:
        contents = _results.read_folder(arguments.results)
        if not contents:
            raise ValueError(
                f"there are no result files in {arguments.results}; make some with: "
                f"python -m benchmarks.run --out {arguments.results}"
            )
        for content in contents:
            out = arguments.out or arguments.results
            for path in (*draw(content, out), *draw_ratios(content, out)):
                print(f"written: {path}")
    except ValueError as error:
        print(f"benchmarks.plots: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"benchmarks.plots: {error}; pip install matplotlib", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
