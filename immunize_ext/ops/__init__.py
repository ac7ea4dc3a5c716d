"""Differentiable operators: spectrum, key/value merge, preconditioned gradient."""

from immunize_ext.ops import _register as _register
from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.merge import merge_kv
from immunize_ext.ops.precondition import (
    PreconditionedLinear,
    Preconditioner,
    precondition_gradient,
)
from immunize_ext.ops.spectrum import (
    GramExtremes,
    SingularExtremes,
    condition_number,
    extremal_singular_values,
    gram_extremes,
    log_condition_number,
)

__all__ = [
    "GramExtremes",
    "PreconditionedLinear",
    "Preconditioner",
    "RegularizationFactor",
    "SingularExtremes",
    "condition_number",
    "extremal_singular_values",
    "gram_extremes",
    "log_condition_number",
    "merge_kv",
    "precondition_gradient",
]
