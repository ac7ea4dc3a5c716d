"""The sections of a report that show a text-to-image immunization."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from immunize_ext.metrics.spread import Spread
from immunize_ext.report.attack_runs import SIDES
from immunize_ext.report.document import document, facts
from immunize_ext.report.text_to_image_evaluation import TextToImageEvaluation
from immunize_ext.report.text_to_image_plots import draw_curves_svg, image_grid, png_of

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
