"""The attacks by name, with settings that re-learn an erased digit of the embedded pipeline.

The rates are those that served best, or nearly so, in ``benchmarks.protection.mima_tuning``. On
another model tune them first (``tune_learning_rate``): the rates usual for Stable Diffusion are
smaller (LoRA 1e-4, DreamBooth and full fine-tuning 5e-6, Textual Inversion 5e-4, Custom Diffusion
1e-5).
"""

from __future__ import annotations

from typing import Protocol

from immunize_ext.seams import Attack
from immunize_ext.settings import Registry
from immunize_ext.text_to_image.attacks.dreambooth import DreamBoothAttack, DreamBoothLoRAAttack
from immunize_ext.text_to_image.attacks.fine_tuning import FineTuningAttack
from immunize_ext.text_to_image.attacks.lora import LoRAAttack
from immunize_ext.text_to_image.attacks.target import Target
from immunize_ext.text_to_image.attacks.textual_inversion import (
    CustomDiffusionAttack,
    TextualInversionAttack,
)
from immunize_ext.text_to_image.model import TextToImage


class TextToImageAttack(Attack[TextToImage, Target], Protocol):
    """An attack that says how it words what it wants; own ones need no base class.

    A ``label`` attribute says what reports call it; its name in words otherwise.
    """

    def prompts(self, target: Target) -> dict[str, str]:
        """What it trains and generates each concept with, by the concept's name."""


ATTACKS: Registry[TextToImageAttack] = Registry("attack", key="name")
"""Attack by name; ``ATTACKS.register`` adds one."""

for _attack in (
    LoRAAttack(),
    LoRAAttack(name="lora_attn2", targets="attn2"),
    FineTuningAttack(),
    FineTuningAttack(name="attn2_fine_tuning", scope="attn2", learning_rate=1e-3),
    FineTuningAttack(name="kv_fine_tuning", scope="kv", learning_rate=3e-3),
    DreamBoothAttack(),
    DreamBoothAttack(name="dreambooth_without_prior", prior=None),
    DreamBoothLoRAAttack(),
    TextualInversionAttack(),
    CustomDiffusionAttack(),
):
    ATTACKS.register(_attack)


def attack_label(name: str) -> str:
    """An attack in words, as reports call it.

    Example:
        >>> attack_label("lora_attn2"), attack_label("my_attack")
        ('LoRA on cross-attention', 'My attack')
    """
    found = getattr(ATTACKS.get(name), "label", None)
    return str(found) if found else name.replace("_", " ").capitalize()
