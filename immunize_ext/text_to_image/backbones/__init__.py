"""Families of denoisers: what of Stable Diffusion 1 to XL, SD3 and FLUX differs from the others."""

from __future__ import annotations

from typing import Any

from immunize_ext.text_to_image.backbones.flux import Flux
from immunize_ext.text_to_image.backbones.protocol import Backbone, Given, Segment, Sizes
from immunize_ext.text_to_image.backbones.sd3 import SD3
from immunize_ext.text_to_image.backbones.unet import UNet

__all__ = ["COMPONENTS", "Backbone", "Given", "Segment", "Sizes", "backbone_of", "denoiser_of"]

_UNET: Backbone = UNet()

# By the name of diffusers' class.
_FAMILIES: dict[str, Backbone] = {
    "UNet2DConditionModel": _UNET,
    "SD3Transformer2DModel": SD3(),
    "FluxTransformer2DModel": Flux(),
}

COMPONENTS = tuple(dict.fromkeys(family.component for family in _FAMILIES.values()))
"""What pipelines call their denoisers."""


def backbone_of(denoiser: Any) -> Backbone | None:
    """The family of a denoiser; ``None`` of a class that no family has.

    Args:
        denoiser: A module of diffusers; a subclass is of its parent's family.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> backbone_of(UNet2DConditionModel.__new__(UNet2DConditionModel)).component
        'unet'
    """
    for kind in type(denoiser).__mro__:
        if kind.__name__ in _FAMILIES:
            return _FAMILIES[kind.__name__]
    # Other UNets are built alike; transformers are not.
    alike = "UNet" in type(denoiser).__name__ and hasattr(denoiser.config, "cross_attention_dim")
    return _UNET if alike else None


def denoiser_of(pipeline: Any) -> tuple[Any, Backbone | None]:
    """The denoiser of a pipeline without the wrapper of ``torch.compile``, and its family."""
    parts = (getattr(pipeline, name, None) for name in COMPONENTS)
    found = next((part for part in parts if part is not None), None)
    found = getattr(found, "_orig_mod", found)
    return found, backbone_of(found)


def supported() -> str:
    """Which pipelines there are families for, in words."""
    return ", ".join(dict.fromkeys(family.kinds for family in _FAMILIES.values()))
