"""What a model draws before anyone attacks it: protected concepts under words of all kinds.

An attack is judged under the words it trains with, so its step 0 does not show what an
immunization did to other words. A model that draws noise for a rare word, or for no word at all,
is damaged there, and one that still draws the concept for an unrelated word was never protected.
Every evaluation therefore scores both models on every protected concept, unattacked, under its own
name, a rare word, an unrelated one, and no words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from immunize_ext.quantities import Spread
from immunize_ext.text_to_image.attack_runs import SIDES, Side
from immunize_ext.text_to_image.attacks import attack_prompt
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.metrics.generation import Measure, Sampling
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.pictures import to_bytes

WORDINGS: Mapping[str, str] = MappingProxyType(
    {
        "own name": "canonical",
        "rare word": "rare_token",
        "unrelated word": "unrelated_word",
        "no words": "",
    }
)
"""How it is asked for, as reports call it: wordings of an attack (``attacks.prompts``)."""


@dataclass(frozen=True)
class Unattacked:
    """Scores of both models on one concept under one wording, before any attack.

    Attributes:
        wording: Key of :data:`WORDINGS`.
        concept: Name of the concept.
        prompt: The words.
        scores: Spread over seeds, by side and measure.
    """

    wording: str
    concept: str
    prompt: str
    scores: Mapping[Side, Mapping[str, Spread]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it; :meth:`from_dict` takes it back."""
        return {
            "wording": self.wording,
            "concept": self.concept,
            "prompt": self.prompt,
            **{
                side: {name: spread.to_dict() for name, spread in found.items()}
                for side, found in self.scores.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Unattacked:
        """Take back what :meth:`to_dict` gave."""
        scores: dict[Side, dict[str, Spread]] = {
            side: {name: Spread.of(found["values"]) for name, found in values[side].items()}
            for side in SIDES
        }
        return cls(values["wording"], values["concept"], values["prompt"], scores)

    def and_seeds_of(self, other: Unattacked) -> Unattacked:
        """The same over the seeds of both."""
        scores: dict[Side, dict[str, Spread]] = {
            side: {
                name: Spread.of((*spread.values, *other.scores[side][name].values))
                for name, spread in found.items()
            }
            for side, found in self.scores.items()
        }
        return Unattacked(self.wording, self.concept, self.prompt, scores)


def score_unattacked(
    models: Mapping[Side, TextToImage],
    concepts: Sequence[Concept],
    measures: Mapping[str, Measure],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    kept: int = 0,
) -> tuple[tuple[Unattacked, ...], dict[tuple[str, Side], Tensor]]:
    """Score models on concepts under every wording of :data:`WORDINGS`.

    Args:
        models: By side.
        concepts: What is looked for. A wording that a concept does not have is left out: there is
            no rare word in place of a name that does not stand in the prompt.
        measures: By name.
        sampling: How images are generated; each seed has noise of its own.
        seeds: Seeds, one round of images each.
        kept: Images kept of the first seed for a picture.

    Returns:
        The scores, wording by wording; and images by wording and side, uint8,
        ``(kept, c, h, w)``: of the first concept, where each has a prompt of its own.

    Note:
        Deterministic on the CPU. A prompt that concepts share is drawn once.
    """
    drawn: dict[tuple[Side, str, int], Tensor] = {}

    def images(side: Side, prompt: str, seed: int) -> Tensor:
        key = (side, prompt, seed)
        if key not in drawn:
            drawn[key] = sampling.for_seed(seed).generate(models[side], prompt)
        return drawn[key]

    found: list[Unattacked] = []
    pictures: dict[tuple[str, Side], Tensor] = {}
    for wording, variant in WORDINGS.items():
        for concept in concepts:
            if variant == "rare_token" and not concept.named_in(concept.prompts[0]):
                continue
            prompt = attack_prompt(concept, variant)
            scores: dict[Side, dict[str, Spread]] = {}
            for side in SIDES:
                rounds = [images(side, prompt, seed) for seed in seeds]
                scores[side] = {
                    name: Spread.of(float(measure(batch, concept)) for batch in rounds)
                    for name, measure in measures.items()
                }
                if kept:
                    pictures.setdefault((wording, side), to_bytes(rounds[0][:kept]))
            found.append(Unattacked(wording, concept.name, prompt, scores))
        drawn.clear()
    return tuple(found), pictures
