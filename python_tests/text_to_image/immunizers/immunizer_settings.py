"""Small concepts and settings that all tests of text-to-image immunizers share."""

from __future__ import annotations

from typing import Any

from attack_pipelines import concept
from torch import Tensor

from immunize_ext.text_to_image.concepts import ConceptSet
from immunize_ext.text_to_image.model import TextToImage

CAPTIONS = (
    "a photo of a cat",
    "a red dog",
    "blue cat painting",
    "a drawing of a red cat",
    "an artwork number",
)
SMALL: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "retain_batch": 4,
    "inner_rate": 0.1,
    "learning_rate": 1e-3,
    # Random weights predict badly: their losses lie above the usual clamp.
    "loss_clamp": 100.0,
}


def concepts(*names: str) -> ConceptSet:
    """Concepts to immunize against, with two to keep."""
    return ConceptSet(
        tuple(concept(name) for name in names or ("three", "five")),
        (concept("six"), concept("seven")),
        CAPTIONS,
    )


def weights(model: TextToImage) -> dict[str, Tensor]:
    """Copies of the denoiser's parameters."""
    return {name: p.detach().clone() for name, p in model.unet.named_parameters()}
