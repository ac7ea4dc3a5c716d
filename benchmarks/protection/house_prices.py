"""House Prices: every method and every published choice under the same metrics.

    python -m benchmarks.protection.house_prices --data DATA/house_price

writes ``house_prices.json`` beside this file. ``DATA/house_price`` holds D1.csv and D2.csv.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.protection._outcomes import (
    PAPER_HOUSE,
    RIDGE,
    one_thread,
    ratios,
    slowdowns,
    spread,
    write,
)
from benchmarks.protection._published import Published, train
from immunize_ext.probing.data import Problem, Task, house_prices_task
from immunize_ext.probing.immunizers import (
    BaselineImmunizer,
    ClosedFormImmunizer,
    ConditionNumberImmunizer,
    ImmaImmunizer,
    MiniBatchImmunizer,
    MultiplicativeImmunizer,
)

ATTACKERS = ("gradient_descent", "conjugate_gradients", "whitened")
PAPER = Published()

# Each differs from the first in what its name says.
PUBLISHED = {
    "paper: 100 epochs, K^-1 on the input side": PAPER,
    "K^-1 on the output side, as released": replace(PAPER, side="left"),
    "no K^-1": replace(PAPER, side="none"),
    "10 epochs": replace(PAPER, epochs=10),
    "released: 10 epochs, output side": replace(PAPER, epochs=10, side="left"),
    "the ragged batch kept": replace(PAPER, drop_last=False),
    "the bias left out of the metric": replace(PAPER, metric_bias=False),
    "both of these": replace(PAPER, drop_last=False, metric_bias=False),
    "the loss preconditioned as well": replace(PAPER, precondition_loss=True),
    "full data in each step": replace(PAPER, batch_size=None),
    "full data, as many steps": replace(PAPER, batch_size=None, epochs=300),
    "start at the identity, no bias": replace(PAPER, start="identity"),
    "learning rate 1e-3": replace(PAPER, learning_rate=1e-3),
    "gradient descent instead of Adam": replace(PAPER, optimizer="gd"),
    "cosine schedule": replace(PAPER, schedule="cosine"),
    "K = 28 in the regularizers": replace(PAPER, width=28),
}

# What of ours takes a seed, and what does not.
Fit = Callable[[Task, Task, int], Tensor]
OURS: dict[str, tuple[bool, Fit]] = {
    "R_ill only": (
        False,
        lambda p, h, seed: (
            BaselineImmunizer("r_ill", steps=400, ridge=RIDGE).fit(None, Problem.of(p, h)).theta
        ),
    ),
    "R_well only": (
        False,
        lambda p, h, seed: (
            BaselineImmunizer("r_well", steps=400, ridge=RIDGE).fit(None, Problem.of(p, h)).theta
        ),
    ),
    "IMMA": (
        True,
        lambda p, h, seed: ImmaImmunizer(ridge=RIDGE, seed=seed).fit(None, Problem.of(p, h)).theta,
    ),
    "Opt kappa, difference": (
        False,
        lambda p, h, seed: (
            BaselineImmunizer("kappa_difference", steps=400, optimizer="adam", ridge=RIDGE)
            .fit(None, Problem.of(p, h))
            .theta
        ),
    ),
    "Opt kappa, log ratio": (
        False,
        lambda p, h, seed: (
            BaselineImmunizer("kappa_log_ratio", steps=400, optimizer="adam", ridge=RIDGE)
            .fit(None, Problem.of(p, h))
            .theta
        ),
    ),
    "multiplicative": (
        False,
        lambda p, h, seed: MultiplicativeImmunizer(ridge=RIDGE).fit(None, Problem.of(p, h)).theta,
    ),
    "Algorithm 1, mini-batches, published lambdas": (
        True,
        lambda p, h, seed: (
            MiniBatchImmunizer(lambda_well=100.0, lambda_ill=1e7, ridge=RIDGE, seed=seed)
            .fit(None, Problem.of(p, h))
            .theta
        ),
    ),
    "Algorithm 1, full data": (
        True,
        lambda p, h, seed: (
            ConditionNumberImmunizer(steps=1000, first_change=0.5, ridge=RIDGE, seed=seed)
            .fit(None, Problem.of(p, h))
            .theta
        ),
    ),
    "whitening": (
        True,
        lambda p, h, seed: (
            ClosedFormImmunizer(1.0, ridge=RIDGE, seed=seed).fit(None, Problem.of(p, h)).theta
        ),
    ),
    "closed form, c = 30": (
        True,
        lambda p, h, seed: (
            ClosedFormImmunizer(30.0, ridge=RIDGE, seed=seed).fit(None, Problem.of(p, h)).theta
        ),
    ),
}


def measure(
    primary: Task, harmful: Task, theta: Tensor, bias: Tensor | None = None
) -> dict[str, Any]:
    """Ratios, and slow-downs where theta is one that an attacker can be given."""
    if not bool(torch.isfinite(theta).all()):
        return {"diverged": True}
    row: dict[str, Any] = {"diverged": False}
    row.update(ratios(primary.x_train, harmful.x_train, theta, bias))
    row["slowdown"] = slowdowns(primary, harmful, theta)
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; nothing where a run diverged."""
    if any(row["diverged"] for row in rows):
        return {"diverged": sum(row["diverged"] for row in rows), "of": len(rows)}
    summary: dict[str, Any] = {"of": len(rows)}
    for policy in ("official", "rank_aware", "ridge"):
        summary[policy] = {
            key: spread([row[policy][key] for row in rows]) for key in ("i", "ii", "rir")
        }
    summary["share_of_ceiling"] = spread([row["share_of_ceiling"] for row in rows])
    summary["seconds"] = spread([row["seconds"] for row in rows])
    summary["slowdown"] = {
        role: {name: spread([row["slowdown"][role][name] for row in rows]) for name in ATTACKERS}
        for role in ("harmful", "primary")
    }
    if "train_loss" in rows[0]:
        summary["train_loss"] = spread([row["train_loss"] for row in rows])
    return summary


