"""The sections of a report that show a text-to-image immunization."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext.quantities import Spread
from immunize_ext.report.page import document, facts
from immunize_ext.report.plots import COLOURS, panel_svg, title
from immunize_ext.storage import run_directory, write_json
from immunize_ext.text_to_image.attack_runs import SIDES
from immunize_ext.text_to_image.evaluation import TextToImageEvaluation
from immunize_ext.text_to_image.plots import draw_curves_svg, image_grid, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


ATTACK_LABELS = {
    "lora": "LoRA",
    "lora_attn2": "LoRA on cross-attention",
    "full_fine_tuning": "Full fine-tuning",
    "attn2_fine_tuning": "Fine-tuning of cross-attention",
    "kv_fine_tuning": "Fine-tuning of K and V",
    "dreambooth": "DreamBooth",
    "dreambooth_without_prior": "DreamBooth without prior preservation",
    "dreambooth_lora": "DreamBooth with LoRA",
    "textual_inversion": "Textual Inversion",
    "custom_diffusion": "Custom Diffusion",
}


METHOD_LABELS = {
    "mima": "MIMA",
    "imma": "IMMA",
    "joint_training": "Joint training",
    "merge_only": "Merge of separate immunizations",
    "loss_ascent": "Plain loss ascent",
}


def label(attack: str) -> str:
    """An attack in words."""
    return ATTACK_LABELS.get(attack, attack.replace("_", " "))


def headline(evaluation: TextToImageEvaluation) -> str:
    """The verdict in a few words, no better than the worst number allows."""
    at_threshold = evaluation.msgr_at_threshold()
    broken = evaluation.reached(evaluation.strongest()) >= evaluation.threshold
    if at_threshold is None or at_threshold.mean < 0.2:
        return "No protection that could be measured"
    if at_threshold.mean < 0.8:
        return "Slower to teach again, partly"
    return "Slower to teach again, not locked" if broken else "Slower to teach again"


def _percent(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.0%}"


def _with_spread(spread: Spread | None) -> str:
    if spread is None or math.isnan(spread.mean):
        return "not measured"
    text = f"{spread.mean:.2f}"
    if len(spread.known) > 1:
        text += f" <small>{spread.minimum:.2f} to {spread.maximum:.2f}</small>"
    return text


def cards(evaluation: TextToImageEvaluation) -> str:
    """Three numbers to begin with."""
    at_threshold, delay = evaluation.msgr_at_threshold(), evaluation.delay()
    gap = "n/a" if at_threshold is None else f"{at_threshold.mean:.2f}"
    ratio = "n/a" if delay.slowdown is None else str(delay.slowdown).replace("x", "×")
    measure = evaluation.measures[0]
    before, after = (
        kept[measure].mean.mean if measure in kept else math.nan
        for kept in (evaluation.retained_before, evaluation.retained_after)
    )
    found = (
        ("harmful", gap, f"MSGR against {label(evaluation.attacks[0])}: 1 is full protection"),
        ("harmful", ratio, "the steps to teach the concepts again"),
        (
            "primary",
            _percent(after),
            f"of what it shall still draw is right, {_percent(before)} before",
        ),
    )
    return "".join(
        f'<div class="card {role}"><b>{escape(value)}</b><span>{escape(words)}</span></div>'
        for role, value, words in found
    )


def verdict(evaluation: TextToImageEvaluation, results: Mapping[str, Any]) -> str:
    """What was protected, against whom, at what cost, and against whom not."""
    method = METHOD_LABELS.get(results["method"], results["method"])
    names = ", ".join(evaluation.targets)
    primary, strongest = label(evaluation.attacks[0]), evaluation.strongest()
    reached = evaluation.reached(strongest)
    control = evaluation.control_gap()
    change = evaluation.retained_change() if evaluation.retained_after else None
    cost = (
        "What it shall keep was not measured: no concepts to keep were given."
        if change is None
        else f"What it shall still draw changed by {change.mean:+.1%} in {evaluation.measures[0]}."
    )
    new_word = evaluation.new_word_gap()
    if new_word is not None:
        cost += (
            " Teaching it something new for a good purpose is "
            + ("hardly slowed" if abs(new_word.final.mean) < 0.1 else "slowed too")
            + f" (gap {new_word.final.mean:.2f} at the end)."
        )
    if strongest == evaluation.attacks[0]:
        against = f"Of the attacks tried, {label(strongest)} does best: "
    else:
        against = f"{label(strongest)} does best of the attacks tried: "
    against += f"it reaches {reached:.0%} {evaluation.measures[0]}. "
    against += evaluation.delay(strongest).sentence(label(strongest))
    specific = ""
    if control is not None and evaluation.threshold_step() is not None:
        step = evaluation.threshold_step()
        assert step is not None
        specific = (
            f" A concept that was erased and not immunized is re-taught as before (gap "
            f"{control.at(step).mean:.2f}), so the protection is specific."
            if abs(control.at(step).mean) <= 0.1
            else f" A concept that was erased and not immunized is held up as well (gap "
            f"{control.at(step).mean:.2f}): part of the protection is damage to the model."
        )
    items = (
        (
            "What was protected",
            f"A text-to-image model in which the concepts <em>{escape(names)}</em> had been "
            f"erased; {method} makes them hard to teach again.",
        ),
        (
            "Against whom",
            f"Someone who trains the model on a few images of a concept: "
            f"{primary}. {evaluation.delay().sentence(primary)}{specific}",
        ),
        ("At what cost", cost),
        ("Not against", f"{against} Whoever trains longer, harder or other layers gets there."),
    )
    return "".join(f"<div><dt>{term}</dt><dd>{text}</dd></div>" for term, text in items)


def _attack_table(evaluation: TextToImageEvaluation) -> str:
    rows = []
    for attack in evaluation.attacks:
        steps = evaluation.comparison(attack, evaluation.targets[0]).steps
        before, after = (
            " ".join(f"{spread.mean:.2f}" for spread in evaluation.target_scores(side, attack))
            for side in SIDES
        )
        delay = str(evaluation.delay(attack)).replace("x", "×")
        cost = evaluation.costs()[attack]
        rows.append(
            f"<tr><th scope=row>{escape(label(attack))}</th><td>{before}</td><td>{after}</td>"
            f"<td><b>{escape(delay)}</b></td>"
            f"<td>{_with_spread(evaluation.msgr_at_threshold(attack))}</td>"
            f"<td>{cost.seconds_per_step.mean:.2f} s <small>{cost.trained_parameters:,} "
            "numbers</small></td></tr>"
        )
    heading = "/".join(map(str, steps))
    return (
        '<div class="scroll"><table><thead><tr><th>Attack</th>'
        f"<th>Without, after {heading} steps</th><th>Immunized</th><th>Delay</th><th>MSGR</th>"
        f"<th>Cost of a step</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _method_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    body = "".join(
        f"<tr><th scope=row>{escape(METHOD_LABELS.get(row['method'], row['method']))}</th>"
        f"<td>{_with_spread(Spread.of(row['msgr']))}</td>"
        f"<td>{_with_spread(Spread.of(row['retained_change']))}</td>"
        f"<td>{_with_spread(Spread.of(row['control']))}</td>"
        f"<td>{row['source']}</td></tr>"
        for row in rows
    )
    return f"""<section><h2>Compared with simpler methods</h2>
