"""What an attack got, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from immunize_ext.models.text_to_image import TextToImage

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
