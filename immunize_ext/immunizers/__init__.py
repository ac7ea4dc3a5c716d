"""Immunizers: thin loops around the operators, and the closed form that needs none."""

from immunize_ext.immunizers.closed_form import (
    ClosedFormImmunizer,
    calibrate_strength,
    closed_form_theta,
)
from immunize_ext.immunizers.condition_number import ConditionNumberImmunizer
from immunize_ext.immunizers.immunized import Immunized
from immunize_ext.immunizers.step_bounds import ill_step_bound, well_step_bound

__all__ = [
    "ClosedFormImmunizer",
    "ConditionNumberImmunizer",
    "Immunized",
    "calibrate_strength",
    "closed_form_theta",
    "ill_step_bound",
    "well_step_bound",
]
