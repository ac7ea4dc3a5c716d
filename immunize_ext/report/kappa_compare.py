"""The report that compares finished condition-number runs at equal primary slow-down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext._version import __version__
from immunize_ext.attacks import ATTACKERS
from immunize_ext.report.document import document
from immunize_ext.report.drawing import COLOURS, panel_svg, panels_png
from immunize_ext.report.drawing import title as panel_title
from immunize_ext.report.html import number
from immunize_ext.report.kappa_points import (
    BUDGETS,
    HEADLINE_BUDGET,
    WORST,
    Point,
    curves,
    equal_cost,
)
from immunize_ext.report.kappa_sections import table
from immunize_ext.report.run_directory import run_directory, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart in print, on a dark page and by most colour-blind readers, with markers beside them.
_PALETTE = ("#0f766f", "#c2410d", "#5b6ee1", "#b7791f", "#a3439b", "#3c8dbc", "#6b8e23", "#8c6d62")
_MARKERS = "osD^vP*X"


def attacker_label(name: str) -> str:
    """What pages call an attacker, the chosen worst one included."""
    return "The worst attacker" if name == WORST else ATTACKERS[name].label


def measured_attackers(points: Sequence[Point]) -> list[str]:
    """Attackers that every point has on both tasks, in the order of reports; the worst one last."""
    common = [
        name
        for name in ATTACKERS
        if points and all(name in p.harmful and name in p.primary for p in points)
    ]
    some = any(ATTACKERS[name].sees_theta for name in common)
    return [*common, *([WORST] if some else [])]


def compare(points: Sequence[Point]) -> dict[str, Any]:
    """Everything that the comparison says, as plain values.

    Args:
        points: At least one run with attacks.

    Returns:
        For ``results.json``: kind, runs, equal-cost tables and curves by attacker.

    Raises:
        ValueError: If no attacker is common to all runs.
    """
    attackers = measured_attackers(points)
    if not attackers:
        raise ValueError(
            "report: runs must share an attacker, got none that all of them have; add one with "
            "immunize attack RUN --attackers gradient_descent, or sweep with --attackers"
        )
    return {
        "kind": "kappa-comparison",
        "version": __version__,
        "runs": [
            {
                "name": point.name,
                "method": point.method,
                "knob": None
                if point.knob is None
                else dict(zip(("name", "value"), point.knob, strict=True)),
                "tasks": point.tasks,
                "seed": point.seed,
                "slowdown": {"harmful": point.harmful, "primary": point.primary},
                "rir": point.rir,
                "share_of_ceiling": point.share_of_ceiling,
                "seconds": point.seconds,
            }
            for point in points
        ],
        "equal_primary_slowdown": {name: equal_cost(points, name) for name in attackers},
        "frontier": {name: curves(points, name) for name in attackers},
    }


def _draw(axes: Axes, points: Sequence[Point], attacker: str, methods: Sequence[str]) -> None:
    lines = curves(points, attacker)
    for index, method in enumerate(methods):
        colour, marker = _PALETTE[index % len(_PALETTE)], _MARKERS[index % len(_MARKERS)]
        single = [p.slowdowns(attacker) for p in points if p.method == method]
        found = [pair for pair in single if pair is not None]
        if len(found) > len(lines.get(method, ())):
            axes.plot(*zip(*found, strict=True), marker, color=colour, alpha=0.22, markersize=4)
        if method in lines:
            xs, ys = zip(*lines[method], strict=True)
            axes.plot(xs, ys, marker=marker, color=colour, markersize=6.5, label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for draw in (axes.axvline, axes.axhline):
        draw(1.0, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}×" if value >= 1 else f"{value:g}×")
        axis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("slow-down of the task to keep (left: faster)")
    axes.set_ylabel("slow-down of the harm")
    panel_title(axes, attacker_label(attacker))
    axes.legend(frameon=False, fontsize=9.5, labelcolor=COLOURS["--muted"], loc="best")


def draw_frontiers(points: Sequence[Point]) -> tuple[dict[str, str], bytes]:
    """The frontier plots: SVG elements by attacker for a page, and one PNG.

    Args:
        points: The runs.

    Returns:
        SVG by attacker, and a PNG file of all.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    shown = [
        name for name in measured_attackers(points) if name == WORST or ATTACKERS[name].sees_theta
    ]
    draw = {name: partial(_draw, points=points, attacker=name, methods=methods) for name in shown}
    svg = {
        name: panel_svg(panel, f"frontier-{name}", size=(7.2, 4.65)) for name, panel in draw.items()
    }
    return svg, panels_png(list(draw.values())) if draw else b""


def _cell(entry: dict[str, Any]) -> str:
    if entry["median"] is None:
        return "<small>no run within</small>"
    spread = ""
    if entry["of"] > 1:
        spread = (
            f" <small>{number(entry['min'])} to {number(entry['max'])}, {entry['cells']} of "
            f"{entry['of']}</small>"
        )
    bound = "≥ " if entry["lower_bounds"] else ""
    return f"<b>{bound}{number(entry['median'])}×</b>{spread}"


