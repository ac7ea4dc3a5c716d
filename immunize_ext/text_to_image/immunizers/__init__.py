"""Immunizers of text-to-image models, and the erasure that goes before them.

One interface: ``fit(model, concepts) -> ImmunizedPipeline``; the model given is never changed.
Importing this module imports neither diffusers nor accelerate.
"""

from __future__ import annotations

from immunize_ext.text_to_image.immunizers.baselines import JointTraining, LossAscent, MergeOnly
from immunize_ext.text_to_image.immunizers.concept_merge import ConceptMerge
from immunize_ext.text_to_image.immunizers.erase import erase
from immunize_ext.text_to_image.immunizers.imma import DiffusionIMMA
from immunize_ext.text_to_image.immunizers.immunized import ImmunizedPipeline
from immunize_ext.text_to_image.immunizers.loop import ImmunizationError, Immunizer
from immunize_ext.text_to_image.immunizers.mima import MIMA

METHODS: dict[str, type[Immunizer] | type[MergeOnly]] = {
    method.method: method for method in (MIMA, DiffusionIMMA, JointTraining, LossAscent, MergeOnly)
}


"""Immunizer by the name of its method."""


__all__ = [
    "METHODS",
    "MIMA",
    "ConceptMerge",
    "DiffusionIMMA",
    "ImmunizationError",
    "ImmunizedPipeline",
    "Immunizer",
    "JointTraining",
    "LossAscent",
    "MergeOnly",
    "erase",
]
