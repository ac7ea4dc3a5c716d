"""What survives an attacker who knows: certificates of three methods over many pairs of tasks.

    python -m benchmarks.protection.certificates --mnist ../shared/data/mnist
    python -m benchmarks.protection.certificates --write docs/certificates.md   # the page's table

Random pairs of digit tasks over seeds, and pairs of MNIST digits at 14 x 14 pixels. The owner has
one half of the harmful samples, the attacker the other. Finished certificates are kept in
``--work``, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from immunize_ext.probing.certificates import certify
from immunize_ext.probing.data import Problem, Task, digits_task, load_problem
from immunize_ext.probing.immunizers import METHODS
from immunize_ext.storage import environment, to_json

from .digit_tasks import random_tasks

OUT = Path(__file__).with_name("certificates.json")
METHOD_NAMES = ("whitening", "closed-form", "label-direction", "lock", "pencil-lock")
MNIST_PAIRS = (("3:8", "4:9"), ("0:1", "3:5"), ("2:6", "7:9"), ("1:7", "5:8"))
BEGIN, END = "<!-- certificates:begin -->", "<!-- certificates:end -->"


def half(task: Task, which: int) -> Task:
    """Every second training sample."""
    x, y = task.x_train[which::2], task.y_train[which::2]
    return Task(task.name, x, y, task.x_test, task.y_test)


def problems(mnist: Path | None, pairs: int, seeds: int) -> Iterator[tuple[str, Problem[Task]]]:
    """Name and tasks."""
    for primary, harmful in random_tasks(pairs, seed=0):
        sides = [
            [[int(digit) for digit in side.split(",")] for side in text.split(":")]
            for text in (primary, harmful)
        ]
        for seed in range(seeds):
            tasks = [digits_task(*side, seed=seed) for side in sides]
            yield f"digits {primary} {harmful} {seed}", Problem.of(*tasks)
    for primary, harmful in MNIST_PAIRS if mnist is not None else ():
        found = load_problem("mnist", primary, (harmful,), data_dir=str(mnist), size=14)
        yield f"mnist {primary} {harmful} 0", found


def row_of(name: str, method: str, problem: Problem[Task]) -> dict[str, Any]:
    """One certificate, in the numbers that are compared."""
    harmful = problem.harmful[0]
    immunized = METHODS[method].fit(None, Problem.of(problem.primary, half(harmful, 0)))
    found = certify(immunized, problem.primary, half(harmful, 1), draws=4)
    harm, own = found.linear
    few = {one.role: one for one in found.few_samples}
    return {
        "problem": name,
        "method": method,
        "descent": found.delays[0].factor if found.delays else None,
        "diagonal": next((d.factor for d in found.delays if d.optimizer == "diagonal"), None),
        "cap": found.work.cap if found.work else None,
        "undone": found.undoing[-1].factor if found.undoing else None,
        "samples_harm": few["harmful"].factor_best,
        "samples_harm_given": few["harmful"].factor_given,
        "samples_own": few["primary"].factor_best,
        "r2_harm": [harm.r2_before, harm.r2_after],
        "r2_own": [own.r2_before, own.r2_after],
        "accuracy_harm": [harm.accuracy_before, harm.accuracy_after],
        "accuracy_own": [own.accuracy_before, own.accuracy_after],
        "kernel_harm": [harm.kernel_before, harm.kernel_after],
        "seconds": sum(found.seconds.values()),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, taken from ``--work`` where they stand there."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, problem in problems(arguments.mnist, arguments.pairs, arguments.seeds):
        for method in METHOD_NAMES:
            path = arguments.work / f"{name} {method}.json".replace(":", "-").replace(",", "")
            if not path.is_file():
                row = to_json(row_of(name, method, problem))
                path.write_text(json.dumps(row), encoding="utf-8")
                print(f"{name} {method}: {row['seconds']:.1f} s", flush=True)
            rows.append(json.loads(path.read_text(encoding="utf-8")))
    return {"rows": rows, "draws": 4, "environment": environment()}


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
    for data, title in (("digits", "8 x 8 digits"), ("mnist", "MNIST, 14 x 14")):
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
            cells = [_median(rows, key, digits=1) for key in _FACTORS]
            cells += [_median(rows, key, 1) for key in _SHARES]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    caps = _values(results["rows"], "cap")
    undone = _values(results["rows"], "undone")
    seconds = _values(results["rows"], "seconds")
    lines += [
        "",
        f"Cap on any slow-down of a free attacker, in work: median {statistics.median(caps):.2f} "
        f"of gradient descent before (largest {caps[-1]:.2f}). Steps of gradient descent after "
        f"whitening by unlabelled inputs, in units of those before immunization: median "
        f"{statistics.median(undone):.2f}. A certificate took {statistics.median(seconds):.1f} s "
        "in the median.",
    ]
    return "\n".join(lines).strip()


_FACTORS = ("descent", "diagonal", "samples_harm", "samples_own")
_SHARES = ("r2_harm", "accuracy_harm", "accuracy_own", "kernel_harm")


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with the table between its marks.

    Raises:
        ValueError: If the marks are missing.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"page must have the marks {BEGIN} and {END}, got none")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END, 1)[1]}"


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
