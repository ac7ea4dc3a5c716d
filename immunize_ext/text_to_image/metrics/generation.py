"""Quality of what a model generates: images of a prompt, judged by a measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.quantities import Spread
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage

Measure = Callable[[Tensor, Concept], float]


"""How well images in [0, 1], shape ``(b, c, h, w)``, show a concept; higher is better."""


def measure_identity(measure: Measure) -> str:
    """What a measure is, so that scores of different ones are not taken for each other.

    Objects say it by an ``identity()`` of their own; others are known by their names.

    Example:
        >>> measure_identity(measure_identity)
        'immunize_ext.text_to_image.metrics.generation.measure_identity'
    """
    own = getattr(measure, "identity", None)
    if own is not None:
        return str(own())
    kind = measure if hasattr(measure, "__qualname__") else type(measure)
    return f"{kind.__module__}.{kind.__qualname__}"


class JudgeErrors(NamedTuple):
    """How often what counts images of a concept errs, where that is known: from a validation.

    Measures that are a share of images may say it by ``errors(concept)``.

    Attributes:
        sensitivity: Share of images of the concept that it recognises.
        false_positives: Share of others that it takes for the concept.
        images: Images of the concept that the first rests on.
        others: Images that the second rests on.
    """

    sensitivity: float
    false_positives: float
    images: int
    others: int


# ``generate`` starts image i from seed + i, so seeds of runs have to lie further apart.
_NOISE_PER_SEED = 100_000


@dataclass(frozen=True)
class Sampling:
    """How images are generated to be judged.

    Attributes:
        images: Images per prompt.
        steps: Denoising steps.
        guidance: Guidance scale.
        seed: Seed of the noise; the same for every model compared.
    """

    images: int = 32
    steps: int = 20
    guidance: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.images < 1 or self.steps < 1:
            raise ValueError(
                f"Sampling: images and steps must be at least 1, got {self.images}, {self.steps}"
            )
        if not (math.isfinite(self.guidance) and self.guidance >= 0.0):
            raise ValueError(
                f"Sampling: guidance must be finite and at least 0, got {self.guidance}"
            )

    def for_seed(self, seed: int) -> Sampling:
        """The same with noise of its own for a seed: no image of two seeds starts alike."""
        return replace(self, seed=self.seed + _NOISE_PER_SEED * seed)

    def generate(self, model: TextToImage, prompt: str) -> Tensor:
        """Images of one prompt, float32 in [0, 1], shape ``(images, c, h, w)``, on the CPU.

        A pixel that is not a number (of a model that an attack has ruined) is black, as image
        files show it.
        """
        with torch.no_grad():
            images = model.generate(
                [prompt] * self.images, steps=self.steps, guidance=self.guidance, seed=self.seed
            )
        return images.cpu().nan_to_num(nan=0.0, posinf=1.0, neginf=0.0)


@dataclass(frozen=True)
class RetainedQuality:
    """How well a model still generates what it is meant for.

    Attributes:
        by_concept: Spread over seeds for each concept.
        mean: Spread over seeds of the mean over concepts.
    """

    by_concept: Mapping[str, Spread]
    mean: Spread


def retained_quality(
    model: TextToImage,
    concepts: Sequence[Concept],
    measure: Measure,
    *,
    sampling: Sampling | None = None,
    seeds: Sequence[int] = (0,),
) -> RetainedQuality:
    """Judge a model on the concepts it is to keep, each under its first prompt.

    Args:
        model: The model.
        concepts: What it has to keep.
        measure: What is judged.
        sampling: How images are generated.
        seeds: Seeds of the noise, one round of images each.

    Returns:
        The quality, by concept and on average.

    Raises:
        ValueError: If there is no concept or no seed.

    Note:
        Deterministic on the CPU.

    Example:
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concepts
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> def brightness(images, concept):
        ...     return float(images.mean())
        >>> model, kept = TextToImage(load_digits_pipeline()), digit_concepts(("three",)).concepts
        >>> found = retained_quality(model, kept, brightness, sampling=Sampling(images=1, steps=1))
        >>> list(found.by_concept), 0.0 <= found.mean.mean <= 1.0
        (['three'], True)
    """
    return retained_qualities(model, concepts, {"": measure}, sampling=sampling, seeds=seeds)[""]


def retained_qualities(
    model: TextToImage,
    concepts: Sequence[Concept],
    measures: Mapping[str, Measure],
    *,
    sampling: Sampling | None = None,
    seeds: Sequence[int] = (0,),
) -> dict[str, RetainedQuality]:
    """As :func:`retained_quality` for several measures of the same images, drawn once."""
    if not concepts or not seeds:
        raise ValueError(
            f"retained_quality: concepts and seeds must not be empty, got {len(concepts)} and "
            f"{len(seeds)}"
        )
    how = Sampling() if sampling is None else sampling
    found: dict[str, dict[str, list[float]]] = {
        name: {concept.name: [] for concept in concepts} for name in measures
    }
    for concept in concepts:
        for seed in seeds:
            images = how.for_seed(seed).generate(model, concept.prompts[0])
            for name, measure in measures.items():
                found[name][concept.name].append(float(measure(images, concept)))
    return {
        name: RetainedQuality(
            {concept: Spread.of(values) for concept, values in by_concept.items()},
            Spread.of(
                sum(values) / len(concepts) for values in zip(*by_concept.values(), strict=True)
            ),
        )
        for name, by_concept in found.items()
    }
