"""What the rest of the package asks of a family of denoisers, and nothing else.

A family says how a pipeline of it encodes text, how its denoiser is called, and what it has to
refuse. Which layers take text, which attend, and how noise is mixed in is found by probing the
denoiser and by the scheduler, so no other file knows one family from another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# What families refuse that know it by different signs.
IP_ADAPTER = "a loaded IP-Adapter (unload_ip_adapter takes it out)"


class Sizes(NamedTuple):
    """The smallest input that a denoiser takes.

    Attributes:
        latents: Channels, height, width.
        text: Width of the features of a token.
        pooled: Width of the pooled vector of a prompt; ``None`` of denoisers that take none.
    """

    latents: tuple[int, int, int]
    text: int
    pooled: int | None


class Segment(NamedTuple):
    """Positions of the text features that one tokenizer accounts for.

    Attributes:
        tokenizer: Its index among those of the pipeline.
        start: First position.
        length: How many.
        looks_back: Whether features depend on the text up to their token alone, as CLIP's do; T5's
            depend on all of it.
    """

    tokenizer: int
    start: int
    length: int
    looks_back: bool


class Given(NamedTuple):
    """What a denoiser is called with.

    Attributes:
        noisy: Noisy latents ``(b, c, h, w)``.
        timesteps: Shape ``(b,)``, as the scheduler counts them.
        hidden: ``(b, t, d)``.
        pooled: ``(b, d2)``, if it takes one.
        scale: Pixels in a latent's side.
    """

    noisy: Tensor
    timesteps: Tensor
    hidden: Tensor
    pooled: Tensor | None
    scale: int


class Backbone(Protocol):
    """A family of denoisers.

    Attributes:
        component: Name of the denoiser in pipelines, in their folders and in adapter files.
        encoders: Endings of the names of text encoders and tokenizers.
        kinds: What its pipelines are called, in errors.
    """

    component: str
    encoders: tuple[str, ...]
    kinds: str

    def unused(self, config: Any) -> tuple[str, ...]:
        """Layers that a denoiser with these settings has and whose outputs it throws away."""
        del config
        return ()

    def refusal(self, pipeline: Any) -> str:
        """Why a pipeline is none that makes images of a text alone; empty if it is one."""
        ...

    def encode(
        self, pipeline: Any, texts: Sequence[str], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Features of tokens ``(b, t, d)`` and of prompts ``(b, d2)``, by the pipeline itself."""
        ...

    def segments(self, pipeline: Any, length: int) -> tuple[Segment, ...]:
        """Which tokenizer accounts for which of ``length`` positions."""
        ...

    def sizes(self, config: Any) -> Sizes:
        """The smallest input for a denoiser with these settings."""
        ...

    def predict(self, run: Callable[..., Any], config: Any, given: Given) -> Tensor:
        """Call a denoiser.

        Args:
            run: The denoiser, or what stands for it; gives a tuple.
            config: Its settings.
            given: Its input.

        Returns:
            The prediction, shape as ``given.noisy``.
        """
        ...
