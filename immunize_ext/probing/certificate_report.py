"""What a certificate says, from its record alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from immunize_ext.quantities import Slowdown
from immunize_ext.report.page import Page, brief, register
from immunize_ext.report.tables import text_table
from immunize_ext.report.words import count, number, percent, real, times

Certificate = Mapping[str, Any]

# What stands for the optimizers of a table, and who else is of the kind.
_OPTIMIZERS = {
    "gradient_descent": "gradient descent",
    "momentum": "momentum, Nesterov",
    "conjugate_gradients": "conjugate gradients",
    "full_matrix_adagrad": "full-matrix Adagrad",
    "diagonal": "Adam, Adagrad, standardised features",
    "nystrom": "low-rank preconditioner (a tenth of the directions)",
    "whitening": "whitening, Newton, K-FAC, closed form",
}

# A lock leaves nothing in the samples that it was made of.
_OWN_SAMPLES = (
    " These are the samples that the lock was made of; in others up to about {} can be left."
)

_ROLES = {"harmful": "harmful task", "primary": "task to keep"}


def _called(row: Certificate) -> str:
    """What a row is about, in words."""
    return _ROLES.get(row["role"]) or f"benign task “{row['name']}”"


def headline(one: Certificate) -> str:
    """The strongest true sentence about what holds against whom."""
    if not one["invertible"]:
        gone = one["linear"][0]
        if gone["r2_after"] < 0.05:
            return "Locked for linear probes, open to others"
        return "Directions are gone, the harm is not"
    factor, own = (real(task["factor_best"]) for task in one["few_samples"][:2])
    if factor >= 2.0 and factor > own:
        return "A delay and a price in samples, no lock"
    return "A delay for those who descend, nothing for those who whiten"


def sentences(one: Certificate, own_samples: bool = True) -> list[str]:
    """What each kind of attacker pays, one sentence each.

    Args:
        one: One certificate.
        own_samples: Whether attackers have the samples that the extractor was made of.
    """
    found = []
    if one["delays"]:
        descent, free = one["delays"][0], one["delays"][6]
        found.append(
            f"By the spectrum alone, gradient descent takes {number(descent['factor'])} times the "
            f"steps; whoever whitens takes {number(free['factor'])} times, for every invertible "
            "extractor, which is a theorem."
        )
    if (work := one["work"]) is not None:
        measured = times(Slowdown(real(work["measured"]), bool(work["measured_is_lower_bound"])))
        verb = "less" if work["cap"] < 1.0 else "more"
        found.append(
            f"Gradient descent is {measured[:-1]} times slower in steps, but a factorisation costs "
            f"as much as {number(work['factorisation'])} of the "
            f"{count(work['steps_before'], 'step')} it took before: in work, a free attacker pays "
            f"{number(work['cap'])} times that at most"
            f"{', ' + verb + ' than before' if verb == 'less' else ''}."
        )
    found += [_price(task) for task in one["few_samples"]]
    gone, kept = one["linear"][:2]
    said = (
        "" if one["invertible"] or not own_samples else _OWN_SAMPLES.format(percent(gone["leak"]))
    )
    found.append(
        f"With all data, the best linear probe explains {percent(gone['r2_after'])} of the harmful "
        f"labels' variance, {percent(gone['r2_before'])} before; of the task to keep "
        f"{percent(kept['r2_after'])}, {percent(kept['r2_before'])} before.{said}"
    )
    if gone["kernel_after"] is not None:
        found.append(_not_linear(gone))
    return found


def _not_linear(gone: Certificate) -> str:
    """What probes that are not linear get, in one sentence."""
    # An earlier version had no perceptron, and no kernel for regressions.
    probes = {"a Gaussian kernel probe": "kernel", "a perceptron": "perceptron"}
    values = {
        probe: (gone[f"{key}_before"], gone[f"{key}_after"])
        for probe, key in probes.items()
        if gone.get(f"{key}_after") is not None
    }
    most = 1.0 if gone["accuracy_before"] is None else 2.0
    stopped = all(before - after > 0.2 / most for before, after in values.values())
    verb = "explains" if gone["accuracy_before"] is None else "is right on"
    of = "labels' variance" if gone["accuracy_before"] is None else "test samples"
    said = "; ".join(
        f"{probe} {verb} {percent(after, 1)}, {percent(before, 1)} before"
        for probe, (before, after) in values.items()
    )
    more = "" if stopped else " Probes that are not linear get round it."
    return f"Of the harmful {of}, {said}.{more} Probes of an earlier layer see none of it."


def _price(task: Mapping[str, Any]) -> str:
    """What a task costs in labelled samples, in one sentence."""
    reference, name = task.get("reference", 40), _called(task)
    value = task["factor_best"]
    if value is None:
        error = number({int(n): value for n, value in task["without"].items()}[reference])
        return (
            f"From {count(reference, 'labelled sample')} nothing is learnt of the {name}, even "
            f"without immunization: an error of {error}, {number(task['constant'])} for the best "
            "constant answer."
        )
    price = f"{number(value)} times"
    if real(value) == float("inf"):
        price = f"more than {number(max(map(int, task['given'])) / reference)} times"
    who = {"harmful": "the best attacker", "primary": "its owner"}.get(task["role"], "a user")
    return (
        f"For what {count(reference, 'labelled sample')} gave without immunization, {who} needs "
        f"{price} as many on the {name}.{_sibling(task)}"
    )


def _sibling(task: Mapping[str, Any]) -> str:
    """What a public model of the same features is worth to an attacker, if it was measured."""
    if task["role"] != "harmful" or task.get("factor_sibling") is None:
        return ""
    value = real(task["factor_sibling"])
    more = "does not get there" if value == float("inf") else f"needs {number(value)} times as many"
    return f" Who maps the features onto a public model that was not immunized {more}."


def _delay_rows(one: Certificate) -> list[list[str]]:
    return [
        [
            _OPTIMIZERS[row["optimizer"]],
            f"{row['exponent']:g}",
            number(10 ** (row["log_kappa_before"] / 2.302585092994046)),
            number(10 ** (row["log_kappa_after"] / 2.302585092994046)),
            f"{number(row['factor'])}×",
        ]
        for row in one["delays"]
        if row["optimizer"] in _OPTIMIZERS
    ]


def _undoing_rows(one: Certificate) -> list[list[str]]:
    return [
        [
            f"{row['inputs']:,}",
            times(Slowdown(real(row["factor"]), bool(row["is_lower_bound"]))),
            f"{number(row['factor_without'])}×",
            number(row["gaussian_kappa"]),
        ]
        for row in one["undoing"]
    ]


def _sample_rows(one: Certificate) -> list[list[str]]:
    found = []
    for task in one["few_samples"]:
        for side, words in (
            ("without", "without immunization"),
            ("given", "features as they are"),
            ("whitened", "re-whitened by unlabelled inputs"),
            ("searched", "after a search for what was made small"),
            ("sibling", "mapped onto a public model"),
        ):
            if not task.get(side):
                continue  # of an earlier version, or not tried
            curve = {int(key): value for key, value in task[side].items()}
            columns = [int(key) for key in task["without"]]
            cells = [number(curve[n]) if n in curve else "" for n in columns]
            found.append([f"{_called(task)}, {words}", *cells])
        if "constant" in task:
            cells = [number(task["constant"])] * len(columns)
            found.append([f"{_called(task)}, best constant answer", *cells])
    return found


def _format_rows(one: Certificate) -> list[list[str]]:
    return [
        [
            f"{_ROLES[row['role']]}, {row['number_format']}",
            percent(row["explained"]),
            percent(row["measured"]),
            "" if row["accuracy"] is None else percent(row["accuracy"], 1),
            f"{real(row['queries']):,.0f}",
        ]
        for row in one["formats"]
    ]


def _linear_rows(one: Certificate) -> list[list[str]]:
    def pair(row: Mapping[str, Any], name: str) -> str:
        before, after = row.get(f"{name}_before"), row.get(f"{name}_after")
        return "" if before is None else f"{percent(before, 1)} → {percent(after, 1)}"

    return [
        [_called(row), *(pair(row, name) for name in ("r2", "accuracy", "kernel", "perceptron"))]
        for row in one["linear"]
    ]


def summary(record: Certificate) -> str:
    """What each attacker pays, in plain text, for every harmful task."""
    parts = []
    for one in record["certificates"]:
        lines = [f"{one['harmful']}: {headline(one)}"]
        lines += [f"- {text}" for text in sentences(one, record.get("own_samples", True))]
        if one["delays"]:
            header = ["optimizer", "power of kappa", "kappa before", "after", "steps"]
            lines += ["", text_table([header, *_delay_rows(one)])]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def parts(one: Certificate, own_samples: bool) -> dict[str, Any]:
    """What pages say of one certificate.

    Args:
        one: The certificate.
        own_samples: As for :func:`sentences`.
    """
    return {
        "headline": headline(one),
        "sentences": sentences(one, own_samples),
        "delays": _delay_rows(one),
        "undoing": _undoing_rows(one),
        "counts": list(one["few_samples"][0]["without"]),
        "samples": _sample_rows(one),
        "formats": _format_rows(one),
        "linear": _linear_rows(one),
    }


@register("kappa-certificate")
def page(record: Certificate) -> Page:
    """The page of a certificate.

    Args:
        record: Content of the JSON file beside it.

    Returns:
        What stands in it.
    """
    certificates, own = record["certificates"], record.get("own_samples", True)
    return Page(
        headline(certificates[0]),
        "kappa_certificate.html.j2",
        {
            "method": record["method"],
            "primary": record["primary"],
            "own_samples": own,
            "run": {"draws": record["draws"], "seed": record["seed"], **record["environment"]},
            "certificates": [
                {"harmful": one["harmful"], "seconds": one["seconds"], **parts(one, own)}
                for one in certificates
            ],
        },
    )


@register("kappa-certificate-part")
def part_page(one: Certificate) -> Page:
    """What a notebook shows of one certificate.

    Args:
        one: What its ``to_dict`` gave.
    """
    header = ["Optimizer", "power", "kappa before", "kappa after", "steps"]
    return brief(headline(one), sentences=sentences(one), header=header, rows=_delay_rows(one))
