"""What a report says about several condition-number runs, and about a sweep of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from immunize_ext.probing import plots
from immunize_ext.probing.comparison import (
    BUDGETS,
    HEADLINE_BUDGET,
    WORST,
    WORST_STEPWISE,
    Point,
    common_attackers,
)
from immunize_ext.probing.results import (
    Cell,
    SlowdownExtent,
    SweepMethod,
    attackers_of,
)
from immunize_ext.quantities import Slowdown, binomial_interval
from immunize_ext.report.page import Page, Panel, register
from immunize_ext.report.tables import text_table
from immunize_ext.report.words import count, number, percent, real

Results = Mapping[str, Any]


_KEY = f"{HEADLINE_BUDGET:g}"


_WORST_LABELS = {
    WORST: "The worst of these attackers",
    WORST_STEPWISE: "The worst of those who train step by step",
}


# Runs in the table of all runs, tasks in the list, and maps in the page, before it gets too long.
_RUNS, _TASKS, _MAPS = 200, 20, 12


# --- comparisons --------------------------------------------------------------------------------


def _is_old(results: Results) -> bool:
    """Whether it is of schema 1, which did not keep which slow-downs of runs are lower bounds."""
    return any("slowdown_is_lower_bound" not in run for run in results["runs"])


def _migrated(results: Results) -> Results:
    """A comparison as it is written now: in schema 1 only the stepwise ones made up the worst."""
    if not _is_old(results):
        return results
    renamed = {
        key: {WORST_STEPWISE if n == WORST else n: found for n, found in results[key].items()}
        for key in ("equal_primary_slowdown", "frontier")
    }
    return {**results, **renamed}


def _labels(results: Results, points: list[Point]) -> dict[str, str]:
    known = {n: info.label for n, info in common_attackers(points).items()} | _WORST_LABELS
    return {n: known.get(n, n) for n in results["equal_primary_slowdown"]}


def _at_least(value: Any, is_lower_bound: bool) -> str:
    return f"{'≥ ' if is_lower_bound else ''}{number(value)}×"


def _bounds(cell: Cell) -> Mapping[str, bool]:
    """Which numbers of a cell are lower bounds; schema 1 says how many, not which."""
    some = bool(cell["lower_bounds"])
    found: Mapping[str, bool] = cell.get("is_lower_bound") or dict.fromkeys(
        ("median", "min", "max"), some
    )
    return found


def _cell(cell: Cell) -> Any:
    if cell["median"] is None:
        return "no run within"
    bound, small = _bounds(cell), ""
    if cell["of"] > 1:
        low = _at_least(cell["min"], bound["min"])
        high = _at_least(cell["max"], bound["max"])
        small = f"{low} to {high}, {cell['cells']} of {cell['of']}"
    return {"main": _at_least(cell["median"], bound["median"]), "small": small}


def _cost_rows(cells: Mapping[str, Mapping[str, Cell]]) -> list[list[Any]]:
    def median(method: str) -> float:
        found = cells[method][_KEY]["median"]
        return -math.inf if found is None else real(found)

    order = sorted(cells, key=median, reverse=True)
    return [[m, *(_cell(cells[m][f"{budget:g}"]) for budget in BUDGETS)] for m in order]


def headline(results: Results, attacker: str, label: str) -> str:
    """The best method at no cost, under one attacker, in a few words."""
    cells = {m: found[_KEY] for m, found in results["equal_primary_slowdown"][attacker].items()}
    reached = {m: real(cell["median"]) for m, cell in cells.items() if cell["median"] is not None}
    if not reached or max(reached.values()) <= 1.05:
        return "No method slows the harm for free"
    best = max(reached, key=lambda method: reached[method])
    bound = "at least " if _bounds(cells[best])["median"] else ""
    return (
        f"{best}: {bound}{reached[best]:.3g} times slower to misuse by {label.lower()}, no slower "
        "to use"
    )


def _worst_case(results: Results, labels: Mapping[str, str]) -> str:
    """One sentence that counts every attacker that the runs share."""
    if WORST not in labels:
        return ""
    cells = [found[_KEY] for found in results["equal_primary_slowdown"][WORST].values()]
    known = [Slowdown(real(c["median"]), _bounds(c)["median"]) for c in cells if c["cells"]]
    if not known:
        return ""
    return (
        f"An attacker who may choose among all that were tried is slowed {_at_least(*max(known))}."
    )


def _run_rows(points: list[Point], attacker: str) -> list[list[str]]:
    rows = []
    for point in points:
        pair = point.pair(attacker)
        knob = "" if point.knob is None else f"{point.knob[0]} = {_knob(point.knob[1])}"
        cost, harm = ("", "") if pair is None else (_at_least(s.ratio, s.censored) for s in pair)
        rows.append(
            [
                point.method,
                knob,
                harm,
                cost,
                number(point.rir["official"]),
                number(point.rir["ridge"]),
                percent(point.share_of_ceiling, 1),
                f"{point.seconds:.2f}",
            ]
        )
    return rows


def _knob(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _left_out(points: list[Point]) -> list[str]:
    """What some runs were attacked by and others not: it cannot be compared, and may be worse."""
    common = common_attackers(points)
    found: dict[str, tuple[str, list[Slowdown]]] = {}
    for point in points:
        for name, harm in point.slowdown["harmful"].items():
            if name not in common:
                found.setdefault(name, (point.attackers[name].label, []))[1].append(harm)
    return [
        f"{label} attacked {len(harms)} of {count(len(points), 'run')} and is left out of the "
        f"comparison; the least slow-down of the harm was {_at_least(*min(harms))}."
        for label, harms in found.values()
    ]


@register("kappa-comparison")
def page(results: Results) -> Page:
    """The page of a comparison.

    Args:
        results: What :func:`immunize_ext.probing.comparison.compare` gave.
    """
    old = _is_old(results)
    results = _migrated(results)
    points = [Point.from_dict(run) for run in results["runs"]]
    labels = _labels(results, points)
    infos = common_attackers(points)
    first = next((name for name in labels if name in infos and infos[name].sees_theta), None)
    first = next(iter(labels)) if first is None else first
    methods = list(dict.fromkeys(point.method for point in points))
    tasks = list(dict.fromkeys(point.tasks for point in points))
    drawn = [n for n in labels if n == WORST_STEPWISE or (n in infos and infos[n].sees_theta)]
    tables = {
        name: {"label": label, "rows": _cost_rows(results["equal_primary_slowdown"][name])}
        for name, label in labels.items()
    }
    # The first attacker and the worst ones decide; the others are a click away.
    shown = [n for n in dict.fromkeys((first, *_WORST_LABELS)) if n in tables]
    notes = _left_out(points)
    if old:
        notes.append(
            "An earlier version wrote this comparison and did not keep which slow-downs of single "
            "runs are lower bounds."
        )
    return Page(
        headline(results, first, labels[first]),
        "kappa_comparison.html.j2",
        {
            "runs": len(points),
            "pairs": len(tasks),
            "worst_case": _worst_case(results, labels),
            "attacker": labels[first].lower(),
            "header": ["Method", *(f"primary ≤ {budget:g}×" for budget in BUDGETS)],
            "shown": [tables[name] for name in shown],
            "folded": [found for name, found in tables.items() if name not in shown],
            "rows": _run_rows(points, first) if len(points) <= _RUNS else [],
            "tasks": tasks[:_TASKS],
            "more_tasks": max(0, len(tasks) - _TASKS),
            "warnings": [],
            "notes": notes,
        },
        {
            "frontier": [
                Panel(
                    plots.frontier(
                        labels[name],
                        results["frontier"][name],
                        _marks(points, name, list(infos)),
                        methods,
                    ),
                    f"{labels[name]}: up is harder to misuse, right of the dotted line is harder "
                    "to use.",
                    f"Slow-down of the harm against that of the task to keep: {labels[name]}",
                    (7.2, 4.65),
                )
                for name in drawn
            ]
        },
    )


def _marks(
    points: list[Point], attacker: str, among: list[str]
) -> dict[str, list[tuple[float, float]]]:
    """Single runs by method: primary and harmful slow-down."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        pair = point.pair(attacker, among)
        if pair is not None:
            found.setdefault(point.method, []).append((pair[0].ratio, pair[1].ratio))
    return found


