"""What all pages of reports share: the document around them, and tables of plain facts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from immunize_ext.report.style import PAGE_STYLE


def document(title: str, body: str, *, style: str = "") -> str:
    """A complete HTML document that refers to nothing outside itself.

    Args:
        title: Plain text.
        body: HTML that stands in ``<main>``.
        style: Rules beside those that all pages share.

    Returns:
        The document.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} - immunization report</title>
<style>{PAGE_STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><th scope=row>{escape(str(key).replace('_', ' '))}</th>"
        f"<td>{escape(_plain(value))}</td></tr>"
        for key, value in values.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return str(value)
