"""What all pages of reports share: the document around them, and tables of plain facts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any


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


PAGE_STYLE = """
:root {
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  --page: #f7f8fa; --paper: #ffffff; --line: #e1e5ea;
  --ink: #1b1f26; --muted: #5f6876; --grid: #e4e7eb; --before: #8c95a4;
  --harmful: #c2410d; --primary: #0f766f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151a; --paper: #1a1e25; --line: #2c323c;
    --ink: #e8ebf0; --muted: #9aa4b2; --grid: #2c323c; --before: #7d8796;
    --harmful: #fb9257; --primary: #4fd1bd;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.6 var(--font); -webkit-text-size-adjust: 100%;
}
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: clamp(1.8rem, 1.2rem + 3vw, 2.8rem); line-height: 1.15; margin: 0 0 1.5rem;
  letter-spacing: -0.02em; text-wrap: balance; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 0.5rem; letter-spacing: -0.01em; }
section { margin-top: 3.25rem; }
p, li { max-width: 46rem; }
section > p { margin: 0 0 1rem; color: var(--muted); }
.kicker { margin: 0 0 0.4rem; color: var(--muted); font-size: 0.85rem; letter-spacing: 0.08em;
  text-transform: uppercase; }
.cards { display: grid; gap: 0.9rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 0.9rem;
  padding: 1rem 1.2rem 1.1rem; }
.card b { display: block; font-size: 2.6rem; line-height: 1.15; letter-spacing: -0.03em;
  font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--muted); font-size: 0.95rem; line-height: 1.4; }
.harmful b { color: var(--harmful); }
.primary b { color: var(--primary); }
.verdict { margin: 1.75rem 0 0; }
.verdict > div { display: grid; grid-template-columns: 10.5rem 1fr; gap: 0.25rem 1.25rem;
  padding: 0.85rem 0; border-top: 1px solid var(--line); }
.verdict dt { font-weight: 650; }
.verdict dd { margin: 0; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; background: var(--paper);
  border: 1px solid var(--line); border-radius: 0.9rem; border-spacing: 0; overflow: hidden;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.6rem 0.9rem; text-align: left; border-top: 1px solid var(--line);
  vertical-align: baseline; }
thead th { border-top: 0; color: var(--muted); font-size: 0.85rem; font-weight: 600; }
tbody th { font-weight: 500; }
td small { color: var(--muted); font-size: 0.85rem; white-space: nowrap; }
.nowrap { white-space: nowrap; }
sup { line-height: 0; font-size: 0.75em; }
section > p.note { margin-top: 1rem; }
.facts th { width: 14rem; color: var(--muted); }
.facts td { overflow-wrap: anywhere; }
.figures { display: grid; gap: 0.9rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; background: var(--paper); border: 1px solid var(--line);
  border-radius: 0.9rem; padding: 0.8rem 0.8rem 0.9rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin: 0.4rem 0.4rem 0; font-size: 0.95rem; line-height: 1.45; }
details { margin-top: 0.9rem; }
summary { cursor: pointer; font-weight: 600; padding: 0.3rem 0; }
@media (max-width: 40rem) {
  main { padding: 1.25rem 0.9rem 3rem; }
  .verdict > div { grid-template-columns: 1fr; }
  .cards { grid-template-columns: 1fr; }
  .card { display: grid; grid-template-columns: 6.5rem 1fr; align-items: center; gap: 0.75rem; }
  .card b { font-size: 1.9rem; }
  th, td { padding: 0.5rem 0.6rem; font-size: 0.95rem; }
  td small { display: block; }
  .nowrap { white-space: nowrap; }
sup { line-height: 0; font-size: 0.75em; }
section > p.note { margin-top: 1rem; }
.facts th { width: 8rem; }
}
@media print { body { background: none; } figure, .card, table { break-inside: avoid; } }
"""