def _plain_cell(cell: Cell | None) -> str:
    if cell is None or cell["median"] is None:
        return "no run within"
    share = "" if cell["of"] == 1 else f" ({cell['cells']} of {cell['of']})"
    return f"{_at_least(cell['median'], _bounds(cell)['median'])}{share}"


def summary(results: Results) -> str:
    """The slow-downs at no cost in plain text."""
    results = _migrated(results)
    points = [Point.from_dict(run) for run in results["runs"]]
    labels = _labels(results, points)
    methods = list(dict.fromkeys(point.method for point in points))
    rows = [["attacker", *methods]]
    for name, label in labels.items():
        cells = results["equal_primary_slowdown"][name]
        rows.append([label, *(_plain_cell(cells.get(method, {}).get(_KEY)) for method in methods)])
    heading = "Slow-down of the harm where the task to keep is no slower than before:"
    return "\n".join([heading, "", text_table(rows), *_left_out(points)])


# --- sweeps -------------------------------------------------------------------------------------


def _rir_rows(results: Results) -> list[list[Any]]:
    rows = []
    for name, entry in results["methods"].items():
        official, ridge = entry["rir"]["official"], entry["rir"]["ridge"]
        rows.append(
            [
                name,
                str(entry["points"]),
                {"main": number(official["mean"])},
                f"{number(official['min'])} to {number(official['max'])}",
                _of(official["below_1"], entry["points"]),
                number(ridge["mean"]),
                percent(entry["share_of_ceiling"]["mean"], 1),
                f"{entry['seconds_immunize']:.1f}",
            ]
        )
    return rows


