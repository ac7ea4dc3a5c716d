"""What ``immunize attack`` and ``immunize report`` do with condition-number runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext import report
from immunize_ext.probing.attacks import ATTACKERS, attack_at_budgets, compare_attack
from immunize_ext.probing.attacks.compress import NEED_SAMPLES, compressed
from immunize_ext.probing.comparison import compare as compare_points
from immunize_ext.probing.comparison import load_points
from immunize_ext.probing.comparison_report import summary
from immunize_ext.probing.evaluation import attackers_in_words
from immunize_ext.probing.immunizers import Immunized
from immunize_ext.probing.report import attack_summary
from immunize_ext.probing.run import check_config, chosen_attackers
from immunize_ext.probing.tmp_config import KappaConfig, checked
from immunize_ext.probing.tmp_tasks import fingerprint, load_tasks
from immunize_ext.report.words import count
from immunize_ext.runtime import progress_bar, threads
from immunize_ext.seams import Progress
from immunize_ext.storage import check_target, environment, run_directory, write_json
from immunize_ext.sweep import write_whole

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
    print(attack_summary(found))
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
        "attackers": attackers_in_words(names),
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


def compare(folders: Sequence[str], arguments: argparse.Namespace) -> int:
    """Write the comparison and print its table."""
    check_target(arguments.out, force=arguments.force)
    report.check_extras()
    comparison = compare_points(load_points(folders))
    with run_directory(arguments.out, force=arguments.force) as folder:
        report.write(comparison, folder)
        write_json(folder / "results.json", comparison)
    print(summary(comparison))
    runs = count(len(comparison["runs"]), "run")
    print(f"\nreport: {Path(arguments.out) / 'report.html'}  ({runs})")
    return 0
