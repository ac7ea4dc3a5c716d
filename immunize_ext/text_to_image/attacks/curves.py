"""What an attack got, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.metrics.generation import Measure, Sampling
from immunize_ext.text_to_image.model import TextToImage

Evaluate = Callable[[TextToImage, int], dict[str, float]]


"""Scores of the model under attack after a number of steps."""


Progress = Callable[[str, float], None]


"""Called with what was done and the share of the work done so far."""


@dataclass(frozen=True)
class AttackCurve:
    """One attack on one model.

    Attributes:
        attack: Name of the attack.
        concept: What it wanted; several names are joined by ``+``.
        steps: Steps at which it was evaluated, ascending; 0 is before the first step.
        scores: By name of the score, its value at each of ``steps``.
        losses: Training loss of every step, evaluated or not.
        seconds: Wall-clock time of the attack's own steps, evaluation left out.
        peak_memory: Most bytes held at once: by the accelerator's allocator, or, on the CPU, by the
            whole process.
        config: Settings, seed, prompts: all that is needed to run it again.
    """

    attack: str
    concept: str
    steps: list[int]
    scores: dict[str, list[float]]
    losses: list[float]
    seconds: float
    peak_memory: int
    config: dict[str, Any] = field(default_factory=dict)

    def score(self, name: str) -> list[float]:
        """Values of one score.

        Raises:
            ValueError: If there is no such score.
        """
        if name not in self.scores:
            raise ValueError(
                f"AttackCurve.score: name must be one of {sorted(self.scores)}, got {name!r}"
            )
        return self.scores[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can say it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackCurve:
        """Take back what :meth:`to_dict` gave.

        Raises:
            ValueError: If a field is missing, unknown or does not fit the others.

        Example:
            >>> scores = {"accuracy": [0.0, 0.5]}
            >>> curve = AttackCurve("lora", "three", [0, 1], scores, [0.9], 1.0, 9)
            >>> AttackCurve.from_dict(curve.to_dict()) == curve
            True
        """
        try:
            curve = cls(**values)
        except TypeError as error:
            raise ValueError(
                f"AttackCurve.from_dict: values must hold the fields of a curve: {error}"
            ) from None
        for name, scores in curve.scores.items():
            if len(scores) != len(curve.steps):
                raise ValueError(
                    f"AttackCurve.from_dict: {name} must have one value for each of "
                    f"{len(curve.steps)} steps, got {len(scores)}"
                )
        return curve


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
