"""Immunizers: thin loops around the operators, and the closed form that needs none.

Each is a frozen dataclass of settings with ``fit(model, problem, *, progress, resume)``, whose
result has a history with a record for the state before the first step and after each one.
:data:`METHODS` holds those for linear extractors by name; whatever is registered there has its
flags, its row in results and its row in reports.
"""

from __future__ import annotations

from immunize_ext.probing.immunizers.baselines import BaselineImmunizer
from immunize_ext.probing.immunizers.closed_form import (
    ClosedFormImmunizer,
    GradedImmunizer,
    WhiteningImmunizer,
    calibrate_strength,
    closed_form_theta,
)
from immunize_ext.probing.immunizers.condition_number import (
    ConditionNumberImmunizer,
    PlainConditionNumberImmunizer,
)
from immunize_ext.probing.immunizers.control import ControllerName, CorridorController
from immunize_ext.probing.immunizers.corridor import project_to_corridor
from immunize_ext.probing.immunizers.deep_extractor import DeepExtractorImmunizer
from immunize_ext.probing.immunizers.guard import LayerWorth, LocalControl, RuleName, rank_layers
from immunize_ext.probing.immunizers.imma import ImmaImmunizer
from immunize_ext.probing.immunizers.immunized import Immunized, ImmunizedExtractor
from immunize_ext.probing.immunizers.label_direction import LabelDirectionImmunizer
from immunize_ext.probing.immunizers.learning_curve import LearningCurveImmunizer
from immunize_ext.probing.immunizers.local_control import LocalControlImmunizer
from immunize_ext.probing.immunizers.lock import (
    Head,
    LinearLock,
    PencilLock,
    best_head,
    lock_price,
)
from immunize_ext.probing.immunizers.loop import IterativeImmunizer, LinearImmunizer
from immunize_ext.probing.immunizers.mini_batch import MiniBatchImmunizer
from immunize_ext.probing.immunizers.multiplicative import (
    MultiplicativeImmunizer,
    multiplicative_step,
)
from immunize_ext.probing.immunizers.optimizer_aware import OptimizerAwareImmunizer
from immunize_ext.probing.immunizers.partial_whitening import PartialWhiteningImmunizer
from immunize_ext.probing.immunizers.registry import METHODS, MethodName, grid_of, knob_of, label_of
from immunize_ext.probing.immunizers.several_harms import SeveralHarmsImmunizer, several_harms_theta
from immunize_ext.probing.immunizers.step_bounds import ill_step_bound, well_step_bound

__all__ = [
    "METHODS",
    "BaselineImmunizer",
    "ClosedFormImmunizer",
    "ConditionNumberImmunizer",
    "ControllerName",
    "CorridorController",
    "DeepExtractorImmunizer",
    "GradedImmunizer",
    "Head",
    "ImmaImmunizer",
    "Immunized",
    "ImmunizedExtractor",
    "IterativeImmunizer",
    "LabelDirectionImmunizer",
    "LayerWorth",
    "LearningCurveImmunizer",
    "LinearImmunizer",
    "LinearLock",
    "LocalControl",
    "LocalControlImmunizer",
    "MethodName",
    "MiniBatchImmunizer",
    "MultiplicativeImmunizer",
    "OptimizerAwareImmunizer",
    "PartialWhiteningImmunizer",
    "PencilLock",
    "PlainConditionNumberImmunizer",
    "RuleName",
    "SeveralHarmsImmunizer",
    "WhiteningImmunizer",
    "best_head",
    "calibrate_strength",
    "closed_form_theta",
    "grid_of",
    "ill_step_bound",
    "knob_of",
    "label_of",
    "lock_price",
    "multiplicative_step",
    "project_to_corridor",
    "rank_layers",
    "several_harms_theta",
    "well_step_bound",
]
