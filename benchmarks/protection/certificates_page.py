"""The tables of docs/certificates.md, from ``certificates.json``.

Medians and quartiles are over problems: pairs of tasks and seeds. Intervals are of the median, by
bootstrap over pairs: seeds of one pair are no independent problems.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import _page

Row = Mapping[str, Any]

MARKS = ("certificates", "rotation", "layers", "seconds")
DATA = {
    "digits": "8 x 8 digits",
    "mnist": "MNIST, 14 x 14",
    "deep": "EfficientNet-Lite0 features of MNIST, 320 maps of the last block",
    "house": "House Prices, SalePrice against LotArea",
}
RESAMPLES = 1000
LIMIT = 32.0  # beyond it a slow-down by rotation is not measured

_PRICES = {
    "gradient descent, spectrum": "descent",
    "Adam-like, spectrum": "diagonal",
    "labelled samples, harm": "samples_harm",
    "with a public model": "samples_harm_sibling",
    "own task": "samples_own",
    "another task": "samples_benign",
}
_REACH = {
    "R² of harm": "r2_harm",
    "right on harm": "accuracy_harm",
    "Gaussian kernel on harm": "kernel_harm",
    "perceptron on harm": "perceptron_harm",
    "harm served in bfloat16, R²": "bfloat16_harm",
    "R² of own task": "r2_own",
    "right on own task": "accuracy_own",
}


def number(value: Any) -> float:
    """What JSON holds for a number, infinite ones included."""
    return math.inf if value == "inf" else float(value)


def cell(rows: Sequence[Row], key: str, place: int | None = None, digits: int = 2) -> str:
    """Median, quartiles, and the interval of the median; nothing where there is no such number."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = row.get(key)
        value = value[place] if isinstance(value, list) and place is not None else value
        if value is not None:
            found.setdefault(pair_of(row), []).append(number(value))
    values = sorted(value for one in found.values() for value in one)
    if not values:
        return ""
    middle = _text(statistics.median(values), digits)
    if len(values) < 4:
        return middle
    # By position, since some are infinite.
    low, high = (_text(values[round(q * (len(values) - 1))], digits) for q in (0.25, 0.75))
    least, most = (_text(value, digits) for value in interval(list(found.values())))
    return f"{middle} ({low} to {high}) [{least}, {most}]"


def pair_of(row: Row) -> str:
    """The pair of tasks: a problem without its seed. Splits of House Prices count each."""
    name = str(row["problem"])
    return name if name.startswith("house") else name.rsplit(" ", 1)[0]


