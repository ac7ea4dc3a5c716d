"""Whether a protection is real: condition-number ratios, their exact ceiling, convergence."""

from immunize_ext.metrics.convergence import (
    Slowdown,
    gradient_descent_steps,
    norm_ratio,
    slowdown,
    steps_to_threshold,
)
from immunize_ext.metrics.hessian import with_ridge
from immunize_ext.metrics.pencil import Pencil, log_rir_ceiling, pencil
from immunize_ext.metrics.rir import (
    GroupedRatio,
    RelativeImmunizationRatio,
    grouped_rir,
    log_kappa,
    relative_immunization_ratio,
)

__all__ = [
    "GroupedRatio",
    "Pencil",
    "RelativeImmunizationRatio",
    "Slowdown",
    "gradient_descent_steps",
    "grouped_rir",
    "log_kappa",
    "log_rir_ceiling",
    "norm_ratio",
    "pencil",
    "relative_immunization_ratio",
    "slowdown",
    "steps_to_threshold",
    "with_ridge",
]
