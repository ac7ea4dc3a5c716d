"""What ``immunize attack`` and ``immunize report`` do with condition-number runs."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext._extras import require_extra
from immunize_ext.probing.attacks import ATTACKERS, attack_at_budgets, compare_attack
from immunize_ext.probing.attacks.compress import NEED_SAMPLES, compressed
from immunize_ext.probing.comparison import (
    HEADLINE_BUDGET,
    Point,
    attacker_label,
    measured_attackers,
    point_of,
    write_comparison,
)
from immunize_ext.probing.comparison import compare as compare_points
from immunize_ext.probing.immunizers import Immunized
from immunize_ext.probing.report import in_words
from immunize_ext.probing.run import check_config, chosen_attackers
from immunize_ext.probing.tmp_config import KappaConfig, checked
from immunize_ext.probing.tmp_tasks import fingerprint, load_tasks
from immunize_ext.quantities import Slowdown
from immunize_ext.report.tables import text_table
from immunize_ext.runtime import progress_bar, threads
from immunize_ext.seams import Progress
from immunize_ext.storage import environment, read_results
from immunize_ext.sweep import finished, write_whole

if TYPE_CHECKING:
    from immunize_ext.probing.data import Task


ATTACKS = "attacks"


def attack(run_folder: str, results: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Attack a run again and add the results as a file of their own."""
    folder = Path(run_folder)
    if results["kind"] != "kappa":
        raise ValueError(
            f"attack: {run_folder} must be a single run, got a sweep, which keeps no extractors; "
            "sweep again with --attackers"
        )
    config = _attack_config(results, arguments)
    check_config(config)
    if any(budget < 1 for budget in arguments.budgets):
        raise ValueError(f"--budgets: must be at least 1 step, got {min(arguments.budgets)}")
    immunized = Immunized.load(folder / "immunized.safetensors")
    primary, harmful = load_tasks(config)
    if fingerprint([primary, *harmful]) != results.get("data_sha256"):
        raise ValueError(
            f"attack: {config.data} must be the data that the run saw, got other numbers; give "
            "its folder with --data-dir"
        )
    roles = arguments.tasks or ["harmful", "primary"]
    tasks: list[tuple[str, Task]] = []
    for role in roles:
        tasks += [(role, task) for task in ([primary] if role == "primary" else harmful)]
    with threads(1), progress_bar(arguments.quiet) as progress:
        found = _run_attacks(config, immunized, tasks, sorted(set(arguments.budgets)), progress)
    path = _next_file(folder / ATTACKS)
    write_whole(path, found)
    print(_attack_table(found))
    print(f"\nadded: {path}")
    return 0


def _attack_config(results: dict[str, Any], arguments: argparse.Namespace) -> KappaConfig:
    config = KappaConfig(**checked(results["request"], "results.json"))
    changes = {
        name: value
        for name in ("loss", "base_budget", "limit", "data_dir")
        if (value := getattr(arguments, name)) is not None
    }
    return replace(config, attackers=tuple(arguments.attackers), **changes)


def _run_attacks(
    config: KappaConfig,
    immunized: Immunized,
    tasks: Sequence[tuple[str, Task]],
    budgets: list[int],
    progress: Progress,
) -> dict[str, Any]:
    started = time.perf_counter()
    rows = []
    names = [name for name in chosen_attackers(config) if ATTACKERS[name].knows(config.loss)]
    if not names:
        raise ValueError(
            f"attack: attackers must be able to minimise the {config.loss} loss, got none that can"
        )
    jobs = [(name, role, task) for name in names for role, task in tasks]
    for index, (name, role, task) in enumerate(jobs):
        progress(f"{ATTACKERS[name].label.lower()}, {role} task", index / len(jobs))
        whole = name in NEED_SAMPLES or config.loss != "squared"
        target = task if whole else compressed(task)
        done = compare_attack(
            target,
            immunized.theta,
            immunized.theta0,
            attacker=name,
            base_budget=config.base_budget,
            limit=config.limit,
            loss="logistic" if config.loss == "logistic" else "squared",
        )
        row: dict[str, Any] = {
            "attacker": name,
            "role": role,
            "task": task.name,
            "slowdown": done.slowdown.ratio,
            "is_lower_bound": done.slowdown.censored,
            "steps_without": done.base_steps,
            "steps_with": done.steps,
            "learning_rate_without": done.base.learning_rate,
            "learning_rate_with": done.immunized.learning_rate,
        }
        if budgets:
            outcomes = attack_at_budgets(
                target,
                immunized.theta,
                immunized.theta0,
                budgets=budgets,
                attacker=name,
                loss="logistic" if config.loss == "logistic" else "squared",
            )
            row["budgets"] = [outcome._asdict() for outcome in outcomes]
        rows.append(row)
    return {
        "kind": "kappa-attack",
        "loss": config.loss,
        "base_budget": config.base_budget,
        "limit": config.limit,
        "attacks": rows,
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }


