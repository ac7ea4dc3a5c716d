"""Writes the tables of docs/mima.md from committed results, or checks them.

python -m benchmarks.protection.mima_page --write docs/mima.md
python -m benchmarks.protection.mima_page --check docs/mima.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from immunize_ext.quantities import corrected_share, share_over_seeds
from immunize_ext.text_to_image.attacks import attack_label
from immunize_ext.text_to_image.results import Measured

from .. import _page
from .._page import table_row
from .mima_attackers import ERASED, NEVER, SCORES, STEPS
from .mima_task import TARGETS, digit

HERE = Path(__file__).parent
NAMES = {
    ERASED: "erased",
    NEVER: "Never learnt",
    "mima": "MIMA",
    "many_words": "Many words",
    "joint_training": "Joint training",
    "merge_only": "Merge of separate immunizations",
    "loss_ascent": "Plain loss ascent",
    "imma": "IMMA on *three* alone",
}
# The methods whose worst case is told.
HEADLINE = ("mima", "many_words")
# What the goal of an immunization under many words is stated for.
BY_WORDS = ("lora", "lora:rare_token", "lora:unrelated_word", "locon")

Row = Mapping[str, Any]


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _spread(value: Row | None) -> str:
    if value is None:
        return "not reached"
    return f"{value['mean']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _named(attack: str) -> str:
    """An attacker in words; LoRA by the own name says so, since others ask otherwise."""
    label = attack_label(attack)
    return f"{label}, own name" if attack == "lora" else label.replace(" asked by ", " ")


# --- who gets past it -----------------------------------------------------------------------------


class Attacked:
    """What one attacker got on one model.

    Args:
        found: Content of ``mima_attackers.json``.
        model: Name of the model.
        attack: Name of the attack.

    Attributes:
        seeds: Those that it was run with; none where it was not run.
        trials: Images of a seed.
    """

    def __init__(self, found: Row, model: str, attack: str) -> None:
        self._rows: dict[str, Row] = found["counts"].get(model, {}).get(attack, {})
        self._judge: Row = found["judges"][0]
        self.seeds = sorted(map(int, self._rows))
        self.trials = len(TARGETS) * found["images"]

    def counts(self, at: int, score: str = SCORES[0]) -> list[int]:
        """Images counted at one of the steps, one number a seed."""
        return [
            sum(int(self._rows[str(seed)][name][score][at]) for name in TARGETS)
            for seed in self.seeds
        ]

    def share(self, at: int, score: str = SCORES[0]) -> float:
        """Their share; NaN where nothing was run."""
        images = self.trials * len(self.seeds)
        return sum(self.counts(at, score)) / images if images else math.nan

    def interval(self, at: int) -> tuple[float, float]:
        """95 % interval of what the judge counts, scatter between seeds included."""
        return share_over_seeds(self.counts(at), self.trials)

    def corrected(self, at: int) -> tuple[float, float]:
        """95 % interval of the true share, the judge's errors included, without the scatter."""
        images = self.trials * len(self.seeds)
        hits, validated, mistaken, others = _validation(self._judge)
        counted = sum(self.counts(at))
        found = corrected_share((counted, images), (hits, validated), (mistaken, others))
        return found.low, found.high

    def cell(self) -> str:
        """Shares after training, the interval of the last, and the number of seeds."""
        if not self.seeds:
            return ""
        shares = " ".join(f"{self.share(at):.2f}" for at, step in enumerate(STEPS) if step)
        low, high = self.interval(len(STEPS) - 1)
        return f"{shares} ({low:.2f} to {high:.2f}; {len(self.seeds)})"


def _validation(judge: Row) -> tuple[int, int, int, int]:
    """Counts of the judge on real images of the targets, and on images of the others."""
    labels = [digit(name).label for name in TARGETS]
    sensitivity = [judge["sensitivity"][label] for label in labels]
    mistaken = [judge["false_positives"][label] for label in labels]
    validated, others = judge["images"] * len(labels), judge["images"] * 9
    wrong = math.fsum(mistaken) / len(mistaken) * others
    hits = math.fsum(sensitivity) / len(sensitivity) * validated
    return round(hits), validated, math.ceil(wrong - 1e-9), others


def tried(found: Row) -> list[str]:
    """Attackers that some method met, those who ask by words first."""
    names = {attack for model in HEADLINE for attack in found["counts"].get(model, {})}
    return [*(a for a in BY_WORDS if a in names), *sorted(names - set(BY_WORDS))]


