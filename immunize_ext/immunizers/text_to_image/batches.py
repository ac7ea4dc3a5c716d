"""Random batches of a concept: latents, text, noise, time steps.

Every draw comes from a generator made of the run's seed and the step, so that a run that goes on
after a stop draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunize_ext.data.concepts import Concept
from immunize_ext.models.text_to_image import Conditioning, TextToImage

# Steps and purposes are mixed into a seed by odd constants, so that no two draws share one.
_STEP, _PURPOSE = 1_000_003, 7_919


def generator_of(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """Generator of one step of a run; a purpose sets apart what is drawn in the same step."""
    mixed = (seed * _STEP + step) * _PURPOSE + purpose
    return torch.Generator().manual_seed(mixed % (2**63))


@dataclass(frozen=True)
class Batch:
    """What one denoising loss is evaluated on.

    Attributes:
        latents: Clean latents, shape ``(b, c, h, w)``.
        conditioning: Text of each, ``b`` rows.
        noise: Noise, like ``latents``.
        timesteps: Time steps, shape ``(b,)``.
    """

    latents: Tensor
    conditioning: Conditioning
    noise: Tensor
    timesteps: Tensor

    def losses(self, model: TextToImage, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Denoising loss of each sample, shape ``(b,)``."""
        return model.noise_loss(
            self.latents,
            self.conditioning,
            noise=self.noise,
            timesteps=self.timesteps,
            parameters=parameters,
            reduction="none",
        )

    def prediction(
        self, model: TextToImage, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """What the denoiser predicts for the noisy latents, shape as ``latents``."""
        noisy = model.scheduler.add_noise(self.latents, self.noise, self.timesteps)
        return model.predict(noisy, self.timesteps, self.conditioning, parameters=parameters)


class ConceptPool:
    """Latents and text features of one concept, computed once.

    Args:
        model: The model whose autoencoder and text encoders are used.
        concept: The concept.
        images: Its images, shape ``(n, c, h, w)`` in [-1, 1].
        prompts: Prompts drawn from, one for each sample.
    """

    def __init__(
        self, model: TextToImage, concept: Concept, images: Tensor, prompts: Sequence[str]
    ) -> None:
        self.name = concept.name
        self.images = images
        self.latents = model.latents(images)
        with torch.no_grad():
            self.conditioning = model.conditioning(prompts)
        config: Any = model.scheduler.config
        self.train_steps = int(config.num_train_timesteps)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """A random batch; no image twice while there are enough."""
        size = len(self.latents)
        rounds = -(-count // size)
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])
        latents = self.latents[order[:count].to(self.latents.device)]
        prompt = torch.randint(len(self.conditioning.hidden), (count,), generator=generator)
        timesteps = torch.randint(self.train_steps, (count,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        return Batch(
            latents,
            self.conditioning.select(prompt),
            noise.to(latents),
            timesteps.to(latents.device),
        )


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of several, in order."""
    texts = [batch.conditioning for batch in batches]
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return Batch(
        torch.cat([batch.latents for batch in batches]),
        Conditioning(
            torch.cat([text.hidden for text in texts]),
            torch.cat(pooled) if len(pooled) == len(texts) else None,
            torch.cat([text.mask for text in texts]),
        ),
        torch.cat([batch.noise for batch in batches]),
        torch.cat([batch.timesteps for batch in batches]),
    )
