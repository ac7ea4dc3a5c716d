"""The page of a report: one file, no links out, light or dark, phone or desktop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from immunize_ext.probing.attacks import ATTACKERS, AttackComparison
from immunize_ext.probing.evaluation import ATTACKER_NAMES, ROLES, UNAFFECTED, Evaluation
from immunize_ext.probing.plots import CURVES
from immunize_ext.quantities import Slowdown
from immunize_ext.report.page import document, facts
from immunize_ext.report.tables import text_table

if TYPE_CHECKING:
    from immunize_ext.probing.attacks import AttackComparison
    from immunize_ext.quantities import Slowdown


# Between these two ratios of steps, an attacker is as fast as before.
SAME = 0.95, 1.05


def times(slowdown: Slowdown) -> str:
    """``3.5×`` or ``>128×``."""
    return str(slowdown).replace("x", "×")


def unchanged(slowdown: Slowdown) -> bool:
    """Whether an attacker is as fast as before, to within 5 %."""
    return not slowdown.censored and SAME[0] <= slowdown.ratio <= SAME[1]


def _steps(count: int) -> str:
    return f"{count:,} step" + ("" if count == 1 else "s")


def describe_attack(comparison: AttackComparison) -> str:
    """Say in one sentence how many times slower an attacker is, also where it is not at all."""
    before, after = comparison.base_steps, comparison.steps
    result = comparison.slowdown
    if after is None:
        return (
            f"Not there after {_steps(comparison.immunized.steps)}: more than "
            f"{result.ratio:.0f} times the {_steps(before)} it took before."
        )
    if unchanged(result):
        return f"Not slowed at all: {_steps(after)}, {before:,} before."
    if result.ratio > 1.0:
        return f"{times(result)[:-1]} times slower: {_steps(after)} instead of {before:,}."
    return f"{1.0 / result.ratio:.1f} times faster: {_steps(after)} instead of {before:,}."


def headline(evaluation: Evaluation) -> str:
    """The verdict in a few words, no better than the worst number allows."""
    harm = evaluation.comparisons["harmful"]["gradient_descent"].slowdown
    cost = evaluation.comparisons["primary"]["gradient_descent"].slowdown
    slowed = harm.censored or harm.ratio > SAME[1]
    if not slowed:
        return "No protection on these tasks"
    if cost.censored or cost.ratio > SAME[1]:
        return "Slower to misuse, and slower to use"
    if not harm.censored and harm.ratio < 2.0:
        return "Slightly slower to misuse"
    return "Slower to misuse, not locked"


def _few_samples(results: dict[str, Any]) -> str:
    """The cost that shows only where samples are few, in one sentence."""
    few = results.get("few_samples")
    if few is None:
        return ""
    without, with_ = few["without"], few["with"]
    start = f" Learnt from only {without['samples']} samples, the best ridge head"
    if without["error_rate"] is not None:
        return (
            f"{start} is wrong on {with_['error_rate']:.1%} of the test samples, on "
            f"{without['error_rate']:.1%} without immunization."
        )
    return f"{start} has a test loss of {with_['loss']:.3g}, {without['loss']:.3g} without."


def _verdict(evaluation: Evaluation, results: dict[str, Any]) -> str:
    harm = evaluation.comparisons["harmful"]
    kept = evaluation.comparisons["primary"]
    names = {role: escape(task.name) for role, task in evaluation.tasks.items()}
    harm_gd, kept_gd = harm["gradient_descent"], kept["gradient_descent"]
    others = "; ".join(
        f"{ATTACKER_NAMES[name].lower()}, {times(harm[name].slowdown)}"
        for name in ("line_search", "conjugate_gradients")
    )
    cost = describe_attack(kept_gd)
    accuracy = evaluation.accuracy_at("primary", "gradient_descent", kept_gd.base.steps)
    if accuracy is not None and evaluation.has_accuracy:
        cost += (
            f" Its test accuracy at the end is {accuracy[1]:.1%}, {accuracy[0]:.1%} without "
            "immunization."
        )
    cost += _few_samples(results)
    unaffected = [name for name in UNAFFECTED if name in harm]
    certain = all(unchanged(harm[name].slowdown) for name in unaffected)
    undone = (
        "is not slowed at all"
        if certain
        else "is not held up by the condition number at all "
        f"(measured: {', '.join(times(harm[name].slowdown) for name in unaffected)})"
    )
    items = (
        (
            "What was protected",
            f"The features were changed so that <em>{names['harmful']}</em> takes longer to learn "
            f"from them, while <em>{names['primary']}</em> stays easy.",
        ),
        (
            "Against whom",
            "Someone who trains a linear head on the features by gradient descent. "
            f"{describe_attack(harm_gd)} Other optimizers: {others}.",
        ),
        ("At what cost", f"The task to keep, by gradient descent: {cost}"),
        (
            "Not against",
            f"Someone who whitens the features first, or solves for the head in closed form, "
            f"{undone}. One factorisation of the features undoes this protection, so it delays an "
            "attacker who does not know about it and stops nobody who does.",
        ),
    )
    return "".join(f"<div><dt>{term}</dt><dd>{text}</dd></div>" for term, text in items)


def _card(role: str, value: Slowdown, label: str) -> str:
    return (
        f'<div class="card {role}"><b>{escape(times(value))}</b><span>{escape(label)}</span></div>'
    )


def _cards(evaluation: Evaluation) -> str:
    harm, kept = (evaluation.comparisons[role] for role in ROLES)
    return "".join(
        (
            _card(
                "harmful",
                harm["gradient_descent"].slowdown,
                "the steps to learn the harmful task by gradient descent",
            ),
            _card(
                "primary",
                kept["gradient_descent"].slowdown,
                "the steps to learn the task to keep by gradient descent",
            ),
            _card(
                "neutral",
                harm["whitened"].slowdown,
                "the steps to learn the harmful task after whitening",
            ),
        )
    )


def _attack_table(evaluation: Evaluation) -> str:
    rows = []
    for name in evaluation.comparisons["harmful"]:
        label = escape(ATTACKERS[name].label)
        cells = []
        for role in ROLES:
            comparison = evaluation.comparisons[role][name]
            before = f"{comparison.base_steps:,}"
            after = (
                f"&gt;{comparison.immunized.steps:,}"
                if comparison.steps is None
                else f"{comparison.steps:,}"
            )
            cells.append(
                f'<td class="{role}"><b>{escape(times(comparison.slowdown))}</b> '
                f"<small>{before} → {after}</small></td>"
            )
        rows.append(f"<tr><th scope=row>{label}</th>{''.join(cells)}</tr>")
    return (
        "<table><thead><tr><th>Attacker</th><th>Harmful task</th><th>Primary task</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _figure(svg: str, caption: str, label: str) -> str:
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label, quote=True)}" ', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _attack_figures(evaluation: Evaluation, svg: dict[str, str]) -> str:
    figures = []
    for name in CURVES:
        for role in ROLES:
            comparison = evaluation.comparisons[role][name]
            label = f"Test loss over the steps of an attacker: {ATTACKER_NAMES[name]}, {role} task"
            figures.append(_figure(svg[f"{name}-{role}"], describe_attack(comparison), label))
    return "".join(figures)


def _accuracy_figures(evaluation: Evaluation, svg: dict[str, str]) -> str:
    figures = []
    for role in ROLES:
        comparison = evaluation.comparisons[role]["gradient_descent"]
        sentences = []
        for step in sorted({10, max(comparison.base_steps, 1)}):
            pair = evaluation.accuracy_at(role, "gradient_descent", step)
            assert pair is not None  # drawn for classification tasks alone
            sentences.append(f"{pair[1]:.1%} instead of {pair[0]:.1%} after {_steps(step)}")
        label = f"Test accuracy over the steps of gradient descent, {role} task"
        figures.append(_figure(svg[f"accuracy-{role}"], f"{'; '.join(sentences)}.", label))
    return "".join(figures)


def _spectrum_figures(evaluation: Evaluation, svg: dict[str, str]) -> str:
    ratio = evaluation.rir["ridge"]
    figures = []
    for role, value, better in (
        ("harmful", ratio.i, "slower"),
        ("primary", ratio.ii, "slower"),
    ):
        if math.isclose(value, 1.0, rel_tol=0.02):
            change = "unchanged"
        elif value > 1.0:
            change = f"{value:.3g} times larger: gradient descent tends to be {better}"
        else:
            change = f"{1.0 / value:.3g} times smaller: gradient descent tends to be faster"
        label = f"Eigenvalues of the Hessian before and after, {role} task"
        caption = f"The condition number κ is {change}."
        figures.append(_figure(svg[f"spectrum-{role}"], caption, label))
    return "".join(figures)


def number(value: float) -> str:
    """Three digits, without an exponent from 0.001 to a million."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "not defined"
    if 1e3 <= value < 1e6:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    mantissa, exponent, power = text.partition("e")
    return f'<span class="nowrap">{mantissa}·10<sup>{int(power)}</sup></span>' if exponent else text


