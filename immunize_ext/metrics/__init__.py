"""Whether a protection is real: condition-number ratios, their exact ceiling, convergence, cost.

For text-to-image models: similarity gaps, delay, judged accuracy and image similarities.
"""

from immunize_ext.metrics.ceiling import CeilingRow, ceiling_table
from immunize_ext.metrics.convergence import (
    Slowdown,
    conjugate_gradient_steps,
    gradient_descent_steps,
    norm_ratio,
    slowdown,
    spectral_slowdown,
    steps_to_threshold,
)
from immunize_ext.metrics.deep_rir import DeepRatio, deep_rir
from immunize_ext.metrics.degradation import RelativeDegradation, relative_degradation
from immunize_ext.metrics.delay import Delay, attack_delay
from immunize_ext.metrics.few_samples import FewSampleError, few_sample_error
from immunize_ext.metrics.generation import (
    Measure,
    RetainedQuality,
    Sampling,
    retained_quality,
)
from immunize_ext.metrics.grouped_bias import GroupedEstimate, grouped_linear_rir
from immunize_ext.metrics.hessian import with_ridge
from immunize_ext.metrics.line_search import line_search_norm_ratio
from immunize_ext.metrics.measures import JudgedAccuracy, PromptSimilarity, ReferenceSimilarity
from immunize_ext.metrics.pencil import Pencil, log_rir_ceiling, pencil
from immunize_ext.metrics.rir import (
    GroupedRatio,
    RelativeImmunizationRatio,
    grouped_rir,
    log_kappa,
    relative_immunization_ratio,
)
from immunize_ext.metrics.similarity import ClipSimilarity, DinoSimilarity, LpipsDistance
from immunize_ext.metrics.similarity_gap import (
    SimilarityGap,
    mean_similarity_gap,
    relative_similarity_gap,
    similarity_gap,
)
from immunize_ext.metrics.spread import Spread
from immunize_ext.metrics.subspaces import (
    SubspaceAngles,
    leading_subspace_angles,
    principal_angles,
)
from immunize_ext.metrics.worst_case import AttackerSteps, WorstCase, worst_case

__all__ = [
    "AttackerSteps",
    "CeilingRow",
    "ClipSimilarity",
    "DeepRatio",
    "Delay",
    "DinoSimilarity",
    "FewSampleError",
    "GroupedEstimate",
    "GroupedRatio",
    "JudgedAccuracy",
    "LpipsDistance",
    "Measure",
    "Pencil",
    "PromptSimilarity",
    "ReferenceSimilarity",
    "RelativeDegradation",
    "RelativeImmunizationRatio",
    "RetainedQuality",
    "Sampling",
    "SimilarityGap",
    "Slowdown",
    "Spread",
    "SubspaceAngles",
    "WorstCase",
    "attack_delay",
    "ceiling_table",
    "conjugate_gradient_steps",
    "deep_rir",
    "few_sample_error",
    "gradient_descent_steps",
    "grouped_linear_rir",
    "grouped_rir",
    "leading_subspace_angles",
    "line_search_norm_ratio",
    "log_kappa",
    "log_rir_ceiling",
    "mean_similarity_gap",
    "norm_ratio",
    "pencil",
    "principal_angles",
    "relative_degradation",
    "relative_immunization_ratio",
    "relative_similarity_gap",
    "retained_quality",
    "similarity_gap",
    "slowdown",
    "spectral_slowdown",
    "steps_to_threshold",
    "with_ridge",
    "worst_case",
]
