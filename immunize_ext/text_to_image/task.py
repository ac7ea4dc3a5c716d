"""What a run is about, loaded: the model, what is immunized and kept, and what judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from immunize_ext._extras import require_extra
from immunize_ext.hub import is_hub_id, model_folder
from immunize_ext.runtime import named_device
from immunize_ext.settings import hint, suggestion
from immunize_ext.text_to_image.concepts import Concept, ConceptSet, load_concepts
from immunize_ext.text_to_image.digits.concepts import digit_concept, digit_concepts
from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
from immunize_ext.text_to_image.digits.judge import DigitJudge
from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
from immunize_ext.text_to_image.metrics.generation import Measure, Sampling
from immunize_ext.text_to_image.metrics.similarity import (
    AcceptedShare,
    ClipSimilarity,
    DinoSimilarity,
    JudgedAccuracy,
    PromptSimilarity,
    ReferenceSimilarity,
)
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.pipeline_folder import INDEX
from immunize_ext.text_to_image.settings import DIGITS, ModelSettings, RunSettings

DIGIT_TARGETS, DIGIT_CONTROL = ("three", "five", "eight"), "six"


@dataclass(frozen=True)
class Task:
    """What a run is about.

    Attributes:
        model: The model as it is given.
        fitted: What immunizers see: targets, and what they have to keep, the control included.
        judged: The same with only what has to stay as it was before erasure.
        control: The specificity control, if any.
        new_word: The concept taught under a new word, if any.
    """

    model: TextToImage
    fitted: ConceptSet
    judged: ConceptSet
    control: Concept | None
    new_word: Concept | None

    @property
    def erased(self) -> ConceptSet:
        """What is erased before anything else: targets and control."""
        gone = self.fitted.concepts + (() if self.control is None else (self.control,))
        return ConceptSet(gone, self.judged.retain, self.judged.captions)


def check_run(settings: RunSettings) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        FileNotFoundError: If the model is missing.
        ValueError: If a name or a setting is unknown or out of range.
    """
    settings.immunizer(settings.seeds[0])
    settings.chosen_attacks()
    check_model(settings)


