"""The plots of a report: as PNG files, and as SVG whose colours follow the page.

Each panel is drawn by one function and used twice: side by side in a PNG, alone in the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from immunize_ext._extras import require_extra
from immunize_ext.attacks import AttackComparison, AttackCurve
from immunize_ext.report.evaluation import (
    ATTACKER_NAMES,
    ROLES,
    Evaluation,
    log_spaced_steps,
)

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
_ROLE_COLOUR = {role: COLOURS[f"--{role}"] for role in ROLES}

# Attackers with a curve to show; a closed-form solution is one point.
CURVES = ("gradient_descent", "line_search", "conjugate_gradients", "whitened")

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "immunize_ext",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
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
_PANEL = (4.8, 3.1)  # inches
# Shares of a panel. Fixed, so that panels line up and no layout has to be solved.
_MARGINS = {"left": 0.15, "right": 0.03, "bottom": 0.17, "top": 0.12}

Panel = Callable[["Axes", Evaluation], None]


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, color=COLOURS["--ink"], pad=10)


def _number(value: float, _position: object = None) -> str:
    """Plain numbers on logarithmic axes: 0.2, 1, 10, 1,000."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _visible(curve: AttackCurve, last: int) -> list[int]:
    """Steps to draw, from 0 to ``last``."""
    return log_spaced_steps(min(curve.steps, last), 160)


def _horizon(comparison: AttackComparison) -> int:
    """Last step to show: a little beyond the later of the two arrivals."""
    arrived = comparison.immunized.steps if comparison.steps is None else comparison.steps
    return max(10, min(2 * max(arrived, comparison.base_steps), comparison.immunized.steps))


def _two_curves(
    axes: Axes, comparison: AttackComparison, role: str, field: str, *, first: int = 0
) -> None:
    last = _horizon(comparison)
    # The dashes lie on top, so that equal curves show both colours.
    for curve, colour, dashes, label, order in (
        (comparison.base, COLOURS["--before"], (4, 2), "before", 2.2),
        (comparison.immunized, _ROLE_COLOUR[role], (), "immunized", 2.1),
    ):
        steps = [step for step in _visible(curve, last) if step >= first]
        values = getattr(curve, field)[steps].numpy()
        axes.plot(steps, values, color=colour, dashes=dashes, label=label, zorder=order)
    # Linear from 0 to 1, logarithmic beyond: the start belongs into the picture.
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
    axes.set_xlim(first, last * 1.05)
    axes.set_xticks(
        [tick for tick in (0, 1, 10, 100, 1000, 10000, 100000) if first <= tick <= last]
    )
    axes.xaxis.set_major_formatter(_number)
    axes.set_xlabel("steps of the attacker")


def _convergence(role: str, attacker: str) -> Panel:
    def draw(axes: Axes, evaluation: Evaluation) -> None:
        comparison = evaluation.comparisons[role][attacker]
        colour = _ROLE_COLOUR[role]
        _title(axes, f"{ATTACKER_NAMES[attacker]}, {role} task")
        _two_curves(axes, comparison, role, "test_loss")
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_ylabel("test loss")
        target = comparison.target
        axes.axhline(target, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
        last = _horizon(comparison)
        start = max(comparison.base_steps, 1)
        end = last if comparison.steps is None else max(comparison.steps, 1)
        axes.plot([start], [target], "o", color=COLOURS["--before"], markersize=7)
        if comparison.steps is not None:
            axes.plot([end], [target], "o", color=colour, markersize=7)
        if start != end:
            axes.annotate(
                "",
                xy=(end, target),
                xytext=(start, target),
                arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 5, "shrinkB": 4},
            )
        axes.annotate(
            str(comparison.slowdown).replace("x", "×"),
            xy=((start * end) ** 0.5, target),
            xytext=(0, -29),
            textcoords="offset points",
            ha="center",
            fontsize=13,
            fontweight="bold",
            color=colour,
        )
        shown = [c.test_loss[_visible(c, last)] for c in (comparison.base, comparison.immunized)]
        low, high = (float(extreme(torch.cat(shown))) for extreme in (torch.min, torch.max))
        # Room below the target for its label.
        low, high = min(low / 1.1, target * (target / high) ** 0.55), high * 1.15
        axes.set_ylim(low, high)
        ticks = (m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5))
        axes.set_yticks([tick for tick in ticks if low <= tick <= high])
        axes.yaxis.set_major_formatter(_number)
        _legend(axes)

    return draw


