"""Prior preservation of DreamBooth: the class of the concept keeps looking as it did."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from immunize_ext.text_to_image.attacks.prompts import replace_name
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage


@dataclass(frozen=True)
class PriorPreservation:
    """Settings of the prior term.

    Attributes:
        weight: Weight of the prior loss.
        images: Class images that the model generates before the attack, for each concept.
        class_prompt: What they are generated and trained with; the canonical prompt with the
            concept's anchor in place of its name when omitted.
        sampling_steps: Denoising steps of the generation.
        guidance: Guidance scale of the generation.
    """

    weight: float = 1.0
    images: int = 20
    class_prompt: str | None = None
    sampling_steps: int = 20
    guidance: float = 1.5

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not (math.isfinite(self.weight) and self.weight >= 0.0):
            raise ValueError(
                f"PriorPreservation: weight must be finite and at least 0, got {self.weight}"
            )
        if self.images < 1 or self.sampling_steps < 1:
            raise ValueError(
                "PriorPreservation: images and sampling_steps must be at least 1, got "
                f"{self.images} and {self.sampling_steps}"
            )

    def prompt_for(self, concept: Concept) -> str:
        """The class prompt of a concept.

        Raises:
            ValueError: If there is no class prompt, and no anchor to make one with.
        """
        if self.class_prompt is not None:
            return self.class_prompt
        if concept.anchor is None:
            raise ValueError(
                f"PriorPreservation: concept {concept.name!r} must have an anchor to name its "
                "class with, got none; give class_prompt"
            )
        return class_prompt(concept)

    def class_images(self, model: TextToImage, prompt: str, *, seed: int) -> Tensor:
        """Class images of the model as it is now, in [-1, 1], shape ``(images, c, h, w)``."""
        with torch.no_grad():
            generated = model.generate(
                [prompt] * self.images,
                steps=self.sampling_steps,
                guidance=self.guidance,
                seed=seed,
            )
        return 2.0 * generated - 1.0


def class_prompt(concept: Concept) -> str:
    """The canonical prompt with the anchor in place of the name.

    A word that then stands there twice ("the digit digit", where the prompt names the class beside
    the concept) is said once, and an anchor that holds the whole rest of the prompt is a prompt
    itself.
    """
    anchor = concept.anchor or ""
    around = replace_name(concept.prompts[0], concept.words, "").split()
    if around and set(around) <= set(anchor.split()):
        return anchor
    words = replace_name(concept.prompts[0], concept.words, anchor).split()
    return " ".join(word for i, word in enumerate(words) if i == 0 or word != words[i - 1])


def prior_preservation_loss(
    losses: Tensor, *, prior_weight: float, weights: Tensor | None = None
) -> Tensor:
    """Loss of a batch that holds B instance samples and then B class samples.

    total = mean_i w_i l_i over the first half + prior_weight * mean_i w_i l_i over the second.

    Weights are per sample and are split where the losses are. Multiplying the losses of one half
    by the weights of both is what published training scripts did; it broadcasts without an error
    where the batch is 1.

    Args:
        losses: Loss of each sample, shape ``(2 B,)``.
        prior_weight: Weight of the class half.
        weights: Weight of each sample (of its noise level, say), shape ``(2 B,)``.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the losses are not per sample and even in number, or there is not one weight
            for each.

    Note:
        Differentiable.

    Source:
        Ruiz et al., DreamBooth, CVPR 2023, equation 2; huggingface/diffusers#13743.

    Example:
        >>> weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> prior_preservation_loss(torch.ones(4), prior_weight=2.0, weights=weights).item()
        8.5
    """
    if losses.dim() != 1 or len(losses) == 0 or len(losses) % 2:
        raise ValueError(
            "prior_preservation_loss: losses must have shape (2 B,), instances first, got "
            f"{tuple(losses.shape)}; use reduction='none'"
        )
    if weights is not None:
        if weights.shape != losses.shape:
            raise ValueError(
                f"prior_preservation_loss: weights must have the shape {tuple(losses.shape)} of "
                f"losses, got {tuple(weights.shape)}; give one weight a sample"
            )
        losses = losses * weights
    instance, prior = losses.chunk(2)
    return instance.mean() + prior_weight * prior.mean()
