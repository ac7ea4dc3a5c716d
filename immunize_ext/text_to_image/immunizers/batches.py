"""Random batches of a concept: latents, text, noise, time steps.

Every draw comes from a generator made of the run's seed and the step, so that a run that goes on
after a stop draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from immunize_ext.bilevel import Composed
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import Conditioning, TextToImage, at_least_float

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
        noisy = model.objective.mix(self.latents, self.noise, self.timesteps)
        return model.predict(noisy, self.timesteps, self.conditioning, parameters=parameters)

    def loss(self, model: TextToImage) -> Composed:
        """Their mean as a function of the denoiser's parameters, by way of its prediction."""
        target = at_least_float(model.objective.target(self.latents, self.noise, self.timesteps))

        def outputs(parameters: Mapping[str, Tensor]) -> Tensor:
            return at_least_float(self.prediction(model, parameters))

        def criterion(prediction: Tensor) -> Tensor:
            return (prediction - target).square().flatten(1).mean(1).mean()

        return Composed(outputs, criterion)


class ConceptPool:
    """Latents and text features of one concept, computed once.

    Args:
        model: The model whose autoencoder and text encoders are used.
        images: Its images, shape ``(n, c, h, w)`` in [-1, 1].
        prompts: Prompts drawn from, one for each sample.
    """

    def __init__(self, model: TextToImage, images: Tensor, prompts: Sequence[str]) -> None:
        self.images = images
        self.latents = model.latents(images)
        with torch.no_grad():
            self.conditioning = model.conditioning(prompts)
        self.objective = model.objective

    def draw(self, count: int, generator: torch.Generator, wording: int | None = None) -> Batch:
        """A random batch; no image twice while there are enough.

        Args:
            count: Samples.
            generator: What draws.
            wording: Which prompt all of them have; each one of its own, at random, when omitted.
        """
        size = len(self.latents)
        rounds = -(-count // size)
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])
        latents = self.latents[order[:count].to(self.latents.device)]
        prompt = torch.randint(len(self.conditioning.hidden), (count,), generator=generator)
        if wording is not None:
            prompt = torch.full_like(prompt, wording)
        timesteps = self.objective.draw(count, generator)
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


# Concepts to keep that come without images are shown by what the model itself makes of them.
_GENERATED = 16


class Retain:
    r"""Mean squared difference of predictions, now and before, on concepts to keep.

    .. math:: L_{retain}(\theta) = \mathbb E\,\lVert \epsilon_\theta(x_t, t, c)
              - \epsilon_{\theta_0}(x_t, t, c) \rVert^2

    Erased concepts that nobody immunizes against belong here too: the model must not drift on them
    either, or they become harder to teach again as well. The empty prompt belongs to it unasked:
    classifier-free guidance subtracts it from every other.

    Args:
        model: The model; what it predicts now is what is kept.
        concepts: What to keep.
        seed: Seed of images that have to be generated.
        prompts: Prompts beside the empty one under which all of it is kept.
    """

    def __init__(
        self,
        model: TextToImage,
        concepts: Sequence[Concept],
        *,
        seed: int,
        prompts: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.pools = [
            ConceptPool(model, _images(model, concept, seed), concept.prompts)
            for concept in concepts
        ]
        if self.pools:
            images = torch.cat([pool.images for pool in self.pools])
            self.pools += [ConceptPool(model, images, (prompt,)) for prompt in ("", *prompts)]

    def draw(self, count: int, generator: torch.Generator) -> Batch | None:
        """A batch over random concepts; ``None`` if there is nothing to keep."""
        if not self.pools:
            return None
        picks = torch.randint(len(self.pools), (count,), generator=generator).tolist()
        return join([self.pools[pick].draw(1, generator) for pick in picks])

    def loss(self, batch: Batch | None, parameters: Mapping[str, Tensor]) -> Tensor:
        """The term for one batch; zero if there is nothing to keep."""
        if batch is None:
            return torch.zeros(())
        with torch.no_grad():
            # The loop never writes into the model, so its own parameters are those before.
            before = at_least_float(batch.prediction(self.model))
        now = at_least_float(batch.prediction(self.model, parameters))
        return (now - before).square().mean()


def _images(model: TextToImage, concept: Concept, seed: int) -> Tensor:
    if concept.source is not None:
        return concept.images("immunize")
    generated = model.generate([concept.prompts[0]] * _GENERATED, seed=seed)
    return generated * 2.0 - 1.0