<p>The same steps, batches and retain term for all. Plain loss ascent neither adapts nor merges; a
method that does not beat it has not shown that its parts matter.</p>
<div class="scroll"><table><thead><tr><th>Method</th><th>MSGR</th><th>Change of what is kept</th>
<th>Gap of the control</th><th>Measured</th></tr></thead><tbody>{body}</tbody></table></div>
</section>"""


def _grids(evaluation: TextToImageEvaluation) -> str:
    attack = evaluation.attacks[0]
    figures = []
    wanted = [*evaluation.targets, *(c.concept for c in evaluation.with_role("control", attack))]
    for concept in wanted:
        picture = image_grid(evaluation, attack, concept)
        if picture is None:
            continue
        encoded = base64.b64encode(png_of(picture)).decode()
        steps = ", ".join(map(str, evaluation.comparison(attack, concept).steps))
        note = "" if concept in evaluation.targets else " (control: not immunized)"
        figures.append(
            f'<figure><img src="data:image/png;base64,{encoded}" alt="Images of {escape(concept)} '
            f'after {steps} steps of the attack, without immunization above and with it below" '
            'style="width:100%;image-rendering:pixelated">'
            f"<figcaption>{escape(concept)}{note}: after {steps} steps; above without, below with "
            "immunization.</figcaption></figure>"
        )
    if not figures:
        return ""
    return f"""<section><h2>What the attacker sees</h2>
