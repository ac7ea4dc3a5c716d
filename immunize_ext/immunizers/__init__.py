"""Immunizers: thin loops around the operators, and the closed form that needs none.

Each is a frozen dataclass of settings with ``fit(primary, harmful) -> Immunized``, whose history
has a record for the state before the first step and after each one.
"""

from immunize_ext.immunizers.baselines import BaselineImmunizer
from immunize_ext.immunizers.closed_form import (
    ClosedFormImmunizer,
    calibrate_strength,
    closed_form_theta,
)
from immunize_ext.immunizers.condition_number import ConditionNumberImmunizer
from immunize_ext.immunizers.corridor import project_to_corridor
from immunize_ext.immunizers.deep_extractor import DeepExtractorImmunizer
from immunize_ext.immunizers.imma import ImmaImmunizer
from immunize_ext.immunizers.immunized import Immunized
from immunize_ext.immunizers.immunized_extractor import ImmunizedExtractor
from immunize_ext.immunizers.mini_batch import MiniBatchImmunizer
from immunize_ext.immunizers.multiplicative import MultiplicativeImmunizer, multiplicative_step
from immunize_ext.immunizers.several_harms import SeveralHarmsImmunizer, several_harms_theta
from immunize_ext.immunizers.step_bounds import ill_step_bound, well_step_bound

__all__ = [
    "BaselineImmunizer",
    "ClosedFormImmunizer",
    "ConditionNumberImmunizer",
    "DeepExtractorImmunizer",
    "ImmaImmunizer",
    "Immunized",
    "ImmunizedExtractor",
    "MiniBatchImmunizer",
    "MultiplicativeImmunizer",
    "SeveralHarmsImmunizer",
    "calibrate_strength",
    "closed_form_theta",
    "ill_step_bound",
    "multiplicative_step",
    "project_to_corridor",
    "several_harms_theta",
    "well_step_bound",
]
