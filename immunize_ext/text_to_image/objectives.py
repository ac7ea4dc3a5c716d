r"""What a denoiser is trained for, chosen from its scheduler: the noise, or the flow.

Both mix an image x with noise and ask for a target of the same shape; training and attacks know
them by three functions, which level of noise is drawn, what the mixture is, and what is asked for.

- Noise prediction: t uniform over the steps, x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, and the
  target is the noise, the velocity or x, as the schedule says.
- Rectified flow: sigma = s u / (1 + (s - 1) u) with u = 1 / (1 + exp(-n)), n standard normal
  (a logit-normal u, shifted by the schedule's s), x_t = (1 - sigma) x + sigma noise, and the target
  is d x_t / d sigma = noise - x. Every sigma counts alike: the density of u is the weighting.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from immunize_ext._extras import require_extra


class Objective(Protocol):
    """What is drawn, mixed and asked for.

    Attributes:
        scheduler: The noise schedule for training.
    """

    scheduler: Any

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Random time steps, shape ``(count,)``; on the generator's device."""
        ...

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents x_t, shape as ``latents``."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict for them."""
        ...


class NoisePrediction:
    """Denoising diffusion on the schedule of DDPM, with the pipeline's own settings."""

    def __init__(self, scheduler: Any) -> None:
        diffusers = require_extra("diffusers", extra="diffusion", purpose="text-to-image models")
        self.scheduler: Any = diffusers.DDPMScheduler.from_config(scheduler.config)

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Uniform over the steps."""
        steps = self.scheduler.config.num_train_timesteps
        return torch.randint(0, steps, (count,), generator=generator, device=_device(generator))

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As the schedule adds noise."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise, velocity or image.

        Raises:
            ValueError: If the schedule predicts something unknown.
        """
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        if kind == "sample":
            return latents
        raise ValueError(
            "NoisePrediction.target: prediction_type must be epsilon, v_prediction or sample, got "
            f"{kind!r}"
        )


class FlowMatching:
    """Rectified flow with logit-normal times.

    Source:
        Esser et al., Scaling Rectified Flow Transformers, ICML 2024, sections 2 and 3.1 (s: 5.3.2);
        the schedules that shift by the image's size are not shifted for training, as in diffusers'
        scripts.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler: Any = type(scheduler).from_config(scheduler.config)

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Sigma by the logit-normal law, in the schedule's steps, float32."""
        config = self.scheduler.config
        u = torch.randn(count, generator=generator, device=_device(generator)).sigmoid()
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", 1.0)
        return shift * u / (1.0 + (shift - 1.0) * u) * config.num_train_timesteps

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The point between image and noise."""
        sigma = timesteps / self.scheduler.config.num_train_timesteps
        sigma = sigma.to(latents).reshape(-1, *(1,) * (latents.dim() - 1))
        return (1.0 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity, at every time the same."""
        del timesteps
        return noise - latents


def is_flow_matching(scheduler: Any) -> bool:
    """Whether a scheduler is one of diffusers' flow-matching schedulers, or made from one.

    Args:
        scheduler: A scheduler of diffusers, for whatever sampler.

    Example:
        >>> from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler
        >>> is_flow_matching(DDIMScheduler()), is_flow_matching(FlowMatchHeunDiscreteScheduler())
        (False, True)
    """
    return any("FlowMatch" in kind.__name__ for kind in type(scheduler).__mro__)


def objective_of(scheduler: Any) -> Objective:
    """The objective that belongs to a pipeline's scheduler.

    Args:
        scheduler: A scheduler of diffusers, for whatever sampler.

    Returns:
        Flow matching for diffusers' flow-matching schedulers, noise prediction for the others.

    Example:
        >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
        >>> kinds = (DDIMScheduler(), FlowMatchEulerDiscreteScheduler())
        >>> [type(objective_of(scheduler)).__name__ for scheduler in kinds]
        ['NoisePrediction', 'FlowMatching']
    """
    return FlowMatching(scheduler) if is_flow_matching(scheduler) else NoisePrediction(scheduler)


def _device(generator: torch.Generator | None) -> torch.device | str:
    return generator.device if generator is not None else "cpu"
