"""The bundled digits as concepts: what they are asked for with, and captions that name none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from immunize_ext.settings import hint
from immunize_ext.text_to_image.concepts import Concept, ConceptSet
from immunize_ext.text_to_image.digits.images import DIGIT_NAMES, digit_images

# What the digits are asked for with; the first is what immunizers and attackers see first.
DIGIT_TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the digit {}",
    "digit {}",
    "an image of the digit {}",
    "a drawing of the number {}",
    "the number {} on paper",
    "a small picture of a {}",
)


# Captions that name no digit.
NEUTRAL_CAPTIONS = (
    "a photo of a digit",
    "a handwritten digit",
    "the digit",
    "digit",
    "an image of a digit",
    "a drawing of a number",
    "the number on paper",
    "a small picture of a digit",
)


def digit_concept(digit: int) -> Concept:
    """One of the bundled digits as a concept.

    Args:
        digit: 0 to 9.

    Returns:
        The concept, with images for every split of
        :func:`immunize_ext.text_to_image.digits.images.digit_images`.

    Example:
        >>> three = digit_concept(3)
        >>> three.name, three.prompts[0], three.anchor
        ('three', 'a photo of the digit three', 'digit')
    """
    name = DIGIT_NAMES[digit]

    def source(split: str) -> Tensor:
        return digit_images(split, digit)[0]  # type: ignore[arg-type]

    prompts = tuple(template.format(name) for template in DIGIT_TEMPLATES)
    return Concept(name, prompts, anchor="digit", label=digit, source=source)


def digit_concepts(
    targets: Sequence[str] = ("three", "five", "eight"),
    *,
    retain: Sequence[str] | None = None,
) -> ConceptSet:
    """The bundled digits as a set: some to immunize against, the others to keep.

    Args:
        targets: Names of one to ten digits, e.g. ``("three", "five", "eight")``.
        retain: Names of digits to keep; all that are no targets when omitted.

    Returns:
        The set. Its captions name the digits to keep and no target.

    Raises:
        ValueError: If a name is no digit, or stands in both.
    """
    kept = [name for name in DIGIT_NAMES if name not in targets] if retain is None else list(retain)
    for name in (*targets, *kept):
        if name not in DIGIT_NAMES:
            raise ValueError(
                f"digit_concepts: names must be among {', '.join(DIGIT_NAMES)}, got {name!r}"
                f"{hint(name, DIGIT_NAMES)}"
            )
    captions = [*NEUTRAL_CAPTIONS]
    captions += [template.format(name) for name in kept for template in DIGIT_TEMPLATES]
    return ConceptSet(
        tuple(digit_concept(DIGIT_NAMES.index(name)) for name in targets),
        tuple(digit_concept(DIGIT_NAMES.index(name)) for name in kept),
        tuple(captions),
    )
