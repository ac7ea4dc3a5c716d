"""One report of several text-to-image runs: protection against what it costs, run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext.report.document import document
from immunize_ext.report.drawing import COLOURS, panel_svg, title
from immunize_ext.report.run_directory import run_directory, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What a sweep may vary, and how the axis is called.
KNOBS = {
    "concepts": "number of concepts",
    "captions": "captions in C_reg",
    "inner_steps": "inner steps",
    "ridge": "ridge, relative",
}


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: Name of its folder or point.
        method: Name of the method.
        concepts: Number of concepts immunized against.
        captions: Number of captions of C_reg.
        inner_steps: Inner steps, where the method has them.
        ridge: Ridge of the merge, where the method has one.
        msgr: MSGR where the unprotected model is taught again; ``None`` if it never was.
        retained_change: Change of what is kept; ``None`` if it was not measured.
        control: Gap of the control; ``None`` without one.
        seconds: Seconds of the immunizer.
        merge_share: Share of them spent merging.
    """

    name: str
    method: str
    concepts: int
    captions: int
    inner_steps: int | None
    ridge: float | None
    msgr: float | None
    retained_change: float | None
    control: float | None
    seconds: float
    merge_share: float


def row_of(name: str, results: Mapping[str, Any]) -> Row:
    """One run's results as a row."""
    mima, settings = results["mima"], results["immunizer"]
    before, after = mima.get("retained_before"), mima.get("retained_after")
    return Row(
        name=name,
        method=results["method"],
        concepts=len(settings["concepts"]),
        captions=int(settings["captions"]),
        inner_steps=settings.get("inner_steps"),
        ridge=settings.get("ridge"),
        msgr=mima.get("msgr"),
        retained_change=None if before is None or after is None else after - before,
        control=mima.get("control_sgr"),
        seconds=results["seconds"]["immunize"],
        merge_share=mima["merge_share"],
    )


def rows_of(folder: Path, results: Mapping[str, Any]) -> list[Row]:
    """The rows of a run or of a sweep."""
    if results["kind"] == "mima-sweep":
        return [Row(**row) for row in results["rows"]]
    return [row_of(folder.name, results)]


def _scatter(axes: Axes, rows: Sequence[Row]) -> None:
    title(axes, "Protection against what it costs")
    for row in rows:
        if row.msgr is None or row.retained_change is None:
            continue
        axes.plot(row.retained_change, row.msgr, "o", color=COLOURS["--harmful"], markersize=7)
        axes.annotate(
            f" {row.name}",
            (row.retained_change, row.msgr),
            fontsize=9,
            color=COLOURS["--muted"],
            va="center",
        )
    axes.axvline(-0.05, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
    axes.set_xlabel("change of what is kept")
    axes.set_ylabel("MSGR")


def _line(axes: Axes, rows: Sequence[Row], knob: str, value: str) -> None:
    words = {"msgr": "MSGR", "retained_change": "change of what is kept"}
    title(axes, f"{words[value]} over the {KNOBS[knob]}")
    colour = COLOURS["--harmful" if value == "msgr" else "--primary"]
    places = sorted({getattr(row, knob) for row in rows})
    means = []
    for place in places:
        found = [
            getattr(row, value)
            for row in rows
            if getattr(row, knob) == place and getattr(row, value) is not None
        ]
        axes.plot([place] * len(found), found, "o", color=colour, alpha=0.4, markersize=5)
        means.append(sum(found) / len(found) if found else float("nan"))
    axes.plot(places, means, color=colour)
    if knob == "ridge" and min(places) > 0:
        axes.set_xscale("log")
    axes.set_xlabel(KNOBS[knob])


def _varied(rows: Sequence[Row]) -> list[str]:
    """Knobs that have more than one value among the rows."""
    found = []
    for knob in KNOBS:
        values = {getattr(row, knob) for row in rows}
        if None not in values and len(values) > 1:
            found.append(knob)
    return found


def write_comparison(rows: Sequence[Row], target: str | Path, *, force: bool = False) -> Path:
    """Write a folder with ``report.html`` and ``results.json``: all of it or nothing.

    Args:
        rows: The runs.
        target: The folder.
        force: Whether an existing one is replaced.

    Returns:
        The folder.

    Raises:
        FileExistsError: If it exists and ``force`` is not given, or is no run directory.
    """
    panels = {"cost": partial(_scatter, rows=rows)}
    for knob in _varied(rows):
        for value in ("msgr", "retained_change"):
            panels[f"{knob}-{value}"] = partial(_line, rows=rows, knob=knob, value=value)
    figures = "".join(
        f"<figure>{panel_svg(draw, f't2i-{name}')}</figure>" for name, draw in panels.items()
    )
    cells = "".join(
        f"<tr><th scope=row>{escape(row.name)}</th><td>{escape(row.method)}</td>"
        f"<td>{row.concepts}</td>"
        + "".join(
            f"<td>{'not measured' if v is None else f'{v:.2f}'}</td>"
            for v in (row.msgr, row.retained_change, row.control)
        )
        + f"<td>{row.seconds:.0f} s</td><td>{row.merge_share:.1%}</td></tr>"
        for row in rows
    )
    page = document(
        "Text-to-image immunizations compared",
        f"""<header><p class="kicker">Immunization report</p>
<h1>{len(rows)} runs compared</h1></header>
<section><h2>Protection and cost</h2>
<p>MSGR at the step where the unprotected model is taught again: 1 is full protection. Left of the
dotted line more than 0.05 of what the model shall keep is lost.</p>
<div class="figures">{figures}</div></section>
<section><h2>In numbers</h2><div class="scroll"><table><thead><tr><th>Run</th><th>Method</th>
<th>Concepts</th><th>MSGR</th><th>Change of what is kept</th><th>Gap of the control</th>
<th>Immunizer</th><th>Merging</th></tr></thead><tbody>{cells}</tbody></table></div></section>""",
    )
    with run_directory(target, force=force) as folder:
        (folder / "report.html").write_text(page, encoding="utf-8")
        rows_as_values = [asdict(row) for row in rows]
        write_json(folder / "results.json", {"kind": "mima-sweep", "rows": rows_as_values})
    return Path(target)
