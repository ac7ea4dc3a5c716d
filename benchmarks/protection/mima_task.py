"""The task of the benchmarks on the digits pipeline: what is erased, immunized and kept."""

from __future__ import annotations

from typing import NamedTuple

from immunize_ext.text_to_image.concepts import Concept, ConceptSet
from immunize_ext.text_to_image.digits.concepts import digit_concept, digit_concepts
from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
from immunize_ext.text_to_image.immunizers import erase
from immunize_ext.text_to_image.model import TextToImage

TARGETS, CONTROL, NEW_WORD = ("three", "five", "eight"), "six", "seven"
IMMA_TARGET = "three"


def digit(name: str) -> Concept:
    """The concept of one digit."""
    return digit_concept(DIGIT_NAMES.index(name))


class MimaTask(NamedTuple):
    """Model and concepts.

    Attributes:
        model: The pipeline with targets and control erased.
        fitted: What an immunizer is given; it keeps the control as it is, erased.
        judged: What is attacked, and what has to stay: here the control is neither.
    """

    model: TextToImage
    fitted: ConceptSet
    judged: ConceptSet

    def fitted_by(self, method: str) -> ConceptSet:
        """Concepts for a method; IMMA knows one, and has to keep the other erased ones too."""
        if method != "imma":
            return self.fitted
        chosen = self.fitted.select([IMMA_TARGET])
        others = tuple(c for c in self.fitted.concepts if c.name != IMMA_TARGET)
        return ConceptSet(chosen.concepts, (*chosen.retain, *others), chosen.captions)

    def judged_for(self, method: str) -> ConceptSet:
        """What a method has set out to protect."""
        return self.judged.select([IMMA_TARGET]) if method == "imma" else self.judged


def mima_task() -> MimaTask:
    """The task, made anew."""
    model = TextToImage(load_digits_pipeline())
    erased = digit_concepts((*TARGETS, CONTROL))
    erase(model, erased)
    fitted = digit_concepts(TARGETS)
    return MimaTask(model, fitted, ConceptSet(fitted.concepts, erased.retain, fitted.captions))
