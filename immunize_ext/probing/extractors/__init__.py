"""Feature extractors: backbones by name, the features they compute, the blocks they consist of."""

from immunize_ext.probing.extractors.backbones import load_backbone
from immunize_ext.probing.extractors.feature_extractor import (
    FeatureExtractor,
    Preprocessing,
    extract_features,
    find_stages,
    select_blocks,
)

__all__ = [
    "FeatureExtractor",
    "Preprocessing",
    "extract_features",
    "find_stages",
    "load_backbone",
    "select_blocks",
]
