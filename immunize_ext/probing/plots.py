"""The plots of a condition-number report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from immunize_ext.probing.results import Attacked
from immunize_ext.report.plots import COLOURS, Draw, title
from immunize_ext.report.words import number, real, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _tick(value: float, _position: object = None) -> str:
    """Plain numbers on logarithmic axes: 0.2, 1, 10, 1,000."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _horizon(one: Attacked) -> int:
    """Last step to show: a little beyond the later of the two arrivals."""
    arrived = one.budget if one.after is None else one.after
    return max(10, min(2 * max(arrived, one.before), one.budget))


def _visible(one: Attacked, side: str, key: str, first: int = 0) -> tuple[list[int], list[float]]:
    assert one.curves is not None  # panels are made of those that have curves
    curve, last = one.curves[side], _horizon(one)
    pairs = zip(curve["steps"], curve[key], strict=True)
    steps, values = zip(*[(s, real(v)) for s, v in pairs if first <= s <= last], strict=True)
    return list(steps), list(values)


def _two_curves(axes: Axes, one: Attacked, key: str, *, first: int = 0) -> None:
    last = _horizon(one)
    # The dashes lie on top, so that equal curves show both colours.
    for side, colour, dashes, label, order in (
        ("without", COLOURS["--before"], (4, 2), "before", 2.2),
        ("with", COLOURS[f"--{one.role}"], (), "immunized", 2.1),
    ):
        steps, values = _visible(one, side, key, first)
        axes.plot(steps, values, color=colour, dashes=dashes, label=label, zorder=order)
    # Linear from 0 to 1, logarithmic beyond: the start belongs into the picture.
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
    axes.set_xlim(first, last * 1.05)
    axes.set_xticks([tick for tick in (0, *(10**e for e in range(7))) if first <= tick <= last])
    axes.xaxis.set_major_formatter(_tick)
    axes.set_xlabel("steps of the attacker")


def convergence(one: Attacked) -> Draw:
    """Test loss over the steps of one attacker, without and with immunization."""

    def draw(axes: Axes) -> None:
        colour = COLOURS[f"--{one.role}"]
        title(axes, f"{one.attacker.label}, {one.role} task")
        _two_curves(axes, one, "test_loss")
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_ylabel("test loss")
        target = real(one.facts["target_test_loss"])
        axes.axhline(target, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
        start = max(one.before, 1)
        end = _horizon(one) if one.after is None else max(one.after, 1)
        axes.plot([start], [target], "o", color=COLOURS["--before"], markersize=7)
        if one.after is not None:
            axes.plot([end], [target], "o", color=colour, markersize=7)
        if start != end:
            axes.annotate(
                "",
                xy=(end, target),
                xytext=(start, target),
                arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 5, "shrinkB": 4},
            )
        axes.annotate(
            times(one.slowdown),
            xy=((start * end) ** 0.5, target),
            xytext=(0, -29),
            textcoords="offset points",
            ha="center",
            fontsize=13,
            fontweight="bold",
            color=colour,
        )
        shown = [*_visible(one, "without", "test_loss")[1], *_visible(one, "with", "test_loss")[1]]
        # Room below the target for its label.
        low = min(min(shown) / 1.1, target * (target / max(shown)) ** 0.55)
        high = max(shown) * 1.15
        axes.set_ylim(low, high)
        ticks = (m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5))
        axes.set_yticks([tick for tick in ticks if low <= tick <= high])
        axes.yaxis.set_major_formatter(_tick)
        _legend(axes)

    return draw


def slowdowns(heading: str, attacks: Sequence[Attacked], labels: Sequence[str]) -> Draw:
    """How many times the steps each attacker needs, on both tasks.

    Args:
        heading: Title of the plot.
        attacks: What was measured.
        labels: Their attackers, from the top.
    """

    def draw(axes: Axes) -> None:
        title(axes, heading)
        for role, marker in (("harmful", "o"), ("primary", "s")):
            colour = COLOURS[f"--{role}"]
            of_role = [one for one in attacks if one.role == role]
            for index, one in enumerate(of_role):
                axes.plot(
                    [max(one.slowdown.ratio, 1e-3)],
                    [labels.index(one.attacker.label)],
                    marker,
                    color=colour,
                    markerfacecolor="none" if one.slowdown.censored else colour,
                    markersize=8,
                    label=f"{role} task" if index == 0 else None,
                )
        axes.axvline(1.0, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.5), max(high, 2.0))
        axes.xaxis.set_major_formatter(lambda value, _: f"{_tick(value)}×")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_yticks(range(len(labels)), labels, fontsize=10)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        left, bottom, width, height = axes.get_position().bounds
        # Room for the names, and for the ticks below however many rows there are.
        axes.set_position((left + 0.22, bottom, width - 0.22, height))
        _legend(axes)

    return draw