def _alternatives(rows: Iterable[dict[str, Any]]) -> str:
    body = "".join(
        f"<tr><th scope=row>{escape(row['name'])}</th><td>{number(row['rir'])}</td>"
        f"<td>{row['share_of_ceiling']:.0%}</td>"
        f'<td class="harmful"><b>{escape(times(Slowdown(*row["harmful"])))}</b></td>'
        f'<td class="primary"><b>{escape(times(Slowdown(*row["primary"])))}</b></td></tr>'
        for row in rows
    )
    if not body:
        return ""
    return f"""<section><h2>Other methods on the same tasks</h2>
<p>Times the steps of gradient descent, every method with its default settings. RIR, the ratio that
the literature reports, does not predict who is slowed: two methods may both reach its ceiling and
differ widely in steps.</p>
<div class="scroll"><table><thead><tr><th>Method</th><th>RIR</th><th>of ceiling</th>
<th>Harmful task</th><th>Primary task</th></tr></thead><tbody>{body}</tbody></table></div>
</section>"""


def _numbers(evaluation: Evaluation, results: dict[str, Any]) -> str:
    explanations = {
        "ridge": f"ridge {evaluation.ridge:g} · λ<sub>max</sub> on K before θ",
        "rank_aware": "smallest eigenvalue above the numerical rank tolerance",
        "official": "as the published code: smallest of H + ε I above ε = 0.000001",
    }
    rows = "".join(
        f"<tr><th scope=row>{text}</th><td>{number(value.rir)}</td><td>{number(value.i)}</td>"
        f"<td>{number(value.ii)}</td><td>{value.rank_harmful_base} → {value.rank_harmful}</td>"
        f"<td>{value.rank_primary_base} → {value.rank_primary}</td></tr>"
        for policy, text in explanations.items()
        for value in (evaluation.rir[policy],)
    )
    ceiling = results["ceiling"]
    return f"""<div class="scroll"><table><thead><tr><th>Smallest eigenvalue meant</th><th>RIR</th>
<th>(i) harmful</th><th>(ii) primary</th><th>rank, harmful</th><th>rank, primary</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<p class="note">With the ridge, no linear extractor can exceed RIR = {number(ceiling)} on these
inputs; this one has {evaluation.share_of_ceiling:.1%} of that. A tenfold smaller ridge would raise
the ceiling {evaluation.ceiling_growth:.3g} times. The other two rows compare eigenvalues in
directions that the data hardly has; they are there to be compared with publications.</p>"""


