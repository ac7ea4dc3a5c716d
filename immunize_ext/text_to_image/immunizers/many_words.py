r"""Immunization under many words, and against attackers of many kinds.

An immunization that is learned under a concept's own name holds under that name. Here every outer
step draws for each concept how an attacker asks: by the concept's own prompts, by a word that means
nothing in place of the name, or by a prompt that has nothing to do with it. All that is kept is
kept under those words too: they shall draw what they drew. Since the words must go on drawing
everything else, what makes the concept hard to teach cannot sit in the text's projections; all
layers are moved.

An attacker may also be let to adapt first: some layers (cross-attention, all attention, everything)
for some steps of Adam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from immunize_ext.bilevel import Adam, Parameters, adapt
from immunize_ext.text_to_image.attacks.prompts import replace_name
from immunize_ext.text_to_image.concepts import Concept, ConceptSet
from immunize_ext.text_to_image.immunizers.bilevel import denoising_loss
from immunize_ext.text_to_image.immunizers.loop import OUTER, Immunizer, Run
from immunize_ext.text_to_image.immunizers.parameters import Scope
from immunize_ext.text_to_image.projections import AttentionScope, attention_blocks
from immunize_ext.worst_case import Weighting


@dataclass(frozen=True, kw_only=True)
class ManyWords(Immunizer):
    r"""Raise the denoising loss under many words, of the concepts that hold worst most.

    .. math:: \max_\theta \sum_n w_n\, \mathbb E_{(p, S, k)} L(x_n, p; \theta'_{n,p,S,k}), \qquad
              w_n \propto \exp\Bigl(-\eta \sum_{j < step} L_{n,j}\Bigr)

    with theta' after k steps of Adam on the layers S under the wording p, to first order; theta'
    is theta where attackers take no steps, as by default.

    Attributes:
        rare_words: Words that stand in place of the name. An attacker who is to be judged should
            use another one.
        unrelated_prompts: Prompts that have nothing to do with the concept.
        own_share: Share of attackers who ask by the concept's own prompts.
        attacker_steps: Most steps of an attacker in the loop; 0 to so many are drawn.
        attackers: Layers that it trains, of those that are moved: ``"attn2"``, ``"attention"`` or
            ``"all"``; one of them is drawn.
        attacker_rate: Adam's rate of an attacker.
        cooldown: Share of the steps, at the end, over which the learning rate falls to 0: what is
            kept comes back meanwhile.

    Source:
        Hedge (Freund and Schapire, 1997) for the weights; Tamirisa et al., TAR, ICLR 2025, for a
        distribution of attackers in the loop.

    Example:
        >>> from immunize_ext.text_to_image.immunizers import ManyWords
        >>> ManyWords(steps=10).rare_words
        ('zwx', 'ohwx', 'glyph')
    """

    method: ClassVar[str] = "many_words"

    label: ClassVar[str] = "Ascent under many words"

    usual_rates: ClassVar[Mapping[str, float]] = {"learning_rate": 3e-5, "attacker_rate": 5e-6}

    # The length of a run decides its rates.
    free: ClassVar[tuple[str, ...]] = ("checkpoint_every", "log_with")

    weighting: Weighting = "exponentiated"
    steps: int = 250
    learning_rate: float = 3e-3
    scope: Scope = "all"
    retain_weight: float = 30.0
    retain_batch: int = 48
    rare_words: tuple[str, ...] = ("zwx", "ohwx", "glyph")
    unrelated_prompts: tuple[str, ...] = (
        "a photo of a dog",
        "a drawing of a house",
        "a picture of the moon on a page",
        "a small sketch of a tree",
    )
    own_share: float = 0.4
    attacker_steps: int = 0
    attackers: tuple[str, ...] = ("attn2", "attention", "all")
    attacker_rate: float = 3e-3
    cooldown: float = 0.8

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if not set(self.attackers) <= {"attn2", "attention", "all"} or not self.attackers:
            raise ValueError(
                f"{self.method}: attackers must be among attn2, attention and all, got "
                f"{list(self.attackers)}"
            )
        if self.attacker_steps < 0:
            raise ValueError(
                f"{self.method}: attacker_steps must be at least 0, got {self.attacker_steps}"
            )
        if not (math.isfinite(self.attacker_rate) and self.attacker_rate > 0.0):
            raise ValueError(
                f"{self.method}: attacker_rate must be positive and finite, got "
                f"{self.attacker_rate}"
            )
        for name in ("own_share", "cooldown"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{self.method}: {name} must be 0 to 1, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """As set, and falling to 0 in the cooldown."""
        left = (self.steps - step) / self.steps
        return self.learning_rate * (min(1.0, left / self.cooldown) if self.cooldown else 1.0)

    def other_wordings(self, concept: Concept) -> list[str]:
        """Prompts of attackers who do not ask by the name.

        A concept whose prompt does not hold its name has no place for a rare word.
        """
        canonical = concept.prompts[0]
        rare = self.rare_words if concept.named_in(canonical) else ()
        placed = [replace_name(canonical, concept.words, word) for word in rare]
        return [*placed, *self.unrelated_prompts]

    def wordings(self, concept: Concept) -> list[str]:
        """Its own prompts, then those of attackers who do not ask by the name."""
        return [*super().wordings(concept), *self.other_wordings(concept)]

    def kept_prompts(self, problem: ConceptSet) -> Sequence[str]:
        """Everything that attackers ask by and that is not a concept's own."""
        return list(dict.fromkeys(p for c in problem.concepts for p in self.other_wordings(c)))

    def attacked_losses(self, run: Run, leaves: Parameters, step: int, batch: int) -> Tensor:
        """One attacker for each concept, and what it still meets on images it has not seen."""
        generator = run.generator(step, OUTER, batch)
        losses = []
        for concept, pool in zip(run.concepts.concepts, run.pools, strict=True):
            own = len(super().wordings(concept))
            wording = self._wording(own, len(self.wordings(concept)), generator)
            layers = self.attackers[_one_of(len(self.attackers), generator)]
            steps = _one_of(self.attacker_steps + 1, generator)
            draws = [pool.draw(self.batch_size, generator, wording) for _ in range(steps + 1)]
            moved = _layers(run, leaves, layers)
            # Others stay as they are, but what the attacker ends at depends on them too.
            rest = {name: value for name, value in leaves.items() if name not in moved}
            attacked = adapt(
                moved,
                [denoising_loss(run, drawn) for drawn in draws[:-1]],
                Adam(self.attacker_rate),
                held=rest,
                scale=run.scale,
            )
            run.inner_losses.extend(attacked.losses)
            losses.append(draws[-1].losses(run.model, rest | attacked.parameters))
        return torch.cat(losses)

    def _wording(self, own: int, every: int, generator: torch.Generator) -> int:
        """Which of all prompts an attacker asks by."""
        by_name = float(torch.rand((), generator=generator)) < self.own_share or own == every
        return _one_of(own, generator) if by_name else own + _one_of(every - own, generator)


def _one_of(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _layers(run: Run, leaves: Parameters, layers: str) -> Parameters:
    """What an attacker trains of that which is moved."""
    if layers == "all":
        return leaves
    scope: AttentionScope = "attn2" if layers == "attn2" else "attention"
    blocks = tuple(f"{b}." for b in attention_blocks("many_words", run.model.unet, scope))
    return {name: value for name, value in leaves.items() if name.startswith(blocks)}
