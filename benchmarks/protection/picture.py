"""Draws docs/holds.svg, the picture of the README: what attackers pay, and who gets through.

    python -m benchmarks.protection.picture --write docs/holds.svg    or --check

Everything in it comes from ``certificates.json`` and ``mima_attackers.json``. It is put together
by hand, not by matplotlib: whatever is installed, the same results give the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from benchmarks.protection.certificates_page import pair_of
from immunize_ext.report.plots import COLOURS

HERE = Path(__file__).parent
METHODS = ("closed-form", "label-direction", "lock")
CHANCE = 0.5  # right answers of who guesses, on pairs of digits
LARGEST = 1000.0  # price at the end of the logarithmic scale
THROUGH = 0.05  # of the right answers above chance: who loses less gets through
MODELS = {"erased": "erased only", "mima": "MIMA", "many_words": "many words"}
ATTACKS = {
    "lora": "LoRA by the concept's own name",
    "lora:rare_token": "LoRA by a rare word",
    "lora:unrelated_word": "LoRA by an unrelated word",
    "dreambooth": "DreamBooth",
    "full_fine_tuning": "full fine-tuning",
}

Row = Mapping[str, Any]
# For each model and attack one entry a seed: counts by concept and score, at each step.
Counts = Mapping[str, Mapping[str, Sequence[Row]]]


class Bar(NamedTuple):
    """One bar: its name, its length between 0 and 1, what is written at its end, its colour."""

    name: str
    length: float
    text: str
    colour: str


class Group(NamedTuple):
    """Bars of one attacker."""

    attacker: str
    bars: list[Bar]


class Block(NamedTuple):
    """Groups on one scale."""

    scale: str
    groups: list[Group]


class Panel(NamedTuple):
    """A column of the picture."""

    title: str
    note: str
    blocks: list[Block]


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return found


# --- what is shown --------------------------------------------------------------------------------


def median(rows: Sequence[Row], method: str, key: str, place: int | None = None) -> float | None:
    """Over the problems; infinite where it was not reached, None where there is no such number."""
    found = [row[key] for row in rows if row["method"] == method and row[key] is not None]
    values = [float(value if place is None else value[place]) for value in found]
    return statistics.median(values) if values else None


def _price(rows: Sequence[Row], method: str, key: str) -> Bar:
    value = median(rows, method, key)
    if value is None or math.isinf(value):
        text = "nothing to learn" if value is None else "not reached"
        return Bar(method, 1.0, text, "primary")
    length = math.log(max(value, 1.0)) / math.log(LARGEST)
    return Bar(method, length, f"{value:.{0 if value >= 10 else 1}f} times", "primary")


def _loss(rows: Sequence[Row], method: str, key: str) -> Bar:
    before, after = (median(rows, method, key, place) for place in (0, 1))
    assert before is not None
    assert after is not None
    length = max(before - after, 0.0) / (before - CHANCE)
    text = f"{after:.2f} right"
    if length < THROUGH:
        return Bar(method, length, f"{text}: gets through", "harmful")
    return Bar(method, length, text, "primary")


def features(found: Row) -> Panel:
    """What attackers of immunized features pay, and what they lose with all data."""
    rows = [row for row in found["rows"] if row["problem"].startswith("mnist")]
    prices = {"descends: steps needed": "descent", "has few labels: samples needed": "samples_harm"}
    losses = {"whitens or solves": "accuracy_harm", "learns with a kernel": "kernel_harm"}
    before = {key: median(rows, METHODS[0], key, 0) for key in losses.values()}
    return Panel(
        "Features: what attackers pay",
        f"MNIST 14 x 14, median of {len({pair_of(row) for row in rows})} pairs",
        [
            Block(
                "Times as much as before, log scale",
                [
                    Group(name, [_price(rows, m, key) for m in METHODS])
                    for name, key in prices.items()
                ],
            ),
            Block(
                "All data: edge over chance lost",
                [
                    Group(
                        f"{name} ({before[key]:.2f} right before)",
                        [_loss(rows, m, key) for m in METHODS],
                    )
                    for name, key in losses.items()
                ],
            ),
        ],
    )


def counts() -> tuple[Counts, int, int]:
    """Judged images of attacks on text-to-image models, images of a concept, steps."""
    found = load("mima_attackers")
    by_model = {
        model: {attack: list(seeds.values()) for attack, seeds in attacks.items()}
        for model, attacks in found["counts"].items()
    }
    return by_model, found["images"], found["steps"][-1]


def share(runs: Sequence[Row], images: int) -> float:
    """Recognised images after the last step, over seeds and concepts."""
    last = [concept["recognised"][-1] for run in runs for concept in run.values()]
    return math.fsum(last) / (images * len(last))


def text_to_image(found: Counts, images: int, steps: int) -> Panel:
    """What attackers of text-to-image models get."""
    groups = []
    seeds: dict[str, int] = {}
    for attack, attacker in ATTACKS.items():
        bars = []
        for model, name in MODELS.items():
            runs = found.get(model, {}).get(attack, [])
            if runs:
                value = share(runs, images)
                colour = "muted" if model == "erased" else "harmful"
                bars.append(Bar(name, value, f"{value:.2f}", colour))
                seeds[name] = min(len(runs), seeds.get(name, len(runs)))
        if bars:
            groups.append(Group(attacker, bars))
    most = max(seeds.values())
    fewer = [f"{name} {number}" for name, number in seeds.items() if number < most]
    return Panel(
        "Text-to-image: what they get",
        ", ".join(["Digits pipeline", f"{most} seeds", *fewer]),
        [Block(f"Images recognised after {steps} steps", groups)],
    )


# --- how it is drawn ------------------------------------------------------------------------------

WIDTH, MARGIN, GAP, NAME = 720, 16, 20, 126
LINE, BAR, LETTER = 24, 18, 10  # no usual font has wider digits
DARK = {
    "paper": "#12151a",
    "ink": "#e8ebf0",
    "muted": "#9aa4b2",
    "grid": "#2c323c",
    "harmful": "#fb9257",
    "primary": "#4fd1bd",
}
LIGHT = {"paper": "#ffffff"} | {name: COLOURS[f"--{name}"] for name in DARK if name != "paper"}


def _text(x: float, y: float, style: str, content: str, anchor: str = "start") -> str:
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" class="{style}"{end}>{escape(content)}</text>'


def _rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" class="{style}"/>'


def _bar(bar: Bar, x: float, y: float, room: float) -> Iterator[str]:
    yield _text(x, y + 14, "muted", bar.name)
    x, room = x + NAME, room - NAME
    yield _rectangle(x, y, room, BAR, "grid")
    # A bar of no length is still to be seen.
    length = max(bar.length * room, 2.0)
    yield _rectangle(x, y, length, BAR, bar.colour)
    if length > room / 2 and length + 6 + LETTER * len(bar.text) > room:
        yield _text(x + length - 6, y + 14, "paper", bar.text, "end")
    else:
        yield _text(x + length + 6, y + 14, "ink", bar.text)


def _panel(panel: Panel, x: float, room: float) -> tuple[list[str], float]:
    """What is drawn, and where it ends."""
    y = 34.0
    drawn = [_text(x, y, "ink title", panel.title), _text(x, y + 24, "muted", panel.note)]
    y += 36
    for block in panel.blocks:
        y += 22
        drawn.append(_text(x, y, "ink strong", block.scale))
        for group in block.groups:
            y += 26
            drawn.append(_text(x, y, "ink", group.attacker))
            y += 7
            for bar in group.bars:
                drawn += _bar(bar, x, y, room)
                y += LINE
        y += 12
    return drawn, y


def _colours(of: Mapping[str, str]) -> str:
    return "".join(f".{name}{{fill:{colour}}}" for name, colour in of.items())


def in_words(panels: Sequence[Panel]) -> str:
    """The picture for who does not see it."""
    said = []
    for panel in panels:
        said += [panel.title, panel.note]
        for block in panel.blocks:
            said.append(block.scale)
            for group in block.groups:
                bars = ", ".join(f"{bar.name} {bar.text}" for bar in group.bars)
                said.append(f"{group.attacker}: {bars}")
    return ". ".join(said) + "."


def picture(panels: Sequence[Panel]) -> str:
    """The panels side by side, as an SVG file that is light or dark as the reader's system is."""
    room = (WIDTH - 2 * MARGIN - GAP * (len(panels) - 1)) / len(panels)
    drawn: list[str] = []
    bottom = 0.0
    for index, panel in enumerate(panels):
        elements, end = _panel(panel, MARGIN + index * (room + GAP), room)
        drawn += elements
        bottom = max(bottom, end)
    font = "font:16.5px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
    style = (
        f"text{{{font}}}.title{{font-size:20px;font-weight:600}}.strong{{font-weight:600}}"
        f"{_colours(LIGHT)}@media (prefers-color-scheme:dark){{{_colours(DARK)}}}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom:g}" '
            f'viewBox="0 0 {WIDTH} {bottom:g}" role="img" aria-labelledby="title desc">',
            '<title id="title">What holds against whom</title>',
            f'<desc id="desc">{escape(in_words(panels))}</desc>',
            f"<style>{style}</style>",
            f'<rect width="{WIDTH}" height="{bottom:g}" rx="8" class="paper"/>',
            *drawn,
            "</svg>\n",
        ]
    )


def drawn() -> str:
    """The picture of the committed results."""
    return picture([features(load("certificates")), text_to_image(*counts())])


def main() -> int:
    """Write the picture, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="SVG")
    action.add_argument("--check", type=Path, metavar="SVG")
    arguments = parser.parse_args()
    if arguments.write is not None:
        arguments.write.write_text(drawn(), encoding="utf-8")
        return 0
    same = arguments.check.read_text(encoding="utf-8") == drawn()
    if not same:
        print(f"{arguments.check} is not what the committed results say", file=sys.stderr)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
