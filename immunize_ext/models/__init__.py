"""Models: feature extractors, edits of weights, text-to-image pipelines for training loops."""

from immunize_ext.models.backbones import load_backbone
from immunize_ext.models.feature_extractor import (
    FeatureExtractor,
    Preprocessing,
    extract_features,
    find_stages,
    select_blocks,
)
from immunize_ext.models.text_projections import (
    TextProjection,
    describe_projections,
    find_text_projections,
)
from immunize_ext.models.text_to_image import Conditioning, TextToImage
from immunize_ext.models.weight_edit import WeightEdit, apply_edit

__all__ = [
    "Conditioning",
    "FeatureExtractor",
    "Preprocessing",
    "TextProjection",
    "TextToImage",
    "WeightEdit",
    "apply_edit",
    "describe_projections",
    "extract_features",
    "find_stages",
    "find_text_projections",
    "load_backbone",
    "select_blocks",
]
