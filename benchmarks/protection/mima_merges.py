"""MIMA with each of its merges, against LoRA, beside the noise floor of an identical rerun.

    python -m benchmarks.protection.mima_merges --seeds 0 1 2
    python -m benchmarks.protection.mima_merges --write docs/merge.md

Everything is as in ``mima_attackers``: digits three, five, eight and six erased, MIMA at its tuned
rate against the first three, LoRA at the rate that suits the unprotected model, 32 images a concept
at 0, 10, 20 and 40 steps. ``rerun`` is the closed form once more, computed on two threads instead of
one: other rounding, and nothing else. ``mima_merges.json`` is written after every model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from immunize_ext.storage import environment, write_file

from .._page import fill
from ..merge_sensitivity import table
from .mima_attackers import IMAGES, STEPS, Judges, attacker
from .mima_task import TARGETS, mima_task
from .mima_tuning import tuned_method

OUT = Path(__file__).with_suffix(".json")
RERUN = "rerun"
MERGES = ("closed_form", RERUN, "mean", "own_copies", "moments", "gated")
WORDS = {
    "closed_form": "closed form (as published)",
    RERUN: "closed form, other rounding",
    "mean": "mean of everything",
    "own_copies": "no merge, each at its own copy",
    "moments": "moments",
    "gated": "gates between base, mean and moments",
}


def measure(out: Path, merges: Sequence[str], seeds: Sequence[int]) -> None:
    """Everything that is not there yet, seed by seed."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    counts = found.setdefault("counts", {})
    judges, task, attack = Judges(), mima_task(), attacker("lora")
    for seed in seeds:
        for name in merges:
            if str(seed) in counts.setdefault(name, {}):
                continue
            kind = "closed_form" if name == RERUN else name
            method: Any = replace(tuned_method("mima"), merge=kind, seed=seed)
            torch.set_num_threads(2 if name == RERUN else 1)
            immunized = method.fit(task.model, task.fitted)
            torch.set_num_threads(1)
            last = immunized.history[-1]
            counts[name][str(seed)] = {
                "attacked": {
                    concept.name: judges.attacked(immunized.model, attack, concept, seed)
                    for concept in task.judged.concepts
                },
                "kept": judges.kept(task, immunized.model, seed),
                "gates": {key: value for key, value in last.items() if key.startswith("gate_")},
            }
            found.update(
                command="python -m benchmarks.protection.mima_merges",
                steps=list(STEPS),
                images=IMAGES,
                targets=list(TARGETS),
                rate=attack.learning_rate,
                environment=environment(),
            )
            write_file(out, (json.dumps(found, indent=1) + "\n").encode())
            print(name, seed, row(found, name, str(seed)), flush=True)


def row(found: dict[str, Any], name: str, seed: str) -> list[float]:
    """Mean recognised share of the concepts at each step."""
    attacked = found["counts"][name][seed]["attacked"]
    places = range(len(found["steps"]))
    return [
        statistics.fmean(one["recognised"][place] / found["images"] for one in attacked.values())
        for place in places
    ]


def parts(found: dict[str, Any]) -> dict[str, str]:
    """The block of docs/merge.md."""
    seeds = sorted(set.intersection(*(set(rows) for rows in found["counts"].values())))
    lines = []
    for name in (name for name in MERGES if name in found["counts"]):
        rows = [row(found, name, seed) for seed in seeds]
        lines.append(
            [
                WORDS[name],
                *(
                    f"{statistics.fmean(column):.2f} ({min(column):.2f} to {max(column):.2f})"
                    for column in zip(*rows, strict=True)
                ),
            ]
        )
    moved = floor(found)
    return {
        "protection": table(["merge", *(f"{step} steps" for step in found["steps"])], lines)
        + f"\n\n{len(seeds)} seeds. Other rounding alone moves one concept by up to "
        f"{max(moved[0]):.2f}, and the mean of three by up to {max(moved[1]):.2f}, at one step of "
        "one seed."
    }


def floor(found: dict[str, Any]) -> tuple[list[float], list[float]]:
    """What the rerun moved: single concepts, and their mean, at every step and seed."""
    first, second = (found["counts"][name] for name in ("closed_form", RERUN))
    single, mean = [], []
    for seed in sorted(set(first) & set(second)):
        for concept in found["targets"]:
            shares = [one[seed]["attacked"][concept]["recognised"] for one in (first, second)]
            single += [abs(a - b) / found["images"] for a, b in zip(*shares, strict=True)]
        rows = [row(found, name, seed) for name in ("closed_form", RERUN)]
        mean += [abs(a - b) for a, b in zip(*rows, strict=True)]
    return single, mean


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--merges", nargs="+", default=list(MERGES), choices=MERGES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", type=Path, help="put the table of what is there into this page")
    arguments = parser.parse_args(argv)
    if arguments.write is None:
        measure(arguments.out, arguments.merges, arguments.seeds)
    else:
        fill(arguments.write, parts(json.loads(arguments.out.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