<p>Images for the concept's prompt while {escape(label(attack))} goes on.</p>
<div class="figures">{"".join(figures)}</div></section>"""


def sections(
    evaluation: TextToImageEvaluation,
    results: Mapping[str, Any],
    *,
    methods: Sequence[Mapping[str, Any]] = (),
) -> str:
    """All sections, in HTML.

    Args:
        evaluation: What was measured.
        results: Content of ``results.json``.
        methods: Rows of the comparison of methods: ``method``, ``msgr``, ``retained_change`` and
            ``control`` as lists of one value a seed, ``source`` in HTML.

    Returns:
        ``<section>`` elements.
    """
    svg = draw_curves_svg(evaluation, ATTACK_LABELS)
    captions = {
        f"attack-{attack}": evaluation.delay(attack).sentence(label(attack))
        for attack in evaluation.attacks
    } | {
        "control": "The specificity control: it should be re-taught as fast as before.",
        "new-word": "A good purpose: this should go on as before.",
        "msgr": "Bars: mean over seeds and concepts; lines: least and largest seed.",
    }
    figures = "".join(
        f"<figure>{drawn}<figcaption>{escape(captions[name])}</figcaption></figure>"
        for name, drawn in svg.items()
    )
    seeds = len(evaluation.seeds)
    share = results.get("mima", {}).get("merge_share")
    merged = "" if not share else f" The merge took {share:.1%} of the immunizer's time."
    definitions = "".join(
        f"<li><b>{escape(name)}</b>: {escape(str(text))}</li>"
        for name, text in evaluation.to_dict()["definitions"].items()
    )
    return f"""{_grids(evaluation)}
<section><h2>Attacks, step by step</h2>
<p>Dashed: the same model without immunization. Bands: least and largest of {seeds}
{"seed" if seeds == 1 else "seeds"}; dotted: the threshold of {evaluation.threshold:g}.</p>
<div class="figures">{figures}</div></section>
<section><h2>Attacks in numbers</h2>{_attack_table(evaluation)}</section>
{_method_table(methods)}
<section><h2>Definitions</h2>
<details><summary>SGR, MSGR, RSGR, delay</summary><ul>{definitions}</ul></details>
<p class="note">{escape(merged.strip())}</p></section>"""


def page(
    evaluation: TextToImageEvaluation,
    results: Mapping[str, Any],
    *,
    methods: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole page of one run; arguments as :func:`page_body`.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    return document(headline(evaluation), page_body(evaluation, results, methods=methods))


def page_body(
    evaluation: TextToImageEvaluation,
    results: Mapping[str, Any],
    *,
    methods: Sequence[Mapping[str, Any]] = (),
) -> str:
    """What stands in the page of one run.

    Args:
        evaluation: What was measured.
        results: Content of ``results.json``.
        methods: As for :func:`sections`.

    Returns:
        HTML that stands in a document.
    """
    settings = {
        **results["config"],
        **{f"immunizer {k}": v for k, v in results["immunizer"].items()},
    }
    return f"""<header>
<p class="kicker">Immunization report</p>
<h1>{escape(headline(evaluation))}</h1>
<div class="cards">{cards(evaluation)}</div>
<dl class="verdict">{verdict(evaluation, results)}</dl>
</header>
{sections(evaluation, results, methods=methods)}
<section><h2>For specialists</h2>
<details><summary>Settings</summary>{facts(settings)}</details>
<details><summary>Run and environment</summary>{
        facts({**results["seconds"], **results["environment"]})
    }</details></section>"""


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
