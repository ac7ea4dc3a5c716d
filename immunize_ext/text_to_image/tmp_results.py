"""What a text-to-image run leaves: results.json, the report, and a few lines on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext.text_to_image.run import BASELINE, TextToImageRun

if TYPE_CHECKING:
    from immunize_ext.text_to_image.evaluation import TextToImageEvaluation


def results_of(run: TextToImageRun) -> dict[str, Any]:
    """What ``results.json`` holds."""
    from immunize_ext.storage import environment
    from immunize_ext.text_to_image.attack_runs import SIDES
    from immunize_ext.text_to_image.plots import grid_entries

    evaluation = run.evaluation
    mima: dict[str, Any] = {
        "seeds": list(run.config.seeds),
        "merge_share": sum(run.merge_share) / len(run.merge_share),
        "projections": run.projections,
    }
    if evaluation is not None:
        measure, step = evaluation.measures[0], evaluation.threshold_step()
        at_threshold, control = evaluation.msgr_at_threshold(), evaluation.control_gap()
        mima |= {
            "threshold_step": step,
            "msgr": None if at_threshold is None else at_threshold.mean,
            "msgr_by_seed": None if at_threshold is None else list(at_threshold.values),
            "control_sgr": None
            if control is None
            else (control.final if step is None else control.at(step)).mean,
            **{
                f"retained_{when}": kept[measure].mean.mean if measure in kept else None
                for when, kept in (
                    ("before", evaluation.retained_before),
                    ("after", evaluation.retained_after),
                )
            },
            "delay": evaluation.delay().to_dict(),
            "strongest": evaluation.strongest(),
            "curves": {
                attack: {
                    "steps": list(evaluation.comparison(attack, evaluation.targets[0]).steps),
                    **{
                        side: [s.to_dict() for s in evaluation.target_scores(side, attack)]
                        for side in SIDES
                    },
                }
                for attack in evaluation.attacks
            },
        }
        mima["grids"] = grid_entries(evaluation)
    mima["methods"] = [
        method_row(name, found)
        for name, found in ((run.config.method, evaluation), (BASELINE, run.baseline))
        if found is not None
    ]
    return {
        "schema": 2,
        "kind": "mima",
        "method": run.config.method,
        "mima": mima,
        "evaluation": None if evaluation is None else evaluation.to_dict(),
        "config": run.config.to_dict(),
        "immunizer": run.immunized.config,
        "history": run.immunized.history,
        "peak_memory": run.immunized.peak_memory,
        "seconds": run.seconds,
        "environment": environment(),
    }


def method_row(method: str, evaluation: TextToImageEvaluation) -> dict[str, Any]:
    """One row of the comparison of methods: one value a seed, under the primary attack."""
    step, at_threshold = evaluation.threshold_step(), evaluation.msgr_at_threshold()
    control = evaluation.control_gap()
    found: dict[str, Any] = {"method": method, "source": "in this run"}
    found["msgr"] = [] if at_threshold is None else list(at_threshold.values)
    found["retained_change"] = (
        list(evaluation.retained_change().values) if evaluation.retained_after else []
    )
    found["control"] = (
        []
        if control is None
        else list((control.final if step is None else control.at(step)).values)
    )
    return found


def write(run: TextToImageRun, target: str | Path, *, force: bool = False) -> Path:
    """Write a run directory: all of it or nothing.

    It holds ``results.json``, ``pipeline/`` (the immunized model, as plain diffusers loads it) and,
    where something could be judged, ``report.html`` and ``curves.png``.

    Raises:
        FileExistsError: If the target exists and ``force`` is not given, or is no run directory.
    """
    from immunize_ext import report
    from immunize_ext.storage import run_directory, write_json

    results = results_of(run)
    with run_directory(target, force=force) as folder:
        run.immunized.save(folder / "pipeline")
        report.write(results, folder)
        write_json(folder / "results.json", results)
    return Path(target)