def _next_file(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    number = 1
    while (folder / f"{number:03d}.json").exists():
        number += 1
    return folder / f"{number:03d}.json"


def _attack_table(found: dict[str, Any]) -> str:
    rows = [("attacker", "task", "slow-down", "steps before", "after")]
    for row in found["attacks"]:
        rows.append(
            (
                ATTACKERS[row["attacker"]].label,
                row["role"],
                in_words(Slowdown(row["slowdown"], row["is_lower_bound"])),
                f"{row['steps_without']:,}",
                "not there" if row["steps_with"] is None else f"{row['steps_with']:,}",
            )
        )
    lines = [text_table(rows)]
    for row in found["attacks"]:
        for outcome in row.get("budgets", ()):
            lines.append(
                f"  {ATTACKERS[row['attacker']].label}, {row['role']}, {outcome['steps']} steps: "
                f"test loss {outcome['loss_with']:.4g}, {outcome['loss_without']:.4g} without"
            )
    return "\n".join(lines)


def with_attacks(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Results with what later attacks added; of attacks with the run's own loss and limits.

    Where a run is against several harmful tasks, the least slow-down counts.
    """
    merged: dict[str, dict[str, float]] = {r: dict(v) for r, v in results["slowdown"].items()}
    bounds = {r: dict(v) for r, v in results["slowdown_is_lower_bound"].items()}
    request = results["request"]
    for path in sorted((folder / ATTACKS).glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} must be JSON, got: {error}; remove it") from error
        same = all(found[key] == request[key] for key in ("loss", "base_budget", "limit"))
        if not same:
            continue
        added: dict[tuple[str, str], tuple[float, bool]] = {}
        for row in found["attacks"]:
            key, value = (row["role"], row["attacker"]), (row["slowdown"], row["is_lower_bound"])
            added[key] = min(added.get(key, value), value)
        for (role, name), (ratio, bound) in added.items():
            merged[role][name], bounds[role][name] = ratio, bound
    return {**results, "slowdown": merged, "slowdown_is_lower_bound": bounds}


def load_points(folders: Sequence[str]) -> list[Point]:
    """Runs and the points of sweeps, later attacks included."""
    points = []
    for folder in folders:
        results = read_results(folder)
        if results["kind"] == "kappa-sweep":
            for name, point in finished(Path(folder)).items():
                points.append(point_of(f"{Path(folder).name}/{name}", point))
        else:
            points.append(point_of(Path(folder).name, with_attacks(Path(folder), results)))
    return points


def compare(folders: Sequence[str], arguments: argparse.Namespace) -> int:
    """Write the comparison and print its table."""
    from immunize_ext.storage import check_target

    check_target(arguments.out, force=arguments.force)
    require_extra("matplotlib", extra="report", purpose="the plots")
    points = load_points(folders)
    comparison = compare_points(points)
    written = write_comparison(points, arguments.out, force=arguments.force)
    attackers = measured_attackers(points)
    key = f"{HEADLINE_BUDGET:g}"
    rows = [("method", *(attacker_label(name) for name in attackers))]
    for method in dict.fromkeys(point.method for point in points):
        cells = []
        for name in attackers:
            entry = comparison["equal_primary_slowdown"][name].get(method, {}).get(key)
            median = None if entry is None else entry["median"]
            if entry is None or median is None:
                cells.append("-")
                continue
            bound = ">" if entry["lower_bounds"] else ""
            share = "" if entry["of"] == 1 else f" ({entry['cells']} of {entry['of']})"
            cells.append(f"{bound}{median:.3g}x{share}")
        rows.append((method, *cells))
    print("Slow-down of the harm where the task to keep is no slower than before:\n")
    print(text_table(rows))
    print(f"\nreport: {written / 'report.html'}  ({len(points)} runs)")
    return 0
