"""What a text-to-image run is about: settings checked; model, concepts and measures loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunize_ext._extras import require_extra
from immunize_ext.settings import suggestion
from immunize_ext.text_to_image.tmp_config import DIGITS, TextToImageConfig

if TYPE_CHECKING:
    from immunize_ext.text_to_image.concepts import Concept, ConceptSet
    from immunize_ext.text_to_image.metrics.generation import Measure, Sampling
    from immunize_ext.text_to_image.model import TextToImage


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
    from immunize_ext.text_to_image.immunizers import METHODS, DiffusionIMMA, MergeOnly

    if config.method not in METHODS:
        raise ValueError(
            f"--method: must be a method, got {config.method!r}; "
            f"{suggestion(config.method, METHODS)}"
        )
    kind: Any = METHODS[config.method]
    single: Any = DiffusionIMMA if kind is MergeOnly else kind
    known = {f.name: f for f in dataclasses.fields(single)}
    settings: dict[str, Any] = {}
    for name, value in config.settings.items():
        if name not in known or name == "seed":
            raise ValueError(
                f"--set: {config.method} must know the setting, got {name!r}; "
                f"{suggestion(name, known)}"
            )
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
    from immunize_ext.text_to_image.attacks import ATTACKS

    immunizer(config, 0)
    for name in config.attacks:
        if name not in ATTACKS:
            raise ValueError(
                f"--attacks: must be attacks, got {name!r}; {suggestion(name, ATTACKS)}"
            )
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
    from immunize_ext.text_to_image.metrics.generation import Sampling

    sampling = Sampling(config.images, config.sampling_steps, config.guidance)
    return _digits(config, sampling) if config.model == DIGITS else _own(config, sampling)


def _digits(config: TextToImageConfig, sampling: Sampling) -> Task:
    from immunize_ext.text_to_image.concepts import ConceptSet
    from immunize_ext.text_to_image.digits.concepts import digit_concept, digit_concepts
    from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
    from immunize_ext.text_to_image.metrics.similarity import JudgedAccuracy
    from immunize_ext.text_to_image.model import TextToImage

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
    from immunize_ext.text_to_image.concepts import ConceptSet, load_concepts
    from immunize_ext.text_to_image.model import TextToImage

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
    from immunize_ext.text_to_image.metrics.similarity import (
        ClipSimilarity,
        DinoSimilarity,
        PromptSimilarity,
        ReferenceSimilarity,
    )

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
    from immunize_ext.text_to_image.concepts import ConceptSet
    from immunize_ext.text_to_image.immunizers import erase

    gone = task.fitted.concepts + (() if task.control is None else (task.control,))
    erase(task.model, ConceptSet(gone, task.judged.retain, task.judged.captions))


def with_captions(task: Task, count: int) -> Task:
    """A task with only the first captions for C_reg.

    Raises:
        ValueError: If there are not so many.
    """
    if not 1 <= count <= len(task.fitted.captions):
        raise ValueError(
            f"--captions: must be 1 to {len(task.fitted.captions)}, as many as there are, got "
            f"{count}"
        )
    fewer = dataclasses.replace(task.fitted, captions=task.fitted.captions[:count])
    return dataclasses.replace(task, fitted=fewer)
