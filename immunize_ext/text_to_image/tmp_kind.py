"""What ``immunize attack`` and ``immunize report`` do with text-to-image tasks."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from immunize_ext.report.tables import text_table
from immunize_ext.runtime import progress_bar
from immunize_ext.storage import check_target, environment, read_results
from immunize_ext.sweep import write_whole
from immunize_ext.text_to_image.attack_runs import SIDES
from immunize_ext.text_to_image.tmp_config import TextToImageConfig, checked

ATTACKS = "attacks"


def attack(run_folder: str, results: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Attack the first seed's model of a run again; the results are a file of their own."""
    from immunize_ext.text_to_image import tmp_task as tasks
    from immunize_ext.text_to_image.attacks import ATTACKS as KNOWN
    from immunize_ext.text_to_image.evaluation import evaluate_text_to_image
    from immunize_ext.text_to_image.immunizers import ImmunizedPipeline
    from immunize_ext.text_to_image.report import label

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
    write_whole(
        file,
        {
            "kind": "mima-attack",
            "config": config.to_dict(),
            "evaluation": evaluation.to_dict(),
            "environment": environment(),
        },
    )
    rows = [["attack", "without", "immunized", "delay"]]
    for name in names:
        before, after = (
            " ".join(f"{s.mean:.2f}" for s in evaluation.target_scores(side, name))
            for side in SIDES
        )
        rows.append([label(name), before, after, str(evaluation.delay(name))])
    print(text_table(rows))
    strongest = evaluation.strongest()
    words = label(strongest)
    print(f"\nstrongest: {words}. {evaluation.delay(strongest).sentence(words)}")
    print(f"\nresults: {file}")
    return 0


def compare(folders: Sequence[str], arguments: argparse.Namespace) -> int:
    """Write one report of several runs or sweeps."""
    from immunize_ext.text_to_image.report import rows_of, write_comparison

    check_target(arguments.out, force=arguments.force)
    rows = [row for folder in folders for row in rows_of(Path(folder), read_results(folder))]
    written = write_comparison(rows, arguments.out, force=arguments.force)
    table = [["run", "method", "concepts", "MSGR", "kept", "control"]]
    for row in rows:
        cells = [row.msgr, row.retained_change, row.control]
        table.append(
            [row.name, row.method, str(row.concepts)]
            + ["-" if value is None else f"{value:.2f}" for value in cells]
        )
    print(text_table(table))
    print(f"\nreport: {written / 'report.html'}")
    return 0
