"""Stable Diffusion 3: joint attention over image and text, CLIP twice and T5, flow matching."""

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


class SD3(Backbone):
    """All text enters once: tokens by ``context_embedder``, the pooled vector beside the time."""

    component = "transformer"
    encoders: tuple[str, ...] = ("", "_2", "_3")
    kinds = "Stable Diffusion 3"

    def unused(self, config: Any) -> tuple[str, ...]:
        """Queries of the text in the last block: it gives the image alone."""
        block = f"transformer_blocks.{config.num_layers - 1}.attn"
        return (f"{block}.add_q_proj", f"{block}.norm_added_q")

    def refusal(self, pipeline: Any) -> str:
        """Image prompts, and schedulers that predict noise."""
        if getattr(pipeline.transformer, "image_proj", None) is not None:
            return IP_ADAPTER
        if not is_flow_matching(pipeline.scheduler):
            return f"no flow matching ({type(pipeline.scheduler).__name__})"
        return ""

    def encode(
        self, pipeline: Any, texts: Sequence[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """CLIP's tokens, both encoders side by side, and after them T5's, zeros if it is absent."""
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return hidden, pooled

    def segments(self, pipeline: Any, length: int) -> tuple[Segment, ...]:
        """CLIP's positions, then T5's."""
        clip = int(pipeline.tokenizer_max_length)
        found = [Segment(0, 0, clip, looks_back=True)]
        if pipeline.text_encoder_3 is not None:
            found.append(Segment(2, clip, length - clip, looks_back=False))
        return tuple(found)

    def sizes(self, config: Any) -> Sizes:
        """Two patches a side."""
        side = 2 * config.patch_size
        pooled = config.pooled_projection_dim
        return Sizes((config.in_channels, side, side), config.joint_attention_dim, pooled)

    def predict(self, run: Callable[..., Any], config: Any, given: Given) -> Tensor:
        """The velocity noise - x."""
        del config
        prediction: Tensor = run(
            hidden_states=given.noisy,
            timestep=given.timesteps,
            encoder_hidden_states=given.hidden,
            pooled_projections=given.pooled,
            return_dict=False,
        )[0]
        return prediction
