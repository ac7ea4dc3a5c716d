"""Whether a protection is real: condition-number ratios, their exact ceiling, convergence, cost."""

from __future__ import annotations

from immunize_ext.probing.metrics.convergence import (
    AttackerSteps,
    WorstCase,
    conjugate_gradient_steps,
    gradient_descent_steps,
    line_search_norm_ratio,
    norm_ratio,
    spectral_slowdown,
    worst_case,
)
from immunize_ext.probing.metrics.cost import (
    Constant,
    FewSampleError,
    RelativeDegradation,
    best_constant,
    few_sample_error,
    relative_degradation,
)
from immunize_ext.probing.metrics.drift import Allowed, certified_answers, drift_bound
from immunize_ext.probing.metrics.estimates import (
    ControlledMean,
    EstimatedKappa,
    EstimatedRatio,
    EstimatorName,
    SampleSpectrum,
    control_variate,
    estimated_kappa,
    estimated_rir,
    kappa_slope,
    ky_fan_log_kappa,
)
from immunize_ext.probing.metrics.hessian import with_ridge
from immunize_ext.probing.metrics.ntk import (
    empirical_ntk,
    kernel_descent_steps,
    ntk_log_condition_number,
)
from immunize_ext.probing.metrics.optimizers import (
    EXPONENT,
    IMPOSSIBLE,
    WHITENING,
    kappa_under,
)
from immunize_ext.probing.metrics.pencil import Pencil, log_rir_ceiling, pencil
from immunize_ext.probing.metrics.rir import (
    CeilingRow,
    DeepRatio,
    GroupedEstimate,
    GroupedRatio,
    RelativeImmunizationRatio,
    ceiling_table,
    computed_rank_rtol,
    deep_rir,
    grouped_linear_rir,
    grouped_rir,
    log_kappa,
    relative_immunization_ratio,
)
from immunize_ext.probing.metrics.sample_risk import Moments, tuned_risk
from immunize_ext.probing.metrics.subspaces import (
    SubspaceAngles,
    leading_subspace_angles,
    principal_angles,
)
from immunize_ext.quantities import Slowdown, Spread, slowdown, steps_to_threshold
from immunize_ext.worst_case import conditional_value_at_risk, soft_minimum

__all__ = [
    "EXPONENT",
    "IMPOSSIBLE",
    "WHITENING",
    "Allowed",
    "AttackerSteps",
    "CeilingRow",
    "Constant",
    "ControlledMean",
    "DeepRatio",
    "EstimatedKappa",
    "EstimatedRatio",
    "EstimatorName",
    "FewSampleError",
    "GroupedEstimate",
    "GroupedRatio",
    "Moments",
    "Pencil",
    "RelativeDegradation",
    "RelativeImmunizationRatio",
    "SampleSpectrum",
    "Slowdown",
    "Spread",
    "SubspaceAngles",
    "WorstCase",
    "best_constant",
    "ceiling_table",
    "certified_answers",
    "computed_rank_rtol",
    "conditional_value_at_risk",
    "conjugate_gradient_steps",
    "control_variate",
    "deep_rir",
    "drift_bound",
    "empirical_ntk",
    "estimated_kappa",
    "estimated_rir",
    "few_sample_error",
    "gradient_descent_steps",
    "grouped_linear_rir",
    "grouped_rir",
    "kappa_slope",
    "kappa_under",
    "kernel_descent_steps",
    "ky_fan_log_kappa",
    "leading_subspace_angles",
    "line_search_norm_ratio",
    "log_kappa",
    "log_rir_ceiling",
    "norm_ratio",
    "ntk_log_condition_number",
    "pencil",
    "principal_angles",
    "relative_degradation",
    "relative_immunization_ratio",
    "slowdown",
    "soft_minimum",
    "spectral_slowdown",
    "steps_to_threshold",
    "tuned_risk",
    "with_ridge",
    "worst_case",
]
