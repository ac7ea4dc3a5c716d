"""What ``immunize attack`` and ``immunize report`` do with text-to-image tasks."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from immunize_ext import report
from immunize_ext.runtime import progress_bar
from immunize_ext.storage import (
    check_target,
    environment,
    read_results,
    run_directory,
    write_json,
)
from immunize_ext.sweep import write_whole
from immunize_ext.text_to_image.comparison import comparison_of, rows_of, summary
from immunize_ext.text_to_image.tmp_config import TextToImageConfig, checked

ATTACKS = "attacks"


def attack(run_folder: str, results: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Attack the first seed's model of a run again; the results are a file of their own."""
    from immunize_ext.text_to_image import tmp_task as tasks
    from immunize_ext.text_to_image.attacks import ATTACKS as KNOWN
    from immunize_ext.text_to_image.evaluation import evaluate_text_to_image
    from immunize_ext.text_to_image.immunizers import ImmunizedPipeline
    from immunize_ext.text_to_image.report import attack_summary

    folder = Path(run_folder)
    if results["kind"] != "mima":
        raise ValueError(f"attack: {run_folder} must be a single run, got a sweep")
    config = dataclasses.replace(
        TextToImageConfig(), **checked(results["config"], str(folder / "results.json"))
    )
    for flag in ("tasks", "loss", "base_budget", "limit", "data_dir"):
        if getattr(arguments, flag) is not None:
            raise ValueError(
                f"--{flag.replace('_', '-')}: must be left out for a text-to-image run, got "
                f"{getattr(arguments, flag)!r}; give --attackers and --budgets"
            )
    names = tuple(arguments.attackers)
    if names == ("all",):
        names = tuple(KNOWN)
    steps = sorted({0, *arguments.budgets}) if arguments.budgets else []
    if any(step < 0 for step in steps):
        raise ValueError(f"--budgets: must be at least 1 step, got {min(steps)}")
    config = dataclasses.replace(
        config,
        attacks=names,
        seeds=config.seeds[:1],
        evaluate_at=tuple(steps) or config.evaluate_at,
        attack_steps=max(steps, default=config.attack_steps),
    )
    tasks.check_config(config)
    with progress_bar(arguments.quiet) as progress:
        task = tasks.load_task(config)
        if not task.measures:
            raise ValueError(
                "attack: nothing can judge this model; the run was made without --clip and --dino"
            )
        if config.erase:
            tasks.erase_concepts(task)
        immunized = ImmunizedPipeline.load(folder / "pipeline")
        evaluation = evaluate_text_to_image(
            task.model,
            immunized.model,
            task.judged,
            attacks=[KNOWN[name] for name in names],
            measures=task.measures,
            control=task.control,
            steps=config.attack_steps,
            evaluate_at=config.steps_to_judge(),
            seeds=config.seeds,
            threshold=config.threshold,
            sampling=task.sampling,
            kept_images=0,
            progress=progress,
        )
    (folder / ATTACKS).mkdir(exist_ok=True)
    file = folder / ATTACKS / f"{'+'.join(names)}-{config.attack_steps}.json"
    if len(names) == len(KNOWN):
        file = folder / ATTACKS / f"all-{config.attack_steps}.json"
    record = {
        "kind": "mima-attack",
        "config": config.to_dict(),
        "evaluation": evaluation.to_dict(),
        "environment": environment(),
    }
    write_whole(file, record)
    print(attack_summary(record))
    print(f"\nresults: {file}")
    return 0


def compare(folders: Sequence[str], arguments: argparse.Namespace) -> int:
    """Write one report of several runs or sweeps."""
    check_target(arguments.out, force=arguments.force)
    rows = [row for folder in folders for row in rows_of(Path(folder).name, read_results(folder))]
    comparison = comparison_of(rows)
    with run_directory(arguments.out, force=arguments.force) as writing:
        report.write(comparison, writing)
        write_json(writing / "results.json", comparison)
    print(summary(comparison))
    print(f"\nreport: {Path(arguments.out) / 'report.html'}")
    return 0