def _of(found: int, trials: int) -> Any:
    """``0 of 6``, with its interval."""
    low, high = binomial_interval(found, trials)
    return {"main": f"{found} of {trials}", "small": f"{low:.0%} to {high:.0%} at 95%"}


def _quartiles(spread: SlowdownExtent) -> list[str]:
    # Schema 1 did not keep which are lower bounds.
    bounds = spread["is_lower_bound"]["quartiles"] if "is_lower_bound" in spread else [False] * 3
    return [_at_least(*pair) for pair in zip(spread["quartiles"] or (), bounds, strict=True)]


def _slowdown_rows(results: Results) -> list[list[Any]]:
    methods: dict[str, SweepMethod] = results["methods"]
    attackers = {name: 1.0 for entry in methods.values() for name in entry["slowdown"]["harmful"]}
    infos = attackers_of({**results, "slowdown": {"harmful": attackers}})
    rows = []
    for name, entry in methods.items():
        for attacker, harm in entry["slowdown"]["harmful"].items():
            low, median, high = _quartiles(harm)
            cost = _quartiles(entry["slowdown"]["primary"][attacker])
            rows.append(
                [
                    f"{name}, {infos[attacker].label.lower()}",
                    {"main": median, "small": f"{low} to {high}"},
                    _of(harm["not_slower"], entry["points"]),
                    {"main": cost[1], "small": f"{cost[0]} to {cost[2]}"},
                ]
            )
    return rows


@register("kappa-sweep")
def sweep_page(results: Results) -> Page:
    """The page of a sweep.

    Args:
        results: What :func:`immunize_ext.probing.comparison.summarise` gave.
    """
    maps = dict(list(results.get("maps", {}).items())[:_MAPS])
    known = [
        abs(real(value))
        for found in maps.values()
        for row in found["log_rir"]
        for value in row
        if not math.isnan(real(value))
    ]
    limit = max([1e-9, *known])
    notes = []
    measured = [
        spread for e in results["methods"].values() for spread in e["slowdown"]["harmful"].values()
    ]
    if any("is_lower_bound" not in spread for spread in measured):
        notes.append(
            "An earlier version wrote this sweep and did not keep which slow-downs were cut off by "
            "their budget: read each as “at least”."
        )
    panels = []
    for name, found in maps.items():
        official = results["methods"][name]["rir"]["official"]
        panels.append(
            Panel(
                plots.heat(f"log RIR (official), {name}", found, limit),
                f"{name}: mean RIR {number(official['mean'])}, least {number(official['min'])}.",
                f"Log RIR by pair of tasks, {name}",
                (5.4, 4.6),
            )
        )
    return Page(
        count(results["points"], "immunization"),
        "kappa_sweep.html.j2",
        {
            "ratios": _rir_rows(results),
            "slowdowns": _slowdown_rows(results),
            "warnings": [],
            "notes": notes,
            "run": results["environment"],
        },
        {"heatmaps": panels},
        columns=min(2, max(1, len(panels))),
    )


def sweep_summary(results: Results) -> str:
    """RIR by method in plain text."""
    rows = [("method", "points", "RIR official: mean", "least", "below 1", "share of ceiling")]
    for name, entry in results["methods"].items():
        official = entry["rir"]["official"]
        rows.append(
            (
                name,
                str(entry["points"]),
                number(official["mean"]),
                number(official["min"]),
                str(official["below_1"]),
                percent(entry["share_of_ceiling"]["mean"], 1),
            )
        )
    return text_table(rows)
