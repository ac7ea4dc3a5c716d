"""What survives an attacker who knows: certificates of every kind of method over many tasks.

    python -m benchmarks.protection.certificates --mnist DATA/mnist --house DATA/house_price --deep
    python -m benchmarks.protection.certificates --write docs/certificates.md   # the page's tables

Random pairs of digit tasks over seeds; pairs of MNIST digits at 14 x 14 pixels; the same pairs from
features of EfficientNet-Lite0; House Prices in other splits. The owner has one half of the harmful
samples, the attacker the other. Beside them, what the rotation at the end of the closed form does
against coordinate-wise attackers, and probes of earlier layers. What is finished is kept in
``--work``, so that an interrupted run goes on, and several may share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunize_ext.probing.attacks import compare_attack
from immunize_ext.probing.certificates import Certificate, certify, linear_information
from immunize_ext.probing.data import (
    Problem,
    Task,
    digits_task,
    gram_equivalent,
    house_prices_task,
    load_problem,
)
from immunize_ext.probing.data.problem import parse_sides
from immunize_ext.probing.immunizers import METHODS, closed_form_theta
from immunize_ext.probing.immunizers.closed_form import random_rotation
from immunize_ext.storage import environment, to_json

from .certificates_page import LIMIT, filled
from .deep_features import CACHE, LAYERS, SERVED, extracted, pair_task
from .digit_tasks import random_tasks

OUT = Path(__file__).with_name("certificates.json")
METHOD_NAMES = (
    "partial-whitening",
    "whitening",
    "closed-form",
    "label-direction",
    "learning-curve",
    "optimizer-aware",
    "lock",
    "pencil-lock",
)
# With 320 features, learning curves and optimizers take minutes.
DEEP_METHODS = ("whitening", "closed-form", "label-direction", "lock")

# Primary, harmful, benign.
MNIST_PAIRS = (
    ("3:8", "4:9", "0:1"),
    ("0:1", "3:5", "2:4"),
    ("2:6", "7:9", "0:1"),
    ("1:7", "5:8", "0:2"),
)
ROTATIONS = ("none", "random", "equal curvature")
COORDINATE_WISE = ("gradient_descent", "adam", "adagrad", "standardised")
ROTATION_SEEDS = 3
ROTATION_LIMIT = LIMIT


@dataclass(frozen=True, eq=False)
class Case:
    """Tasks that are certified.

    Attributes:
        name: Unique; begins with the data, then the pair.
        make: The primary and the harmful task, and others that stay as they may.
    """

    name: str
    make: Callable[[], tuple[Problem[Task], Sequence[Task]]]


@lru_cache(maxsize=1)
def tasks_of(case: Case) -> tuple[Problem[Task], Sequence[Task]]:
    """Made when they are asked for, which what is finished never does; the last ones are kept."""
    return case.make()


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """All of them."""
    pairs = random_tasks(arguments.pairs, seed=0)
    # Seed by seed: what an interrupted run leaves is a whole one of fewer seeds.
    for seed in range(arguments.seeds):
        for primary, harmful in pairs:
            yield Case(
                f"digits {primary} {harmful} {seed}", partial(digits, primary, harmful, seed)
            )
    for split in range(arguments.splits) if arguments.house is not None else ():
        yield Case(f"house splits {split}", partial(house_prices, arguments.house, split))
    for seed in range(arguments.seeds) if arguments.mnist is not None else ():
        for three in MNIST_PAIRS:
            name = f"{three[0]} {three[1]} {seed}"
            yield Case(f"mnist {name}", partial(mnist_pair, arguments.mnist, three, seed))
            if arguments.deep:
                yield Case(f"deep {name}", partial(deep_pair, arguments, three, seed))


def digits(primary: str, harmful: str, seed: int) -> tuple[Problem[Task], Sequence[Task]]:
    """Two tasks of the 8 x 8 digits, and one between them."""
    sides = [parse_sides(text) for text in (primary, harmful)]
    between = sides[0][0][:1], sides[1][0][:1]
    *tasks, other = (digits_task(*side, seed=seed) for side in (*sides, between))
    return Problem.of(*tasks), [other]


def deep_pair(
    arguments: argparse.Namespace, pairs: Sequence[str], seed: int
) -> tuple[Problem[Task], Sequence[Task]]:
    """Pairs of digits as EfficientNet-Lite0 sees them."""
    features = extracted(arguments.mnist, arguments.work / CACHE)
    *tasks, other = (pair_task(features, SERVED, pair, seed) for pair in pairs)
    return Problem.of(*tasks), [other]


def mnist_pair(
    folder: Path, pairs: Sequence[str], seed: int = 0
) -> tuple[Problem[Task], Sequence[Task]]:
    """Pairs of digits at 14 x 14 pixels: primary, harmful, another."""
    primary, *others = pairs
    found = load_problem("mnist", primary, tuple(others), data_dir=str(folder), size=14, seed=seed)
    return Problem.of(found.primary, found.harmful[0]), found.harmful[1:]


def house_prices(folder: Path, split: int) -> tuple[Problem[Task], Sequence[Task]]:
    """House Prices, split anew: the published test part has 100 rows, its training part 200."""
    tasks = []
    for role, rows in (("primary", 200), ("harmful", 600)):
        whole = house_prices_task(folder, role, test_rows=None)  # type: ignore[arg-type]
        x = torch.cat([whole.x_train, whole.x_test])
        y = torch.cat([whole.y_train, whole.y_test])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
        train, test = order[:rows], order[rows:]
        tasks.append(Task(whole.name, x[train], y[train], x[test], y[test]))
    return Problem.of(*tasks), ()


def row_of(case: Case, method: str) -> dict[str, Any]:
    """One certificate, in the numbers that are compared."""
    problem, benign = tasks_of(case)
    owners, attackers = problem.harmful[0].halves()
    started = time.process_time()
    immunized = METHODS[method].fit(None, Problem.of(problem.primary, owners))
    fitted = time.process_time()
    found = certify(immunized, problem.primary, attackers, benign=benign, draws=4)
    ended = time.process_time()
    row = {"problem": case.name, "method": method, **in_numbers(found)}
    return {**row, "fit_seconds": fitted - started, "cpu_seconds": ended - fitted}


def in_numbers(found: Certificate) -> dict[str, Any]:
    """What of a certificate is kept."""
    names = {"harmful": "harm", "primary": "own", "benign": "benign"}
    row: dict[str, Any] = {
        "descent": found.delays[0].factor if found.delays else None,
        "diagonal": next((d.factor for d in found.delays if d.optimizer == "diagonal"), None),
        "cap": found.work.cap if found.work else None,
        "undone": found.undoing[-1].factor if found.undoing else None,
        "leak": found.linear[0].leak,
        "seconds": found.seconds,
    }
    for served in found.formats:
        row[f"{served.number_format}_{names[served.role]}"] = served.measured
    for one in found.few_samples:
        role = names[one.role]
        row[f"samples_{role}"] = one.factor_best
        row[f"samples_{role}_given"] = one.factor_given
        row[f"samples_{role}_sibling"] = one.factor_sibling
    for two in found.linear:
        role = names[two.role]
        row[f"r2_{role}"] = [two.r2_before, two.r2_after]
        row[f"accuracy_{role}"] = [two.accuracy_before, two.accuracy_after]
        if two.role != "benign":
            row[f"kernel_{role}"] = [two.kernel_before, two.kernel_after]
            row[f"perceptron_{role}"] = [two.perceptron_before, two.perceptron_after]
    return row


def rotated(problem: Problem[Task], rotation: str, seed: int) -> Tensor:
    """The closed form at strength 30 with another last rotation."""
    x_primary, x_harmful = problem.primary.x_train, problem.harmful[0].x_train
    theta = closed_form_theta(
        x_primary, x_harmful, strength=30.0, rotate=rotation == "equal curvature", seed=seed
    )
    return theta @ random_rotation(theta, seed) if rotation == "random" else theta


def rotation_row(
    name: str, folder: Path, pairs: Sequence[str], rotation: str, seed: int
) -> dict[str, Any]:
    """Slow-downs of the harmful task."""
    problem, _ = mnist_pair(folder, pairs)
    theta = rotated(problem, rotation, seed)
    task = gram_equivalent(problem.harmful[0])
    row: dict[str, Any] = {"problem": name, "rotation": rotation, "seed": seed}
    for attacker in COORDINATE_WISE:
        done = compare_attack(
            task, theta, attacker=attacker, base_budget=1000, limit=ROTATION_LIMIT
        )
        row[attacker] = math.inf if done.slowdown.censored else done.slowdown.ratio
    return row


def layer_row(
    name: str, arguments: argparse.Namespace, pairs: Sequence[str], layer: str
) -> dict[str, Any]:
    """What the best linear probe of one layer finds of the harm, and what a lock leaves of it."""
    features = extracted(arguments.mnist, arguments.work / CACHE)
    owners, attackers = pair_task(features, layer, pairs[1], 0).halves()
    row: dict[str, Any] = {"problem": name, "layer": layer, "features": attackers.num_features}
    row["r2"], row["accuracy"] = linear_information(attackers)
    if layer == SERVED:
        primary = pair_task(features, layer, pairs[0], 0)
        theta = METHODS["lock"].fit(None, Problem.of(primary, owners)).theta
        row["r2_locked"], row["accuracy_locked"] = linear_information(attackers, theta)
    return row


def methods_of(case: Case) -> tuple[str, ...]:
    """What is certified on its data."""
    return DEEP_METHODS if case.name.startswith("deep") else METHOD_NAMES


def seed_of(case: Case) -> tuple[str, str]:
    """Data and seed."""
    words = case.name.split()
    return words[0], words[-1]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, taken from ``--work`` where they stand there."""
    arguments.work.mkdir(parents=True, exist_ok=True)

    def file_of(name: str) -> Path:
        path: Path = arguments.work / f"{name}.json".replace(":", "-").replace(",", "")
        return path

    def kept(name: str, row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = file_of(name)
        if not path.is_file():
            path.write_text(json.dumps(to_json(row())), encoding="utf-8")
            print(name, flush=True)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    every = {
        case: [f"{case.name} {method}" for method in methods_of(case)] for case in cases(arguments)
    }
    if arguments.finished:
        # A seed is there with all pairs and methods of its data, or not at all.
        lacking = {
            seed_of(case)
            for case, names in every.items()
            if not all(file_of(name).is_file() for name in names)
        }
        every = {case: names for case, names in every.items() if seed_of(case) not in lacking}
    rows = [
        kept(name, partial(row_of, case, method))
        for case, names in every.items()
        for name, method in zip(names, methods_of(case), strict=True)
    ]
    turned, layers = [], []
    for pairs in MNIST_PAIRS if arguments.mnist is not None else ():
        for rotation in ROTATIONS:
            for seed in range(1 if rotation == "none" else ROTATION_SEEDS):
                name = f"rotation {pairs[0]} {pairs[1]} {rotation} {seed}"
                made = partial(rotation_row, name, arguments.mnist, pairs, rotation, seed)
                turned.append(kept(name, made))
        for layer in LAYERS if arguments.deep else ():
            name = f"layers {pairs[0]} {pairs[1]} {layer}"
            layers.append(kept(name, partial(layer_row, name, arguments, pairs, layer)))
    return {
        "rows": rows,
        "rotations": turned,
        "layers": layers,
        "draws": 4,
        "environment": environment(),
    }


def in_lines(results: dict[str, Any]) -> str:
    """JSON with a line for each row, of six digits each number."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {name: short(one) for name, one in value.items()}
        return [short(one) for one in value] if isinstance(value, list) else value

    parts = []
    for name, value in results.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(short(row)) for row in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="folder of MNIST; without it no pairs of it")
    parser.add_argument("--house", type=Path, help="folder of House Prices; without it none")
    parser.add_argument("--deep", action="store_true", help="EfficientNet-Lite0 as well")
    parser.add_argument("--work", type=Path, default=Path("runs/certificates"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", type=int, default=10, help="of House Prices")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--finished", action="store_true", help="seeds that are complete in --work, no others"
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="fill in the page, measure nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
        arguments.write.write_text(filled(page, results), encoding="utf-8")
        return
    results = measure(arguments)
    arguments.out.write_text(in_lines(results), encoding="utf-8")


if __name__ == "__main__":
    main()
