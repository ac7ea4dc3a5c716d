"""Text-to-image runs: erase, immunize, attack, judge, write."""

from __future__ import annotations

import dataclasses
import difflib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext._extras import require_extra
from immunize_ext.commands._common import Progress
from immunize_ext.commands._text_to_image_config import DIGITS, TextToImageConfig

if TYPE_CHECKING:
    from immunize_ext.data.concepts import Concept, ConceptSet
    from immunize_ext.immunizers.text_to_image import ImmunizedPipeline
    from immunize_ext.metrics.generation import Measure, Sampling
    from immunize_ext.models import TextToImage
    from immunize_ext.report.text_to_image_evaluation import TextToImageEvaluation

# Whatever is claimed for a method has to be more than this.
BASELINE = "loss_ascent"

DIGIT_TARGETS, DIGIT_CONTROL = ("three", "five", "eight"), "six"


@dataclass(frozen=True)
class Task:
    """What a run is about, loaded.

    Attributes:
        model: The model as it is given.
        fitted: What immunizers see: targets, and what they have to keep, the control included.
        judged: The same with only what has to stay as it was before erasure.
        control: The specificity control, if any.
        new_word: The concept taught under a new word, if any.
        measures: Measures by name; empty if nothing can judge.
        sampling: How images are generated.
    """

    model: TextToImage
    fitted: ConceptSet
    judged: ConceptSet
    control: Concept | None
    new_word: Concept | None
    measures: dict[str, Measure]
    sampling: Sampling


def immunizer(config: TextToImageConfig, seed: int) -> Any:
    """The method of a run with its settings, for one seed.

    Raises:
        ValueError: If the method or a setting is unknown.
    """
    from immunize_ext.immunizers.text_to_image import METHODS, DiffusionIMMA, MergeOnly

    if config.method not in METHODS:
        near = difflib.get_close_matches(config.method, METHODS, n=1)
        hint = f"did you mean {near[0]}" if near else f"known are {', '.join(METHODS)}"
        raise ValueError(f"--method: must be a method, got {config.method!r}; {hint}")
    kind: Any = METHODS[config.method]
    single: Any = DiffusionIMMA if kind is MergeOnly else kind
    known = {f.name: f for f in dataclasses.fields(single)}
    settings: dict[str, Any] = {}
    for name, value in config.settings.items():
        if name not in known or name == "seed":
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}" if near else f"known are {', '.join(known)}"
            raise ValueError(f"--set: {config.method} must know the setting, got {name!r}; {hint}")
        settings[name] = _as(str(known[name].type), value, name)
    made = single(**settings, seed=seed)
    return MergeOnly(single=made) if kind is MergeOnly else made


