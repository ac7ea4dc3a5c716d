"""What further attacks on a finished run gave, from their record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from immunize_ext.probing import plots
from immunize_ext.probing import report as run_report
from immunize_ext.probing.results import ROLES, Attacked, attacked
from immunize_ext.quantities import Slowdown
from immunize_ext.report.page import Page, Panel, register
from immunize_ext.report.tables import text_table
from immunize_ext.report.words import count, in_words, number, real, times

Record = Mapping[str, Any]
Row = Mapping[str, Any]


def _found(record: Record) -> dict[str, dict[str, Attacked]]:
    """The attacks as those of a run: of several harmful tasks the one that is slowed least."""
    return attacked(_as_run(record))


def _as_run(record: Record) -> dict[str, Any]:
    facts: dict[str, dict[str, Row]] = {role: {} for role in ROLES}
    for row in sorted(record["attacks"], key=_slowdown, reverse=True):
        facts[row["role"]][row["attacker"]] = row
    # In the order in which they were made.
    names = list(dict.fromkeys(row["attacker"] for row in record["attacks"]))
    facts = {role: {n: by[n] for n in names if n in by} for role, by in facts.items()}
    return {
        "attackers": record.get("attackers", {}),
        "attacks": facts,
        "slowdown": {r: {n: row["slowdown"] for n, row in by.items()} for r, by in facts.items()},
        "slowdown_is_lower_bound": {
            r: {n: row["is_lower_bound"] for n, row in by.items()} for r, by in facts.items()
        },
    }


def _slowdown(row: Row) -> Slowdown:
    return Slowdown(real(row["slowdown"]), bool(row["is_lower_bound"]))


def _labels(record: Record) -> dict[str, str]:
    found = _found(record)
    return {name: one.attacker.label for role in ROLES for name, one in found[role].items()}


def headline(record: Record) -> str:
    """The verdict in a few words, no better than the worst number allows."""
    run = _as_run(record)
    if not run["slowdown"]["harmful"]:
        return "The task to keep, attacked once more"
    return run_report.headline(run)


def verdict(record: Record) -> str:
    """One sentence that counts every attacker on the harmful task."""
    run = _as_run(record)
    if not run["slowdown"]["harmful"]:
        return "The harmful task was not attacked: nothing here says whether it is protected."
    return run_report.verdict(run)


def _rows(record: Record) -> list[list[Any]]:
    labels = _labels(record)
    rows = []
    for row in record["attacks"]:
        learns = bool(row["steps_without"])
        after = "not there" if row["steps_with"] is None else f"{row['steps_with']:,}"
        slowed = times(_slowdown(row)) if learns else "hardly learnt, even before"
        rates = [row.get(f"learning_rate_{side}") for side in ("without", "with")]
        rows.append(
            [
                labels[row["attacker"]],
                run_report.TASKS[row["role"]] + (f": {row['task']}" if "task" in row else ""),
                {"main": slowed, "role": row["role"]},
                f"{row['steps_without']:,} → {after}",
                "" if None in rates else " → ".join(number(rate) for rate in rates),
            ]
        )
    return rows


def _budget_rows(record: Record) -> list[list[str]]:
    labels = _labels(record)
    return [
        [
            f"{labels[row['attacker']]}, {run_report.TASKS[row['role']]}",
            f"{outcome['steps']:,}",
            number(outcome["loss_without"]),
            number(outcome["loss_with"]),
        ]
        for row in record["attacks"]
        for outcome in row.get("budgets", ())
    ]


def _panels(found: Mapping[str, Mapping[str, Attacked]], labels: Sequence[str]) -> list[Panel]:
    shown = [one for role in ROLES for one in found[role].values() if one.learns]
    if not shown:
        return []
    heading = "How many times the steps each attacker needs"
    size = 7.2, 1.3 + 0.34 * len(labels)
    caption = "Right of the dotted line: slower than without immunization. An open mark is a bound."
    return [Panel(plots.slowdowns(heading, shown, labels), caption, heading, size)]


def summary(record: Record) -> str:
    """The table of attackers in plain text."""
    labels = _labels(record)
    rows = [("attacker", "task", "slow-down", "steps before", "after")]
    lines = []
    for row in record["attacks"]:
        label = labels[row["attacker"]]
        after = "not there" if row["steps_with"] is None else f"{row['steps_with']:,}"
        before = f"{row['steps_without']:,}"
        rows.append((label, row["role"], in_words(_slowdown(row)), before, after))
        lines += [
            f"  {label}, {row['role']}, {count(outcome['steps'], 'step')}: test loss "
            f"{number(outcome['loss_with'])}, {number(outcome['loss_without'])} without"
            for outcome in row.get("budgets", ())
        ]
    return "\n".join([text_table(rows), *lines])


@register("kappa-attack")
def page(record: Record) -> Page:
    """The page of further attacks.

    Args:
        record: Content of a file under ``RUN/attacks``.

    Returns:
        What stands in it.
    """
    labels = list(dict.fromkeys(_labels(record).values()))
    known = ("loss", "base_budget", "limit", "seconds")
    return Page(
        headline(record),
        "kappa_attack.html.j2",
        {
            "method": record.get("method"),
            "verdict": verdict(record),
            "attacks": _rows(record),
            "budgets": _budget_rows(record),
            "run": {
                **{name: record[name] for name in known if name in record},
                **record.get("environment", {}),
            },
        },
        {"slowdowns": _panels(_found(record), labels)},
    )
