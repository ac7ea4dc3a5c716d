"""MIMA with each of its merges, against one attacker, beside the noise floor of a rerun.

    python -m benchmarks.protection.mima_merges --seeds 0 1 2
    python -m benchmarks.protection.mima_merges --write docs/merge.md

Everything is as in ``mima_attackers``: digits three, five, eight and six erased, MIMA at its tuned
rate against the first three, LoRA that asks by a rare word, 32 images a concept at 0, 10, 20 and 40
steps. The closed form's counts are those of ``mima_attackers.json``; ``rerun`` is the same settings
and seeds once more, by a later build of this package: other rounding, and nothing else.
``mima_merges.json`` is written after every model.
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

from .._page import fill, table
from .mima_attackers import IMAGES, STEPS, Judges, attacker
from .mima_attackers import OUT as ATTACKERS
from .mima_task import TARGETS, mima_task
from .mima_tuning import tuned_method

OUT = Path(__file__).with_suffix(".json")
ATTACK, PUBLISHED, RERUN = "lora:rare_token", "closed_form", "rerun"
MERGES = ("mean", "moments", "gated", RERUN, "own_copies")
WORDS = {
    "closed_form": "closed form (as published)",
    RERUN: "closed form, the same seeds again",
    "mean": "mean of everything",
    "own_copies": "no merge, each at its own copy",
    "moments": "moments",
    "gated": "gates between base, mean and moments",
}


def measure(out: Path, merges: Sequence[str], seeds: Sequence[int]) -> None:
    """Everything that is not there yet, seed by seed."""
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    counts = found.setdefault("counts", {})
    judges, task, attack = Judges(), mima_task(), attacker(ATTACK)
    for seed in seeds:
        for name in merges:
            if str(seed) in counts.setdefault(name, {}):
                continue
            kind = PUBLISHED if name == RERUN else name
            method: Any = replace(tuned_method("mima"), merge=kind, seed=seed)
            immunized = method.fit(task.model, task.fitted)
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
                attack=ATTACK,
                rate=attack.learning_rate,
                environment=environment(),
            )
            write_file(out, (json.dumps(found, indent=1) + "\n").encode())
            print(name, seed, row(found, name, str(seed)), flush=True)


def counted(found: dict[str, Any], name: str, seed: str) -> dict[str, list[int]]:
    """Recognised images of each concept at each step."""
    if name == PUBLISHED:
        attacked = published()["counts"]["mima"][ATTACK][seed]
    else:
        attacked = found["counts"][name][seed]["attacked"]
    return {concept: attacked[concept]["recognised"] for concept in found["targets"]}


def published() -> dict[str, Any]:
    """What stands in ``mima_attackers.json``."""
    found: dict[str, Any] = json.loads(ATTACKERS.read_text(encoding="utf-8"))
    return found


def kept(found: dict[str, Any], name: str, seeds: Sequence[str]) -> list[float]:
    """Mean recognised share of the concepts that had to stay, of seeds for which it was counted."""
    if name == PUBLISHED:
        counts = published()["kept"]["mima"]
    else:
        counts = {seed: one["kept"] for seed, one in found["counts"][name].items()}
    return [
        statistics.fmean(counts[seed].values()) / found["images"]
        for seed in seeds
        if seed in counts
    ]


def row(found: dict[str, Any], name: str, seed: str) -> list[float]:
    """Mean recognised share of the concepts at each step."""
    counts = counted(found, name, seed).values()
    return [statistics.fmean(step) / found["images"] for step in zip(*counts, strict=True)]


def parts(found: dict[str, Any]) -> dict[str, str]:
    """The block of docs/merge.md."""
    lines = []
    for name in (PUBLISHED, *(name for name in MERGES if found["counts"].get(name))):
        seeds = sorted(found["counts"]["mean" if name == PUBLISHED else name])
        rows = [row(found, name, seed) for seed in seeds]
        shares = [
            f"{statistics.fmean(c):.2f} ({min(c):.2f} to {max(c):.2f})"
            for c in zip(*rows, strict=True)
        ]
        others = kept(found, name, seeds)
        shares.append(
            f"{statistics.fmean(others):.2f} ({min(others):.2f} to {max(others):.2f})"
            if len(others) == len(seeds)
            else f"{statistics.fmean(others):.2f} (of {len(others)} alone)"
        )
        lines.append([WORDS[name], str(len(seeds)), *shares])
    single, mean = floor(found)
    gates = [one["gates"] for one in found["counts"]["gated"].values()]
    ends = {key: statistics.fmean(gate[key] for gate in gates) for key in gates[0]}
    return {
        "protection": table(
            ["merge", "seeds", *(f"{s} steps" for s in found["steps"]), "kept"], lines
        )
        + f"\n\nThe same seeds again move one concept by up to {max(single):.2f}, and the mean of "
        f"three by up to {max(mean):.2f}, at one step of one seed. The gates end, on average, at "
        f"{ends['gate_base']:.2f} for the base, {ends['gate_mean']:.2f} for the mean and "
        f"{ends['gate_moments']:.2f} for the merge by moments."
    }


def floor(found: dict[str, Any]) -> tuple[list[float], list[float]]:
    """What the rerun moved: single concepts, and their mean, at every step and seed."""
    single, mean = [], []
    for seed in sorted(found["counts"][RERUN]):
        first, second = (counted(found, name, seed) for name in (PUBLISHED, RERUN))
        for concept, counts in first.items():
            pairs = zip(counts, second[concept], strict=True)
            single += [abs(a - b) / found["images"] for a, b in pairs]
        rows = [row(found, name, seed) for name in (PUBLISHED, RERUN)]
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
