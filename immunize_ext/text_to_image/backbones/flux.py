"""FLUX.1: joint attention in two streams, then in one; tokens of T5, the pooled vector of CLIP."""

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

# Side of the patches that the pipeline packs into channels.
_PATCH = 2

# What diffusers' training scripts feed models whose guidance was distilled into them.
_GUIDANCE = 3.5

# The denoiser counts time from 0 to 1, the scheduler to this.
_STEPS = 1000.0


class Flux(Backbone):
    """All text enters once: T5's tokens by ``context_embedder``, CLIP's vector beside the time."""

    component = "transformer"
    encoders: tuple[str, ...] = ("", "_2")
    kinds = "FLUX"

    def refusal(self, pipeline: Any) -> str:
        """Image prompts, inpainting, and schedulers that predict noise."""
        config, transformer = pipeline.transformer.config, pipeline.transformer
        latents = pipeline.vae.config.latent_channels
        if getattr(transformer, "encoder_hid_proj", None) is not None:
            return IP_ADAPTER
        if config.in_channels != latents * _PATCH**2:
            return f"a denoiser of {config.in_channels} channels beside latents of {latents}"
        if not is_flow_matching(pipeline.scheduler):
            return f"no flow matching ({type(pipeline.scheduler).__name__})"
        return ""

    def encode(
        self, pipeline: Any, texts: Sequence[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """T5's tokens, padded to a fixed length that attention sees, and CLIP's pooled vector."""
        hidden, pooled, _ = pipeline.encode_prompt(
            prompt=list(texts), prompt_2=None, device=device, num_images_per_prompt=1
        )
        return hidden, pooled

    def segments(self, pipeline: Any, length: int) -> tuple[Segment, ...]:
        """T5 has all positions."""
        del pipeline
        return (Segment(1, 0, length, looks_back=False),)

    def sizes(self, config: Any) -> Sizes:
        """Two patches a side."""
        side = 2 * _PATCH
        latents = (config.in_channels // _PATCH**2, side, side)
        return Sizes(latents, config.joint_attention_dim, config.pooled_projection_dim)

    def predict(self, run: Callable[..., Any], config: Any, given: Given) -> Tensor:
        """The velocity noise - x, of patches packed into channels."""
        noisy, timesteps, hidden, pooled, _ = given
        b, c, h, w = noisy.shape
        patches = noisy.unflatten(3, (w // _PATCH, _PATCH)).unflatten(2, (h // _PATCH, _PATCH))
        packed = patches.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * _PATCH**2)
        rows, columns = torch.meshgrid(
            *(torch.arange(side // _PATCH, device=noisy.device) for side in (h, w)), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        guidance = noisy.new_full((b,), _GUIDANCE) if config.guidance_embeds else None
        prediction = run(
            hidden_states=packed,
            timestep=timesteps.to(noisy.dtype) / _STEPS,
            guidance=guidance,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            txt_ids=noisy.new_zeros(hidden.shape[1], 3),
            img_ids=places.to(noisy.dtype),
            return_dict=False,
        )[0]
        grid = prediction.reshape(b, h // _PATCH, w // _PATCH, c, _PATCH, _PATCH)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
