"""Finished text-to-image runs as rows, and what a report says about several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from immunize_ext.report.page import Page, Panel, register
from immunize_ext.report.tables import text_table
from immunize_ext.report.words import count, percent
from immunize_ext.text_to_image import plots

Results = Mapping[str, Any]


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
        strongest: MSGR of the strongest attack at the last judged step; ``None`` in schema 1.
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
    strongest: float | None = None


def row_of(name: str, results: Results) -> Row:
    """One run's results as a row."""
    mima, settings = results["mima"], results["immunizer"]
    before, after = mima.get("retained_before"), mima.get("retained_after")
    evaluation = results.get("evaluation")
    strongest = (
        None
        if evaluation is None
        else evaluation["summary"][evaluation["strongest"]]["msgr"]["final"]["mean"]
    )
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
        strongest=strongest if isinstance(strongest, (int, float)) else None,
    )


def rows_of(name: str, results: Results) -> list[Row]:
    """The rows of a run or of a sweep.

    Args:
        name: Name of its folder.
        results: Content of its ``results.json``.
    """
    if results["kind"] == "mima-sweep":
        return [Row(**row) for row in results["rows"]]
    return [row_of(name, results)]


def comparison_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The results, of kind ``mima-sweep``, of several runs.

    Args:
        rows: The runs.
    """
    return {"schema": 2, "kind": "mima-sweep", "rows": [asdict(row) for row in rows]}


def _varied(rows: Sequence[Row]) -> list[str]:
    """Knobs that have more than one value among the rows."""
    found = []
    for knob in KNOBS:
        values = {getattr(row, knob) for row in rows}
        if None not in values and len(values) > 1:
            found.append(knob)
    return found


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


@register("mima-sweep")
def page(results: Results) -> Page:
    """The page of several runs.

    Args:
        results: What :func:`comparison_of` gave.
    """
    rows = [Row(**row) for row in results["rows"]]
    panels = [
        Panel(
            plots.protection_and_cost(rows),
            "Up: harder to teach again. Left of the dotted line more than 0.05 of what the model "
            "shall keep is lost.",
            "MSGR against the change of what is kept, a mark for each run",
        )
    ]
    for knob in _varied(rows):
        for value, words in (("msgr", "MSGR"), ("retained_change", "what is kept")):
            drawn = plots.over_knob(rows, knob, KNOBS[knob], value)
            caption = f"{words[0].upper()}{words[1:]} over the {KNOBS[knob]}; line: mean."
            panels.append(Panel(drawn, caption, f"{words} over the {KNOBS[knob]}"))
    cells = [
        [
            row.name,
            row.method,
            str(row.concepts),
            *map(_number, (row.msgr, row.strongest, row.retained_change, row.control)),
            f"{row.seconds:.0f} s",
            percent(row.merge_share, 1),
        ]
        for row in rows
    ]
    title = f"{count(len(rows), 'run')} compared"
    return Page(title, "mima_sweep.html.j2", {"rows": cells}, {"comparison": panels})


def summary(results: Results) -> str:
    """The rows in plain text."""
    table = [["run", "method", "concepts", "MSGR", "strongest, last", "kept", "control"]]
    for values in results["rows"]:
        row = Row(**values)
        found = map(_number, (row.msgr, row.strongest, row.retained_change, row.control))
        table.append([row.name, row.method, str(row.concepts), *found])
    return text_table(table)