def reached(found: Row, model: str, attacks: Sequence[str], at: int) -> tuple[float, str]:
    """The largest share at one of the steps, and whose it is."""
    met = [(Attacked(found, model, attack), attack) for attack in attacks]
    return max((one.share(at), attack) for one, attack in met if one.seeds)


def worst() -> str:
    """All attackers on the methods of the headline, and the worst of them."""
    found = load("mima_attackers")
    models = [name for name in (ERASED, NEVER, *HEADLINE) if name in found["counts"]]
    lines = [
        table_row(["attack", *(NAMES[name] for name in models)]),
        "|" + "---|" * (len(models) + 1),
    ]
    attacks = tried(found)
    for attack in attacks:
        cells = [Attacked(found, name, attack).cell() for name in models]
        lines.append(table_row([_named(attack), *cells]))
    lines += [
        "",
        f"Recognised after {', '.join(str(s) for s in STEPS if s)} steps; in brackets the 95 % "
        "interval of the last, scatter between seeds included, and the number of seeds.",
    ]
    for name in HEADLINE:
        if name not in found["counts"]:
            continue
        told = []
        for at, step in enumerate(STEPS):
            if step:
                share, attack = reached(found, name, attacks, at)
                told.append(f"{share:.2f} after {step} ({_named(attack)})")
        end = len(STEPS) - 1
        _, last = reached(found, name, attacks, end)
        low, high = Attacked(found, name, last).corrected(end)
        share, attack = reached(found, name, BY_WORDS, end)
        lines += [
            "",
            f"**{NAMES[name]}, worst case: {', '.join(told)}.** The last is {low:.2f} to "
            f"{high:.2f} of the images in truth, the judge's errors on real images included. "
            f"Of LoRA by three wordings and LoCon alone: {share:.2f} after {STEPS[-1]} "
            f"({_named(attack)}; {Attacked(found, ERASED, attack).share(end):.2f} on the erased "
            "model).",
        ]
    return "\n".join(lines)


def words() -> str:
    """LoRA under several wordings: both judges, and how much is any digit."""
    found = load("mima_attackers")
    steps = ", ".join(map(str, STEPS))
    lines = [
        table_row(
            [
                "LoRA asks by",
                "model",
                f"recognised after {steps} steps",
                "second judge",
                "any digit",
            ]
        ),
        "|" + "---|" * 5,
    ]
    for attack in tried(found):
        base, _, wording = attack.partition(":")
        if base != "lora":
            continue
        for name in (ERASED, *HEADLINE):
            one = Attacked(found, name, attack)
            if one.seeds:
                shares = [
                    " ".join(f"{one.share(at, score):.2f}" for at in range(len(STEPS)))
                    for score in SCORES
                ]
                asked = wording.replace("_", " ") or "own name"
                lines.append(table_row([asked, f"{NAMES[name]} ({len(one.seeds)})", *shares]))
    first, second = (math.fsum(judge["sensitivity"]) / 10 for judge in found["judges"])
    lines += [
        "",
        f"In brackets the number of seeds. The judges accept and recognise {first:.1%} and "
        f"{second:.1%} of real images they have not seen.",
    ]
    return "\n".join(lines)


def kept() -> str:
    """What has to stay, recognised under its own names, on the seeds that all models have."""
    found = load("mima_attackers")["kept"]
    names = [name for name in (ERASED, *HEADLINE) if found.get(name)]
    lines = [
        table_row(["model", "seeds", "kept digits recognised", "least of a seed"]),
        "|---|---|---|---|",
    ]
    images = load("mima_attackers")["images"]
    for name in names:
        by_seed = [sum(row.values()) / len(row) / images for row in found[name].values()]
        mean = math.fsum(by_seed) / len(by_seed)
        cells = [NAMES[name], str(len(by_seed)), f"{mean:.3f}", f"{min(by_seed):.3f}"]
        lines.append(table_row(cells))
    return "\n".join(lines)


# --- methods --------------------------------------------------------------------------------------