def interval(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % of medians over pairs drawn anew, with all seeds of each."""
    generator = np.random.default_rng(0)
    medians = sorted(
        statistics.median(value for k in chosen for value in pairs[k])
        for chosen in generator.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    )
    cut = round(0.025 * RESAMPLES)
    return medians[cut], medians[-1 - cut]


def _text(value: float, digits: int) -> str:
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def tables(results: Mapping[str, Any]) -> str:
    """Two tables for each kind of data: what is paid, and what is reached with all data."""
    lines: list[str] = []
    for data, title in DATA.items():
        rows = [row for row in results["rows"] if row["problem"].split()[0] == data]
        if not rows:
            continue
        problems, pairs = ({f(row) for row in rows} for f in (_problem, pair_of))
        counted = f"{len(problems)} problems of {len(pairs)} pairs"
        if data == "house":
            counted = f"{len(problems)} splits"
        elif len(problems) % len(pairs) == 0:
            seeds = len(problems) // len(pairs)
            counted = f"{len(pairs)} pairs, {seeds} {'seed' if seeds == 1 else 'seeds'} each"
        lines += ["", f"### {title}, {counted}", "", *_table(rows, _PRICES, None, 1)]
        lines += ["", *_table(rows, _REACH, 1, 2)]
    return "\n".join(lines).strip()


def _problem(row: Row) -> str:
    return str(row["problem"])


def _table(
    rows: Sequence[Row], columns: Mapping[str, str], place: int | None, digits: int
) -> list[str]:
    # Where no row has a number (right answers of a regression), there is no column.
    kept = {
        title: key for title, key in columns.items() if any(cell([row], key, place) for row in rows)
    }
    lines = [f"| method | {' | '.join(kept)} |", "|---" * (len(kept) + 1) + "|"]
    if place is not None:
        methods = {row["method"] for row in rows}
        first = [row for row in rows if row["method"] == min(methods)]
        cells = [cell(first, key, 0, digits) if "16" not in key else "" for key in kept.values()]
        lines.append(f"| none | {' | '.join(cells)} |")
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        cells = [cell(chosen, key, place, digits) for key in kept.values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def seconds(results: Mapping[str, Any]) -> str:
    """What a certificate costs by part, and the caps in work."""
    titles = ("delays", "work", "undoing", "few_samples", "formats", "linear")
    lines = [
        "| data | features | " + " | ".join(t.replace("_", " ") for t in titles) + " | all |",
        "|---" * (len(titles) + 3) + "|",
    ]
    features = {"digits": 64, "mnist": 196, "deep": 320, "house": 79}
    for data, title in DATA.items():
        rows = [row for row in results["rows"] if row["problem"].split()[0] == data]
        # Locks have no delay to certify.
        rows = [row for row in rows if row["descent"] is not None]
        if not rows:
            continue
        least = min(rows, key=lambda row: float(row["cpu_seconds"]))
        # Parts were timed by the clock, beside other work: their shares are what is right.
        share = least["cpu_seconds"] / sum(least["seconds"].values())
        cells = [f"{share * least['seconds'][name]:.2f}" for name in titles]
        whole = f"{least['cpu_seconds']:.1f}"
        lines.append(f"| {title} | {features[data]} | {' | '.join(cells)} | {whole} |")
    caps = sorted(row["cap"] for row in results["rows"] if row["cap"] is not None)
    lines += [
        "",
        f"Cap on any slow-down of a free attacker, in work: median {statistics.median(caps):.2f} "
        f"of gradient descent before (largest {caps[-1]:.2f}), over {len(caps)} certificates; in "
        "all others whitening learns the harm worse than gradient descent does, and there is none.",
    ]
    return "\n".join(lines)


def layer_table(results: Mapping[str, Any]) -> str:
    """Probes of earlier layers: the harm, median over pairs."""
    lines = ["| probe of | features | R² of harm | right on harm |", "|---|---|---|---|"]
    rows = results["layers"]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        chosen = [row for row in rows if row["layer"] == layer]
        title = "the head, 1280" if layer == "output" else f"block {layer.rsplit('.', 1)[1]}"
        cells = [
            f"{statistics.median(row[key] for row in chosen):.2f}" for key in ("r2", "accuracy")
        ]
        lines.append(f"| {title} | {chosen[0]['features']} | {' | '.join(cells)} |")
        if "r2_locked" in chosen[0]:
            cells = [
                f"{statistics.median(row[key] for row in chosen):.2f}"
                for key in ("r2_locked", "accuracy_locked")
            ]
            lines.append(f"| {title}, **locked** | | {' | '.join(cells)} |")
    return "\n".join(lines)


def rotation_table(results: Mapping[str, Any]) -> str:
    """Slow-downs by last rotation: median, least and largest over pairs and seeds."""
    attackers = ("gradient_descent", "adam", "adagrad", "standardised")
    lines = [
        "| last rotation | gradient descent | Adam | Adagrad | standardised features |",
        "|---|---|---|---|---|",
    ]
    rows = results["rotations"]
    for rotation in dict.fromkeys(row["rotation"] for row in rows):
        cells = []
        for attacker in attackers:
            values = sorted(number(row[attacker]) for row in rows if row["rotation"] == rotation)
            ends = f"{_times(values[0])} to {_times(values[-1])}"
            cells.append(f"{_times(statistics.median(values))} ({ends})")
        lines.append(f"| {rotation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(value: float) -> str:
    return f">{LIMIT:.0f}" if math.isinf(value) else f"{value:.2g}"


def filled(page: str, results: Mapping[str, Any]) -> str:
    """The page with all tables between their marks.

    Raises:
        ValueError: If marks are missing.
    """
    made = (tables, rotation_table, layer_table, seconds)
    return _page.filled(page, {name: make(results) for name, make in zip(MARKS, made, strict=True)})
