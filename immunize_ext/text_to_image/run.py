"""Text-to-image immunization from settings to a folder: run, erase, attack again, compare, sweep.

    from immunize_ext.text_to_image import run
    found = run.run(run.RunSettings(method="mima"), "runs/mima")
    print(found.summary())

Whatever ``immunize mima`` and its relatives do is one of these functions.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from immunize_ext import report
from immunize_ext._extras import require_extra
from immunize_ext.hub import is_hub_id
from immunize_ext.seams import Progress
from immunize_ext.settings import build, plain, settings_of
from immunize_ext.storage import (
    SCHEMA,
    ManyRuns,
    check_target,
    digest,
    environment,
    read_results,
    run_directory,
    to_json,
    work_folder,
    write_json,
    write_whole,
)
from immunize_ext.sweep import run_sweep
from immunize_ext.text_to_image import comparison as comparisons
from immunize_ext.text_to_image import report as pages
from immunize_ext.text_to_image.attack_runs import SIDES
from immunize_ext.text_to_image.attack_search import Attempts, search_attacks
from immunize_ext.text_to_image.attacks import SettingsSearch, attack_label
from immunize_ext.text_to_image.card import Measured
from immunize_ext.text_to_image.evaluation import (
    TextToImageEvaluation,
    evaluate_text_to_image,
    pool,
)
from immunize_ext.text_to_image.immunizers import (
    Erasure,
    ImmunizedPipeline,
    TextToImageImmunizer,
    describe_erasure,
    method_label,
)
from immunize_ext.text_to_image.immunizers import erase as erase_concepts
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.pipeline_folder import INDEX
from immunize_ext.text_to_image.plots import grid_entries, unattacked_entries
from immunize_ext.text_to_image.projections import describe_projections, text_entrances
from immunize_ext.text_to_image.settings import (
    BASELINE,
    DIGITS,
    AttackSettings,
    EraseSettings,
    ModelSettings,
    RunSettings,
    SweepSettings,
)
from immunize_ext.text_to_image.task import (
    Task,
    check_model,
    check_run,
    load_measures,
    load_model,
    load_task,
    sampling_of,
)

KIND = "mima"
PIPELINE = "pipeline"
ERASURE = "erasure.json"

# Images of each step and concept that a page shows.
_SHOWN = 3


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        settings: What was asked for.
        immunized: The immunized model of the first seed.
        evaluation: What was measured, over all seeds; ``None`` if nothing could judge.
        baseline: Plain loss ascent under the primary attack, with the same settings of the loop;
            ``None`` if nothing could judge or the method is that itself.
        merge_share: Share of the immunizer's time spent merging, one a seed.
        seconds: Wall-clock time by stage.
        projections: The edited layers in words.
        erased: What erasure found of each concept in its prompts.
        warnings: Sentences about the immunizations, of any seed.
    """

    settings: RunSettings
    immunized: ImmunizedPipeline
    evaluation: TextToImageEvaluation | None
    baseline: TextToImageEvaluation | None
    merge_share: tuple[float, ...]
    seconds: dict[str, float]
    projections: str
    erased: tuple[str, ...]
    warnings: tuple[str, ...]

    def results(self) -> dict[str, Any]:
        """Exactly what ``results.json`` holds."""
        evaluation = self.evaluation
        mima: dict[str, Any] = {
            "seeds": list(self.settings.seeds),
            "merge_share": sum(self.merge_share) / len(self.merge_share),
            "projections": self.projections,
            "erased": list(self.erased),
        }
        if evaluation is not None:
            mima |= _numbers(evaluation) | {
                "grids": grid_entries(evaluation),
                "unattacked": unattacked_entries(evaluation),
            }
        mima["methods"] = [
            _method_row(name, found)
            for name, found in ((self.settings.method, evaluation), (BASELINE, self.baseline))
            if found is not None
        ]
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "method": self.settings.method,
            "method_label": method_label(self.settings.method),
            "attacks": _labels(() if evaluation is None else evaluation.attacks),
            "mima": mima,
            "evaluation": None if evaluation is None else evaluation.to_dict(),
            "config": plain(self.settings),
            "immunizer": self.immunized.config,
            "history": self.immunized.history,
            "peak_memory": self.immunized.peak_memory,
            "seconds": self.seconds,
            "environment": environment(self.immunized.model.device),
            "warnings": list(self.warnings),
            "notes": [],
        }

    def summary(self) -> str:
        """What a newcomer needs to see, in plain text."""
        lines = [f"erased {line}" for line in self.erased]
        rates = self.settings.rates()
        if rates is not None:
            lines.append(rates)
        return "\n".join([*lines, pages.summary(self.results())])

    def write(self, out: str | Path, *, force: bool = False) -> Path:
        """Write the run folder, all of it or nothing.

        It holds ``results.json``, ``pipeline/`` (the immunized model, as plain diffusers loads it)
        and ``report.html`` with its plots.

        Raises:
            FileExistsError: If the target exists and ``force`` is not given, or is no run folder.
            MissingExtraError: If a package that draws is not installed.
        """
        results = self.results()
        with run_directory(out, force=force) as folder:
            name = self.settings.model
            base = name.partition("@")[0] if is_hub_id(name) else None
            self.immunized.save(folder / PIPELINE, base=base, measured=self._measured())
            if self.evaluation is not None:
                report.write(results, folder)
            write_json(folder / "results.json", results)
        return Path(out)

    def _measured(self) -> Measured | None:
        found = self.evaluation
        if found is None:
            return None
        reached = {
            attack_label(name): tuple(found.target_scores(side, name)[-1].mean for side in SIDES)
            for name in found.attacks
        }
        return Measured(
            found.measures[0],
            self.settings.attack_steps,
            self.settings.images,
            {name: (values[0], values[1]) for name, values in reached.items()},
        )


