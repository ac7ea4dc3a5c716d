"""MNIST: the released configuration run whole, on our operators.

    python -m benchmarks.protection.mnist_released --data DATA/mnist

writes ``mnist_released.json`` beside this file, anew after each pair; a run that was interrupted
goes on. The procedure is the published one (``_published``: K^{-1} on the output side, 30 epochs of
batches of 64, Adam), only that extremes and K^{-1} come from the operators.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.protection._outcomes import one_thread, spread, write
from benchmarks.protection._paper_figure import PAPER_FIGURE
from benchmarks.protection._published import train
from benchmarks.protection.mnist_pairs import PAIRS, RELEASED, SAMPLE, digit_task, triangle
from immunize_ext.probing.data import Task, load_mnist
from immunize_ext.probing.metrics import relative_immunization_ratio

SETTINGS = replace(RELEASED, operators=True)
# Those of which single values were published first, then pairs in an order that spreads digits.
ORDER = (
    *SAMPLE,
    *sorted(set(PAIRS) - set(SAMPLE), key=lambda pair: ((pair[1] - pair[0]) % 10, pair)),
)


def released_pair(primary: Task, harmful: Task, seed: int) -> dict[str, float]:
    """Immunize one pair and measure RIR as the released code does: of the output, bias included."""
    run = train(primary, harmful, SETTINGS, seed=seed)
    assert run.bias is not None
    theta, start = run.theta, torch.eye(len(run.theta), dtype=torch.float64)
    # The bias is a row of theta under one more input, which is 1; the extractor before has none.
    rows = [
        triangle(torch.cat([task.x_train, torch.ones_like(task.x_train[:, :1])], dim=1))
        for task in (primary, harmful)
    ]
    extractors = [
        torch.cat([theta, run.bias[None]]),
        torch.cat([start, torch.zeros_like(run.bias)[None]]),
    ]
    ratio = relative_immunization_ratio(*rows, *extractors, policy="official")
    return {
        "i": ratio.i,
        "ii": ratio.ii,
        "rir": ratio.rir,
        "iterations": run.iterations,
        "seconds": run.seconds,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=len(ORDER), help="how many of the 90")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no pair later")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("mnist_released.json"))
    arguments = parser.parse_args()
    one_thread()
    command = f"python -m benchmarks.protection.mnist_released --data DATA --seed {arguments.seed}"
    rows: list[dict[str, Any]] = []
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
        if found["settings"] == asdict(SETTINGS) | {"ridges": list(SETTINGS.ridges)}:
            rows = [row for row in found["pairs"] if row["seed"] == arguments.seed]
    done = {(row["primary"], row["harmful"]) for row in rows}
    images, labels = load_mnist(arguments.data)
    tasks = {digit: digit_task(images, labels, digit, 10**6) for digit in range(10)}
    size = SETTINGS.batch_size
    assert size is not None
    iterations = [
        SETTINGS.epochs * (min(len(tasks[digit].x_train) for digit in pair) // size)
        for pair in PAIRS
    ]

    def keep() -> None:
        ratios = [row["rir"] for row in rows]
        write(
            arguments.out,
            command,
            {
                "settings": asdict(SETTINGS),
                "pairs": rows,
                "official_rir": spread(ratios),
                "paper_rir_of_these": spread([row["paper"] for row in rows]),
                "below_1": sum(ratio < 1.0 for ratio in ratios),
                "cpu_seconds": sum(row["seconds"] for row in rows),
                "iterations_of_all_pairs": spread(iterations) | {"sum": sum(iterations)},
            },
        )

    started = time.monotonic()
    for primary, harmful in ORDER[: arguments.pairs]:
        if (primary, harmful) in done:
            continue
        if time.monotonic() - started > 60.0 * arguments.minutes:
            break
        measured = released_pair(tasks[primary], tasks[harmful], arguments.seed)
        paper = float(torch.tensor(PAPER_FIGURE["Ours (theirs)"][harmful][primary]).exp())
        rows.append(
            {
                "primary": primary,
                "harmful": harmful,
                "seed": arguments.seed,
                **measured,
                "paper": paper,
            }
        )
        print(rows[-1], flush=True)
        keep()
    if rows:
        keep()


if __name__ == "__main__":
    main()
