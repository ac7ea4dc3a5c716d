"""Immunizers of text-to-image models, and the erasure that goes before them.

One interface: ``fit(model, problem, *, progress, resume) -> ImmunizedPipeline``; the model given is
never changed. Importing this module imports neither diffusers nor accelerate.
"""

from __future__ import annotations

from immunize_ext.text_to_image.immunizers.baselines import JointTraining, LossAscent, MergeOnly
from immunize_ext.text_to_image.immunizers.concept_merge import (
    ClassMerge,
    ConceptMerge,
    GatedMerge,
    Merge,
    MomentMerge,
)
from immunize_ext.text_to_image.immunizers.erase import Erasure, describe_erasure, erase
from immunize_ext.text_to_image.immunizers.imma import DiffusionIMMA
from immunize_ext.text_to_image.immunizers.immunized import ImmunizedPipeline
from immunize_ext.text_to_image.immunizers.loop import ImmunizationError, Immunizer
from immunize_ext.text_to_image.immunizers.many_words import ManyWords
from immunize_ext.text_to_image.immunizers.mima import MIMA
from immunize_ext.text_to_image.immunizers.registry import (
    METHODS,
    MethodName,
    TextToImageImmunizer,
    method_label,
)

__all__ = [
    "METHODS",
    "MIMA",
    "ClassMerge",
    "ConceptMerge",
    "DiffusionIMMA",
    "Erasure",
    "GatedMerge",
    "ImmunizationError",
    "ImmunizedPipeline",
    "Immunizer",
    "JointTraining",
    "LossAscent",
    "ManyWords",
    "Merge",
    "MergeOnly",
    "MethodName",
    "MomentMerge",
    "TextToImageImmunizer",
    "describe_erasure",
    "erase",
    "method_label",
]
