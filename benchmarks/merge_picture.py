"""Draws docs/merge.svg: what a merge costs, against captions, overlap, and the weights it may move.

    python -m benchmarks.merge_picture --write docs/merge.svg    or --check

Everything in it comes from ``merge_sensitivity.json`` and ``merge_choice.json``. Put together by
hand, as the README's picture is: whatever is installed, the same results give the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from immunize_ext.report.plots import COLOURS

from ._session import RESULTS
from .merge_sensitivity import KAPPAS, in_words

WIDTH, HEIGHT = 330, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 50, 42
SHADES = ("--before", "--harmful", "--primary", "--ink", "--muted")

Row = Mapping[str, Any]


class Curve(NamedTuple):
    """Points (x, mean, least, largest), by x; drawn dashed if it is no measurement."""

    name: str
    points: list[tuple[float, float, float, float]]
    dashed: bool = False


class Panel(NamedTuple):
    """One plot, both axes logarithmic."""

    title: str
    across: str
    up: str
    ticks: list[tuple[float, str]]
    heights: tuple[float, ...]
    curves: list[Curve]
    names: tuple[int, int]  # where they stand, from the upper left corner of the axes


def _point(x: float, one: Row) -> tuple[float, float, float, float]:
    return x, one["mean"], one["least"], one["largest"]


def captions(results: Row) -> Panel:
    """Drift against |C_reg|."""
    rows = [row for row in results["captions"] if row["kappa"] == KAPPAS[1]]
    curves = [
        Curve(
            f"ridge {in_words(ridge)}",
            [
                _point(row["share"], row["found"]["inflation"])
                for row in rows
                if row["ridge"] == ridge and row["found"] is not None
            ],
        )
        for ridge in (0.0, 1e-4, 1e-2, "LW")
    ]
    expected = [
        (row["share"], row["predicted"])
        for row in rows
        if row["ridge"] == 0.0 and row["predicted"] is not None
    ]
    curves.append(Curve("expected at ridge 0", [(x, y, y, y) for x, y in expected], dashed=True))
    ticks = [(0.25, "d/4"), (1.0, "d"), (4.0, "4 d"), (16.0, "16 d")]
    title = "Enough captions, or a small ridge"
    heights = (1, 2, 5, 10)
    return Panel(title, "caption rows", "drift / least drift", ticks, heights, curves, (158, 8))


def overlap(results: Row) -> Panel:
    """Drift against overlap."""
    curves = []
    for count in (2, 5, 9):
        rows = [row for row in results["overlap"] if row["concepts"] == count]
        curves.append(
            Curve(
                f"{count} concepts",
                [_point(1.0 / (1.0 - row["rho"]), row["found"]["moved"]) for row in rows],
            )
        )
        expected = [(1.0 / (1.0 - row["rho"]), row["moved"]) for row in rows]
        name = "expected" if count == 9 else ""
        curves.append(Curve(name, [(x, y, y, y) for x, y in expected], dashed=True))
    ticks = [(1.0, "0"), (10.0, ".9"), (100.0, ".99")]
    title = "Concepts that can be told apart"
    heights = (1, 10, 100, 1000)
    return Panel(title, "overlap of any two", "drift", ticks, heights, curves, (8, 8))


def weights(results: Row) -> Panel:
    """What is left against the share of the weights."""
    names = {
        "rows, by score": "best rows",
        "columns, one by one, the same share of every layer": "columns, one by one",
        "layers, by knapsack": "best layers",
        "rows, at random": "random rows",
    }
    curves = [
        Curve(short, [_point(row["share"], row["found"][name]["left"]) for row in results["parts"]])
        for name, short in names.items()
    ]
    whole = results["whole"]
    least = whole["moments (the least there is)"]["left"]["mean"]
    shares = [row["share"] for row in results["parts"]]
    flat = [(x, least, least, least) for x in (shares[0], shares[-1])]
    curves.append(Curve("everything", flat, dashed=True))
    ticks = [(1 / 16, "1/16"), (1 / 8, "1/8"), (1 / 4, "1/4"), (1 / 2, "1/2")]
    title = "A part of it does most"
    heights = (0.1, 0.2, 0.5, 1.0)
    left = "left of the objective"
    return Panel(title, "share of the weights", left, ticks, heights, curves, (8, 147))


# --- drawing --------------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, shade: str = "--muted", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{COLOURS[shade]}" {more}>{escape(text)}</text>'


def _draw(panel: Panel, left: float) -> Iterator[str]:
    points = [point for curve in panel.curves for point in curve.points]
    low_x, high_x = min(p[0] for p in points), max(p[0] for p in points)
    low = min(min(p[2] for p in points), panel.heights[0])
    high = max(p[3] for p in points)
    right, bottom = left + WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        share = math.log(x / low_x) / math.log(high_x / low_x)
        return left + LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return bottom - math.log(y / low) / math.log(high / low) * (bottom - TOP)

    yield _text(left + 8, 20, panel.title, "--ink", 'font-size="14" font-weight="600"')
    yield _text(left + 8, 38, panel.up)
    yield _text(right, HEIGHT - 6, panel.across, more='text-anchor="end"')
    for value in panel.heights:
        if low <= value <= high:
            yield (
                f'<path d="M{left + LEFT:.1f} {up(value):.1f}H{right:.1f}" '
                f'stroke="{COLOURS["--grid"]}"/>'
            )
            yield _text(left + LEFT - 5, up(value) + 4, f"{value:g}", more='text-anchor="end"')
    for value, name in panel.ticks:
        yield _text(across(value), bottom + 16, name, more='text-anchor="middle"')
    shade = -1
    names = []
    for curve in panel.curves:
        shade += not curve.dashed
        colour = COLOURS["--muted" if curve.dashed else SHADES[shade % len(SHADES)]]
        line = "L".join(f"{across(p[0]):.1f} {up(p[1]):.1f}" for p in curve.points)
        if not curve.dashed:
            edge = [(across(p[0]), up(p[2])) for p in curve.points]
            edge += [(across(p[0]), up(p[3])) for p in reversed(curve.points)]
            area = "L".join(f"{x:.1f} {y:.1f}" for x, y in edge)
            yield f'<path d="M{area}Z" fill="{colour}" opacity="0.15"/>'
        dashes = ' stroke-dasharray="4 3"' if curve.dashed else ' stroke-width="2"'
        yield f'<path d="M{line}" fill="none" stroke="{colour}"{dashes}/>'
        if curve.name:
            names.append((curve.name, colour, curve.dashed))
    x = left + LEFT + panel.names[0]
    for place, (name, colour, dashed) in enumerate(names):
        y = TOP + panel.names[1] + 14 * place
        dashes = ' stroke-dasharray="4 3"' if dashed else ' stroke-width="2"'
        yield f'<path d="M{x:.1f} {y:.1f}h16" stroke="{colour}"{dashes}/>'
        yield _text(x + 21, y + 4, name, "--ink")


def picture(sensitivity: Row, choice: Row) -> str:
    """The picture."""
    panels = [captions(sensitivity), overlap(sensitivity), weights(choice)]
    body = [line for number, panel in enumerate(panels) for line in _draw(panel, number * WIDTH)]
    width = len(panels) * WIDTH
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" '
            f'viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" font-size="11.5">',
            f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Draw or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path)
    action.add_argument("--check", type=Path)
    arguments = parser.parse_args(argv)
    found = picture(
        *(
            json.loads((arguments.results / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("merge_sensitivity", "merge_choice")
        )
    )
    if arguments.write is not None:
        arguments.write.write_text(found, encoding="utf-8")
        return 0
    return int(arguments.check.read_text(encoding="utf-8") != found)


if __name__ == "__main__":
    sys.exit(main())
