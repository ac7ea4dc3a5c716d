"""MNIST: all 90 ordered pairs of digits by the closed form, other methods on a sample of them.

    python -m benchmarks.protection.mnist_pairs --data DATA/mnist

writes ``mnist_pairs.json`` beside this file. ``DATA/mnist`` holds the four gzipped IDX files. As in
the released code, the primary task's inputs are the training images of one digit, the harmful
task's those of another, and the labels are constant.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.protection._outcomes import PAPER_MNIST, RIDGE, one_thread, spread, write
from benchmarks.protection._paper_figure import PAPER_FIGURE
from benchmarks.protection._published import Published, train
from immunize_ext.probing.data import Problem, Task, load_mnist
from immunize_ext.probing.immunizers import (
    BaselineImmunizer,
    ConditionNumberImmunizer,
    ImmaImmunizer,
    MiniBatchImmunizer,
    MultiplicativeImmunizer,
    closed_form_theta,
)
from immunize_ext.probing.metrics import log_kappa, log_rir_ceiling

STRENGTH = 30.0
STEPS = 20
PAIRS = tuple((a, b) for a in range(10) for b in range(10) if a != b)
# (primary, harmful): every digit once on each side.
SAMPLE = ((4, 9), (3, 8), (0, 1), (7, 2))
RELEASED = Published(
    epochs=30,
    learning_rate=1e-3,
    lambda_well=1.0,
    lambda_ill=5e7,
    side="left",
    ridges=(1.0, 1e-7),
    width=28,
    loss="logistic",
)


def triangle(images: Tensor) -> Tensor:
    """R of a QR factorisation: the same Gram matrix in 784 rows."""
    return torch.linalg.qr(images, mode="r").R


def official(rows: Tensor, theta: Tensor | None = None) -> float:
    """Log condition number under the official floor."""
    return float(log_kappa(rows if theta is None else rows @ theta, policy="official")[0])


_WORKER: dict[str, Any] = {}


def _start_worker(triangles: dict[int, Tensor], bases: dict[int, float]) -> None:
    one_thread()
    _WORKER.update(triangles=triangles, bases=bases)


def closed_form_pair(pair: tuple[int, int]) -> dict[str, Any]:
    """Immunize one pair in closed form."""
    primary, harmful = (_WORKER["triangles"][digit] for digit in pair)
    started = time.process_time()
    theta = closed_form_theta(primary, harmful, strength=STRENGTH, ridge=RIDGE)
    seconds = time.process_time() - started
    log_i = official(harmful, theta) - _WORKER["bases"][pair[1]]
    log_ii = official(primary, theta) - _WORKER["bases"][pair[0]]
    return {
        "primary": pair[0],
        "harmful": pair[1],
        "i": math.exp(log_i),
        "ii": math.exp(log_ii),
        "rir": math.exp(log_i - log_ii),
        "seconds": seconds,
        "seconds_with_metric": time.process_time() - started,
    }


def all_pairs(folder: Path, jobs: int) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """The 90 pairs from the files to the numbers, timed as a whole.

    ``cpu_seconds`` does not depend on what else the machine did, ``seconds`` does.
    """
    started, started_cpu = time.perf_counter(), time.process_time()
    images, labels = load_mnist(folder)
    triangles = {d: triangle(torch.from_numpy(images[labels == d])) for d in range(10)}
    bases = {digit: official(rows) for digit, rows in triangles.items()}
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _start_worker, (triangles, bases)) as pool:
        rows = pool.map(closed_form_pair, PAIRS, chunksize=5)
    seconds = time.perf_counter() - started
    cpu = time.process_time() - started_cpu + sum(row["seconds_with_metric"] for row in rows)
    ratios = [row["rir"] for row in rows]
    result = {
        "method": "closed form",
        "strength": STRENGTH,
        "ridge": RIDGE,
        "pairs": rows,
        "official_rir": spread(ratios),
        "below_1": sum(ratio < 1.0 for ratio in ratios),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "load": os.getloadavg()[0],
        "processes": jobs,
    }
    return result, triangles


def digit_task(images: Any, labels: Any, digit: int, count: int) -> Task:
    """The first images of one digit with the label +1."""
    x = torch.from_numpy(images[labels == digit][:count])
    y = torch.ones(len(x), dtype=torch.float64)
    return Task(f"images of digit {digit}", x, y, x[:8], y[:8])


def reduced(task: Task) -> Task:
    """A task with the same K (up to its scale) and the same mean losses (up to a constant)."""
    q, r = torch.linalg.qr(task.x_train)
    scale = math.sqrt(r.shape[0] / task.x_train.shape[0])
    return Task(task.name, scale * r, scale * (q.mT @ task.y_train), task.x_test, task.y_test)


# Few steps each, so that the sample takes minutes: a stated budget, not the best a method can do.
# The learning rates keep gradient descent stable at the largest eigenvalue of these images.
Fit = Callable[[Task, Task], Tensor]
METHODS: dict[str, Fit] = {
    "R_ill only": lambda p, h: (
        BaselineImmunizer("r_ill", steps=STEPS, ridge=RIDGE).fit(None, Problem.of(p, h)).theta
    ),
    "IMMA": lambda p, h: ImmaImmunizer(steps=STEPS, ridge=RIDGE).fit(None, Problem.of(p, h)).theta,
    "Opt kappa, difference": lambda p, h: (
        BaselineImmunizer("kappa_difference", steps=STEPS, optimizer="adam", ridge=RIDGE)
        .fit(None, Problem.of(p, h))
        .theta
    ),
    "Opt kappa, log ratio": lambda p, h: (
        BaselineImmunizer("kappa_log_ratio", steps=STEPS, optimizer="adam", ridge=RIDGE)
        .fit(None, Problem.of(p, h))
        .theta
    ),
    "Algorithm 1, full data": lambda p, h: (
        ConditionNumberImmunizer(steps=STEPS, learning_rate=1e-4, first_change=0.5, ridge=RIDGE)
        .fit(None, Problem.of(p, h))
        .theta
    ),
    "multiplicative": lambda p, h: (
        MultiplicativeImmunizer(steps=STEPS, ridge=RIDGE).fit(None, Problem.of(p, h)).theta
    ),
    "closed form": lambda p, h: closed_form_theta(
        p.x_train, h.x_train, strength=STRENGTH, ridge=RIDGE
    ),
}


def sample_methods(tasks: dict[int, Task], pairs: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Every method on the sampled pairs, with the paper's value of the same pairs."""
    small = {digit: reduced(task) for digit, task in tasks.items()}
    rows = {digit: small[digit].x_train for digit in small}
    bases = {digit: official(x) for digit, x in rows.items()}
    found: dict[str, Any] = {}
    for name, fit in METHODS.items():
        values = []
        for primary, harmful in pairs:
            started = time.process_time()
            try:
                theta = fit(small[primary], small[harmful])
            except ValueError as error:
                values.append({"primary": primary, "harmful": harmful, "refused": str(error)})
                print(name, values[-1], flush=True)
                continue
            seconds = time.process_time() - started
            log_i = official(rows[harmful], theta) - bases[harmful]
            log_ii = official(rows[primary], theta) - bases[primary]
            values.append(
                {
                    "primary": primary,
                    "harmful": harmful,
                    "i": math.exp(log_i),
                    "ii": math.exp(log_ii),
                    "rir": math.exp(log_i - log_ii),
                    "seconds": seconds,
                }
            )
            print(name, values[-1], flush=True)
        found[name] = {"rows": values}
        ratios = [value["rir"] for value in values if "rir" in value]
        if len(ratios) == len(values):
            found[name]["official_rir"] = spread(ratios)
            found[name]["seconds"] = spread([value["seconds"] for value in values])
    return found