def _as(kind: str, value: Any, name: str) -> Any:
    """A value of a setting in its kind; numbers from the shell are floats."""
    if value is None and "None" in kind:
        return None
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind.startswith("int") and plain and float(value) == int(value):
        return int(value)
    if kind == "float" and plain:
        return float(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    named = any(word in kind for word in ("str", "Literal", "Scope"))
    if named and isinstance(value, str):
        return value
    raise ValueError(f"--set: {name} must be of type {kind}, got {value!r}")


def check_config(config: TextToImageConfig) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        ValueError: If a setting is out of range.
        FileNotFoundError: If the model or a file is missing.
    """
    from immunize_ext.attacks.text_to_image import ATTACKS

    immunizer(config, 0)
    for name in config.attacks:
        if name not in ATTACKS:
            near = difflib.get_close_matches(name, ATTACKS, n=1)
            hint = f"did you mean {near[0]}" if near else f"known are {', '.join(ATTACKS)}"
            raise ValueError(f"--attacks: must be attacks, got {name!r}; {hint}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"--seeds: must be different seeds, got {list(config.seeds)}")
    for name in ("attack_steps", "images", "sampling_steps"):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: must be at least 1, got {getattr(config, name)}")
    if config.model == DIGITS:
        if config.concepts is not None:
            raise ValueError(
                "--concepts: must go with --model; the digits name theirs by --targets"
            )
        return
    if not (Path(config.model) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"--model: must be a folder with model_index.json, got {config.model}; give what "
            "DiffusionPipeline.save_pretrained wrote, or leave it out for the digits"
        )
    if config.concepts is None:
        raise ValueError("--concepts: must name a concepts.yaml for a model of your own, got none")


def load_task(config: TextToImageConfig) -> Task:
    """Load model, concepts and measures.

    Raises:
        ValueError: If a name is unknown.
        FileNotFoundError: If a file is missing.
        MissingExtraError: If diffusers or what judges is not installed.
    """
    require_extra("diffusers", extra="diffusion", purpose="text-to-image models")
    from immunize_ext.metrics.generation import Sampling

    sampling = Sampling(config.images, config.sampling_steps, config.guidance)
    return _digits(config, sampling) if config.model == DIGITS else _own(config, sampling)


def _digits(config: TextToImageConfig, sampling: Sampling) -> Task:
    from immunize_ext.data.concepts import ConceptSet, digit_concept, digit_concepts
    from immunize_ext.data.digit_images import DIGIT_NAMES
    from immunize_ext.metrics.measures import JudgedAccuracy
    from immunize_ext.models import TextToImage
    from immunize_ext.models.digits_pipeline import load_digits_pipeline

    targets = config.targets or DIGIT_TARGETS
    control = config.control
    if control is None and not config.targets:
        control = DIGIT_CONTROL
    fitted = digit_concepts(targets)
    extra: dict[str, Concept | None] = {}
    for flag, name in (("--control", control), ("--new-word", config.new_word)):
        if name is not None and (name not in DIGIT_NAMES or name in targets):
            raise ValueError(f"{flag}: must be a digit that is no target, got {name!r}")
        extra[flag] = None if name is None else digit_concept(DIGIT_NAMES.index(name))
    kept = tuple(concept for concept in fitted.retain if concept.name != control)
    return Task(
        TextToImage(load_digits_pipeline()),
        fitted,
        ConceptSet(fitted.concepts, kept, fitted.captions),
        extra["--control"],
        extra["--new-word"],
        {"accuracy": JudgedAccuracy()},
        sampling,
    )


def _own(config: TextToImageConfig, sampling: Sampling) -> Task:
    from immunize_ext.data.concepts import ConceptSet, load_concepts
    from immunize_ext.models import TextToImage

    assert config.concepts is not None
    model = TextToImage.from_pretrained(config.model)
    scale = int(getattr(model.pipeline, "vae_scale_factor", 1))
    size = config.image_size or int(model.unet.config.sample_size) * scale
    found = load_concepts(config.concepts, size=size)
    everything = {concept.name: concept for concept in (*found.concepts, *found.retain)}
    chosen: dict[str, Concept | None] = {}
    for flag, name in (("--control", config.control), ("--new-word", config.new_word)):
        if name is not None and name not in everything:
            known = ", ".join(everything)
            raise ValueError(
                f"{flag}: must be a concept of {config.concepts}, got {name!r}; {known}"
            )
        chosen[flag] = None if name is None else everything[name]
    control = chosen["--control"]
    names = config.targets or tuple(n for n in found.names if n != config.control)
    fitted = found.select(names)
    if control is not None and control not in fitted.retain:
        fitted = ConceptSet(fitted.concepts, (*fitted.retain, control), fitted.captions)
    kept = tuple(c for c in fitted.retain if c is not control)
    return Task(
        model,
        fitted,
        ConceptSet(fitted.concepts, kept, fitted.captions),
        control,
        chosen["--new-word"],
        _similarities(config),
        sampling,
    )


def _similarities(config: TextToImageConfig) -> dict[str, Measure]:
    from immunize_ext.metrics.measures import PromptSimilarity, ReferenceSimilarity
    from immunize_ext.metrics.similarity import ClipSimilarity, DinoSimilarity

    measures: dict[str, Measure] = {}
    if config.clip is not None:
        clip = ClipSimilarity.from_pretrained(config.clip)
        measures["clip_image"] = ReferenceSimilarity(clip.image_image)
        measures["clip_text"] = PromptSimilarity(clip)
    if config.dino is not None:
        dino = DinoSimilarity.from_pretrained(config.dino)
        measures["dino"] = ReferenceSimilarity(dino.image_image)
    return measures


def erase_concepts(task: Task) -> None:
    """Erase targets and control in the model of a task.

    Raises:
        ValueError: If a concept has no anchor; the model is then unchanged.
    """
    from immunize_ext.data.concepts import ConceptSet
    from immunize_ext.immunizers.text_to_image import erase

    gone = task.fitted.concepts + (() if task.control is None else (task.control,))
    erase(task.model, ConceptSet(gone, task.judged.retain, task.judged.captions))


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
    from immunize_ext.models import describe_projections, find_text_projections
    from immunize_ext.report.text_to_image_pool import pool

    started = time.perf_counter()
    task = load_task(config)
    if captions is not None:
        task = _with_captions(task, captions)
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
    from immunize_ext.attacks.text_to_image import ATTACKS
    from immunize_ext.report.text_to_image_evaluation import evaluate_text_to_image

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
    from immunize_ext.immunizers.text_to_image import LossAscent

    known = {f.name for f in dataclasses.fields(LossAscent)}
    return {name: value for name, value in config.settings.items() if name in known}


def _with_captions(task: Task, count: int) -> Task:
    if not 1 <= count <= len(task.fitted.captions):
        raise ValueError(
            f"--captions: must be 1 to {len(task.fitted.captions)}, as many as there are, got "
            f"{count}"
        )
    fewer = dataclasses.replace(task.fitted, captions=task.fitted.captions[:count])
    return dataclasses.replace(task, fitted=fewer)


def _immunized(
    config: TextToImageConfig, task: Task, folder: Path, seed: int, progress: Progress
) -> ImmunizedPipeline:
    """Immunize with one seed, or take what a run that was cut off had made already."""
    from immunize_ext.immunizers.text_to_image import ImmunizedPipeline

    method = immunizer(config, seed)
    if (folder / "pipeline").is_dir():
        return ImmunizedPipeline.load(folder / "pipeline")
    made: ImmunizedPipeline = method.fit(
        task.model, task.fitted, out=folder / "checkpoint", resume=True, progress=progress
    )
    made.save(folder / "pipeline")
    return made


def results_of(run: TextToImageRun) -> dict[str, Any]:
    """What ``results.json`` holds."""
    from immunize_ext.report import environment
    from immunize_ext.report.attack_runs import SIDES

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
    mima["methods"] = [
        method_row(name, found)
        for name, found in ((run.config.method, evaluation), (BASELINE, run.baseline))
        if found is not None
    ]
    return {
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
    from immunize_ext.report import run_directory
    from immunize_ext.report.run_directory import write_json
    from immunize_ext.report.text_to_image_page import ATTACK_LABELS, page
    from immunize_ext.report.text_to_image_plots import draw_curves_png

    results = results_of(run)
    with run_directory(target, force=force) as folder:
        run.immunized.save(folder / "pipeline")
        if run.evaluation is not None:
            (folder / "curves.png").write_bytes(draw_curves_png(run.evaluation, ATTACK_LABELS))
            text = page(run.evaluation, results, methods=results["mima"]["methods"])
            (folder / "report.html").write_text(text, encoding="utf-8")
        write_json(folder / "results.json", results)
    return Path(target)


def work_folder(target: str | Path) -> Path:
    """Where a run keeps what it can go on from until it is finished."""
    path = Path(target)
    return path.with_name(f".{path.name}.work")


def forget_work(folder: Path) -> None:
    """Remove what a finished run does not need any more."""
    shutil.rmtree(folder, ignore_errors=True)


def summary(results: Mapping[str, Any], evaluation: TextToImageEvaluation | None) -> str:
    """What a newcomer needs to see, in plain text."""
    from immunize_ext.commands._tables import text_table
    from immunize_ext.report.attack_runs import SIDES
    from immunize_ext.report.text_to_image_page import delay_words, headline, label

    mima = results["mima"]
    lines = [mima["projections"], ""]
    if evaluation is None:
        lines.append(
            "Immunized; no attack was judged. Give --clip or --dino the folder of a model to "
            "measure likeness with."
        )
        return "\n".join(lines)
    lines += [headline(evaluation), ""]
    rows = [["attack", "without", "immunized", "delay"]]
    for attack in evaluation.attacks:
        before, after = (
            " ".join(f"{s.mean:.2f}" for s in evaluation.target_scores(side, attack))
            for side in SIDES
        )
        rows.append([label(attack), before, after, str(evaluation.delay(attack))])
    lines += [text_table(rows), ""]
    lines.append(delay_words(evaluation.delay()))
    if mima["retained_after"] is not None:
        lines.append(
            f"What it shall still draw: {mima['retained_before']:.2f} before, "
            f"{mima['retained_after']:.2f} after."
        )
    if mima["control_sgr"] is not None:
        lines.append(f"Control, erased but not immunized: gap {mima['control_sgr']:.2f}.")
    return "\n".join(lines)
