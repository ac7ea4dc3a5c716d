"""Whether the protection of a text-to-image model is real: gaps, delay, judged accuracy."""

from immunize_ext.text_to_image.metrics.gaps import (
    Delay,
    SimilarityGap,
    attack_delay,
    mean_similarity_gap,
    relative_similarity_gap,
    similarity_gap,
)
from immunize_ext.text_to_image.metrics.generation import (
    Measure,
    RetainedQuality,
    Sampling,
    retained_quality,
)
from immunize_ext.text_to_image.metrics.similarity import (
    AcceptedShare,
    ClipSimilarity,
    DinoSimilarity,
    JudgedAccuracy,
    LpipsDistance,
    PromptSimilarity,
    ReferenceSimilarity,
)

__all__ = [
    "AcceptedShare",
    "ClipSimilarity",
    "Delay",
    "DinoSimilarity",
    "JudgedAccuracy",
    "LpipsDistance",
    "Measure",
    "PromptSimilarity",
    "ReferenceSimilarity",
    "RetainedQuality",
    "Sampling",
    "SimilarityGap",
    "attack_delay",
    "mean_similarity_gap",
    "relative_similarity_gap",
    "retained_quality",
    "similarity_gap",
]