def accuracy(one: Attacked) -> Draw:
    """Test accuracy over the steps of one attacker, without and with immunization."""

    def draw(axes: Axes) -> None:
        title(axes, f"Right answers on test data, {one.role} task")
        # Before the first step the head is 0 and has no opinion.
        _two_curves(axes, one, "test_accuracy", first=1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _legend(axes, "lower right")

    return draw


def spectrum(role: str, values: Mapping[str, list[float]]) -> Draw:
    """Eigenvalues of one task's Hessian before and after."""

    def draw(axes: Axes) -> None:
        title(axes, f"Spectrum of the Hessian, {role} task")
        for key, colour, marker, label in (
            ("before", COLOURS["--before"], ".", "before"),
            ("after", COLOURS[f"--{role}"], "o", "immunized"),
        ):
            eigenvalues = [real(value) for value in values[key]]
            last = eigenvalues[-1]
            kappa = eigenvalues[0] / last if last > 0.0 else math.inf
            axes.plot(
                values["places"],
                [value / eigenvalues[0] for value in eigenvalues],
                marker,
                markersize=4,
                color=colour,
                label=f"{label}, κ = {number(kappa)}",
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_tick)
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


# Told apart in print, on a dark page and by most colour-blind readers, with markers beside them.
_PALETTE = ("#0f766f", "#c2410d", "#5b6ee1", "#b7791f", "#a3439b", "#3c8dbc", "#6b8e23", "#8c6d62")


_MARKERS = "osD^vP*X"


def frontier(
    heading: str,
    lines: Mapping[str, Sequence[Sequence[Any]]],
    marks: Mapping[str, Sequence[tuple[float, float]]],
    methods: Sequence[str],
) -> Draw:
    """Slow-down of the harm against that of the task to keep, a curve for each method.

    Args:
        heading: Title of the plot.
        lines: Curves by method: primary and harmful slow-down.
        marks: Single runs by method, in the same form.
        methods: All methods, in the order of their colours.
    """

    def draw(axes: Axes) -> None:
        for index, method in enumerate(methods):
            colour, marker = _PALETTE[index % len(_PALETTE)], _MARKERS[index % len(_MARKERS)]
            line = [(real(x), real(y)) for x, y in lines.get(method, ())]
            single = marks.get(method, ())
            if len(single) > len(line):
                axes.plot(*zip(*single, strict=True), marker, color=colour, alpha=0.22, ms=4)
            if line:
                xs, ys = zip(*line, strict=True)
                axes.plot(xs, ys, marker=marker, color=colour, markersize=6.5, label=method)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for rule in (axes.axvline, axes.axhline):
            rule(1.0, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{_tick(value)}×")
            axis.set_minor_formatter(lambda *_: "")
        axes.set_xlabel("slow-down of the task to keep (left: faster)")
        axes.set_ylabel("slow-down of the harm")
        title(axes, heading)
        axes.legend(frameon=False, fontsize=9.5, labelcolor=COLOURS["--muted"], loc="best")

    return draw


def heat(heading: str, values: Mapping[str, Any], limit: float) -> Draw:
    """Log RIR by pair of tasks.

    Args:
        heading: Title of the plot.
        values: ``rows`` (harmful tasks), ``columns`` (primary tasks) and ``log_rir``.
        limit: Largest value of the colours.
    """

    def draw(axes: Axes) -> None:
        rows, columns = values["rows"], values["columns"]
        matrix = np.array([[real(value) for value in row] for row in values["log_rir"]])
        # Diverging around log RIR 0: below it the primary task got relatively worse.
        axes.imshow(matrix, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, fontsize=9)
        axes.set_yticks(range(len(rows)), rows, fontsize=9)
        axes.grid(False)
        axes.set_xlabel("primary task")
        axes.set_ylabel("harmful task")
        for (i, j), value in np.ndenumerate(matrix) if matrix.size <= 144 else ():
            if not math.isnan(value):
                # On the map's colours, in any page.
                colour = "#ffffff" if abs(value) > 0.55 * limit else "#1b1f27"
                text = axes.text(j, i, f"{value:.1f}", fontsize=8, color=colour)
                text.set(ha="center", va="center")
        title(axes, heading)

    return draw
