"""The sections of a report's page that show :func:`kappa_details`, in words and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from immunize_ext.attacks import ATTACKERS
from immunize_ext.report.html import number


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
        details: What :func:`immunize_ext.report.kappa_details.kappa_details` gave.

    Returns:
        ``<section>`` elements.
    """
    return _worst_case(details) + _costs(details) + _ceiling(details) + _specialists(details)