def check_model(settings: ModelSettings) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        FileNotFoundError: If the model is missing.
        ValueError: If the concepts are missing, or a target of the digits is none.
    """
    named_device(settings.device)
    if settings.model == DIGITS:
        for name in ("concepts", "variant", "image_size", "clip", "dino"):
            if getattr(settings, name, None) is not None:
                raise ValueError(
                    f"{name}: must go with a model of your own (--model); the digits come with "
                    "theirs, and are chosen by targets"
                )
        if settings.dtype not in ("saved", "float32"):
            # Its autoencoder is exact in float32 alone.
            raise ValueError(f"dtype: must be float32 for the digits, got {settings.dtype}")
        digit_concepts(settings.targets or DIGIT_TARGETS)
        return
    if not is_hub_id(settings.model) and not (Path(settings.model) / INDEX).is_file():
        raise FileNotFoundError(
            f"model: must be a folder with model_index.json, got {settings.model}; give what "
            "DiffusionPipeline.save_pretrained wrote, a name on huggingface.co (owner/model), or "
            f"leave it out for the digits{hint(settings.model, [DIGITS])}"
        )
    if settings.concepts is None:
        raise ValueError("concepts: must name a concepts.yaml for a model of your own, got none")
    model_folder(settings.model, function="model", index=INDEX, variant=settings.variant)


def load_alone(settings: ModelSettings) -> TextToImage:
    """The model that settings name, without its concepts.

    Raises:
        FileNotFoundError: If a file is missing.
        MissingExtraError: If diffusers is not installed.
        ValueError: If a file holds something else.
    """
    require_extra("diffusers", extra="diffusion", purpose="text-to-image models")
    if settings.model == DIGITS:
        return TextToImage(load_digits_pipeline()).to(settings.device)
    dtype = None if settings.dtype == "saved" else getattr(torch, settings.dtype)
    model = TextToImage.from_pretrained(
        settings.model, dtype=dtype, variant=settings.variant, device=settings.device
    )
    if settings.image_size is not None:
        model.image_size = settings.image_size
    return model


def load_model(settings: ModelSettings) -> tuple[TextToImage, ConceptSet]:
    """The model, and all concepts that are known of it.

    Raises:
        FileNotFoundError: If a file is missing.
        MissingExtraError: If diffusers is not installed.
        ValueError: If a file holds something else.
    """
    model = load_alone(settings)
    if settings.model == DIGITS:
        return model, digit_concepts(settings.targets or DIGIT_TARGETS)
    size = settings.image_size or model.image_size
    assert settings.concepts is not None  # check_model asked
    return model, load_concepts(settings.concepts, size=size)


def load_task(settings: RunSettings) -> Task:
    """Load model and concepts, and choose among them.

    Raises:
        ValueError: If a name is unknown.
        FileNotFoundError: If a file is missing.
        MissingExtraError: If diffusers is not installed.
    """
    model, found = load_model(settings)
    if settings.model == DIGITS:
        everything = {name: digit_concept(index) for index, name in enumerate(DIGIT_NAMES)}
        usual = DIGIT_CONTROL if not settings.targets else None
        targets = found.names
    else:
        everything = {concept.name: concept for concept in (*found.concepts, *found.retain)}
        usual = None
        targets = settings.targets or tuple(n for n in found.names if n != settings.control)
    control = _chosen("control", settings.control or usual, everything)
    new_word = _chosen("new_word", settings.new_word, everything)
    fitted = found.select(targets)
    for name, concept in (("control", control), ("new_word", new_word)):
        if concept is not None and concept.name in fitted.names:
            raise ValueError(f"{name}: must be no target, got {concept.name!r}")
    kept = tuple(c for c in fitted.retain if control is None or c.name != control.name)
    if control is not None:
        # Immunizers keep it as it is, erased; what it was is not judged.
        fitted = replace(fitted, retain=(*kept, control))
    if settings.caption_count is not None:
        if settings.caption_count > len(fitted.captions):
            raise ValueError(
                f"caption_count: must be 1 to {len(fitted.captions)}, as many as there are, got "
                f"{settings.caption_count}"
            )
        fitted = replace(fitted, captions=fitted.captions[: settings.caption_count])
    judged = replace(fitted, retain=kept)
    return Task(model, fitted, judged, control, new_word)


def _chosen(setting: str, name: str | None, everything: Mapping[str, Concept]) -> Concept | None:
    if name is None:
        return None
    if name not in everything:
        raise ValueError(
            f"{setting}: must be a concept of the model, got {name!r}; "
            f"{suggestion(name, everything)}"
        )
    return everything[name]


def load_measures(settings: RunSettings) -> dict[str, Measure]:
    """What judges, by name; empty if nothing can.

    Raises:
        FileNotFoundError: If a folder holds no model.
        MissingExtraError: If what judges is not installed.
        ValueError: If a folder asks for code or holds pickled weights.
    """
    if settings.model == DIGITS:
        judge = DigitJudge()
        return {
            "accuracy": JudgedAccuracy(judge),
            "second judge": JudgedAccuracy(DigitJudge("trees")),
            "any digit": AcceptedShare(judge),
        }
    measures: dict[str, Measure] = {}
    if settings.clip is not None:
        clip = ClipSimilarity.from_pretrained(settings.clip)
        clip.model.to(settings.device)
        measures["clip_image"] = ReferenceSimilarity(clip.image_image)
        measures["clip_text"] = PromptSimilarity(clip)
    if settings.dino is not None:
        dino: Any = DinoSimilarity.from_pretrained(settings.dino)
        dino.model.to(settings.device)
        measures["dino"] = ReferenceSimilarity(dino.image_image)
    return measures


def sampling_of(settings: RunSettings) -> Sampling:
    """How images are generated to be judged."""
    return Sampling(settings.images, settings.sampling_steps, settings.guidance)
