"""Finished condition-number runs as points: slow-down of the harm against that of the primary task.

Two methods are compared at equal cost: only runs whose primary slow-down, for the same attacker,
is within a budget count, and of those the one that slows the harm most. No run is interpolated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from immunize_ext._version import __version__
from immunize_ext.probing.attacks import ATTACKERS
from immunize_ext.probing.report import number, table
from immunize_ext.report.page import document
from immunize_ext.report.plots import COLOURS, panel_svg, panels_png
from immunize_ext.report.plots import title as panel_title
from immunize_ext.storage import run_directory, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Primary slow-downs at which methods are compared; 1: the owner pays nothing.
BUDGETS = (0.5, 1.0, 2.0)


HEADLINE_BUDGET = 1.0


# The attacker who may choose: least slow-down of the harm, largest of the primary task.
WORST = "worst"


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        name: Where it was found.
        method: Its method with the variant.
        knob: Name and value of the method's knob; ``None`` without one.
        tasks: What it is about: the same for runs that may be compared.
        seed: Its seed.
        harmful: Slow-down of the harmful task by attacker.
        primary: Slow-down of the primary task by attacker.
        bounded: Attackers whose harmful slow-down is a lower bound.
        rir: RIR by rank policy.
        share_of_ceiling: Its share of the ceiling.
        seconds: What immunizing took.
    """

    name: str
    method: str
    knob: tuple[str, float | str] | None
    tasks: str
    seed: int
    harmful: dict[str, float]
    primary: dict[str, float]
    bounded: frozenset[str]
    rir: dict[str, float]
    share_of_ceiling: float
    seconds: float

    def is_lower_bound(self, attacker: str) -> bool:
        """Whether the attack on the harmful task was cut off by its budget."""
        if attacker != WORST:
            return attacker in self.bounded
        names = [n for n in self.harmful if n in self.primary and ATTACKERS[n].sees_theta]
        least = min(names, key=lambda name: self.harmful[name])
        return least in self.bounded

    def slowdowns(self, attacker: str) -> tuple[float, float] | None:
        """Slow-down of the primary and of the harmful task; ``None`` if not measured."""
        if attacker == WORST:
            names = [n for n in self.harmful if n in self.primary and ATTACKERS[n].sees_theta]
            if not names:
                return None
            return max(self.primary[n] for n in names), min(self.harmful[n] for n in names)
        if attacker not in self.harmful or attacker not in self.primary:
            return None
        return self.primary[attacker], self.harmful[attacker]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)  # strict JSON writes "inf", and NaN as null


