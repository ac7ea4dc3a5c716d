"""What a finished sweep over pairs of tasks says: summary, heat maps, page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from immunize_ext.report.document import document
from immunize_ext.report.drawing import panel_svg, panels_png
from immunize_ext.report.drawing import title as panel_title
from immunize_ext.report.html import number
from immunize_ext.report.kappa_sections import table
from immunize_ext.report.run_directory import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def _draw(axes: Axes, points: Mapping[str, Mapping[str, Any]], method: str, limit: float) -> None:
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
        return lambda axes: _draw(axes, points, method, limit)

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
                f"<b>{_cell(official['mean'])}</b>",
                f"{_cell(official['min'])} to {_cell(official['max'])}",
                str(official["below_1"]),
                _cell(ridge["mean"]),
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


def _cell(value: Any) -> str:
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
                    f"<b>{_cell(median)}×</b> <small>{_cell(low)} to {_cell(high)}</small>",
                    f"{harm['not_slower']} of {entry['points']}",
                    f"<b>{_cell(cost['quartiles'][1])}×</b>",
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
        f"{_cell(summary['methods'][method]['rir']['official']['mean'])}, least "
        f"{_cell(summary['methods'][method]['rir']['official']['min'])}.</figcaption></figure>"
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
