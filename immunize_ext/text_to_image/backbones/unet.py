"""UNets with cross-attention: Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from immunize_ext.text_to_image.backbones.protocol import (
    IP_ADAPTER,
    Backbone,
    Given,
    Segment,
    Sizes,
)
from immunize_ext.text_to_image.objectives import is_flow_matching

# Numbers that SDXL takes beside the pooled vector: original size, crop corner, target size.
_TIME_IDS = 6


class UNet(Backbone):
    """CLIP's features enter every cross-attention by K and V, SDXL's pooled vector once."""

    component = "unet"
    encoders: tuple[str, ...] = ("", "_2")
    kinds = "Stable Diffusion 1, 2 or XL"

    def refusal(self, pipeline: Any) -> str:
        """Inpainting, classes, grounding, image prompts, and flow matching: no UNet learnt it."""
        config = pipeline.unet.config
        latents = getattr(pipeline.vae.config, "latent_channels", config.in_channels)
        if config.in_channels != latents:
            return f"a denoiser of {config.in_channels} channels beside latents of {latents}"
        if str(getattr(config, "attention_type", "")).startswith("gated"):
            return "grounded attention (GLIGEN)"
        if getattr(config, "class_embed_type", None) or getattr(config, "num_class_embeds", None):
            return "a denoiser with classes"
        if getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj":
            return IP_ADAPTER
        if is_flow_matching(pipeline.scheduler):
            return f"flow matching ({type(pipeline.scheduler).__name__})"
        return ""

    def encode(
        self, pipeline: Any, texts: Sequence[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Features of CLIP; of both encoders side by side in SDXL, which pools the second."""
        encoded = pipeline.encode_prompt(
            prompt=list(texts),
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return encoded[0], encoded[2] if len(encoded) > 2 else None

    def segments(self, pipeline: Any, length: int) -> tuple[Segment, ...]:
        """Both encoders of SDXL have the same tokens at the same positions."""
        del pipeline
        return (Segment(0, 0, length, looks_back=True),)

    def sizes(self, config: Any) -> Sizes:
        """One pixel more than the smallest: normalising groups of one channel needs two values."""
        side = 2 ** len(config.block_out_channels)
        width = config.cross_attention_dim
        width = max(width) if isinstance(width, (list, tuple)) else int(width)
        if getattr(config, "encoder_hid_dim", None):
            width = int(config.encoder_hid_dim)
        pooled = None
        if getattr(config, "addition_embed_type", None) == "text_time":
            times = config.addition_time_embed_dim * _TIME_IDS
            pooled = config.projection_class_embeddings_input_dim - times
        return Sizes((config.in_channels, side, side), width, pooled)

    def predict(self, run: Callable[..., Any], config: Any, given: Given) -> Tensor:
        """With SDXL's size conditioning for an image that was neither scaled nor cropped."""
        del config
        arguments: dict[str, Any] = {"encoder_hidden_states": given.hidden, "return_dict": False}
        if given.pooled is not None:
            arguments["added_cond_kwargs"] = {
                "text_embeds": given.pooled,
                "time_ids": time_ids(given.noisy, given.scale),
            }
        prediction: Tensor = run(given.noisy, given.timesteps, **arguments)[0]
        return prediction


def time_ids(noisy: Tensor, scale: int) -> Tensor:
    """SDXL's size conditioning: original size, crop corner, target size, in pixels."""
    height, width = (side * scale for side in noisy.shape[-2:])
    row = torch.tensor([height, width, 0, 0, height, width], dtype=noisy.dtype)
    return row.to(noisy.device).expand(len(noisy), _TIME_IDS)
