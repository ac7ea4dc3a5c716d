"""Immunization of text-to-image diffusion models: concepts, immunizers, attacks, metrics."""

from immunize_ext.text_to_image.model import Conditioning, TextToImage
from immunize_ext.text_to_image.projections import (
    TextProjection,
    describe_projections,
    find_text_projections,
)
from immunize_ext.text_to_image.weight_edit import WeightEdit, apply_edit

__all__ = [
    "Conditioning",
    "TextProjection",
    "TextToImage",
    "WeightEdit",
    "apply_edit",
    "describe_projections",
    "find_text_projections",
]
