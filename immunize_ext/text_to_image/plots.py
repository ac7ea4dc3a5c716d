"""The plots of a text-to-image report: curves with spread, gaps by attack, images over steps."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext.report.plots import COLOURS, Draw, title
from immunize_ext.text_to_image.results import SIDES, Measured, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from immunize_ext.text_to_image.evaluation import TextToImageEvaluation


_SIDE_STYLE = {
    "unprotected": (COLOURS["--before"], (4, 2), "without"),
    "immunized": (COLOURS["--harmful"], (), "immunized"),
}


# Images of one concept and step that a grid shows, and how far they stand apart.
_SHOWN, _GAP = 3, 2


# Small images are drawn larger, and large ones smaller: results hold the grids.
_LEAST_SIDE, _LARGEST_SIDE = 32, 96


def _band(axes: Axes, steps: Sequence[int], scores: Sequence[Score], side: str) -> None:
    colour, dashes, word = _SIDE_STYLE[side]
    if scores[0].seeds > 1:
        low, high = [score.low for score in scores], [score.high for score in scores]
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    means = [score.mean for score in scores]
    axes.plot(steps, means, color=colour, dashes=dashes, marker="o", markersize=4, label=word)


def scores(
    heading: str,
    measured: Measured,
    steps: Sequence[int],
    by_side: dict[str, list[Score]],
    *,
    threshold: bool = True,
) -> Draw:
    """Score over the steps of an attack, of both models.

    Args:
        heading: Title of the plot.
        measured: What was measured.
        steps: The steps.
        by_side: Scores at each step by side.
        threshold: Whether the threshold is shown.
    """

    def draw(axes: Axes) -> None:
        title(axes, heading)
        axes.set_xlabel("steps of the attacker")
        axes.set_ylabel(measured.measure)
        axes.set_xticks(list(steps))
        axes.set_xlim(min(steps), max(max(steps), 1))
        if measured.measure == "accuracy":
            axes.set_ylim(-0.02, 1.02)
        for side in SIDES:
            _band(axes, steps, by_side[side], side)
        if threshold:
            level = measured.threshold
            axes.axhline(level, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
        axes.legend(frameon=False, fontsize=10, labelcolor=COLOURS["--muted"])

    return draw


def attack_scores(measured: Measured, attack: str) -> Draw:
    """Mean score over all concepts under one attack."""
    by_side = {side: measured.scores(side, attack) for side in SIDES}
    heading = f"{measured.label(attack)}, all concepts"
    return scores(heading, measured, measured.steps(attack), by_side)


def gaps(measured: Measured) -> Draw:
    """MSGR over the steps, a line for each attack: not at one step alone."""

    def draw(axes: Axes) -> None:
        title(axes, "MSGR at every judged step")
        # Shades of one colour and markers: the order of the attacks says who is who.
        for index, (attack, marker) in enumerate(
            zip(measured.attacks, "osD^vP*X" * len(measured.attacks), strict=False)
        ):
            steps = [step for step in measured.steps(attack) if step > 0]
            found = [measured.gap("msgr", attack, step) for step in steps]
            known = [(s, g) for s, g in zip(steps, found, strict=True) if math.isfinite(g.mean)]
            if not known:
                continue
            at = [step for step, _ in known]
            alpha = 1.0 - 0.6 * index / max(len(measured.attacks) - 1, 1)
            axes.plot(
                at,
                [gap.mean for _, gap in known],
                color=COLOURS["--harmful"],
                alpha=alpha,
                marker=marker,
                markersize=5,
                label=measured.label(attack),
            )
            axes.set_xticks(at)
        axes.axhline(0.0, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.05), max(high, 1.05))
        axes.set_xlabel("steps of the attacker")
        axes.set_ylabel("MSGR")
        axes.legend(frameon=False, fontsize=9.5, labelcolor=COLOURS["--muted"])

    return draw


# --- images -------------------------------------------------------------------------------------


def grid_entries(evaluation: TextToImageEvaluation) -> list[dict[str, Any]]:
    """Images over the steps of the attacks, as results hold them.

    Args:
        evaluation: What was measured, with images kept.

    Returns:
        One entry for each attack and each target or control it was tried on: ``attack``,
        ``concept``, ``role``, ``steps``, ``media`` and ``base64``. Photographs are kept small.
    """
    entries = []
    for compared in evaluation.comparisons:
        picture = image_grid(evaluation, compared.attack, compared.concept)
        if compared.role in ("target", "control") and picture is not None:
            entries.append(
                {
                    "attack": compared.attack,
                    "concept": compared.concept,
                    "role": compared.role,
                    "steps": list(compared.steps),
                    **_encoded(picture),
                }
            )
    return entries


def unattacked_entries(evaluation: TextToImageEvaluation) -> list[dict[str, Any]]:
    """Images of both models before any attack, as results hold them.

    Args:
        evaluation: What was measured, with images kept.

    Returns:
        One entry for each wording: ``wording``, ``prompt``, ``media`` and ``base64``.
    """
    prompts: dict[str, str] = {}
    for found in evaluation.step_zero:
        prompts.setdefault(found.wording, found.prompt)
    return [
        {
            "wording": wording,
            "prompt": prompt,
            **_encoded(_above([_cell(evaluation.unattacked[wording, side]) for side in SIDES])),  # type: ignore[index]
        }
        for wording, prompt in prompts.items()
        if (wording, SIDES[0]) in evaluation.unattacked
    ]


def image_grid(evaluation: TextToImageEvaluation, attack: str, concept: str) -> Tensor | None:
    """Images over the steps of an attack: without immunization above, with it below.

    Args:
        evaluation: What was measured.
        attack: Name of the attack.
        concept: Name of the concept.

    Returns:
        One picture, uint8, shape ``(h, w, c)``; ``None`` if no images were kept.
    """
    rows = []
    for side in SIDES:
        steps = evaluation.grid(attack, concept, side)  # type: ignore[arg-type]
        if not steps:
            return None
        cells = [_cell(images[:_SHOWN]) for _, images in sorted(steps.items())]
        rows.append(_beside(cells, 3 * _GAP))
    return _above(rows)


def _above(rows: list[Tensor]) -> Tensor:
    """Two rows of images, the first above."""
    gap = torch.full((3 * _GAP, rows[0].shape[1], rows[0].shape[2]), 255, dtype=torch.uint8)
    return torch.cat([rows[0], gap, rows[1]])


def _cell(images: Tensor) -> Tensor:
    """Images of one step beside each other, ``(h, w, c)``."""
    side = images.shape[-1]
    if side > _LARGEST_SIDE:
        size = (_LARGEST_SIDE * images.shape[-2] // side, _LARGEST_SIDE)
        small = torch.nn.functional.interpolate(images.float(), size, mode="area")
        images = small.round().to(torch.uint8)
    scale = max(1, _LEAST_SIDE // side)
    enlarged = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return _beside(list(enlarged.permute(0, 2, 3, 1)), _GAP)


def _beside(pictures: list[Tensor], gap: int) -> Tensor:
    height, _, channels = pictures[0].shape
    white = torch.full((height, gap, channels), 255, dtype=torch.uint8)
    parts = [part for picture in pictures for part in (picture, white)]
    return torch.cat(parts[:-1], dim=1)


def _encoded(picture: Tensor) -> dict[str, str]:
    """A picture ``(h, w, 1)`` or ``(h, w, 3)`` as a file: exact if grey, small if a photograph."""
    pillow = require_extra("PIL.Image", extra="report", purpose="image grids")
    grey = picture.shape[-1] == 1
    image = pillow.fromarray((picture.squeeze(-1) if grey else picture).numpy())
    buffer = io.BytesIO()
    if grey:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=88)
    media = "image/png" if grey else "image/jpeg"
    return {"media": media, "base64": base64.b64encode(buffer.getvalue()).decode()}


# --- several runs -------------------------------------------------------------------------------


def protection_and_cost(rows: Sequence[Any]) -> Draw:
    """MSGR against the change of what is kept, a mark for each run."""

    def draw(axes: Axes) -> None:
        title(axes, "Protection against what it costs")
        for row in rows:
            if row.msgr is None or row.retained_change is None:
                continue
            place = (row.retained_change, row.msgr)
            axes.plot(*place, "o", color=COLOURS["--harmful"], markersize=7)
            text = axes.annotate(f" {row.name}", place, fontsize=9, va="center")
            text.set_color(COLOURS["--muted"])
        axes.axvline(-0.05, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
        axes.set_xlabel("change of what is kept")
        axes.set_ylabel("MSGR")

    return draw


def over_knob(rows: Sequence[Any], knob: str, label: str, value: str) -> Draw:
    """MSGR (``"msgr"``) or what is kept (``"retained_change"``) over a setting of the runs."""
    return partial(_over_knob, rows=rows, knob=knob, label=label, value=value)


def _over_knob(axes: Axes, rows: Sequence[Any], knob: str, label: str, value: str) -> None:
    words = {"msgr": "MSGR", "retained_change": "change of what is kept"}
    title(axes, f"{words[value]} over the {label}")
    colour = COLOURS["--harmful" if value == "msgr" else "--primary"]
    places = sorted({getattr(row, knob) for row in rows})
    means = []
    for place in places:
        at = [getattr(row, value) for row in rows if getattr(row, knob) == place]
        found = [one for one in at if one is not None]
        axes.plot([place] * len(found), found, "o", color=colour, alpha=0.4, markersize=5)
        means.append(sum(found) / len(found) if found else math.nan)
    axes.plot(places, means, color=colour)
    if knob == "ridge" and min(places) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel(label)