def _cost_table(entries: dict[str, dict[str, Any]]) -> str:
    order = sorted(
        entries,
        key=lambda method: -(entries[method][f"{HEADLINE_BUDGET:g}"]["median"] or -math.inf),
    )
    rows = [
        (escape(method), *(_cell(entries[method][f"{budget:g}"]) for budget in BUDGETS))
        for method in order
    ]
    header = ("Method", *(f"primary ≤ {budget:g}×" for budget in BUDGETS))
    return table(header, rows)


def _headline(comparison: dict[str, Any], attacker: str) -> str:
    entries = comparison["equal_primary_slowdown"][attacker]
    key = f"{HEADLINE_BUDGET:g}"
    reached = {m: e[key]["median"] for m, e in entries.items() if e[key]["median"] is not None}
    if not reached or max(reached.values()) <= 1.05:
        return "No method slows the harm for free"
    best = max(reached, key=lambda method: reached[method])
    bound = "at least " if entries[best][key]["lower_bounds"] else ""
    return f"{best}: {bound}{reached[best]:.3g} times slower to misuse, no slower to use"


def _runs_table(points: Sequence[Point], attacker: str) -> str:
    rows = []
    for point in points:
        pair = point.slowdowns(attacker)
        knob = "" if point.knob is None else f"{point.knob[0]} = {_knob(point.knob[1])}"
        bound = "&gt;" if attacker in point.bounded else ""
        rows.append(
            (
                escape(point.method),
                escape(knob),
                "" if pair is None else f"{bound}{number(pair[1])}×",
                "" if pair is None else f"{number(pair[0])}×",
                number(point.rir["official"]),
                number(point.rir["ridge"]),
                f"{point.share_of_ceiling:.1%}",
                f"{point.seconds:.2f}",
            )
        )
    return table(
        ("Run", "", "harm", "primary", "RIR official", "RIR ridge", "of ceiling", "s"), rows
    )


def _knob(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


_STYLE = """
.figures.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.5rem; }
"""


def render_comparison(
    points: Sequence[Point], comparison: dict[str, Any], svg: dict[str, str]
) -> str:
    """Write the page.

    Args:
        points: The runs.
        comparison: What :func:`compare` gave.
        svg: What :func:`draw_frontiers` gave.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    attackers = list(comparison["equal_primary_slowdown"])
    first = next((name for name in attackers if name in svg), attackers[0])
    title = _headline(comparison, first)
    tasks = list(dict.fromkeys(point.tasks for point in points))
    listed = "".join(f"<li>{escape(text)}</li>" for text in tasks[:20])
    more = f"<li>and {len(tasks) - 20} more</li>" if len(tasks) > 20 else ""
    tables = {
        name: f"<h3>{escape(attacker_label(name))}</h3>"
        f"{_cost_table(comparison['equal_primary_slowdown'][name])}"
        for name in attackers
    }
    # The first attacker and the worst one decide; the others are a click away.
    folded = "".join(tables[name] for name in attackers if name not in (first, WORST))
    shown = "".join(tables[name] for name in dict.fromkeys((first, WORST)) if name in tables)
    if folded:
        shown += f"<details><summary>Other attackers</summary>{folded}</details>"
    figures = "".join(
        f"<figure>{drawing}<figcaption>{escape(attacker_label(name))}: up is harder to misuse, "
        "right of the dotted line is harder to use.</figcaption></figure>"
        for name, drawing in svg.items()
    )
    detail = _runs_table(points, first) if len(points) <= 200 else ""
    body = f"""<header>
<p class="kicker">Methods at equal cost · {len(points)} runs · {len(tasks)} pairs of tasks</p>
<h1>{escape(title)}</h1>
<p>A method is worth what it slows the harm while the task to keep is no slower than before. Each
number is that of a run that was measured, by {escape(attacker_label(first).lower())} unless another
attacker is named. A person who whitens the features first, or solves for the head in closed form,
is not slowed by any of these methods.</p>
</header>
<section><h2>The frontiers</h2>
<p>One curve per method over its strength; faint marks are single runs.</p>
<div class="figures wide">{figures}</div></section>
<section><h2>Slow-down of the harm at equal primary slow-down</h2>
<p>The most a method slows the harm among its runs within the budget; median over tasks and seeds;
≥ where an attack was cut off by its budget. Small: range, and in how many of these there is a run
within the budget.</p>
{shown}</section>
<section><h2>All runs</h2>
<p>RIR, which the literature reports, does not order the runs by protection.</p>{detail}
<details><summary>Tasks</summary><ul>{listed}{more}</ul></details></section>"""
    return document(title, body, style=_STYLE)


def write_comparison(points: Sequence[Point], target: str | Path, *, force: bool = False) -> Path:
    """Write a directory with ``results.json``, ``frontier.png`` and ``report.html``.

    Args:
        points: The runs.
        target: The directory.
        force: Whether an existing one is replaced.

    Returns:
        The directory.

    Raises:
        FileExistsError: If the target exists and ``force`` is not given, or is no run directory.
        ValueError: If the runs share no attacker.
        MissingExtraError: If matplotlib is not installed.
    """
    comparison = compare(points)
    svg, png = draw_frontiers(points)
    with run_directory(target, force=force) as folder:
        if png:
            (folder / "frontier.png").write_bytes(png)
        page = render_comparison(points, comparison, svg)
        (folder / "report.html").write_text(page, encoding="utf-8")
        write_json(folder / "results.json", comparison)
    return Path(target)
