"""The plots of a condition-number report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from immunize_ext.probing.attacks import AttackComparison, AttackCurve
from immunize_ext.probing.evaluation import ATTACKER_NAMES, ROLES, Evaluation, log_spaced_steps
from immunize_ext.report.plots import COLOURS, Draw, panel_svg, panels_png, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_ROLE_COLOUR = {role: COLOURS[f"--{role}"] for role in ROLES}


# Attackers with a curve to show; a closed-form solution is one point.
CURVES = ("gradient_descent", "line_search", "conjugate_gradients", "whitened")


Panel = Callable[["Axes", Evaluation], None]


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
        title(axes, f"{ATTACKER_NAMES[attacker]}, {role} task")
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
        title(axes, f"Right answers on test data, {role} task")
        # Before the first step the head is 0 and has no opinion.
        _two_curves(axes, comparison, role, "test_accuracy", first=1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _legend(axes, "lower right")

    return draw


def _spectrum(role: str) -> Panel:
    def draw(axes: Axes, evaluation: Evaluation) -> None:
        spectrum = evaluation.spectra[role]
        title(axes, f"Spectrum of the Hessian, {role} task")
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
    if not evaluation.has_accuracy:
        del figures["accuracy"]
    return figures


def _bind(panel: Panel, evaluation: Evaluation) -> Draw:
    return lambda axes: panel(axes, evaluation)


def draw_png(evaluation: Evaluation) -> dict[str, bytes]:
    """Draw the figures of a run directory.

    Args:
        evaluation: What was measured.

    Returns:
        PNG files by figure: ``convergence``, ``spectra`` and, for classification, ``accuracy``.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    return {
        name: panels_png([_bind(draw, evaluation) for draw in panels.values()])
        for name, panels in _panels(evaluation).items()
    }


def draw_svg(evaluation: Evaluation) -> dict[str, str]:
    """Draw the panels of the page, ready to stand in HTML.

    Args:
        evaluation: What was measured.

    Returns:
        ``<svg>`` elements by panel: ``gradient_descent-harmful``, ``spectrum-primary``, ...

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    return {
        name: panel_svg(_bind(draw, evaluation), name)
        for panels in _panels(evaluation).values()
        for name, draw in panels.items()
    }