def _labels(attacks: Sequence[str]) -> dict[str, dict[str, str]]:
    return {name: {"label": attack_label(name)} for name in attacks}


def _numbers(evaluation: TextToImageEvaluation) -> dict[str, Any]:
    """The headline numbers of an evaluation."""
    measure, at_threshold = evaluation.measures[0], evaluation.msgr_at_threshold()
    retained = {"before": evaluation.retained_before, "after": evaluation.retained_after}
    control = _control_values(evaluation)
    return {
        "threshold_step": evaluation.threshold_step(),
        "msgr": None if at_threshold is None else at_threshold.mean,
        "msgr_by_seed": None if at_threshold is None else list(at_threshold.values),
        "control_sgr": sum(control) / len(control) if control else None,
        **{
            f"retained_{when}": kept[measure].mean.mean if measure in kept else None
            for when, kept in retained.items()
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


def _control_values(evaluation: TextToImageEvaluation) -> list[float]:
    """Gap of the control, one a seed: at the threshold step, or at the end."""
    control, step = evaluation.control_gap(), evaluation.threshold_step()
    if control is None:
        return []
    return list((control.final if step is None else control.at(step)).values)


def _method_row(method: str, evaluation: TextToImageEvaluation) -> dict[str, Any]:
    """One row of the comparison of methods: one value a seed, under the primary attack."""
    at_threshold = evaluation.msgr_at_threshold()
    change = evaluation.retained_change() if evaluation.retained_after else None
    return {
        "method": method,
        "label": method_label(method),
        "source": "in this run",
        "msgr": [] if at_threshold is None else list(at_threshold.values),
        "retained_change": [] if change is None else list(change.values),
        "control": _control_values(evaluation),
    }


def run(
    settings: RunSettings,
    out: str | Path | None = None,
    *,
    force: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Run:
    """Erase, immunize, attack and judge.

    Args:
        settings: What to do. All of it is checked before any work.
        out: The run folder to write, all of it or nothing. A run that was cut off left its
            immunized models and attacks beside it, each with a digest of what made it; what this
            one has in common with it is not done again.
        force: Whether an existing run folder is replaced.
        jobs: Processes for the attacks.
        progress: Called with what is being done and the share done so far.

    Returns:
        The run.

    Raises:
        FileExistsError: If ``out`` exists and ``force`` is not given, or is no run folder.
        FileNotFoundError: If a model or a file is missing.
        MissingExtraError: If a package that is needed is not installed.
        ValueError: If a setting is unknown or out of range.

    Note:
        Deterministic on the CPU given ``settings`` and the number of threads, but for the seconds.
    """
    check_run(settings)
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    require_extra("accelerate", extra="diffusion", purpose="the immunizers")
    if out is None:
        return _measured(settings, None, jobs, progress)
    check_target(out, force=force)
    report.check_extras()
    work = work_folder(out)
    found = _measured(settings, work, jobs, progress)
    if progress is not None:
        progress("writing the report", 1.0)
    found.write(out, force=force)
    shutil.rmtree(work, ignore_errors=True)
    return found


def _measured(
    settings: RunSettings, work: Path | None, jobs: int, progress: Progress | None
) -> Run:
    started = time.perf_counter()
    tell = progress or (lambda text, share: None)
    task, measures = load_task(settings), load_measures(settings)
    projections = describe_projections(text_entrances(task.model.unet))
    tell(projections, 0.0)
    rates = settings.rates()
    if rates is not None:
        tell(rates, 0.0)
    erased = _erase(task) if settings.erase else []
    for line in erased:
        tell(f"erased {line}", 0.0)
    seconds = {"load": time.perf_counter() - started, "immunize": 0.0, "attack": 0.0}
    made: list[ImmunizedPipeline] = []
    judged: dict[str, list[TextToImageEvaluation]] = {settings.method: []}
    plans = [(settings, 0.0, 0.9 if settings.method != BASELINE else 1.0)]
    if settings.method != BASELINE and measures:
        plans.append((settings.baseline(), 0.9, 1.0))
        judged[BASELINE] = []
        seconds["baseline"] = 0.0
    count = len(settings.seeds)
    for (index, seed), (plan, low, high) in product(enumerate(settings.seeds), plans):
        main = plan is settings
        middle = low + (high - low) / 3.0
        now = time.perf_counter()
        immunized = _immunized(
            plan.immunizer(seed),
            task,
            work,
            _part(progress, (index + low) / count, (index + middle) / count),
        )
        seconds["immunize" if main else "baseline"] += time.perf_counter() - now
        if main:
            made.append(immunized)
        if measures:
            now = time.perf_counter()
            judged[plan.method].append(
                evaluate_text_to_image(
                    task.model,
                    immunized.model,
                    task.judged,
                    attacks=plan.chosen_attacks(),
                    measures=measures,
                    control=task.control,
                    new_word_concept=task.new_word,
                    steps=plan.attack_steps,
                    evaluate_at=plan.steps_to_judge(),
                    seeds=(seed,),
                    threshold=plan.threshold,
                    sampling=sampling_of(plan),
                    kept_images=_SHOWN,
                    out=None if work is None else work / "attacks",
                    processes=jobs,
                    progress=_part(progress, (index + middle) / count, (index + high) / count),
                )
            )
            seconds["attack" if main else "baseline"] += time.perf_counter() - now
    seconds["total"] = time.perf_counter() - started
    pooled = {name: pool(found) for name, found in judged.items() if found}
    return Run(
        settings,
        made[0],
        pooled.get(settings.method),
        pooled.get(BASELINE) if settings.method != BASELINE else None,
        tuple(immunized.merge_share for immunized in made),
        seconds,
        projections,
        tuple(erased),
        tuple(
            text if count == 1 else f"seed {seed}: {text}"
            for seed, immunized in zip(settings.seeds, made, strict=True)
            for text in immunized.warnings
        ),
    )


def _part(progress: Progress | None, first: float, last: float) -> Progress | None:
    """A progress whose shares are those of a part of the whole."""
    if progress is None:
        return None
    whole = progress
    return lambda text, share: whole(text, first + (last - first) * share)


def _erase(task: Task) -> list[str]:
    """Erase targets and control in the model of a task, and say what was found of them."""
    erase_concepts(task.model, task.erased)
    return describe_erasure(task.erased.concepts)


def _immunized(
    method: TextToImageImmunizer, task: Task, work: Path | None, progress: Progress | None
) -> ImmunizedPipeline:
    """Immunize, or take what a run that was cut off has made of exactly the same."""
    if work is None:
        return method.fit(task.model, task.fitted, progress=progress)
    kind = f"{type(method).__module__}.{type(method).__qualname__}"
    key = digest(kind, plain(method), task.model.digest(), task.fitted.digest())[:16]
    folder = work / f"immunized-{key}"
    if (folder / PIPELINE / INDEX).is_file():
        return ImmunizedPipeline.load(folder / PIPELINE, device=task.model.device)
    made = method.fit(task.model, task.fitted, progress=progress, resume=folder / "checkpoint")
    made.save(folder / PIPELINE)
    return made


# --- erasure alone --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Erased:
    """A model from which concepts were erased.

    Attributes:
        settings: What was asked for.
        immunized: The model.
        projections: The edited layers in words.
        found: What was found of each concept in its prompts.
        changes: By name of each parameter that changed, |W - W0|_F / |W0|_F.
        base: Digest of the model that it was made of.
    """

    settings: EraseSettings
    immunized: ImmunizedPipeline
    projections: str
    found: tuple[str, ...]
    changes: dict[str, float]
    base: str

    def record(self, command: str | None = None) -> dict[str, Any]:
        """What ``erasure.json`` holds, beside the command line that asked for it."""
        return {
            "schema": SCHEMA,
            "kind": "erasure",
            "command": command,
            "config": plain(self.settings),
            "base_model_digest": self.base,
            "concepts": list(self.immunized.config["concepts"]),
            "retained": list(self.immunized.config["retain"]),
            "found": list(self.found),
            "projections": self.projections,
            "relative_changes": self.changes,
            "seconds": self.immunized.seconds,
            "environment": environment(self.immunized.model.device),
        }

    def summary(self) -> str:
        """What was erased, and in which layers."""
        names = ", ".join(self.immunized.config["concepts"])
        sizes = self.changes.values()
        changed = f"changed by {min(sizes):.1%} to {max(sizes):.1%} of their norms"
        return "\n".join([f"erased {names} in {self.projections}, {changed}", *self.found])


def erase(
    settings: EraseSettings,
    out: str | Path | None = None,
    *,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Erased:
    """Erase concepts and write the edited pipeline; the model given is not changed.

    Args:
        settings: What to erase. All of it is checked before any work.
        out: The folder to write, in diffusers' layout, with ``erasure.json``: what was done, with
            which versions, and how far each layer moved.
        force: Whether a pipeline that is there already is replaced.
        command: The command line that asked for it, for the record.
        progress: Called with what is being done and the share done so far.

    Returns:
        The edited model.

    Raises:
        FileExistsError: If ``out`` exists and ``force`` is not given, or is no pipeline.
        FileNotFoundError: If a model or a file is missing.
        ValueError: If nothing would be erased, or a setting is out of range.
    """
    method = Erasure(
        ridge=settings.ridge,
        erase_scale=settings.erase_scale,
        preserve_scale=settings.preserve_scale,
    )
    check_model(settings)
    target = None if out is None else Path(out)
    if target is not None and target.exists() and not (force and (target / INDEX).is_file()):
        raise FileExistsError(
            f"{out} exists; choose another folder, or replace a pipeline with force (--force)"
        )
    tell = progress or (lambda text, share: None)
    model, found = load_model(settings)
    chosen = found.select(settings.targets or found.names)
    layers = describe_projections(text_entrances(model.unet))
    tell(layers, 0.3)
    immunized = method.fit(model, chosen)
    tell("writing", 0.9)
    erased = Erased(
        settings,
        immunized,
        layers,
        tuple(describe_erasure(chosen.concepts)),
        _relative_changes(model, immunized.model),
        model.digest(),
    )
    if target is not None:
        text = json.dumps(to_json(erased.record(command)), indent=2, ensure_ascii=False) + "\n"
        immunized.model.save(target, overwrite=force, extra={ERASURE: text})
    return erased


def _relative_changes(before: TextToImage, after: TextToImage) -> dict[str, float]:
    """How far each parameter of the denoiser moved, of those that did."""
    old = before.unet.state_dict()
    return {
        name: float((now.double() - old[name]).norm() / old[name].double().norm())
        for name, now in after.unet.state_dict().items()
        if not torch.equal(now, old[name])
    }


# Seeds of searches are so far beyond those of results.
_SEARCH_SEED = 10_000


# --- more attacks on a finished run ---------------------------------------------------------------


@dataclass(frozen=True)
class AttackRecord:
    """What further attacks gave.

    Attributes:
        record: The content of the file.
        path: The file; its page stands beside it.
    """

    record: dict[str, Any]
    path: Path

    def results(self) -> dict[str, Any]:
        """Exactly what the file holds."""
        return self.record

    def summary(self) -> str:
        """The table of attackers, and where it was added."""
        return f"{pages.attack_summary(self.record)}\n\nadded: {self.path}"


def attack(
    folder: str | Path, settings: AttackSettings, *, progress: Progress | None = None
) -> AttackRecord:
    """Attack the first seed's model of a run again; the results are a file of their own.

    Args:
        folder: The run folder; nothing that is in it is changed.
        settings: The attacks.
        progress: Called with what is being done and the share done so far.

    Returns:
        What was added under ``folder/attacks``: a JSON file and its page.

    Raises:
        FileNotFoundError: If there is no such run.
        MissingExtraError: If a package that draws is not installed.
        ValueError: If it is no single run, nothing can judge it, or a setting is out of range.
    """
    report.check_extras()
    results = read_results(folder)
    if results["kind"] != KIND:
        raise ValueError(f"attack: {folder} must be a single run, got a sweep")
    about = _request(results["config"])
    steps = tuple(sorted({0, *settings.budgets})) if settings.budgets else about.steps_to_judge()
    about = replace(
        about,
        attacks=settings.attacks,
        attack_settings=settings.attack_settings,
        prompts=settings.prompts,
        seeds=about.seeds[:1],
        evaluate_at=steps,
        attack_steps=max(steps[-1], 1),
        images=settings.images or about.images,
        device=settings.device or about.device,
    )
    attacks = about.chosen_attacks()
    check_model(about)
    measures = load_measures(about)
    if not measures:
        raise ValueError(
            "attack: nothing can judge this model; the run was made without --clip and --dino"
        )
    task = load_task(about)
    if about.erase:
        _erase(task)
    immunized = ImmunizedPipeline.load(Path(folder) / PIPELINE, device=task.model.device).model
    searches: list[SettingsSearch] = []
    if settings.search:
        searches = search_attacks(
            attacks,
            Attempts(
                immunized,
                task.judged,
                measures,
                sampling_of(about),
                about.attack_steps,
                max(about.seeds) + _SEARCH_SEED,
            ),
            trials=settings.search,
            most_lost=settings.most_lost,
            seconds=settings.search_seconds,
            journal=Path(folder) / "attacks" / "search.journal",
            progress=_part(progress, 0.0, 0.8),
        )
        best = {found.attack.name: found.attack for found in searches}
        attacks = [best.get(attack.name, attack) for attack in attacks]
        progress = _part(progress, 0.8, 1.0)
    evaluation = evaluate_text_to_image(
        task.model,
        immunized,
        task.judged,
        attacks=attacks,
        measures=measures,
        control=task.control,
        steps=about.attack_steps,
        evaluate_at=steps,
        seeds=about.seeds,
        threshold=about.threshold,
        sampling=sampling_of(about),
        kept_images=0,
        progress=progress,
    )
    record = {
        "schema": SCHEMA,
        "kind": "mima-attack",
        "attacks": _labels(evaluation.attacks),
        "config": plain(about)
        | {name: results["config"].get(name) for name in ("method", "settings")},
        "search": [found.to_dict() for found in searches],
        "evaluation": evaluation.to_dict(),
        "environment": environment(task.model.device),
    }
    return AttackRecord(record, report.write_record(record, Path(folder) / "attacks"))


def _request(values: Mapping[str, Any]) -> RunSettings:
    """What a run of any schema was asked for, as far as its model and its judges go."""
    left_out = ("method", "settings", "attacks", "attack_settings", "prompts")
    names = [name for name in settings_of(RunSettings) if name not in left_out]
    known = {name: values[name] for name in names if values.get(name) is not None}
    return build(RunSettings, known, "results.json")


# --- comparisons ----------------------------------------------------------------------------------


def compare(folders: Sequence[str | Path], out: str | Path, *, force: bool = False) -> ManyRuns:
    """Compare finished runs and sweeps.

    Args:
        folders: Run and sweep folders, of any schema.
        out: The folder to write.
        force: Whether an existing one is replaced.

    Returns:
        The comparison.

    Raises:
        FileExistsError: If ``out`` exists and ``force`` is not given, or is no run folder.
        FileNotFoundError: If a folder holds no run.
    """
    check_target(out, force=force)
    report.check_extras()
    rows = [
        row
        for folder in folders
        for row in comparisons.rows_of(Path(folder).name, read_results(folder))
    ]
    content = comparisons.comparison_of(rows)
    with run_directory(out, force=force) as folder:
        report.write(content, folder)
        write_json(folder / "results.json", content)
    return ManyRuns(content, Path(out), comparisons.summary(content))


# --- sweeps ---------------------------------------------------------------------------------------


def measure_point(name: str, settings: RunSettings, inputs: str) -> dict[str, Any]:
    """What a sweep keeps of one point: a row of its comparison.

    Args:
        name: Name of the point.
        settings: What to do.
        inputs: Digest of the files that the settings name.
    """
    del inputs  # part of what the point is made of
    return plain(comparisons.row_of(name, run(settings).results()))


def sweep(
    settings: SweepSettings,
    out: str | Path,
    *,
    force: bool = False,
    jobs: int = 1,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> ManyRuns:
    """Do what is missing of a sweep, and compare its points.

    Args:
        settings: The points. All of it is checked before any work.
        out: The sweep folder: a file for each point, ``results.json`` and ``report.html``. The same
            call goes on with one that was cut off.
        force: Whether points of other settings are dropped.
        jobs: Processes, where there is no executor.
        executor: Where the points run (:func:`immunize_ext.sweep.run_jobs`).
        progress: Called after each point.

    Returns:
        The sweep.

    Raises:
        FileExistsError: If ``out`` holds something else, or a sweep of other settings.
        ValueError: If a setting is unknown or out of range.

    Note:
        Processes import the package anew: methods and attacks of your own have to be registered by
        a module that they import as well, or ``jobs`` has to be 1.
    """
    points = settings.points()
    for point in points.values():
        check_run(point)
    report.check_extras()
    inputs = _inputs(settings)
    done = run_sweep(
        out,
        f"{KIND}-sweep",
        {name: partial(measure_point, name, point, inputs) for name, point in points.items()},
        force=force,
        executor=executor,
        processes=jobs,
        progress=progress,
    )
    content = comparisons.comparison_of([comparisons.Row(**row) for row in done.values()])
    report.write(content, Path(out))
    write_whole(Path(out) / "results.json", content)
    return ManyRuns(content, Path(out), comparisons.summary(content))


def _inputs(settings: ModelSettings) -> str:
    """Digest of the files that settings name by their paths."""
    if settings.model == DIGITS:
        return ""
    model, found = load_model(settings)
    judges = [Path(p) for p in (getattr(settings, n, None) for n in ("clip", "dino")) if p]
    return digest(model.digest(), found.digest(), judges)