def paper_sample(pairs: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """The paper's mean RIR over the same pairs, from its figure 2."""
    return {
        name: spread([math.exp(matrix[harmful][primary]) for primary, harmful in pairs])["mean"]
        for name, matrix in PAPER_FIGURE.items()
    }


def speed(tasks: dict[int, Task], pair: tuple[int, int], iterations: int) -> dict[str, Any]:
    """CPU seconds per iteration of the released procedure and of the same loop on our operators."""
    primary, harmful = (tasks[digit] for digit in pair)
    one = partial(train, primary, harmful, RELEASED, seed=0)
    one(iterations=2)  # warm up
    published = one(iterations=iterations)
    size = RELEASED.batch_size
    assert size is not None

    def part(task: Task) -> Task:
        cut = iterations * size
        return Task(task.name, task.x_train[:cut], task.y_train[:cut], task.x_test, task.y_test)

    ours = MiniBatchImmunizer(epochs=1, record_every=10**6, lambda_well=1.0, lambda_ill=5e7)
    few = replace(ours, epochs=2)
    seconds = []
    for immunizer in (ours, few):
        started = time.process_time()
        immunizer.fit(None, Problem.of(part(primary), part(harmful)))
        seconds.append(time.process_time() - started)
    steps = RELEASED.epochs * (min(len(task.x_train) for task in (primary, harmful)) // size)
    per_iteration = published.seconds / published.iterations
    # The difference of two runs leaves out what is done once: records that look at all data.
    ours_per_iteration = (seconds[1] - seconds[0]) / iterations
    wide = train(primary, harmful, replace(RELEASED, width=784), seed=0, iterations=1)
    return {
        "pair": list(pair),
        "iterations": published.iterations,
        "seconds_per_iteration": per_iteration,
        "our_seconds_per_iteration": ours_per_iteration,
        "speed_up_per_iteration": per_iteration / ours_per_iteration,
        "iterations_of_a_full_run": steps,
        "seconds_of_a_full_run": steps * per_iteration,
        "first_r_well_with_k_28": published.first_well,
        "first_r_well_with_k_784": wide.first_well,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sample", type=int, default=2, help="pairs for other methods")
    parser.add_argument("--iterations", type=int, default=20, help="of the released procedure")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("mnist_pairs.json"))
    arguments = parser.parse_args()
    one_thread()
    command = (
        f"python -m benchmarks.protection.mnist_pairs --data DATA --jobs {arguments.jobs} "
        f"--sample {arguments.sample} --iterations {arguments.iterations}"
    )
    content: dict[str, Any] = {"ridge": RIDGE, "paper": PAPER_MNIST}

    def keep(**more: Any) -> None:
        content.update(more)
        write(arguments.out, command, content)

    closed, triangles = all_pairs(arguments.data, arguments.jobs)
    print({key: value for key, value in closed.items() if key != "pairs"}, flush=True)
    keep(closed_form=closed)
    pairs = SAMPLE[: arguments.sample]
    images, labels = load_mnist(arguments.data)
    tasks = {digit: digit_task(images, labels, digit, 10**6) for digit in sorted({*sum(pairs, ())})}
    speeds = [speed(tasks, pair, arguments.iterations) for pair in pairs]
    per_pair = spread([entry["seconds_of_a_full_run"] for entry in speeds])["mean"]
    total = per_pair * len(PAIRS)
    keep(
        speed={
            "sample": speeds,
            "published_cpu_seconds_all_pairs_extrapolated": total,
            "our_cpu_seconds_all_pairs": closed["cpu_seconds"],
            "speed_up": total / closed["cpu_seconds"],
        },
        ceilings={
            f"{a},{b}": math.exp(log_rir_ceiling(triangles[a], triangles[b], ridge=RIDGE))
            for a, b in pairs
        },
        same_images_twice=math.exp(log_rir_ceiling(triangles[3], triangles[3], ridge=RIDGE)),
    )
    print(content["speed"], flush=True)
    keep(
        sample={
            "pairs": [list(pair) for pair in pairs],
            "steps": STEPS,
            "paper": paper_sample(pairs),
            "methods": sample_methods(tasks, pairs),
        }
    )


if __name__ == "__main__":
    main()
