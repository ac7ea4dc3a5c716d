"""What all plots of a report share: colours, style, and how a panel becomes PNG or SVG.

Each panel is drawn by one function and used twice: side by side in a PNG, alone in a page, where
its colours follow the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from immunize_ext._extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Colours by the name of the CSS variable that takes their place in the page.
COLOURS = {
    "--ink": "#1b1f26",
    "--muted": "#5f6876",
    "--grid": "#e4e7eb",
    "--before": "#8c95a4",
    "--harmful": "#c2410d",
    "--primary": "#0f766f",
}


STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "immunize_ext",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
    "text.parse_math": False,  # names are text: "$" is a dollar
    "text.color": COLOURS["--ink"],
    "axes.edgecolor": COLOURS["--grid"],
    "axes.labelcolor": COLOURS["--muted"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": COLOURS["--grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["--grid"],
    "ytick.color": COLOURS["--grid"],
    "xtick.labelcolor": COLOURS["--muted"],
    "ytick.labelcolor": COLOURS["--muted"],
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


PANEL = (4.8, 3.1)  # inches


# Shares of a panel. Fixed, so that panels line up and no layout has to be solved.
_MARGINS = {"left": 0.15, "right": 0.03, "bottom": 0.17, "top": 0.12}


Draw = Callable[["Axes"], None]


def title(axes: Axes, text: str) -> None:
    """Write a panel's title."""
    axes.set_title(text, loc="left", fontsize=11.5, color=COLOURS["--ink"], pad=10)


def _matplotlib() -> tuple[Any, Any]:
    matplotlib = require_extra("matplotlib", extra="report", purpose="the plots")
    figure = require_extra("matplotlib.figure", extra="report", purpose="the plots")
    return matplotlib, figure.Figure


def _place(left: float, bottom: float, columns: int, rows: int) -> tuple[float, ...]:
    """Place of the axes in one cell of a figure: the same margins in every panel."""
    return (
        left + _MARGINS["left"] / columns,
        bottom + _MARGINS["bottom"] / rows,
        (1.0 - _MARGINS["left"] - _MARGINS["right"]) / columns,
        (1.0 - _MARGINS["bottom"] - _MARGINS["top"]) / rows,
    )


def panels_png(panels: Sequence[Draw], *, columns: int = 2) -> bytes:
    """Draw panels side by side.

    Args:
        panels: What draws each, in reading order.
        columns: Panels in a row.

    Returns:
        A PNG file.

    Raises:
        MissingExtraError: If matplotlib is not installed.

    Note:
        Sets no matplotlib state: no backend, no pyplot, settings only inside a context.
    """
    matplotlib, figure_class = _matplotlib()
    rows = (len(panels) + columns - 1) // columns
    with matplotlib.rc_context(STYLE):
        size = columns * PANEL[0], rows * PANEL[1]
        figure = figure_class(figsize=size, facecolor="white")
        for index, draw in enumerate(panels):
            row, column = divmod(index, columns)
            place = _place(column / columns, 1 - (row + 1) / rows, columns, rows)
            draw(figure.add_axes(place))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def panel_svg(draw: Draw, name: str, *, size: tuple[float, float] = PANEL) -> str:
    """Draw one panel, ready to stand in a page.

    Args:
        draw: What draws it.
        name: Unique in the page.
        size: Width and height in inches.

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    matplotlib, figure_class = _matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=size)
        figure.patch.set_visible(False)
        axes = figure.add_axes(_place(0.0, 0.0, 1, 1))
        axes.patch.set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """Cut an SVG file down to its element, and let it take colours and font from the page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # One page holds many of these: identifiers must not clash.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
