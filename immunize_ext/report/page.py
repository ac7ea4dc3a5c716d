"""A page: what one kind of results looks like, filled into a template.

A page is drawn from ``results.json`` alone, so that any run can be drawn again. A wing says for its
kinds what stands where (:func:`register`); templates escape whatever they are given.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from immunize_ext._extras import MissingExtraError, require_extra
from immunize_ext.report import words
from immunize_ext.report.plots import PANEL, Draw, panel_svg, panels_png
from immunize_ext.storage import write_file, write_numbered

REPORT = "report.html"


@dataclass(frozen=True)
class Panel:
    """One plot of a page.

    Attributes:
        draw: What draws it.
        caption: What it says, in a sentence.
        label: What it shows, for those who hear the page.
        size: Width and height in inches.
    """

    draw: Draw
    caption: str
    label: str
    size: tuple[float, float] = PANEL


@dataclass(frozen=True)
class Page:
    """What stands in the page of one result.

    Attributes:
        title: The headline.
        template: Name of the template, ``kappa.html.j2``.
        context: What the template is filled with, beside ``title`` and ``figures``.
        panels: Plots by group. Each group stands in the page, and beside it as a PNG file.
        columns: Panels in a row of a PNG file.
    """

    title: str
    template: str
    context: Mapping[str, Any]
    panels: Mapping[str, Sequence[Panel]] = field(default_factory=dict)
    columns: int = 2


def brief(
    title: str,
    lede: str = "",
    *,
    sentences: Sequence[str] = (),
    header: Sequence[str] = (),
    rows: Sequence[Sequence[Any]] = (),
    warnings: Sequence[str] = (),
) -> Page:
    """What a notebook shows of a result.

    Args:
        title: The verdict.
        lede: A sentence on it.
        sentences: More, one by one.
        header: Of the table.
        rows: Its rows; cells as the pages have them.
        warnings: What has to be known before a number is quoted.
    """
    return Page(
        title,
        "brief.html.j2",
        {
            "lede": lede,
            "sentences": list(sentences),
            "header": list(header),
            "rows": [list(row) for row in rows],
            "warnings": list(warnings),
        },
    )


Maker = Callable[[Mapping[str, Any]], Page]


_makers: dict[str, Maker] = {}


# Who registers the kinds of this package; imported when the first page of theirs is asked for.
_REGISTRANTS = {
    "kappa": "immunize_ext.probing.report",
    "kappa-evaluation": "immunize_ext.probing.report",
    "kappa-attack": "immunize_ext.probing.attack_report",
    "kappa-certificate": "immunize_ext.probing.certificate_report",
    "kappa-certificate-part": "immunize_ext.probing.certificate_report",
    "kappa-sweep": "immunize_ext.probing.comparison_report",
    "kappa-comparison": "immunize_ext.probing.comparison_report",
    "mima": "immunize_ext.text_to_image.report",
    "mima-evaluation": "immunize_ext.text_to_image.report",
    "mima-attack": "immunize_ext.text_to_image.report",
    "mima-sweep": "immunize_ext.text_to_image.comparison",
    "demo": "immunize_ext.report.demo",
}


def register(*kinds: str) -> Callable[[Maker], Maker]:
    """Say what makes the page of results of some kinds; a decorator.

    Args:
        *kinds: Values of ``results["kind"]``.

    Returns:
        The decorator, which gives the function back.

    Example:
        >>> @register("weather")
        ... def page(results):
        ...     return Page(results["city"], "plain.html.j2", {"facts": results})
        >>> "<h1>Basel &lt;CH&gt;</h1>" in render({"kind": "weather", "city": "Basel <CH>"})
        True
    """

    def decorate(maker: Maker) -> Maker:
        _makers.update(dict.fromkeys(kinds, maker))
        return maker

    return decorate


def page_of(results: Mapping[str, Any]) -> Page:
    """The page of a result.

    Raises:
        ValueError: If nobody registered its kind.
    """
    kind = results.get("kind")
    if kind not in _makers and kind in _REGISTRANTS:
        importlib.import_module(_REGISTRANTS[kind])
    if kind not in _makers:
        known = ", ".join(dict.fromkeys((*_REGISTRANTS, *_makers)))
        raise ValueError(f"render: kind must be one of {known}, got {kind!r}; give a results.json")
    return _makers[kind](results)


def check_extras() -> None:
    """Ask for what pages need, before any work is done for them.

    Raises:
        MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    require_extra("jinja2", extra="report", purpose="the pages")
    require_extra("matplotlib", extra="report", purpose="the plots")


