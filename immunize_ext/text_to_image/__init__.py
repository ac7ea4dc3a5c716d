"""Immunization of text-to-image diffusion models: concepts, immunizers, attacks, metrics.

    from immunize_ext.text_to_image import run
    found = run.run(run.RunSettings(method="mima"), "runs/mima")
    print(found.summary())

What is not named by an import here is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from immunize_ext._lazy import lazy
from immunize_ext.text_to_image.model import Conditioning, TextToImage
from immunize_ext.text_to_image.projections import (
    TextProjection,
    describe_projections,
    find_text_projections,
    text_entrances,
)
from immunize_ext.text_to_image.text_layers import TextLayer, find_text_layers
from immunize_ext.text_to_image.weight_edit import WeightEdit, apply_edit

if TYPE_CHECKING:
    from immunize_ext.text_to_image import (
        adapter,
        attacks,
        concepts,
        digits,
        evaluation,
        immunizers,
        metrics,
        run,
    )
    from immunize_ext.text_to_image.attacks import ATTACKS
    from immunize_ext.text_to_image.concepts import ConceptSet, load_concepts
    from immunize_ext.text_to_image.evaluation import evaluate_text_to_image
    from immunize_ext.text_to_image.immunizers import METHODS, ImmunizedPipeline

_MODULES = (
    *("adapter", "attacks", "concepts", "digits", "evaluation", "immunizers", "metrics", "run"),
)
_PLACES = {
    "ATTACKS": "attacks",
    "METHODS": "immunizers",
    "ConceptSet": "concepts",
    "ImmunizedPipeline": "immunizers",
    "evaluate_text_to_image": "evaluation",
    "load_concepts": "concepts",
    **{name: name for name in _MODULES},
}

__all__ = [
    "ATTACKS",
    "METHODS",
    "ConceptSet",
    "Conditioning",
    "ImmunizedPipeline",
    "TextLayer",
    "TextProjection",
    "TextToImage",
    "WeightEdit",
    "adapter",
    "apply_edit",
    "attacks",
    "concepts",
    "describe_projections",
    "digits",
    "evaluate_text_to_image",
    "evaluation",
    "find_text_layers",
    "find_text_projections",
    "immunizers",
    "load_concepts",
    "metrics",
    "run",
    "text_entrances",
]

__getattr__ = lazy(__name__, _PLACES)


def __dir__() -> list[str]:
    return __all__
