"""The retain term: what has to stay is distilled from the model as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from immunize_ext.data.concepts import Concept
from immunize_ext.immunizers.text_to_image.batches import Batch, ConceptPool, join
from immunize_ext.models.text_to_image import TextToImage, at_least_float

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

    Raises:
        ValueError: If a concept has no prompt.
    """

    def __init__(self, model: TextToImage, concepts: Sequence[Concept], *, seed: int) -> None:
        self.model = model
        self.pools = [
            ConceptPool(model, concept, _images(model, concept, seed), concept.prompts)
            for concept in concepts
        ]
        if self.pools:
            self.pools.append(_without_text(model, self.pools))

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


def _without_text(model: TextToImage, pools: Sequence[ConceptPool]) -> ConceptPool:
    """The images of all pools under the empty prompt."""
    everything = Concept("", ("",))
    return ConceptPool(model, everything, torch.cat([pool.images for pool in pools]), ("",))


def _images(model: TextToImage, concept: Concept, seed: int) -> Tensor:
    if concept.source is not None:
        return concept.images("immunize")
    generated = model.generate([concept.prompts[0]] * _GENERATED, seed=seed)
    return generated * 2.0 - 1.0
