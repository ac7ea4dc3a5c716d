"""LoRA: low-rank updates of linear and convolution layers, through PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from immunize_ext._extras import require_extra
from immunize_ext.text_to_image.attacks.adaptation import Adaptation, Prepared
from immunize_ext.text_to_image.attacks.trainables import Trainables
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import AttentionScope, block_layers, linear_layers

# Marks the parameters of an adapter in a UNet.
_FACTORS = re.compile(r"\.lora_[AB]\.")


# The projections of CLIP's attention, which the usual scripts adapt in text encoders.
_TEXT_LAYERS = r".*\.(q_proj|k_proj|v_proj|out_proj)"


def with_attention(encoders: Sequence[nn.Module]) -> list[tuple[int, nn.Module]]:
    """Text encoders that are adapted, with their place: those of CLIP, as the usual scripts do."""
    return [
        (index, encoder)
        for index, encoder in enumerate(encoders)
        if any(re.fullmatch(_TEXT_LAYERS, name) for name, _ in encoder.named_modules())
    ]


LoRATargets = AttentionScope | Literal["blocks"]


def inject(part: Any, values: dict[str, Any]) -> dict[str, nn.Parameter]:
    """Put a LoRA adapter into a UNet or a text encoder, in place, with float32 factors.

    Args:
        part: A diffusers UNet, or a text encoder of transformers.
        values: Arguments of ``peft.LoraConfig``.

    Returns:
        The factors by parameter name; a float64 model has float64 factors.

    Raises:
        MissingExtraError: If PEFT is not installed.
        ValueError: If there is an adapter already.
    """
    peft = require_extra("peft", extra="diffusion", purpose="the LoRA attack")
    if any(_FACTORS.search(name) for name, _ in part.named_parameters()):
        raise ValueError(
            f"LoRAAttack: the {type(part).__name__} must not have an adapter already, got one; "
            "merge it into the weights first"
        )
    # Not by the add_adapter that both have: that of transformers asks for the newest PEFT.
    peft.inject_adapter_in_model(peft.LoraConfig(**values), part)
    factors = {}
    for name, parameter in part.named_parameters():
        if _FACTORS.search(name):
            if parameter.dtype.itemsize < 4:
                parameter.data = parameter.data.float()
            factors[name] = parameter
    return factors


@dataclass(frozen=True, kw_only=True)
class LoRAAttack(Adaptation):
    """Train W + (alpha / rank) B A with B and A of low rank, W frozen.

    Attributes:
        rank: Rank of the updates.
        alpha: Their scale; equal to the rank when omitted, which makes the factor 1.
        targets: ``"attention"`` (all of it, as the usual training scripts do, and in joint models
            where text enters), ``"attn2"`` (Q, K, V and output of cross-attention), ``"kv"``, or
            ``"blocks"``: feed-forward layers and convolutions too (LoCon).
        train_text_encoder: Adapt the attention of the text encoders too.
        rs_lora: Scale by alpha / sqrt(rank) instead, which keeps updates of all ranks alike.
        init: How A starts: ``"kaiming"`` (PEFT's default) or ``"gaussian"`` (that of diffusers'
            scripts); B starts at 0 in both.

    Source:
        Hu et al., ICLR 2022; Kalajdzievski, 2023 (rs_lora); Yeh et al., LyCORIS, ICLR 2024
        (LoCon).
    """

    labels: ClassVar[Mapping[str, str]] = {
        "lora": "LoRA",
        "lora_attn2": "LoRA on cross-attention",
        "locon": "LoCon",
        "lora_with_text": "LoRA with text encoder",
    }

    usual_rates: ClassVar[Mapping[str, float]] = {"learning_rate": 1e-4}

    name: str = "lora"
    learning_rate: float = 9e-3
    rank: int = 4
    alpha: float | None = None
    targets: LoRATargets = "attention"
    train_text_encoder: bool = False
    rs_lora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"{self.name}: rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0.0:
            raise ValueError(f"{self.name}: alpha must be positive, got {self.alpha}")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(
                f"{self.name}: init must be 'kaiming' or 'gaussian', got {self.init!r}"
            )

    def _prepare(self, model: TextToImage, target: Sequence[Concept]) -> Prepared:
        unet = model.unet
        if self.targets == "blocks":
            layers = block_layers(self.name, unet)
        else:
            layers = linear_layers(self.name, unet, self.targets)
        values = self._values("|".join(map(re.escape, layers)))
        part = model.backbone.component
        named = {f"{part}.{name}": factor for name, factor in inject(unet, values).items()}
        text: dict[str, nn.Parameter] = {}
        if self.train_text_encoder:
            for index, encoder in with_attention(model.text_encoders):
                found = inject(encoder, self._values(_TEXT_LAYERS))
                text |= {f"text_encoder.{index}.{name}": factor for name, factor in found.items()}
        # While B is 0, no gradient reaches A.
        silent = [name for name in named if ".lora_A." in name]
        # The last layer of a text encoder is there whether a UNet looks at it or not.
        trainables = Trainables(named | text, silent_at_first=silent, may_be_unused=text)
        return Prepared(
            trainables,
            lora=values,
            text_lora=self._values(_TEXT_LAYERS) if self.train_text_encoder else None,
            text_moves=self.train_text_encoder,
        )

    def _values(self, layers: str) -> dict[str, Any]:
        """Arguments of ``peft.LoraConfig``."""
        return {
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            # A pattern, matched as a whole: a list would match ends of names too.
            "target_modules": layers,
            "use_rslora": self.rs_lora,
            "init_lora_weights": True if self.init == "kaiming" else "gaussian",
        }
