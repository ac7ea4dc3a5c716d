"""Immunizers of text-to-image models, and the erasure that goes before them.

One interface: ``fit(model, concepts) -> ImmunizedPipeline``; the model given is never changed.
Importing this module imports neither diffusers nor accelerate.
"""

from immunize_ext.immunizers.text_to_image.baselines import JointTraining, LossAscent, MergeOnly
from immunize_ext.immunizers.text_to_image.concept_merge import ConceptMerge
from immunize_ext.immunizers.text_to_image.erase import erase
from immunize_ext.immunizers.text_to_image.imma import DiffusionIMMA
from immunize_ext.immunizers.text_to_image.immunized_pipeline import ImmunizedPipeline
from immunize_ext.immunizers.text_to_image.loop import ImmunizationError, Immunizer
from immunize_ext.immunizers.text_to_image.mima import MIMA

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
