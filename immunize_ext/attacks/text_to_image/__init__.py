"""Attacks on text-to-image models: one interface, with budgets and curves.

Every attack is a frozen dataclass of settings with ``run`` (a curve) and ``adapt`` (the adapted
clone too). Importing this module imports neither diffusers nor PEFT.
"""

from immunize_ext.attacks.text_to_image.adaptation import Adaptation, Adapted, snr_weights
from immunize_ext.attacks.text_to_image.curves import AttackCurve, Evaluate, Progress
from immunize_ext.attacks.text_to_image.custom_diffusion import CustomDiffusionAttack
from immunize_ext.attacks.text_to_image.dreambooth import DreamBoothAttack, DreamBoothLoRAAttack
from immunize_ext.attacks.text_to_image.fine_tuning import FineTuningAttack
from immunize_ext.attacks.text_to_image.lora import LoRAAttack
from immunize_ext.attacks.text_to_image.prior import PriorPreservation, prior_preservation_loss
from immunize_ext.attacks.text_to_image.prompts import (
    PROMPT_VARIANTS,
    attack_prompt,
    replace_name,
)
from immunize_ext.attacks.text_to_image.registry import ATTACKS, TextToImageAttack
from immunize_ext.attacks.text_to_image.scoring import ConceptScores
from immunize_ext.attacks.text_to_image.textual_inversion import TextualInversionAttack
from immunize_ext.attacks.text_to_image.tuning import (
    TunedAttack,
    rate_grid,
    tune_learning_rate,
)
from immunize_ext.attacks.text_to_image.weights import load_adaptation, save_adaptation

__all__ = [
    "ATTACKS",
    "PROMPT_VARIANTS",
    "Adaptation",
    "Adapted",
    "AttackCurve",
    "ConceptScores",
    "CustomDiffusionAttack",
    "DreamBoothAttack",
    "DreamBoothLoRAAttack",
    "Evaluate",
    "FineTuningAttack",
    "LoRAAttack",
    "PriorPreservation",
    "Progress",
    "TextToImageAttack",
    "TextualInversionAttack",
    "TunedAttack",
    "attack_prompt",
    "load_adaptation",
    "prior_preservation_loss",
    "rate_grid",
    "replace_name",
    "save_adaptation",
    "snr_weights",
    "tune_learning_rate",
]