def render_html(
    evaluation: Evaluation,
    results: dict[str, Any],
    svg: dict[str, str],
    *,
    sections: str = "",
) -> str:
    """Write the page; arguments as :func:`render_body`.

    Returns:
        A complete HTML document that refers to nothing outside itself.
    """
    return document(headline(evaluation), render_body(evaluation, results, svg, sections=sections))


def render_body(
    evaluation: Evaluation,
    results: dict[str, Any],
    svg: dict[str, str],
    *,
    sections: str = "",
) -> str:
    """Write what stands in the page.

    Args:
        evaluation: What was measured.
        results: The content of ``results.json``.
        svg: The panels of :func:`immunize_ext.probing.plots.draw_svg`.
        sections: More sections in HTML, before what is to be known before quoting.

    Returns:
        HTML that stands in a document.
    """
    title = headline(evaluation)
    method = results.get("method_label")
    kicker = "Immunization report" + ("" if method is None else f" · {escape(method)}")
    sentences = (*results["warnings"], *results.get("notes", ()))
    remarks = "".join(f"<li>{escape(text)}</li>" for text in sentences)
    before_quoting = (
        f"<section><h2>Before you quote these numbers</h2><ul>{remarks}</ul></section>"
        if remarks
        else ""
    )
    accuracy = (
        f"""<section><h2>Right answers while the attack runs</h2>
<p>The share of test samples that a head trained by gradient descent gets right.</p>
<div class="figures">{_accuracy_figures(evaluation, svg)}</div></section>"""
        if "accuracy-harmful" in svg
        else ""
    )
    tasks = "".join(
        f"<li><b>{role}</b>: {escape(task.name)}; {task.x_train.shape[0]} samples to train on, "
        f"{task.x_test.shape[0]} others to test on, {task.num_features} features</li>"
        for role, task in evaluation.tasks.items()
    )
    run: dict[str, Any] = {key: results[key] for key in ("seconds", "seeds") if key in results}
    return f"""<header>
<p class="kicker">{kicker}</p>
<h1>{escape(title)}</h1>
<div class="cards">{_cards(evaluation)}</div>
<dl class="verdict">{_verdict(evaluation, results)}</dl>
</header>
<section><h2>Attackers, one by one</h2>
<p>How many times the steps each attacker needs, compared with the same attacker without
immunization, to come within 10&nbsp;% of the lowest test loss it reached there. Below 1 is
faster. Small: steps before → after.</p>
<div class="scroll">{_attack_table(evaluation)}</div></section>
<section><h2>Watching the attackers learn</h2>
<p>Test loss over the steps, dashed before and solid after immunization; the dotted line is what has
to be reached. Harmful task in orange, task to keep in green.</p>
<div class="figures">{_attack_figures(evaluation, svg)}</div></section>
{accuracy}
<section><h2>Why: the spectra</h2>
<p>Gradient descent learns one direction after another, in the order of these eigenvalues. The wider
they spread, the longer the last ones take.</p>
<div class="figures">{_spectrum_figures(evaluation, svg)}</div></section>
{_alternatives(results.get("alternatives", ()))}
{sections}
{before_quoting}
<section><h2>For specialists</h2>
{_numbers(evaluation, results)}
<details><summary>Tasks</summary><ul>{tasks}</ul></details>
<details><summary>Settings</summary>{facts({"method": results["method"], **results["config"]})}
</details>
<details><summary>Run and environment</summary>{facts({**run, **results["environment"]})}</details>
</section>"""


