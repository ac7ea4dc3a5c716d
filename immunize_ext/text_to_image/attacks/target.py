"""What an attack on a text-to-image model wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage

Evaluate: TypeAlias = Callable[[TextToImage, int], dict[str, float]]
"""Scores of the model under attack after a number of steps."""


@dataclass(frozen=True)
class Target:
    """Concepts that an attack shall produce, and how it is judged on the way.

    Attributes:
        concepts: One, or several that it learns jointly.
        prompt: Another wording than the attack's own.
        evaluate: Scores of the model under attack at a step; called without gradients and with
            random generators of its own, so that it has no influence on the attack.
        evaluate_at: Steps at which ``evaluate`` is called, ascending, 0 for the model as given;
            the start and the end when omitted.
    """

    concepts: Sequence[Concept]
    prompt: str | None = None
    evaluate: Evaluate | None = None
    evaluate_at: Sequence[int] | None = None

    @classmethod
    def of(cls, wanted: Target | Sequence[Concept]) -> Target:
        """Concepts alone are a target that is not judged."""
        return wanted if isinstance(wanted, Target) else cls(wanted)

    @property
    def names(self) -> list[str]:
        """Names of the concepts, in their order."""
        return [concept.name for concept in self.concepts]

    def checkpoints(self, function: str, steps: int) -> list[int]:
        """The steps to be judged at.

        Raises:
            ValueError: If ``steps`` are fewer than none, there is no concept or one twice, or the
                steps to be judged at do not ascend from 0 to at most ``steps``.
        """
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"{function}: target must hold at least one concept and none twice, got "
                f"{self.names}"
            )
        if steps < 0:
            raise ValueError(f"{function}: steps must be at least 0, got {steps}")
        found = sorted({0, steps}) if self.evaluate_at is None else list(self.evaluate_at)
        if found != sorted(set(found)) or any(not 0 <= step <= steps for step in found):
            raise ValueError(
                f"{function}: evaluate_at must ascend from 0 to at most steps={steps} without "
                f"repetition, got {found}"
            )
        return found
