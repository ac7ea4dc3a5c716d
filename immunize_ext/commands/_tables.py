"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from immunize_ext.attacks import AttackComparison
    from immunize_ext.metrics import Slowdown


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the left, the first row underlined.

    Example:
        >>> print(text_table([("name", "x"), ("a", "1")]))
          name  x
          ----  -
          a     1
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
        if index == 0:
            lines.append("  " + "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def in_words(slowdown: Slowdown) -> str:
    """``3.5× slower``, ``as fast as before``, ``2.0× faster``."""
    from immunize_ext.report.html import times, unchanged

    if unchanged(slowdown):
        return "as fast as before"
    if slowdown.censored or slowdown.ratio > 1.0:
        return f"{times(slowdown)} slower"
    return f"{1.0 / slowdown.ratio:.1f}× faster"


def attack_table(comparisons: Mapping[str, Mapping[str, AttackComparison]]) -> str:
    """Slow-downs of both tasks, one attacker a line."""
    from immunize_ext.attacks import ATTACKERS

    rows = [("attacker", "harmful task", "primary task")]
    for name in comparisons["harmful"]:
        cells = [in_words(comparisons[role][name].slowdown) for role in ("harmful", "primary")]
        rows.append((ATTACKERS[name].label, cells[0], cells[1]))
    return text_table(rows)
