"""Writes the tables of docs/mima.md from committed results, or checks them.

python -m benchmarks.protection.mima_page --write docs/mima.md
python -m benchmarks.protection.mima_page --check docs/mima.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from immunize_ext.quantities import corrected_share
from immunize_ext.text_to_image.results import Measured

from . import mima_words

HERE = Path(__file__).parent
NAMES = {
    "mima": "MIMA",
    "joint_training": "Joint training",
    "merge_only": "Merge of separate immunizations",
    "loss_ascent": "Plain loss ascent",
    "imma": "IMMA on *three* alone",
    "never_learnt": "Never learnt",
    "lora": "LoRA",
    "full_fine_tuning": "Full fine-tuning",
    "textual_inversion": "Textual Inversion",
    "dreambooth": "DreamBooth with prior preservation",
}
NEVER = "never_learnt"
STEPS = (0, 10, 20, 40)

Row = Mapping[str, Any]


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _spread(value: Row | None) -> str:
    if value is None:
        return "not reached"
    return f"{value['mean']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _curve(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


# --- who gets past it -----------------------------------------------------------------------------


class Attacker:
    """How far one attacker with one wording gets, on the erased model and on MIMA's.

    Attributes:
        name: In words.
        counts: Recognised images at each step, by side (``without`` and ``with``).
        images: Of how many.
    """

    def __init__(self, name: str, counts: Mapping[str, list[int]], images: int) -> None:
        self.name, self.counts, self.images = name, counts, images

    def shares(self, side: str) -> list[float]:
        """Accuracy at each step."""
        return [count / self.images for count in self.counts[side]]

    def interval(self, at: int, judge: Row) -> str:
        """What may be true of MIMA's model at a step, the judge's errors included."""
        hits, validated, mistaken, others = _validation(judge)
        found = corrected_share(
            (self.counts["with"][at], self.images), (hits, validated), (mistaken, others)
        )
        return f"{found.low:.2f} to {found.high:.2f}"


def _validation(judge: Row) -> tuple[int, int, int, int]:
    """Counts of the judge on real images of the targets, and on images of the others."""
    labels = [mima_words.digit(name).label for name in mima_words.TARGETS]
    sensitivity = [judge["sensitivity"][label] for label in labels]
    mistaken = [judge["false_positives"][label] for label in labels]
    validated, others = judge["images"] * len(labels), judge["images"] * 9
    wrong = math.fsum(mistaken) / len(mistaken) * others
    hits = math.fsum(sensitivity) / len(sensitivity) * validated
    return round(hits), validated, math.ceil(wrong - 1e-9), others


def attackers() -> Iterator[Attacker]:
    """Everyone who was tried on MIMA and judged by judges that can say "none of these"."""
    digits, more, words = map(load, ("mima_digits", "mima_digits_attackers", "mima_words"))
    for row in (digits["methods"]["mima"], more["methods"]["mima"]):
        measured = Measured({"evaluation": row["evaluation"], "config": {}})
        if not measured.others:  # the earlier judge stood alone
            continue
        for attack in measured.attacks:
            scores = {
                side: measured.scores(key, attack)
                for side, key in (("without", "unprotected"), ("with", "immunized"))
            }
            counts = {
                side: [round(score.mean * score.trials) for score in found]
                for side, found in scores.items()
            }
            own = ", own name" if attack == "lora" else ""
            yield Attacker(NAMES[attack] + own, counts, scores["with"][0].trials)
    total = words["seeds"] * len(words["targets"]) * words["images"]
    for word in mima_words.WORDS:
        if word != "own name":
            found = {
                side: [
                    mima_words.total(words, word, side, "recognised", at)
                    for at in range(len(STEPS))
                ]
                for side in mima_words.SIDES
            }
            yield Attacker(f"LoRA, {word}", found, total)


def worst() -> str:
    """Attackers on MIMA, and the worst of them at each step."""
    judge = load("mima_words")["judges"][0]
    found = list(attackers())
    lines = [
        f"| attack | erased, after {', '.join(map(str, STEPS))} steps | MIMA |",
        "|---|---|---|",
    ]
    for one in found:
        shares = ", ".join(
            f"{share:.2f} ({one.interval(at, judge)})"
            for at, share in enumerate(one.shares("with"))
        )
        lines.append(f"| {one.name} | {_curve(one.shares('without'))} | {shares} |")
    lines += earlier()
    best = [max(found, key=lambda one, at=at: one.shares("with")[at]) for at in range(len(STEPS))]
    reached = ", ".join(
        f"{one.shares('with')[at]:.2f} after {step} ({one.name})"
        for at, (step, one) in enumerate(zip(STEPS, best, strict=True))
        if step
    )
    lines += [
        "",
        f"**Worst case: {reached}.** In brackets of the table the 95 % interval of the true share, "
        "the judge's errors on real images included (Rogan and Gladen, from Clopper-Pearson "
        "intervals of the images and of the judge's validation); scatter between seeds is not in "
        "it.",
    ]
    return "\n".join(lines)


def earlier() -> list[str]:
    """Rows that no judge but the earlier one has seen, which the worst case leaves out."""
    row = load("mima_digits_attackers")["methods"]["mima"]["evaluation"]
    if len(row["measures"]) > 1:
        return []
    return [
        f"| {NAMES[name]}, *earlier judge* | "
        + " | ".join(
            _curve([point["mean"] for point in row["summary"][name][side]])
            for side in ("unprotected", "immunized")
        )
        + " |"
        for name in row["attacks"]
    ]


# --- methods --------------------------------------------------------------------------------------


def methods() -> str:
    """All methods under LoRA by the own name, beside the outside option."""
    rows: dict[str, Any] = load("mima_digits")["methods"]
    step = rows["mima"]["evaluation"]["summary"]["lora"]["delay"]["unprotected"]
    outside = rows.get(NEVER)
    header = [
        *("method", f"MSGR at step {step}", "at steps 20, 40"),
        *(() if outside is None else (f"useful at {step}, 20, 40",)),
        *("any digit at step 0", "what is kept", "control", "new word"),
    ]
    lines = [_line(header), "|" + "---|" * len(header)]
    for name, row in rows.items():
        evaluation = row["evaluation"]
        found = evaluation["summary"]["lora"]
        kept = evaluation["retained_change"]
        measured = Measured({"evaluation": evaluation, "config": {}})
        cells = [
            NAMES[name],
            _spread(found["msgr"]["at"][str(step)]),
            ", ".join(_spread(found["msgr"]["at"][after]) for after in ("20", "40")),
            *(() if outside is None else ("" if name == NEVER else _useful(evaluation, outside),)),
            f"{measured.beside('any digit', 'immunized', 'lora')[0]:.2f}",
            f"{kept['mean']:+.3f} (least {kept['min']:+.3f})",
            *(
                f"{found[gap]['at'][str(step)]['mean']:+.2f}"
                for gap in ("control_sgr", "new_word_sgr")
            ),
        ]
        lines.append(_line(cells))
    shares = rows["mima"]["merge_share"]
    seeds = len(rows["mima"]["evaluation"]["seeds"])
    lines += [
        "",
        f"{seeds} seeds; in brackets the least and the largest. The merge took {min(shares):.1%} "
        f"to {max(shares):.1%} of MIMA's time (forward pass).",
    ]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _useful(evaluation: Row, outside: Row) -> str:
    """Smaller of the gaps of the method and of the outside option, at each step after 0."""
    found = [
        [one["summary"]["lora"]["msgr"]["at"][str(step)]["mean"] for step in STEPS if step]
        for one in (evaluation, outside["evaluation"])
    ]
    return ", ".join(f"{min(pair):.2f}" for pair in zip(*found, strict=True))


# --- before any attack ----------------------------------------------------------------------------


def before() -> str:
    """What the erased model and MIMA's draw for words of all kinds, unattacked."""
    evaluation = load("mima_digits")["methods"]["mima"]["evaluation"]
    found = Measured({"evaluation": evaluation, "config": {}}).unattacked()
    lines = [
        "| asked by | any digit: erased | MIMA | a protected digit: erased | MIMA |",
        "|---|---|---|---|---|",
    ]
    for wording, by_measure in found.items():
        cells = [
            f"{by_measure[measure][side].mean:.2f}"
            for measure in ("any digit", "accuracy")
            for side in ("unprotected", "immunized")
        ]
        lines.append(f"| {wording} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- tuning ---------------------------------------------------------------------------------------


def tuning() -> str:
    """Learning rates tried."""
    made = load("mima_tuning")
    lines = [
        "| tuned on seeds "
        + " and ".join(map(str, made["seeds"]))
        + " | rates tried, and what came out | taken |",
        "|---|---|---|",
    ]
    for name, found in made["attacks"].items():
        tried = ", ".join(f"{rate}: {score:.2f}" for rate, score in found["table"].items())
        lines.append(f"| {NAMES[name]}, accuracy | {tried} | {found['rate']:g} |")
    for name, found in made["methods"].items():
        tried = ", ".join(
            f"{rate}: {row['msgr']:.2f} at {row['retained_change']:+.3f}"
            for rate, row in found["table"].items()
        )
        lines.append(f"| {NAMES[name]}, MSGR at what is kept | {tried} | {found['rate']:g} |")
    return "\n".join([*lines, "", f"Judge of this table: {made['judge']}."])


TABLES = {"worst": worst, "methods": methods, "before": before, "tuning": tuning}


def filled(page: str) -> str:
    """The page with every table between its marks."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page must have the marks {begin} and {end} once")
        head, rest = page.split(begin)
        page = f"{head}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return page


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = arguments.page.read_text(encoding="utf-8")
    wanted = filled(text)
    if arguments.write:
        arguments.page.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print(f"{arguments.page} does not say what the results say; run it with --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
