"""What survives an attacker who knows: certificates of three methods over many pairs of tasks.

    python -m benchmarks.protection.certificates --mnist ../shared/data/mnist
    python -m benchmarks.protection.certificates --write docs/certificates.md   # the page's table

Random pairs of digit tasks over seeds, and pairs of MNIST digits at 14 x 14 pixels. The owner has
one half of the harmful samples, the attacker the other. Beside them, what the rotation at the end
of the closed form does against coordinate-wise attackers. What is finished is kept in ``--work``,
so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunize_ext.probing.attacks import compare_attack
from immunize_ext.probing.certificates import certify
from immunize_ext.probing.data import Problem, Task, digits_task, gram_equivalent, load_problem
from immunize_ext.probing.immunizers import METHODS, closed_form_theta
from immunize_ext.probing.immunizers.closed_form import random_rotation
from immunize_ext.storage import environment, to_json

from .digit_tasks import random_tasks

OUT = Path(__file__).with_name("certificates.json")
METHOD_NAMES = (
    "whitening",
    "closed-form",
    "label-direction",
    "learning-curve",
    "optimizer-aware",
    "lock",
    "pencil-lock",
)
MNIST_PAIRS = (("3:8", "4:9"), ("0:1", "3:5"), ("2:6", "7:9"), ("1:7", "5:8"))
MARKS = ("certificates", "rotation")
ROTATIONS = ("none", "random", "equal curvature")
COORDINATE_WISE = ("gradient_descent", "adam", "adagrad", "standardised")
ROTATION_SEEDS = 3
ROTATION_LIMIT = 32.0


def problems(arguments: argparse.Namespace) -> Iterator[tuple[str, Problem[Task]]]:
    """Name and tasks."""
    pairs, seeds = arguments.pairs, arguments.seeds
    for primary, harmful in random_tasks(pairs, seed=0):
        sides = [
            [[int(digit) for digit in side.split(",")] for side in text.split(":")]
            for text in (primary, harmful)
        ]
        for seed in range(seeds):
            tasks = [digits_task(*side, seed=seed) for side in sides]
            yield f"digits {primary} {harmful} {seed}", Problem.of(*tasks)
    for primary, harmful in MNIST_PAIRS if arguments.mnist is not None else ():
        yield f"mnist {primary} {harmful} 0", mnist_pair(arguments.mnist, primary, harmful)


def mnist_pair(folder: Path, primary: str, harmful: str) -> Problem[Task]:
    """Two pairs of digits at 14 x 14 pixels."""
    return load_problem("mnist", primary, (harmful,), data_dir=str(folder), size=14)


def row_of(name: str, method: str, problem: Problem[Task]) -> dict[str, Any]:
    """One certificate, in the numbers that are compared."""
    owners, attackers = problem.harmful[0].halves()
    immunized = METHODS[method].fit(None, Problem.of(problem.primary, owners))
    found = certify(immunized, problem.primary, attackers, draws=4)
    harm, own = found.linear
    few = {one.role: one for one in found.few_samples}
    return {
        "problem": name,
        "method": method,
        "descent": found.delays[0].factor if found.delays else None,
        "diagonal": next((d.factor for d in found.delays if d.optimizer == "diagonal"), None),
        "cap": found.work.cap if found.work else None,
        "samples_harm": few["harmful"].factor_best,
        "samples_harm_given": few["harmful"].factor_given,
        "samples_harm_sibling": few["harmful"].factor_sibling,
        "samples_own": few["primary"].factor_best,
        "r2_harm": [harm.r2_before, harm.r2_after],
        "r2_own": [own.r2_before, own.r2_after],
        "accuracy_harm": [harm.accuracy_before, harm.accuracy_after],
        "accuracy_own": [own.accuracy_before, own.accuracy_after],
        "kernel_harm": [harm.kernel_before, harm.kernel_after],
        "seconds": sum(found.seconds.values()),
    }


def rotated(problem: Problem[Task], rotation: str, seed: int) -> Tensor:
    """The closed form at strength 30 with another last rotation."""
    x_primary, x_harmful = problem.primary.x_train, problem.harmful[0].x_train
    theta = closed_form_theta(
        x_primary, x_harmful, strength=30.0, rotate=rotation == "equal curvature", seed=seed
    )
    return theta @ random_rotation(theta, seed) if rotation == "random" else theta


def rotation_row(name: str, problem: Problem[Task], rotation: str, seed: int) -> dict[str, Any]:
    """Slow-downs of the harmful task."""
    theta = rotated(problem, rotation, seed)
    task = gram_equivalent(problem.harmful[0])
    row: dict[str, Any] = {"problem": name, "rotation": rotation, "seed": seed}
    for attacker in COORDINATE_WISE:
        done = compare_attack(
            task, theta, attacker=attacker, base_budget=1000, limit=ROTATION_LIMIT
        )
        row[attacker] = math.inf if done.slowdown.censored else done.slowdown.ratio
    return row


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, taken from ``--work`` where they stand there."""
    arguments.work.mkdir(parents=True, exist_ok=True)

    def kept(name: str, row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = arguments.work / f"{name}.json".replace(":", "-").replace(",", "")
        if not path.is_file():
            path.write_text(json.dumps(to_json(row())), encoding="utf-8")
            print(name, flush=True)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    rows = [
        kept(f"{name} {method}", partial(row_of, name, method, problem))
        for name, problem in problems(arguments)
        for method in METHOD_NAMES
    ]
    turned = []
    for primary, harmful in MNIST_PAIRS if arguments.mnist is not None else ():
        problem = mnist_pair(arguments.mnist, primary, harmful)
        for rotation in ROTATIONS:
            for seed in range(1 if rotation == "none" else ROTATION_SEEDS):
                name = f"rotation {primary} {harmful} {rotation} {seed}"
                turned.append(kept(name, partial(rotation_row, name, problem, rotation, seed)))
    return {"rows": rows, "rotations": turned, "draws": 4, "environment": environment()}


# --- the page -------------------------------------------------------------------------------------


def _values(rows: list[dict[str, Any]], key: str, place: int | None = None) -> list[float]:
    found = []
    for row in rows:
        value = row[key] if place is None else (row[key] or [None, None])[place]
        if value is not None:
            found.append(math.inf if value == "inf" else float(value))
    return sorted(found)


def _text(value: float, digits: int) -> str:
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def _median(rows: list[dict[str, Any]], key: str, place: int | None = None, digits: int = 2) -> str:
    """Median and quartiles."""
    values = _values(rows, key, place)
    if not values:
        return ""
    middle = statistics.median(values)
    if len(values) < 4:
        return _text(middle, digits)
    # By position, since some are infinite.
    low, high = (values[round(share * (len(values) - 1))] for share in (0.25, 0.75))
    return f"{_text(middle, digits)} ({_text(low, digits)} to {_text(high, digits)})"


def table(results: dict[str, Any]) -> str:
    """The table of the page."""
    lines = []
    titles = {"digits": "8 x 8 digits", "mnist": "MNIST, 14 x 14"}
    for data, title in titles.items():
        chosen = [row for row in results["rows"] if row["problem"].startswith(data)]
        if not chosen:
            continue
        count = len({row["problem"] for row in chosen})
        lines += [
            "",
            f"{title}, {count} problems; median (quartiles):",
            "",
            "| method | gradient descent, spectrum | Adam-like, spectrum | labelled samples, harm "
            "| labelled samples, own task | R² of harm | right on harm | right on own task "
            "| kernel probe on harm |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        without = [row for row in chosen if row["method"] == METHOD_NAMES[0]]
        cells = [_median(without, key, 0) for key in _SHARES]
        lines.append(f"| none | 1 | 1 | 1 | 1 | {' | '.join(cells)} |")
        for method in METHOD_NAMES:
            rows = [row for row in chosen if row["method"] == method]
            if not rows:
                continue
            cells = [_median(rows, key, digits=1) for key in _FACTORS]
            cells += [_median(rows, key, 1) for key in _SHARES]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    caps = _values(results["rows"], "cap")
    seconds = _values(results["rows"], "seconds")
    lines += [
        "",
        f"Cap on any slow-down of a free attacker, in work: median {statistics.median(caps):.2f} "
        f"of gradient descent before (largest {caps[-1]:.2f}). A certificate took "
        f"{statistics.median(seconds):.1f} s in the median, beside other work.",
    ]
    return "\n".join(lines).strip()


_FACTORS = ("descent", "diagonal", "samples_harm", "samples_own")
_SHARES = ("r2_harm", "accuracy_harm", "accuracy_own", "kernel_harm")


def rotation_table(results: dict[str, Any]) -> str:
    """Slow-downs by last rotation: median, least and largest over pairs and seeds."""
    lines = [
        "| last rotation | gradient descent | Adam | Adagrad | standardised features |",
        "|---|---|---|---|---|",
    ]
    for rotation in ROTATIONS:
        rows = [row for row in results["rotations"] if row["rotation"] == rotation]
        cells = []
        for attacker in COORDINATE_WISE:
            values = _values(rows, attacker)
            ends = f"{_times(values[0])} to {_times(values[-1])}"
            cells.append(f"{_times(statistics.median(values))} ({ends})")
        lines.append(f"| {rotation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(value: float) -> str:
    return f">{ROTATION_LIMIT:.0f}" if math.isinf(value) else f"{value:.2g}"


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with both tables between their marks.

    Raises:
        ValueError: If marks are missing.
    """
    for name, content in zip(MARKS, (table(results), rotation_table(results)), strict=True):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in page or end not in page:
            raise ValueError(f"page must have the marks {begin} and {end}, got none")
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"
    return page


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="folder of MNIST; without it digits alone")
    parser.add_argument("--work", type=Path, default=Path("runs/certificates"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
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
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
