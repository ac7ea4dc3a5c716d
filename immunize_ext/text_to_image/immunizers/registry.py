"""The methods by name, with the settings that hold where nothing else is said."""

from __future__ import annotations

from typing import Literal, TypeAlias

from immunize_ext import seams
from immunize_ext.settings import Registry
from immunize_ext.text_to_image.concepts import ConceptSet
from immunize_ext.text_to_image.immunizers.baselines import JointTraining, LossAscent, MergeOnly
from immunize_ext.text_to_image.immunizers.erase import Erasure
from immunize_ext.text_to_image.immunizers.imma import DiffusionIMMA
from immunize_ext.text_to_image.immunizers.immunized import ImmunizedPipeline
from immunize_ext.text_to_image.immunizers.many_words import ManyWords
from immunize_ext.text_to_image.immunizers.mima import MIMA
from immunize_ext.text_to_image.model import TextToImage

TextToImageImmunizer: TypeAlias = seams.Immunizer[TextToImage, ConceptSet, ImmunizedPipeline]
"""What a method can do; own ones need no base class. A ``label`` says what reports call it."""

METHODS: Registry[TextToImageImmunizer] = Registry(
    "method", key="method", plugins="immunize_ext.text_to_image"
)

MethodName: TypeAlias = Literal[
    "mima",
    "many_words",
    "imma",
    "joint_training",
    "loss_ascent",
    "merge_only",
    "erasure",
]
"""Names of the methods of the package; those that others register are texts as well."""
"""Method by name; ``METHODS.register`` adds one."""

for _method in (MIMA, ManyWords, DiffusionIMMA, JointTraining, LossAscent, MergeOnly, Erasure):
    METHODS.register(_method)


def method_label(name: str) -> str:
    """A method in words, as reports call it.

    Example:
        >>> method_label("loss_ascent"), method_label("my_method")
        ('Plain loss ascent', 'My method')
    """
    found = getattr(METHODS.get(name), "label", None)
    return str(found) if found else name.replace("_", " ").capitalize()