def run_one(folder: Path, group: str, name: str, seed: int) -> dict[str, Any]:
    """Train with one method or variant and one seed, and measure."""
    primary, harmful = (house_prices_task(folder, r) for r in ("primary", "harmful"))  # type: ignore[arg-type]
    started = time.perf_counter()
    extra: dict[str, Any] = {}
    bias = None
    if group == "published":
        try:
            run = train(primary, harmful, PUBLISHED[name], seed=seed)
            theta, bias = run.theta, run.bias
            extra = {"train_loss": run.train_loss}
        except torch.linalg.LinAlgError:  # eigvalsh of NaN
            theta = torch.full((79, 79), math.nan)
    else:
        theta = OURS[name][1](primary, harmful, seed)
    row = {"seed": seed, "seconds": time.perf_counter() - started, **extra}
    return row | measure(primary, harmful, theta, bias)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("house_prices.json"))
    arguments = parser.parse_args()
    one_thread()
    seeds = arguments.seeds
    content: dict[str, Any] = {"ridge": RIDGE, "seeds": seeds, "paper": PAPER_HOUSE}
    counts = {("published", name): seeds for name in PUBLISHED}
    counts |= {("ours", name): seeds if seeded else 1 for name, (seeded, _) in OURS.items()}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, one_thread) as pool:
        futures = {
            key: [pool.submit(run_one, arguments.data, *key, seed) for seed in range(count)]
            for key, count in counts.items()
        }
        for (group, name), found in futures.items():
            rows = [future.result() for future in found]
            summary = summarise(rows)
            content.setdefault(group, {})[name] = {"summary": summary, "rows": rows}
            print(name, summary.get("official", summary), flush=True)
    command = f"python -m benchmarks.protection.house_prices --data DATA --seeds {seeds}"
    write(arguments.out, command, content)


if __name__ == "__main__":
    main()
