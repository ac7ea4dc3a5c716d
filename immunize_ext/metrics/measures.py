"""Measures of generated images: how well they show a concept, by a judge or by similarity.

A measure takes images in [0, 1] and the concept, and gives one number; higher is a better likeness.
All of them can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from immunize_ext.data.concepts import Concept
from immunize_ext.metrics.judge import DigitJudge
from immunize_ext.metrics.similarity import ClipSimilarity


class Judge(Protocol):
    """A classifier of images."""

    def score(self, images: Tensor, label: int) -> float:
        """Share of images that show a class."""


class JudgedAccuracy:
    """Share of images that a judge takes for the concept.

    Args:
        judge: Any classifier with ``score(images, label)``; the judge of the bundled digits when
            omitted.

    Example:
        >>> from immunize_ext.data.concepts import digit_concept
        >>> four = digit_concept(4)
        >>> JudgedAccuracy()((four.images("attack") + 1) / 2, four) > 0.9
        True
    """

    def __init__(self, judge: Judge | None = None) -> None:
        self._own = judge is None
        self.judge: Judge = DigitJudge() if judge is None else judge

    def __call__(self, images: Tensor, concept: Concept) -> float:
        """The share.

        Raises:
            ValueError: If the concept has no label that a judge could know it by.
        """
        if concept.label is None:
            raise ValueError(
                f"JudgedAccuracy: concept {concept.name!r} must have a label, got none; give it "
                "the class that the judge knows it by"
            )
        return self.judge.score(images, concept.label)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process fits the judge of the digits anew, which is exact and takes no time."""
        return (JudgedAccuracy, () if self._own else (self.judge,))


class ReferenceSimilarity:
    """Mean similarity of images to the concept's own images.

    Args:
        similarity: Of two batches in [0, 1]: ``ClipSimilarity(...).image_image``,
            ``DinoSimilarity(...).image_image`` or ``LpipsDistance(...).similarity``.
        split: Which images of the concept to compare with.
    """

    def __init__(
        self, similarity: Callable[[Tensor, Tensor], float], *, split: str = "attack"
    ) -> None:
        self.similarity, self.split = similarity, split

    def __call__(self, images: Tensor, concept: Concept) -> float:
        """The mean over all pairs."""
        return self.similarity(images, (concept.images(self.split) + 1.0) / 2.0)


class PromptSimilarity:
    """Mean CLIP similarity of images to the concept's first prompt.

    Args:
        clip: CLIP with its tokenizer.
    """

    def __init__(self, clip: ClipSimilarity) -> None:
        self.clip = clip

    def __call__(self, images: Tensor, concept: Concept) -> float:
        """The mean."""
        return self.clip.image_text(images, [concept.prompts[0]])
