"""Fine-tuning: the weights themselves, all of them or those that take text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from immunize_ext.text_to_image.attacks.adaptation import Adaptation, Prepared
from immunize_ext.text_to_image.attacks.trainables import Trainables
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import attention_blocks, linear_layers, parameters_of

FineTuningScope = Literal["all", "all_but_attn2", "attention", "attn2", "kv"]


@dataclass(frozen=True, kw_only=True)
class FineTuningAttack(Adaptation):
    """Train the UNet's own weights.

    Attributes:
        scope: ``"all"`` of the UNet, ``"all_but_attn2"`` (what immunizers move, cross-attention,
            stays as they left it), its ``"attention"``, its cross-attention (``"attn2"``) or the
            projections of the text alone (``"kv"``).
        train_text_encoder: Train the text encoders too.
    """

    labels: ClassVar[Mapping[str, str]] = {
        "full_fine_tuning": "Full fine-tuning",
        "full_fine_tuning_with_text": "Full fine-tuning with text encoder",
        "other_layers_fine_tuning": "Fine-tuning of all but cross-attention",
        "attn2_fine_tuning": "Fine-tuning of cross-attention",
        "kv_fine_tuning": "Fine-tuning of K and V",
    }

    usual_rates: ClassVar[Mapping[str, float]] = {"learning_rate": 5e-6}

    name: str = "full_fine_tuning"
    learning_rate: float = 3e-4
    scope: FineTuningScope = "all"
    train_text_encoder: bool = False

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if self.scope not in get_args(FineTuningScope):
            raise ValueError(
                f"{self.name}: scope must be one of {', '.join(get_args(FineTuningScope))}, got "
                f"{self.scope!r}"
            )

    def _prepare(self, model: TextToImage, target: Sequence[Concept]) -> Prepared:
        unet = model.unet
        if self.scope == "all":
            chosen = dict(unet.named_parameters())
        elif self.scope == "all_but_attn2":
            left = parameters_of(unet, attention_blocks(self.name, unet, "attn2"))
            chosen = {name: p for name, p in unet.named_parameters() if name not in left}
        elif self.scope == "kv":
            chosen = parameters_of(unet, linear_layers(self.name, unet, "kv"))
        else:
            chosen = parameters_of(unet, attention_blocks(self.name, unet, self.scope))
        named = {
            f"{model.backbone.component}.{name}": parameter for name, parameter in chosen.items()
        }
        text = {}
        if self.train_text_encoder:
            for index, encoder in enumerate(model.text_encoders):
                for name, parameter in encoder.named_parameters():
                    text[f"text_encoder.{index}.{name}"] = parameter
        # Last layers and poolers of a text encoder are there whether a UNet looks at them or not.
        trainables = Trainables(named | text, may_be_unused=text)
        return Prepared(trainables, text_moves=self.train_text_encoder)
