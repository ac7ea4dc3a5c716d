"""Slow-down of the closed form over random pairs of digit tasks, not only the demo's.

Draws pairs of tasks (2 digits against 3 others, the other 5 digits for the harmful task), splits
each by several seeds, immunizes with default settings and attacks both tasks. Run

    python -m benchmarks.protection.digit_tasks --out benchmarks/protection/digit_tasks.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from immunize_ext.probing.attacks import compare_attack
from immunize_ext.probing.data import Problem, digits_task
from immunize_ext.probing.immunizers import ClosedFormImmunizer
from immunize_ext.storage import environment

ATTACKERS = ("gradient_descent", "line_search", "conjugate_gradients", "whitened")


def random_tasks(count: int, seed: int) -> list[tuple[str, str]]:
    """Draw pairs of tasks that share no digit, as the command line writes them."""
    generator = np.random.default_rng(seed)

    def written(digits: np.ndarray[Any, Any]) -> str:
        sides = (sorted(digits[:2].tolist()), sorted(digits[2:].tolist()))
        return ":".join(",".join(map(str, side)) for side in sides)

    drawn = (generator.permutation(10) for _ in range(count))
    return [(written(order[:5]), written(order[5:])) for order in drawn]


def measure(primary_text: str, harmful_text: str, seed: int) -> dict[str, Any]:
    """Immunize one pair of tasks and attack both."""
    sides = [
        [[int(digit) for digit in side.split(",")] for side in text.split(":")]
        for text in (primary_text, harmful_text)
    ]
    primary, harmful = (digits_task(*side, seed=seed) for side in sides)
    immunized = ClosedFormImmunizer(seed=seed).fit(None, Problem.of(primary, harmful))
    row: dict[str, Any] = {
        "primary_task": primary_text,
        "harmful_task": harmful_text,
        "seed": seed,
        "strength": immunized.config["strength"],
    }
    for role, task in (("harmful", harmful), ("primary", primary)):
        slowdowns = {
            a: compare_attack(task, immunized.theta, attacker=a).slowdown for a in ATTACKERS
        }
        row[role] = {name: value.ratio for name, value in slowdowns.items()}
        row[f"{role}_is_lower_bound"] = {n: value.censored for n, value in slowdowns.items()}
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Quantiles of the slow-downs, and how often the harmful task got no slower."""
    summary: dict[str, Any] = {}
    for role in ("harmful", "primary"):
        for attacker in ATTACKERS:
            values = [row[role][attacker] for row in rows]
            quartiles = statistics.quantiles(values, n=4)
            summary[f"{role} {attacker}"] = {
                "min": min(values),
                "quartiles": quartiles,
                "max": max(values),
                "not_slower": sum(value <= 1.05 for value in values),
                "of": len(values),
            }
    return summary


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for primary, harmful in random_tasks(arguments.pairs, seed=0):
        for seed in range(arguments.seeds):
            rows.append(measure(primary, harmful, seed))
            print(rows[-1], flush=True)
    command = (
        f"python -m benchmarks.protection.digit_tasks --pairs {arguments.pairs} "
        f"--seeds {arguments.seeds}"
    )
    result = {
        "command": command,
        "environment": environment(),
        "summary": summarise(rows),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
