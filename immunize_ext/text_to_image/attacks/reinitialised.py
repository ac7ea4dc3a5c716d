"""Re-initialised layers: what an immunization did to them is thrown away before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from immunize_ext.text_to_image.attacks.adaptation import Prepared
from immunize_ext.text_to_image.attacks.fine_tuning import FineTuningAttack
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import AttentionScope, linear_layers


@dataclass(frozen=True, kw_only=True)
class ReinitialisedAttack(FineTuningAttack):
    """Draw the weights of some layers anew, as a new model has them, and fine-tune.

    Attributes:
        layers: ``"attn2"`` (Q, K, V and output of cross-attention), ``"kv"`` or ``"attention"``.
            They are drawn before the first step, by the seed of the attack: without any step the
            model stays as it is.
    """

    labels: ClassVar[Mapping[str, str]] = {
        "reinitialised": "Fine-tuning with cross-attention drawn anew"
    }

    name: str = "reinitialised"
    layers: AttentionScope = "attn2"

    def _prepare(self, model: TextToImage, target: Sequence[Concept]) -> Prepared:
        prepared = super()._prepare(model, target)
        modules = [
            model.unet.get_submodule(name)
            for name in linear_layers(self.name, model.unet, self.layers)
        ]

        def draw_anew() -> None:
            for module in modules:
                linear: Any = module
                linear.reset_parameters()
            prepared.trainables.take()

        prepared.before_training = draw_anew
        return prepared
