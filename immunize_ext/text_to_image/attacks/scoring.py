"""Scores of a model under attack: images of every concept, judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.metrics.generation import Measure, Sampling
from immunize_ext.text_to_image.model import TextToImage


@dataclass
class ConceptScores:
    """An ``evaluate`` for attacks: scores of every concept by every measure.

    With one concept the scores are named by their measures (``"accuracy"``), with several
    ``"accuracy/three"`` and so on, and ``"accuracy"`` is their mean.

    Attributes:
        concepts: What is looked for.
        prompts: What it is generated with, by concept: the attack's ``prompts(concepts)``.
        measures: By name.
        sampling: How many images, and how.
        kept: Images kept per concept and step for a grid.
        grids: The kept images, by concept and then by step, ``(kept, c, h, w)`` in [0, 1].
    """

    concepts: Sequence[Concept]
    prompts: Mapping[str, str]
    measures: Mapping[str, Measure]
    sampling: Sampling = field(default_factory=Sampling)
    kept: int = 0
    grids: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse measures and prompts that do not fit the concepts."""
        if not self.concepts or not self.measures:
            raise ValueError("ConceptScores: concepts and measures must not be empty")
        missing = [c.name for c in self.concepts if c.name not in self.prompts]
        if missing:
            raise ValueError(
                f"ConceptScores: prompts must hold every concept, got none for {missing}"
            )

    def __call__(self, model: TextToImage, step: int) -> dict[str, float]:
        """Generate, judge, and keep a few images."""
        found: dict[str, float] = {}
        for concept in self.concepts:
            images = self.sampling.generate(model, self.prompts[concept.name])
            if self.kept:
                self.grids.setdefault(concept.name, {})[step] = images[: self.kept].clone()
            for name, measure in self.measures.items():
                key = name if len(self.concepts) == 1 else f"{name}/{concept.name}"
                found[key] = float(measure(images, concept))
        if len(self.concepts) > 1:
            for name in self.measures:
                values = [found[f"{name}/{concept.name}"] for concept in self.concepts]
                found[name] = sum(values) / len(values)
        return found