def in_words(slowdown: Slowdown) -> str:
    """``3.5× slower``, ``as fast as before``, ``2.0× faster``."""
    pass

    if unchanged(slowdown):
        return "as fast as before"
    if slowdown.censored or slowdown.ratio > 1.0:
        return f"{times(slowdown)} slower"
    return f"{1.0 / slowdown.ratio:.1f}× faster"


def attack_table(comparisons: Mapping[str, Mapping[str, AttackComparison]]) -> str:
    """Slow-downs of both tasks, one attacker a line."""
    from immunize_ext.probing.attacks import ATTACKERS

    rows = [("attacker", "harmful task", "primary task")]
    for name in comparisons["harmful"]:
        cells = [in_words(comparisons[role][name].slowdown) for role in ("harmful", "primary")]
        rows.append((ATTACKERS[name].label, cells[0], cells[1]))
    return text_table(rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML already; the first of each row is its title."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>" + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _attacker(name: str) -> str:
    return escape(ATTACKERS[name].label.lower())


def _ratio(value: float, lower_bound: bool = False) -> str:
    return f"{'&gt;' if lower_bound else ''}{number(value)}×"


def _worst_case(details: dict[str, Any]) -> str:
    harm = details["worst_case"]["harmful"]
    some, every = harm["iterative_attackers"], harm["all_attackers"]
    return f"""<section><h2>If the attacker may choose</h2>
<p>A protection is as good as the attacker who minds it least.</p>
<ul><li>Of those who train step by step, <b>{_attacker(some["least_slowed"])}</b> is slowed least:
{_ratio(some["least_slowdown"])}. A free choice among them (the fastest without immunization
against the fastest with it) costs {
        _ratio(some["slowdown_of_a_free_choice"], some["is_lower_bound"])
    } the steps.</li>
<li>Over all attackers measured, a free choice costs {
        _ratio(every["slowdown_of_a_free_choice"], every["is_lower_bound"])
    } the steps: {_attacker(every["fastest_with"])}.</li></ul></section>"""


def _costs(details: dict[str, Any]) -> str:
    few = details["few_samples"]
    without, with_ = few["without"], few["with"]
    rows = [
        (
            f"Test loss of the task to keep, learnt from {without['samples']} samples",
            number(without["loss"]),
            number(with_["loss"]),
        )
    ]
    if without["error_rate"] is not None:
        rows.append(
            ("Wrong answers there", f"{without['error_rate']:.1%}", f"{with_['error_rate']:.1%}")
        )
    for role, label in (("harmful", "harmful task"), ("primary", "task to keep")):
        for step in ("10", "100"):
            ratios = details["norm_ratio"][role]
            rows.append(
                (
                    f"Distance to the best head after {step} line-search steps, {label}",
                    number(ratios["without"][step]),
                    number(ratios["with"][step]),
                )
            )
    return (
        "<section><h2>What else changed</h2><p>The best of many ridge heads on few samples; and "
        "|w<sub>t</sub> − w*|² relative to the start, under exact line search, in each model's own "
        f"feature space.</p>{table(('', 'without', 'with'), rows)}</section>"
    )


def _ceiling(details: dict[str, Any]) -> str:
    rows = []
    for row in details["ceiling_table"]:
        growth = row["growth_per_decade"]
        rows.append(
            (
                f"{row['ridge']:g}",
                number(math.exp(min(row["log_ceiling"], 700.0))),
                "" if growth is None else f"{growth:.3g}×",
                number(math.exp(min(row["log_rir"], 700.0))),
                f"{row['share']:.2%}" if row["share"] >= 1e-4 else f"{row['share']:.2g}",
            )
        )
    header = ("Ridge", "Ceiling", "growth per decade", "RIR of this run", "share")
    return (
        "<section><h2>The ceiling of RIR, by ridge</h2><p>No linear extractor can exceed the "
        "ceiling, and a ceiling without its ridge means nothing: growth above 10 per decade says "
        f"more about the ridge than about the data.</p>{table(header, rows)}</section>"
    )


def _specialists(details: dict[str, Any]) -> str:
    angles, grouped = details["subspace_angles"], details["grouped_rir"]

    def degrees(values: Sequence[float]) -> str:
        return ", ".join(f"{value:.0f}°" for value in values)

    rows = [
        (
            f"Principal angles between the {angles['count']} leading directions of both tasks",
            f"{degrees(angles['before_degrees'])} before",
            f"{degrees(angles['after_degrees'])} after (eigenvalue gap {angles['gap_after']:.3g})",
        ),
        (
            f"RIR from {grouped['groups']} groups of {grouped['group_size']} samples, as papers "
            f"estimate it, ridge {grouped['ridge']:g}",
            f"{number(grouped['mean'])} from groups",
            f"{number(grouped['full_data'])} from all data (bias of the log "
            f"{grouped['log_bias']:+.2f}, spread {grouped['log_spread']:.2f})",
        ),
    ]
    for role, label in (("harmful", "harmful task"), ("primary", "task to keep")):
        spectral = details["spectral_slowdown"][role]
        rows.append(
            (
                f"Slow-down on the training loss from the spectrum alone, {label}",
                f"gradient descent {number(spectral['gradient_descent'])}×",
                f"conjugate gradients {number(spectral['conjugate_gradients'])}×",
            )
        )
        degradation = details["rfd"][role]
        for field in ("test_loss", "test_accuracy"):
            if field in degradation:
                rows.append(
                    (
                        f"RFD of the {field.replace('_', ' ')} over {degradation['steps']} steps, "
                        f"{label}",
                        f"{degradation[field]['signed']:+.1f} % signed",
                        f"{degradation[field]['absolute']:.1f} % absolute",
                    )
                )
    return "<section><h2>More numbers</h2>" + table(("Measure", "", ""), rows) + "</section>"


def kappa_sections(details: dict[str, Any]) -> str:
    """The sections as HTML.

    Args:
        details: What :func:`immunize_ext.probing.evaluation.kappa_details` gave.

    Returns:
        ``<section>`` elements.
    """
    return _worst_case(details) + _costs(details) + _ceiling(details) + _specialists(details)
