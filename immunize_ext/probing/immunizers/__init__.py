"""Immunizers: thin loops around the operators, and the closed form that needs none.

Each is a frozen dataclass of settings with ``fit(primary, harmful) -> Immunized``, whose history
has a record for the state before the first step and after each one.
"""

from __future__ import annotations

from immunize_ext.probing.immunizers.baselines import BaselineImmunizer
from immunize_ext.probing.immunizers.closed_form import (
    ClosedFormImmunizer,
    calibrate_strength,
    closed_form_theta,
)
from immunize_ext.probing.immunizers.condition_number import ConditionNumberImmunizer
from immunize_ext.probing.immunizers.corridor import project_to_corridor
from immunize_ext.probing.immunizers.deep_extractor import DeepExtractorImmunizer
from immunize_ext.probing.immunizers.imma import ImmaImmunizer
from immunize_ext.probing.immunizers.immunized import Immunized, ImmunizedExtractor
from immunize_ext.probing.immunizers.mini_batch import MiniBatchImmunizer
from immunize_ext.probing.immunizers.multiplicative import (
    MultiplicativeImmunizer,
    multiplicative_step,
)
from immunize_ext.probing.immunizers.several_harms import SeveralHarmsImmunizer, several_harms_theta
from immunize_ext.probing.immunizers.step_bounds import ill_step_bound, well_step_bound

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