def point_of(name: str, results: dict[str, Any]) -> Point:
    """Take a point out of ``results.json`` of a run, or of a point of a sweep.

    Args:
        name: Where it was found.
        results: Its content.

    Returns:
        The point.

    Raises:
        ValueError: If a field is missing.
    """
    try:
        request, knob = results["request"], results["knob"]
        bounds = results["slowdown_is_lower_bound"]["harmful"]
        tasks = [f"{role}: {results['tasks'][role]['name']}" for role in ("primary", "harmful")]
        keys = ("data", "size", "max_train", "loss", "ridge", "base_budget", "limit")
        return Point(
            name=name,
            method=results["method_label"],
            knob=None if knob is None else (knob["name"], knob["value"]),
            # Runs under other conditions are other tasks.
            tasks="; ".join([*tasks, *(f"{k} {request[k]}" for k in keys)]),
            seed=int(request["seed"]),
            harmful={n: _number(v) for n, v in results["slowdown"]["harmful"].items()},
            primary={n: _number(v) for n, v in results["slowdown"]["primary"].items()},
            bounded=frozenset(n for n, bound in bounds.items() if bound),
            rir={policy: _number(value) for policy, value in results["rir"].items()},
            share_of_ceiling=_number(results["share_of_ceiling"]),
            seconds=_number(results["seconds"]["immunize"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: results.json must be of a finished kappa run, got {error!r}; run it again"
        ) from None


def equal_cost(
    points: Iterable[Point], attacker: str, budgets: Sequence[float] = BUDGETS
) -> dict[str, dict[str, Any]]:
    """The most that each method slows the harm within budgets of primary slow-down.

    Args:
        points: The runs.
        attacker: Whose slow-downs count, on both tasks; or :data:`WORST`.
        budgets: Largest primary slow-downs.

    Returns:
        By method, then by budget: ``median`` over tasks and seeds of the best slow-down within the
        budget, ``min``, ``max``, ``lower_bounds`` (how many of these were cut off), ``cells``
        (tasks and seeds where a run is within it) and ``of``.

    Example:
        >>> point = Point("a", "m", None, "t", 0, {"lbfgs": 3.0}, {"lbfgs": 0.9}, frozenset(), {},
        ...               1.0, 0.0)
        >>> equal_cost([point], "lbfgs", [0.5, 1.0])["m"]["1"]["median"]
        3.0
    """
    methods: dict[str, dict[tuple[str, int], list[tuple[float, float, bool]]]] = {}
    for point in points:
        found = point.slowdowns(attacker)
        if found is not None:
            cells = methods.setdefault(point.method, {})
            cut_off = point.is_lower_bound(attacker)
            cells.setdefault((point.tasks, point.seed), []).append((*found, cut_off))
    table: dict[str, dict[str, Any]] = {}
    for method, cells in methods.items():
        table[method] = {}
        for budget in budgets:
            best = [
                max(within)
                for runs in cells.values()
                if (within := [(harm, cut) for cost, harm, cut in runs if cost <= budget])
            ]
            values = [harm for harm, _ in best]
            table[method][f"{budget:g}"] = {
                "median": statistics.median(values) if values else None,
                "min": min(values, default=None),
                "max": max(values, default=None),
                "lower_bounds": sum(cut for _, cut in best),
                "cells": len(best),
                "of": len(cells),
            }
    return table


def curves(points: Iterable[Point], attacker: str) -> dict[str, list[tuple[float, float]]]:
    """Each method's curve: geometric means over tasks and seeds, one for each value of its knob.

    Args:
        points: The runs.
        attacker: Whose slow-downs count, or :data:`WORST`.

    Returns:
        By method: primary and harmful slow-down, in the order of the knob.
    """
    groups: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for point in points:
        found = point.slowdowns(attacker)
        if found is None:
            continue
        value = point.knob[1] if point.knob is not None else 0.0
        # Calibrated strengths differ between tasks, and belong together.
        key = float(value) if isinstance(value, (int, float)) else math.inf
        groups.setdefault(point.method, {}).setdefault(key, []).append(found)
    return {
        method: [
            (
                statistics.geometric_mean([max(cost, 1e-9) for cost, _ in by_value[key]]),
                statistics.geometric_mean([max(harm, 1e-9) for _, harm in by_value[key]]),
            )
            for key in sorted(by_value)
        ]
        for method, by_value in groups.items()
    }


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


POLICIES = ("official", "ridge", "rank_aware")


def _variant(point: Mapping[str, Any]) -> str:
    """A method with the value of its knob."""
    knob = point["knob"]
    label = str(point["method_label"])
    if knob is None or knob["value"] is None:
        return label
    value = knob["value"]
    return f"{label}, {knob['name']} = {value:.4g}" if not isinstance(value, str) else label


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return {"mean": None, "min": None, "max": None, "quartiles": None}
    quartiles = (
        statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    )
    return {
        "mean": statistics.fmean(found),
        "min": min(found),
        "max": max(found),
        "quartiles": quartiles,
    }


def summarise(points: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means, extremes and quartiles of each method over its points.

    Args:
        points: Points of a sweep by name.

    Returns:
        Plain values: by method, RIR under each rank policy with how many are below 1, share of the
        ceiling, seconds, and slow-downs where they were measured.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points.values():
        groups.setdefault(_variant(point), []).append(point)
    methods: dict[str, Any] = {}
    for name, members in groups.items():
        rir = {}
        for policy in POLICIES:
            values = [_float(point["rir"][policy]) for point in members]
            rir[policy] = _spread(values) | {"below_1": sum(value < 1.0 for value in values)}
        methods[name] = {
            "points": len(members),
            "rir": rir,
            "share_of_ceiling": _spread([_float(p["share_of_ceiling"]) for p in members]),
            "seconds_immunize": sum(_float(p["seconds"]["immunize"]) for p in members),
            "seconds_total": sum(_float(p["seconds"]["total"]) for p in members),
            "slowdown": {
                role: {
                    attacker: _spread([_float(p["slowdown"][role][attacker]) for p in members])
                    | {"not_slower": sum(p["slowdown"][role][attacker] <= 1.05 for p in members)}
                    for attacker in members[0]["slowdown"][role]
                }
                for role in ("harmful", "primary")
            },
        }
    first = next(iter(points.values()))
    return {
        "kind": "kappa-sweep",
        "points": len(points),
        "methods": methods,
        "environment": first["environment"],
    }


def heat_map(
    points: Mapping[str, Mapping[str, Any]], method: str, policy: str = "official"
) -> tuple[list[str], list[str], np.ndarray]:
    """Log RIR of one method by pair of tasks, mean over seeds.

    Args:
        points: Points of a sweep by name.
        method: A key of ``summarise(points)["methods"]``.
        policy: Rank policy of the RIR.

    Returns:
        Harmful tasks (rows), primary tasks (columns) and the matrix, NaN where there is no point.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    for point in points.values():
        if _variant(point) == method:
            request = point["request"]
            harmful = "+".join(request["harmful"]) or point["tasks"]["harmful"]["name"]
            primary = request["primary"] or point["tasks"]["primary"]["name"]
            value = _float(point["log_rir"][policy])
            cells.setdefault((harmful, primary), []).append(value)
    rows = sorted({row for row, _ in cells})
    columns = sorted({column for _, column in cells})
    matrix = np.full((len(rows), len(columns)), math.nan)
    for (row, column), values in cells.items():
        matrix[rows.index(row), columns.index(column)] = statistics.fmean(values)
    return rows, columns, matrix


def _draw_sweep(
    axes: Axes, points: Mapping[str, Mapping[str, Any]], method: str, limit: float
) -> None:
    rows, columns, matrix = heat_map(points, method)
    # Diverging around log RIR 0: below it the primary task got relatively worse.
    axes.imshow(matrix, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.grid(False)
    axes.set_xlabel("primary task")
    axes.set_ylabel("harmful task")
    if matrix.size <= 144:
        for (i, j), value in np.ndenumerate(matrix):
            if not math.isnan(value):
                dark = abs(value) > 0.55 * limit
                axes.text(
                    j,
                    i,
                    f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#ffffff" if dark else "#1b1f27",  # on the map's colours, in any page
                )
    panel_title(axes, f"log RIR (official), {method}")


def write_summary(
    folder: Path, summary: dict[str, Any], points: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write ``heatmaps.png``, ``report.html`` and, last, ``results.json`` into a sweep directory.

    Args:
        folder: The sweep directory.
        summary: What :func:`summarise` gave.
        points: The points by name.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    methods = list(summary["methods"])
    matrices = [heat_map(points, method)[2] for method in methods]
    limit = max([1e-9, *(float(np.nanmax(np.abs(matrix))) for matrix in matrices)])

    def drawing(method: str) -> Any:
        return lambda axes: _draw_sweep(axes, points, method, limit)

    shown = methods[:12]
    svg = [
        panel_svg(drawing(method), f"map-{index}", size=(5.4, 4.6))
        for index, method in enumerate(shown)
    ]
    png = panels_png([drawing(method) for method in shown], columns=min(2, len(shown)))
    _write_bytes(folder / "heatmaps.png", png)
    _write_bytes(folder / "report.html", _page(summary, shown, svg).encode())
    temporary = folder / ".results.json"
    write_json(temporary, summary)
    temporary.replace(folder / "results.json")


def _write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _rir_table(summary: dict[str, Any]) -> str:
    rows = []
    for name, entry in summary["methods"].items():
        official, ridge = entry["rir"]["official"], entry["rir"]["ridge"]
        rows.append(
            (
                escape(name),
                str(entry["points"]),
                f"<b>{_sweep_cell(official['mean'])}</b>",
                f"{_sweep_cell(official['min'])} to {_sweep_cell(official['max'])}",
                str(official["below_1"]),
                _sweep_cell(ridge["mean"]),
                f"{_float(entry['share_of_ceiling']['mean']):.1%}",
                f"{entry['seconds_immunize']:.1f}",
            )
        )
    header = (
        "Method",
        "points",
        "RIR official",
        "range",
        "below 1",
        "RIR ridge",
        "of ceiling",
        "s",
    )
    return table(header, rows)


def _sweep_cell(value: Any) -> str:
    return number(_float(value))


def _slowdown_table(summary: dict[str, Any]) -> str:
    rows = []
    for name, entry in summary["methods"].items():
        for attacker, harm in entry["slowdown"]["harmful"].items():
            cost = entry["slowdown"]["primary"][attacker]
            low, median, high = harm["quartiles"]
            rows.append(
                (
                    f"{escape(name)}, {escape(attacker.replace('_', ' '))}",
                    f"<b>{_sweep_cell(median)}×</b> <small>{_sweep_cell(low)} to {_sweep_cell(high)}</small>",
                    f"{harm['not_slower']} of {entry['points']}",
                    f"<b>{_sweep_cell(cost['quartiles'][1])}×</b>",
                )
            )
    if not rows:
        return (
            "<p>No attacker was run: RIR alone does not tell who is slowed. Sweep again with "
            "<code>--attackers gradient_descent</code>.</p>"
        )
    return table(("Attacker", "harm, median", "harm not slowed", "primary, median"), rows)


def _page(summary: dict[str, Any], shown: Sequence[str], svg: Sequence[str]) -> str:
    figures = "".join(
        f"<figure>{drawing}<figcaption>{escape(method)}: mean RIR "
        f"{_sweep_cell(summary['methods'][method]['rir']['official']['mean'])}, least "
        f"{_sweep_cell(summary['methods'][method]['rir']['official']['min'])}.</figcaption></figure>"
        for method, drawing in zip(shown, svg, strict=True)
    )
    title = f"{summary['points']} immunizations"
    body = f"""<header>
<p class="kicker">Condition-number sweep</p>
<h1>{title}</h1>
<p>RIR compares condition numbers before and after: above 1, the harmful task's grew relative to
the primary task's. It says how far the two were driven apart, not who is slowed. A person who
whitens the features first, or solves for the head in closed form, is not slowed at all.</p>
</header>
<section><h2>RIR by method</h2>{_rir_table(summary)}</section>
<section><h2>Slow-downs</h2>{_slowdown_table(summary)}</section>
<section><h2>By pair of tasks</h2>
<p>Orange: RIR above 1. Purple: below.</p>
<div class="figures">{figures}</div></section>"""
    return document(title, body)