def methods() -> str:
    """All methods under LoRA by the own name, beside the outside option."""
    rows: dict[str, Any] = load("mima_digits")["methods"]
    step = rows["mima"]["evaluation"]["summary"]["lora"]["delay"]["unprotected"]
    outside = rows.get(NEVER)
    header = [
        *("method", f"MSGR at step {step}", "at steps 20, 40"),
        f"least concept at {step}, 20, 40",
        *(() if outside is None else (f"useful at {step}, 20, 40",)),
        *("any digit at step 0", "what is kept", "control", "new word"),
    ]
    lines = [table_row(header), "|" + "---|" * len(header)]
    for name, row in rows.items():
        evaluation = row["evaluation"]
        found = evaluation["summary"]["lora"]
        kept = evaluation["retained_change"]
        measured = Measured({"evaluation": evaluation, "config": {}})
        cells = [
            NAMES[name],
            _spread(found["msgr"]["at"][str(step)]),
            ", ".join(_spread(found["msgr"]["at"][after]) for after in ("20", "40")),
            ", ".join(_least(found["sgr"], str(after)) for after in (step, 20, 40)),
            *(() if outside is None else ("" if name == NEVER else _useful(evaluation, outside),)),
            f"{measured.beside('any digit', 'immunized', 'lora')[0]:.2f}",
            f"{kept['mean']:+.3f} (least {kept['min']:+.3f})",
            *(
                f"{found[gap]['at'][str(step)]['mean']:+.2f}"
                for gap in ("control_sgr", "new_word_sgr")
            ),
        ]
        lines.append(table_row(cells))
    shares = rows["mima"]["merge_share"]
    seeds = len(rows["mima"]["evaluation"]["seeds"])
    lines += [
        "",
        f"{seeds} seeds; in brackets the least and the largest. The merge took {min(shares):.1%} "
        f"to {max(shares):.1%} of MIMA's time (forward pass).",
    ]
    return "\n".join(lines)


def _least(by_concept: Row, step: str) -> str:
    """The gap of the concept that is protected least, the mean over seeds, and its name."""
    found = {name: row["at"][step]["mean"] for name, row in by_concept.items()}
    name = min(found, key=lambda one: found[one])
    return f"{found[name]:.2f} ({name})"


def _useful(evaluation: Row, outside: Row) -> str:
    """Smaller of the gaps of the method and of the outside option, at each step after 0."""
    found = [
        [one["summary"]["lora"]["msgr"]["at"][str(step)]["mean"] for step in STEPS if step]
        for one in (evaluation, outside["evaluation"])
    ]
    return ", ".join(f"{min(pair):.2f}" for pair in zip(*found, strict=True))


# --- before any attack ----------------------------------------------------------------------------


def before() -> str:
    """How much of what models draw is any digit, by words of all kinds, unattacked."""
    rows: dict[str, Any] = load("mima_digits")["methods"]
    shown: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        measured = Measured({"evaluation": row["evaluation"], "config": {}})
        for wording, by_measure in measured.unattacked().items():
            scores = by_measure["any digit"]
            shown.setdefault(NAMES[ERASED], {})[wording] = scores["unprotected"].mean
            shown.setdefault(NAMES[name], {})[wording] = scores["immunized"].mean
    found = load("mima_attackers")
    if "many_words" in found["counts"]:
        attacks = {
            "own name": "lora",
            "rare word": "lora:rare_token",
            "unrelated word": "lora:unrelated_word",
        }
        shown[NAMES["many_words"]] = {
            wording: Attacked(found, "many_words", attack).share(0, "any digit")
            for wording, attack in attacks.items()
        }
    wordings = list(shown[NAMES[ERASED]])
    lines = [table_row(["any digit, asked by", *wordings]), "|" + "---|" * (len(wordings) + 1)]
    for name, row in shown.items():
        lines.append(
            table_row([name, *(f"{row[word]:.2f}" if word in row else "" for word in wordings)])
        )
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
        shown = ", ".join(f"{rate}: {score:.2f}" for rate, score in found["table"].items())
        lines.append(f"| {attack_label(name)}, accuracy | {shown} | {found['rate']:g} |")
    for name, found in made["methods"].items():
        shown = ", ".join(
            f"{rate}: {row['msgr']:.2f} at {row['retained_change']:+.3f}"
            for rate, row in found["table"].items()
        )
        lines.append(f"| {NAMES[name]}, MSGR at what is kept | {shown} | {found['rate']:g} |")
    return "\n".join([*lines, "", f"Judge of this table: {made['judge']}."])


TABLES = {
    "worst": worst,
    "words": words,
    "kept": kept,
    "methods": methods,
    "before": before,
    "tuning": tuning,
}


def filled(page: str) -> str:
    """The page with every table between its marks."""
    return _page.filled(page, {name: table() for name, table in TABLES.items()})


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
