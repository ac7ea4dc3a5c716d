"""Attacks on text-to-image models: one interface, with budgets and curves.

Every attack is a frozen dataclass of settings with ``run`` (a curve) and ``adapt`` (the adapted
clone too). Importing this module imports neither diffusers nor PEFT.
"""

from __future__ import annotations

from immunize_ext.seams import AttackCurve, Progress
from immunize_ext.text_to_image.attacks.adaptation import Adaptation, Adapted, snr_weights
from immunize_ext.text_to_image.attacks.dreambooth import DreamBoothAttack, DreamBoothLoRAAttack
from immunize_ext.text_to_image.attacks.fine_tuning import FineTuningAttack
from immunize_ext.text_to_image.attacks.lora import LoRAAttack
from immunize_ext.text_to_image.attacks.prior import PriorPreservation, prior_preservation_loss
from immunize_ext.text_to_image.attacks.prompts import PROMPT_VARIANTS, attack_prompt, replace_name
from immunize_ext.text_to_image.attacks.registry import (
    ATTACKS,
    AttackName,
    TextToImageAttack,
    asked_by,
    attack_label,
    registered_name,
)
from immunize_ext.text_to_image.attacks.reinitialised import ReinitialisedAttack
from immunize_ext.text_to_image.attacks.scoring import ConceptScores
from immunize_ext.text_to_image.attacks.search import Outcome, SettingsSearch, search_settings
from immunize_ext.text_to_image.attacks.target import Evaluate, Target
from immunize_ext.text_to_image.attacks.textual_inversion import (
    CustomDiffusionAttack,
    TextualInversionAttack,
)
from immunize_ext.text_to_image.attacks.tuning import RateSearch, rate_grid, tune_learning_rate
from immunize_ext.text_to_image.attacks.weights import load_adaptation, save_adaptation, save_lora

__all__ = [
    "ATTACKS",
    "PROMPT_VARIANTS",
    "Adaptation",
    "Adapted",
    "AttackCurve",
    "AttackName",
    "ConceptScores",
    "CustomDiffusionAttack",
    "DreamBoothAttack",
    "DreamBoothLoRAAttack",
    "Evaluate",
    "FineTuningAttack",
    "LoRAAttack",
    "Outcome",
    "PriorPreservation",
    "Progress",
    "RateSearch",
    "ReinitialisedAttack",
    "SettingsSearch",
    "Target",
    "TextToImageAttack",
    "TextualInversionAttack",
    "asked_by",
    "attack_label",
    "attack_prompt",
    "load_adaptation",
    "prior_preservation_loss",
    "rate_grid",
    "registered_name",
    "replace_name",
    "save_adaptation",
    "save_lora",
    "search_settings",
    "snr_weights",
    "tune_learning_rate",
]