@cache
def _environment() -> Any:
    jinja2 = require_extra("jinja2", extra="report", purpose="the pages")
    here = Path(__file__).parent
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here / "templates", here]),  # the style sheet stands here
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (words.count, words.number, words.percent, words.plain, words.times):
        found.filters[function.__name__] = function
    return found


def _svg(panel: Panel, name: str) -> str:
    """One plot for a page, with what it shows for those who hear it."""
    drawn = panel_svg(panel.draw, name, size=panel.size)
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(panel.label)}" ', 1)


def body(page: Page, *, identifier: str = "figure") -> Any:
    """What stands in the document of a page.

    Args:
        page: The page.
        identifier: Begins the identifiers of its plots; unique where pages share a document.

    Returns:
        HTML that may stand in a template as it is (``markupsafe.Markup``).

    Raises:
        MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    markupsafe = require_extra("markupsafe", extra="report", purpose="the pages")
    figures = {
        group: [
            {
                "svg": markupsafe.Markup(_svg(panel, f"{identifier}-{group}-{i}")),
                "caption": panel.caption,
            }
            for i, panel in enumerate(panels)
        ]
        for group, panels in page.panels.items()
    }
    template = _environment().get_template(page.template)
    return markupsafe.Markup(template.render(page.context, title=page.title, figures=figures))


def _document(page: Page) -> str:
    document: str = (
        _environment().get_template("document.html.j2").render(title=page.title, body=body(page))
    )
    return document


def render(results: Mapping[str, Any]) -> str:
    """Draw the page of a result.

    Args:
        results: The content of a ``results.json``, as it was read or as it will be written.

    Returns:
        An HTML document that refers to nothing outside itself, light or dark, phone or desktop.

    Raises:
        ValueError: If its kind is unknown.
        MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    return _document(page_of(results))


def in_notebook(kind: str, results: Mapping[str, Any]) -> str | None:
    """What a result shows of itself in a notebook, for its ``_repr_html_``.

    Args:
        kind: Who draws it, see :func:`register`.
        results: What it is drawn from.

    Returns:
        HTML, or ``None`` without the extra ``report``: the notebook then shows its ``repr``.
    """
    try:
        return str(body(page_of({**results, "kind": kind})))
    except MissingExtraError:
        return None


def write(results: Mapping[str, Any], folder: str | Path) -> None:
    """Write ``report.html`` and the plots as PNG files into a folder.

    Args:
        results: As for :func:`render`.
        folder: The run folder, or one that becomes it.

    Raises:
        ValueError: If the kind of the results is unknown.
        MissingExtraError: If jinja2 or matplotlib is not installed.
        OSError: If a file cannot be written.
    """
    page = page_of(results)
    files = {REPORT: _document(page).encode()}
    for group, panels in page.panels.items():
        if panels:
            drawn = panels_png([panel.draw for panel in panels], columns=page.columns)
            files[f"{group}.png"] = drawn
    for name, content in files.items():
        write_file(Path(folder) / name, content)


def write_record(results: Mapping[str, Any], folder: Path) -> Path:
    """Write results and their page under the next free number: ``001.json`` and ``001.html``.

    Args:
        results: As for :func:`render`.
        folder: Where; made if it is not there, its parent must be.

    Returns:
        The JSON file.

    Raises:
        ValueError: As :func:`render`; nothing is then written.
        MissingExtraError: As :func:`render`.
        OSError: If a file cannot be written.
    """
    page = render(results)
    path = write_numbered(folder, results)
    write_file(path.with_suffix(".html"), page.encode())
    return path
