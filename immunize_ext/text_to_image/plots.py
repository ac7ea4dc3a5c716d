"""The plots of a text-to-image report: curves with spread, gaps by attack, images over steps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext.quantities import Spread
from immunize_ext.report.plots import COLOURS, Draw, panel_svg, panels_png, title
from immunize_ext.text_to_image.attack_runs import SIDES
from immunize_ext.text_to_image.evaluation import TextToImageEvaluation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes


_SIDE_STYLE = {
    "unprotected": (COLOURS["--before"], (4, 2), "without"),
    "immunized": (COLOURS["--harmful"], (), "immunized"),
}


# Images of one concept and step that a grid shows, and how large a pixel of them is drawn.
_SHOWN, _SCALE, _GAP = 3, 4, 2


def _band(
    axes: Axes, steps: Sequence[int], spreads: Sequence[Spread], side: str, *, label: bool = True
) -> None:
    colour, dashes, word = _SIDE_STYLE[side]
    mean = [spread.mean for spread in spreads]
    axes.fill_between(
        steps,
        [spread.minimum for spread in spreads],
        [spread.maximum for spread in spreads],
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(
        steps,
        mean,
        color=colour,
        dashes=dashes,
        marker="o",
        markersize=4,
        label=word if label else None,
    )


def _curve_axes(axes: Axes, steps: Sequence[int], heading: str, measure: str) -> None:
    title(axes, heading)
    axes.set_xlabel("steps of the attacker")
    axes.set_ylabel(measure)
    axes.set_xticks(list(steps))
    axes.set_xlim(min(steps), max(steps))
    if measure == "accuracy":
        axes.set_ylim(-0.02, 1.02)


def _attack_panel(axes: Axes, evaluation: TextToImageEvaluation, attack: str, heading: str) -> None:
    steps = evaluation.comparison(attack, evaluation.targets[0]).steps
    _curve_axes(axes, steps, heading, evaluation.measures[0])
    for side in SIDES:
        _band(axes, steps, evaluation.target_scores(side, attack), side)
    axes.axhline(evaluation.threshold, color=COLOURS["--muted"], linewidth=1.0, dashes=(1, 2))
    axes.legend(frameon=False, fontsize=10, labelcolor=COLOURS["--muted"])


def _concept_panel(
    axes: Axes, evaluation: TextToImageEvaluation, attack: str, concept: str, heading: str
) -> None:
    found = evaluation.comparison(attack, concept)
    _curve_axes(axes, found.steps, heading, evaluation.measures[0])
    for side in SIDES:
        _band(axes, found.steps, found.spread(side, evaluation.measures[0]), side)
    axes.legend(frameon=False, fontsize=10, labelcolor=COLOURS["--muted"])


def _bars(axes: Axes, evaluation: TextToImageEvaluation, labels: dict[str, str]) -> None:
    title(axes, "MSGR when the unprotected model is re-taught")
    attacks = list(evaluation.attacks)
    spreads = [evaluation.msgr_at_threshold(attack) for attack in attacks]
    places = [float(place) for place in range(len(attacks))]
    values = [0.0 if spread is None else spread.mean for spread in spreads]
    axes.barh(places, values, color=COLOURS["--harmful"], height=0.5)
    for place, spread in zip(places, spreads, strict=True):
        if spread is None:
            axes.text(0.01, place, "never re-taught", va="center", color=COLOURS["--muted"])
        else:
            axes.plot(
                [spread.minimum, spread.maximum], [place, place], color=COLOURS["--ink"], lw=1.2
            )
    # Above the bars: beside them there is no room for long names.
    for place, attack in zip(places, attacks, strict=True):
        axes.text(0.0, place - 0.36, labels.get(attack, attack), fontsize=9.5, va="bottom")
    axes.set_yticks([])
    axes.set_ylim(len(attacks) - 0.5, -0.75)
    axes.set_xlim(min(0.0, *values) - 0.02, 1.02)
    axes.set_xlabel("1: nothing learnt, 0: no protection")
    axes.grid(visible=False, axis="y")


def curve_panels(evaluation: TextToImageEvaluation, labels: dict[str, str]) -> dict[str, Draw]:
    """What draws each panel, by name.

    Args:
        evaluation: What was measured.
        labels: Attacks in words.

    Returns:
        ``attack-NAME`` for each attack, ``control`` and ``new-word`` where they were measured, and
        ``msgr``.
    """
    panels: dict[str, Draw] = {}
    for attack in evaluation.attacks:
        panels[f"attack-{attack}"] = partial(
            _attack_panel,
            evaluation=evaluation,
            attack=attack,
            heading=f"{labels.get(attack, attack)}, all concepts",
        )
    for role, name, words in (
        ("control", "control", "erased, not immunized"),
        ("new_word", "new-word", "taught under a new word"),
    ):
        found = evaluation.with_role(role, evaluation.attacks[0])  # type: ignore[arg-type]
        if found:
            panels[name] = partial(
                _concept_panel,
                evaluation=evaluation,
                attack=evaluation.attacks[0],
                concept=found[0].concept,
                heading=f"{found[0].concept}: {words}",
            )
    panels["msgr"] = partial(_bars, evaluation=evaluation, labels=labels)
    return panels


def draw_curves_svg(evaluation: TextToImageEvaluation, labels: dict[str, str]) -> dict[str, str]:
    """Panels for a page, as ``<svg>`` elements by name; see :func:`curve_panels`."""
    return {
        name: panel_svg(draw, f"t2i-{name}")
        for name, draw in curve_panels(evaluation, labels).items()
    }


def draw_curves_png(evaluation: TextToImageEvaluation, labels: dict[str, str]) -> bytes:
    """All panels side by side, as a PNG file."""
    return panels_png(list(curve_panels(evaluation, labels).values()))


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
        steps = evaluation.grid(attack, concept, side)
        if not steps:
            return None
        cells = [_cell(images[:_SHOWN]) for _, images in sorted(steps.items())]
        rows.append(_beside(cells, 3 * _GAP))
    gap = torch.full((3 * _GAP, rows[0].shape[1], rows[0].shape[2]), 255, dtype=torch.uint8)
    return torch.cat([rows[0], gap, rows[1]])


def _cell(images: Tensor) -> Tensor:
    """Images of one step beside each other, ``(h, w, c)``."""
    enlarged = images.repeat_interleave(_scale(images), -1).repeat_interleave(_scale(images), -2)
    return _beside(list(enlarged.permute(0, 2, 3, 1)), _GAP)


def _scale(images: Tensor) -> int:
    return max(1, _SCALE * 8 // images.shape[-1])


def _beside(pictures: list[Tensor], gap: int) -> Tensor:
    height, _, channels = pictures[0].shape
    white = torch.full((height, gap, channels), 255, dtype=torch.uint8)
    parts = [part for picture in pictures for part in (picture, white)]
    return torch.cat(parts[:-1], dim=1)


def png_of(picture: Tensor) -> bytes:
    """A PNG file of a picture, uint8, shape ``(h, w, 1)`` or ``(h, w, 3)``."""
    import io

    pillow = require_extra("PIL.Image", extra="report", purpose="image grids")
    array = picture.squeeze(-1).numpy() if picture.shape[-1] == 1 else picture.numpy()
    buffer = io.BytesIO()
    pillow.fromarray(array).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
