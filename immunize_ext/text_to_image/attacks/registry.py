"""The attacks by name, with settings that re-learn an erased digit of the embedded pipeline.

The rates are those that served best, or nearly so, in ``benchmarks.protection.mima_tuning``. Runs
on another model take each attack's ``usual_rates``; tune them there first (``tune_learning_rate``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeAlias

from immunize_ext.seams import Attack
from immunize_ext.settings import Registry
from immunize_ext.text_to_image.attacks.dreambooth import DreamBoothAttack, DreamBoothLoRAAttack
from immunize_ext.text_to_image.attacks.fine_tuning import FineTuningAttack
from immunize_ext.text_to_image.attacks.lora import LoRAAttack
from immunize_ext.text_to_image.attacks.reinitialised import ReinitialisedAttack
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


ATTACKS: Registry[TextToImageAttack] = Registry(
    "attack", key="name", plugins="immunize_ext.text_to_image"
)
"""Attack by name; ``ATTACKS.register`` adds one."""

AttackName: TypeAlias = Literal[
    "lora",
    "lora_attn2",
    "locon",
    "lora_with_text",
    "full_fine_tuning",
    "full_fine_tuning_with_text",
    "other_layers_fine_tuning",
    "reinitialised",
    "attn2_fine_tuning",
    "kv_fine_tuning",
    "dreambooth",
    "dreambooth_without_prior",
    "dreambooth_lora",
    "textual_inversion",
    "custom_diffusion",
]
"""Names of the attacks of the package; those that others register are texts as well."""

for _attack in (
    LoRAAttack(),
    LoRAAttack(name="lora_attn2", targets="attn2"),
    LoRAAttack(name="locon", targets="blocks"),
    LoRAAttack(name="lora_with_text", train_text_encoder=True),
    FineTuningAttack(),
    FineTuningAttack(name="full_fine_tuning_with_text", train_text_encoder=True),
    FineTuningAttack(name="other_layers_fine_tuning", scope="all_but_attn2"),
    ReinitialisedAttack(),
    FineTuningAttack(name="attn2_fine_tuning", scope="attn2", learning_rate=1e-3),
    FineTuningAttack(name="kv_fine_tuning", scope="kv", learning_rate=3e-3),
    DreamBoothAttack(),
    DreamBoothAttack(name="dreambooth_without_prior", prior=None),
    DreamBoothLoRAAttack(),
    TextualInversionAttack(),
    CustomDiffusionAttack(),
):
    ATTACKS.register(_attack)


# Between the name of an attack and a wording that is not its own.
_ASKED = ":"


def asked_by(
    attacks: Sequence[TextToImageAttack], prompts: Sequence[str]
) -> list[TextToImageAttack]:
    """The same attacks under several wordings, each an attack with a name of its own.

    A protection that holds against one wording only shows as such when others are tried too: the
    worst of them is what an attacker gets.

    Args:
        attacks: The attacks.
        prompts: Wordings (``immunize_ext.text_to_image.attacks.prompts``); none leaves every attack
            as it is. Attacks that bring a word of their own, or have no wording, stay as they are.

    Returns:
        For each attack and wording one; a wording that is the attack's own leaves its name.

    Example:
        >>> from immunize_ext.text_to_image.attacks import LoRAAttack
        >>> [a.name for a in asked_by([LoRAAttack()], ("canonical", "rare_token"))]
        ['lora', 'lora:rare_token']
    """
    found: list[TextToImageAttack] = []
    for attack in attacks:
        own: Any = getattr(attack, "prompt", None)
        worded = own is not None and not hasattr(attack, "token")
        found += [
            attack if prompt == own else _worded(attack, prompt)
            for prompt in (prompts if worded and prompts else (own,))
        ]
    return found


def _worded(attack: Any, prompt: str) -> TextToImageAttack:
    named: TextToImageAttack = replace(attack, name=f"{attack.name}{_ASKED}{prompt}", prompt=prompt)
    return named


def registered_name(name: str) -> str:
    """The attack that :func:`asked_by` made another of.

    Example:
        >>> registered_name("lora:rare_token"), registered_name("lora")
        ('lora', 'lora')
    """
    return name.partition(_ASKED)[0]


def attack_label(name: str) -> str:
    """An attack in words, as reports call it.

    Example:
        >>> attack_label("lora_attn2"), attack_label("my_attack")
        ('LoRA on cross-attention', 'My attack')
        >>> attack_label("lora:rare_token"), attack_label("lora:a drawing")
        ('LoRA, asked by rare token', 'LoRA, asked by a drawing')
    """
    base, asked, wording = name.partition(_ASKED)
    found = getattr(ATTACKS.get(base), "label", None)
    label = str(found) if found else base.replace("_", " ").capitalize()
    return f"{label}, asked by {wording.replace('_', ' ')}" if asked else label
