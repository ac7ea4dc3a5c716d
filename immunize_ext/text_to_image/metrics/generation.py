"""Quality of what a model generates: images of a prompt, judged by a measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    """
    if not concepts or not seeds:
        raise ValueError(
            f"retained_quality: concepts and seeds must not be empty, got {len(concepts)} and "
            f"{len(seeds)}"
        )
    how = Sampling() if sampling is None else sampling
    found = {
        concept.name: [
            float(measure(how.for_seed(seed).generate(model, concept.prompts[0]), concept))
            for seed in seeds
        ]
        for concept in concepts
    }
    rounds = zip(*found.values(), strict=True)
    return RetainedQuality(
        {name: Spread.of(values) for name, values in found.items()},
        Spread.of(sum(values) / len(concepts) for values in rounds),
    )
