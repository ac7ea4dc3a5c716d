"""LoRA: low-rank updates of the attention layers, through PEFT."""

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
from immunize_ext.text_to_image.projections import AttentionScope, linear_layers

# Marks the parameters of an adapter in a UNet.
_FACTORS = re.compile(r"\.lora_[AB]\.")


def inject(unet: Any, values: dict[str, Any]) -> dict[str, nn.Parameter]:
    """Put a LoRA adapter into a UNet, in place, with float32 factors.

    Args:
        unet: A diffusers UNet.
        values: Arguments of ``peft.LoraConfig``.

    Returns:
        The factors by parameter name; a float64 UNet has float64 factors.

    Raises:
        MissingExtraError: If PEFT is not installed.
        ValueError: If the UNet has an adapter already.
    """
    peft = require_extra("peft", extra="diffusion", purpose="the LoRA attack")
    if any(_FACTORS.search(name) for name, _ in unet.named_parameters()):
        raise ValueError(
            "LoRAAttack: the UNet must not have an adapter already, got one; merge it into the "
            "weights first"
        )
    unet.add_adapter(peft.LoraConfig(**values))
    factors = {}
    for name, parameter in unet.named_parameters():
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
        targets: ``"attention"`` (all of it, as the usual training scripts do), ``"attn2"`` (Q, K,
            V and output of cross-attention) or ``"kv"``.
        rs_lora: Scale by alpha / sqrt(rank) instead, which keeps updates of all ranks alike.
        init: How A starts: ``"kaiming"`` (PEFT's default) or ``"gaussian"`` (that of diffusers'
            scripts); B starts at 0 in both.

    Source:
        Hu et al., ICLR 2022; Kalajdzievski, 2023 (rs_lora).
    """

    labels: ClassVar[Mapping[str, str]] = {
        "lora": "LoRA",
        "lora_attn2": "LoRA on cross-attention",
    }

    name: str = "lora"
    learning_rate: float = 9e-3
    rank: int = 4
    alpha: float | None = None
    targets: AttentionScope = "attention"
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
        layers = linear_layers(self.name, model.unet, self.targets)
        values = {
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            # A pattern, matched as a whole: a list would match ends of names too.
            "target_modules": "|".join(map(re.escape, layers)),
            "use_rslora": self.rs_lora,
            "init_lora_weights": True if self.init == "kaiming" else "gaussian",
        }
        factors = inject(model.unet, values)
        named = {f"unet.{name}": parameter for name, parameter in factors.items()}
        # While B is 0, no gradient reaches A.
        silent = [name for name in named if ".lora_A." in name]
        return Prepared(Trainables(named, silent_at_first=silent), lora=values)
