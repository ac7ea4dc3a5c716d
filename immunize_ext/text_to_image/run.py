"""Text-to-image runs: erase, immunize, attack, judge; writes only what it can go on from."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext.seams import Progress
from immunize_ext.text_to_image.tmp_config import TextToImageConfig
from immunize_ext.text_to_image.tmp_task import (
    Task,
    erase_concepts,
    immunizer,
    load_task,
    with_captions,
)

if TYPE_CHECKING:
    from immunize_ext.text_to_image.evaluation import TextToImageEvaluation
    from immunize_ext.text_to_image.immunizers import ImmunizedPipeline


# Whatever is claimed for a method has to be more than this.
BASELINE = "loss_ascent"


@dataclass(frozen=True)
class TextToImageRun:
    """A finished run, not yet written.

    Attributes:
        config: Its settings.
        immunized: The immunized model of the first seed.
        evaluation: What was measured, over all seeds; ``None`` if nothing could judge.
        merge_share: Share of the immunizer's time spent merging, one a seed.
        seconds: Wall-clock time by stage.
        projections: The edited layers in words.
        baseline: Plain loss ascent under the primary attack, with the same settings of the loop;
            ``None`` if nothing could judge or the method is that itself.
    """

    config: TextToImageConfig
    immunized: ImmunizedPipeline
    evaluation: TextToImageEvaluation | None
    merge_share: list[float]
    seconds: dict[str, float]
    projections: str
    baseline: TextToImageEvaluation | None = None


def run_text_to_image(
    config: TextToImageConfig,
    work: Path,
    progress: Progress,
    *,
    jobs: int = 1,
    captions: int | None = None,
) -> TextToImageRun:
    """Erase, immunize, attack and judge.

    Args:
        config: What to do.
        work: Folder for what a run that is cut off can go on from.
        progress: Called with what is being done and the share done so far.
        jobs: Processes for the attacks.
        captions: Use only so many captions for C_reg.

    Returns:
        The run.

    Raises:
        ValueError: If a setting is out of range, or ``work`` is of a run with other settings.
    """
    from immunize_ext.text_to_image.evaluation import pool
    from immunize_ext.text_to_image.projections import describe_projections, find_text_projections

    started = time.perf_counter()
    task = load_task(config)
    if captions is not None:
        task = with_captions(task, captions)
    found = describe_projections(find_text_projections(task.model.unet))
    progress(found, 0.0)
    if config.erase:
        erase_concepts(task)
    seconds = {"load": time.perf_counter() - started, "immunize": 0.0, "attack": 0.0}
    evaluations, baseline, shares, first = [], [], [], None
    count = len(config.seeds)
    for index, seed in enumerate(config.seeds):

        def part(low: float, high: float, index: int = index) -> Progress:
            return lambda text, share: progress(text, (index + low + (high - low) * share) / count)

        now = time.perf_counter()
        immunized = _immunized(config, task, work / f"immunized-{seed}", seed, part(0.0, 0.3))
        seconds["immunize"] += time.perf_counter() - now
        shares.append(immunized.merge_share)
        first = immunized if first is None else first
        if not task.measures:
            continue
        now = time.perf_counter()
        evaluations.append(_attacked(config, task, immunized, seed, work, jobs, part(0.3, 0.9)))
        seconds["attack"] += time.perf_counter() - now
        if config.method != BASELINE:
            now = time.perf_counter()
            simple = dataclasses.replace(
                config,
                method=BASELINE,
                settings=_shared_settings(config),
                attacks=config.attacks[:1],
            )
            folder = work / f"{BASELINE}-{seed}"
            made = _immunized(simple, task, folder, seed, part(0.9, 0.95))
            baseline.append(_attacked(simple, task, made, seed, work, jobs, part(0.95, 1.0)))
            seconds["baseline"] = seconds.get("baseline", 0.0) + time.perf_counter() - now
    assert first is not None
    seconds["total"] = time.perf_counter() - started
    return TextToImageRun(
        config,
        first,
        pool(evaluations) if evaluations else None,
        shares,
        seconds,
        found,
        pool(baseline) if baseline else None,
    )


def _attacked(
    config: TextToImageConfig,
    task: Task,
    immunized: ImmunizedPipeline,
    seed: int,
    work: Path,
    jobs: int,
    progress: Progress,
) -> TextToImageEvaluation:
    """Attack one immunized model and its twin."""
    from immunize_ext.text_to_image.attacks import ATTACKS
    from immunize_ext.text_to_image.evaluation import evaluate_text_to_image

    return evaluate_text_to_image(
        task.model,
        immunized.model,
        task.judged,
        attacks=[ATTACKS[name] for name in config.attacks],
        measures=task.measures,
        control=task.control,
        new_word_concept=task.new_word,
        steps=config.attack_steps,
        evaluate_at=config.steps_to_judge(),
        seeds=(seed,),
        threshold=config.threshold,
        sampling=task.sampling,
        out=work / "attacks",
        processes=jobs,
        progress=progress,
    )


def _shared_settings(config: TextToImageConfig) -> dict[str, Any]:
    """Settings of the outer loop, which the baseline has too: equal steps, batches, retain term."""
    from immunize_ext.text_to_image.immunizers import LossAscent

    known = {f.name for f in dataclasses.fields(LossAscent)}
    return {name: value for name, value in config.settings.items() if name in known}


def _immunized(
    config: TextToImageConfig, task: Task, folder: Path, seed: int, progress: Progress
) -> ImmunizedPipeline:
    """Immunize with one seed, or take what a run that was cut off had made already."""
    from immunize_ext.text_to_image.immunizers import ImmunizedPipeline

    method = immunizer(config, seed)
    if (folder / "pipeline").is_dir():
        return ImmunizedPipeline.load(folder / "pipeline")
    made: ImmunizedPipeline = method.fit(
        task.model, task.fitted, out=folder / "checkpoint", resume=True, progress=progress
    )
    made.save(folder / "pipeline")
    return made


def work_folder(target: str | Path) -> Path:
    """Where a run keeps what it can go on from until it is finished."""
    path = Path(target)
    return path.with_name(f".{path.name}.work")


def forget_work(folder: Path) -> None:
    """Remove what a finished run does not need any more."""
    shutil.rmtree(folder, ignore_errors=True)
