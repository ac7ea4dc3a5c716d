"""Custom Diffusion: a new word, and the projections of the text to keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from immunize_ext.attacks.text_to_image.adaptation import Prepared
from immunize_ext.attacks.text_to_image.prior import PriorPreservation
from immunize_ext.attacks.text_to_image.textual_inversion import NewWordAttack
from immunize_ext.attacks.text_to_image.trainables import Trainables
from immunize_ext.data.concepts import Concept
from immunize_ext.models.text_layers import linear_layers, parameters_of
from immunize_ext.models.text_to_image import TextToImage


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionAttack(NewWordAttack):
    """Train K and V of cross-attention together with a new word.

    Weights stay in the layers they belong to, so attention processors are the model's own.

    Source:
        Kumari et al., CVPR 2023.
    """

    name: str = "custom_diffusion"
    learning_rate: float = 3e-3
    prior: PriorPreservation | None = field(default_factory=PriorPreservation)

    def _prepare(self, model: TextToImage, concepts: Sequence[Concept]) -> Prepared:
        tokens, rows = self._new_tokens(model, concepts)
        chosen = parameters_of(model.unet, linear_layers(self.name, model.unet, "kv"))
        named = {f"unet.{name}": parameter for name, parameter in chosen.items()}
        return Prepared(Trainables(named | rows), tokens=tokens, text_moves=True)