def _accuracy(role: str) -> Panel:
    def draw(axes: Axes, evaluation: Evaluation) -> None:
        comparison = evaluation.comparisons[role]["gradient_descent"]
        _title(axes, f"Right answers on test data, {role} task")
        # Before the first step the head is 0 and has no opinion.
        _two_curves(axes, comparison, role, "test_accuracy", first=1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _legend(axes, "lower right")

    return draw


def _spectrum(role: str) -> Panel:
    def draw(axes: Axes, evaluation: Evaluation) -> None:
        spectrum = evaluation.spectra[role]
        _title(axes, f"Spectrum of the Hessian, {role} task")
        for values, colour, marker, label in (
            (spectrum.before, COLOURS["--before"], ".", "before"),
            (spectrum.after, _ROLE_COLOUR[role], "o", "immunized"),
        ):
            relative = (values / values[0]).numpy()
            kappa = 1.0 / relative[-1]
            axes.plot(
                np.arange(1, len(relative) + 1),
                relative,
                marker,
                markersize=4,
                color=colour,
                label=f"{label}, κ = {kappa:,.0f}",
            )
        axes.set_yscale("log")
        axes.set_xlabel("eigenvalue, from the largest")
        axes.set_ylabel("relative to the largest")
        _legend(axes)

    return draw


def _legend(axes: Axes, location: Literal["best", "lower right"] = "best") -> None:
    axes.legend(
        loc=location,
        frameon=False,
        fontsize=10.5,
        labelcolor=COLOURS["--muted"],
        handlelength=1.8,
        borderaxespad=0.2,
    )


def _panels(evaluation: Evaluation) -> dict[str, dict[str, Panel]]:
    """Panels by figure, two to a row: harmful on the left, primary on the right."""
    figures = {
        "convergence": {f"{a}-{role}": _convergence(role, a) for a in CURVES for role in ROLES},
        "accuracy": {f"accuracy-{role}": _accuracy(role) for role in ROLES},
        "spectra": {f"spectrum-{role}": _spectrum(role) for role in ROLES},
    }
    if not all(task.is_classification for task in evaluation.tasks.values()):
        del figures["accuracy"]
    return figures


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


def draw_png(evaluation: Evaluation) -> dict[str, bytes]:
    """Draw the figures of a run directory.

    Args:
        evaluation: What was measured.

    Returns:
        PNG files by figure: ``convergence``, ``spectra`` and, for classification, ``accuracy``.

    Raises:
        MissingExtraError: If matplotlib is not installed.

    Note:
        Sets no matplotlib state: no backend, no pyplot, settings only inside a context.
    """
    matplotlib, figure_class = _matplotlib()
    drawn = {}
    for name, panels in _panels(evaluation).items():
        rows = (len(panels) + 1) // 2
        with matplotlib.rc_context(_STYLE):
            size = 2 * _PANEL[0], rows * _PANEL[1]
            figure = figure_class(figsize=size, facecolor="white")
            for index, draw in enumerate(panels.values()):
                row, column = divmod(index, 2)
                draw(figure.add_axes(_place(column / 2, 1 - (row + 1) / rows, 2, rows)), evaluation)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=140)
        drawn[name] = buffer.getvalue()
    return drawn


def draw_svg(evaluation: Evaluation) -> dict[str, str]:
    """Draw the panels of the page, ready to stand in HTML.

    Args:
        evaluation: What was measured.

    Returns:
        ``<svg>`` elements by panel: ``gradient_descent-harmful``, ``spectrum-primary``, ...

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    matplotlib, figure_class = _matplotlib()
    drawn = {}
    for panels in _panels(evaluation).values():
        for name, draw in panels.items():
            with matplotlib.rc_context(_STYLE):
                figure = figure_class(figsize=_PANEL)
                figure.patch.set_visible(False)
                axes = figure.add_axes(_place(0.0, 0.0, 1, 1))
                axes.patch.set_visible(False)
                draw(axes, evaluation)
                buffer = io.StringIO()
                figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            drawn[name] = _for_page(buffer.getvalue(), name)
    return drawn


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
