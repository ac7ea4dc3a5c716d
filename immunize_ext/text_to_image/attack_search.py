"""The strongest settings of several attacks, searched for on one model.

An attempt is an attack on every concept by itself, judged at its last step alone: its score is the
mean over the concepts, and what it lost is how much worse the model became, on average over these
attacks, at the concepts that it shall keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from immunize_ext.seams import Progress
from immunize_ext.storage import digest
from immunize_ext.text_to_image.attacks import (
    Adaptation,
    ConceptScores,
    Outcome,
    SettingsSearch,
    Target,
    TextToImageAttack,
    search_settings,
)
from immunize_ext.text_to_image.concepts import Concept, ConceptSet
from immunize_ext.text_to_image.metrics.generation import (
    Measure,
    Sampling,
    measure_identity,
    retained_quality,
)
from immunize_ext.text_to_image.model import TextToImage

# Of the images that a score is made of, so many times fewer for each concept to keep: there are
# more of these, and what an attack loses is a bound and not a result.
_FEWER = 4


@dataclass(frozen=True)
class Attempts:
    """How attempts are made: on what, and how they are judged.

    Attributes:
        model: The model that is attacked; it is not changed.
        concepts: What the attacks want, and what the model has to keep.
        measures: By name; the first is the one that counts.
        sampling: How images are generated.
        steps: Steps of each attack.
        seed: Of the attacks and of the images: none that a result uses.
    """

    model: TextToImage
    concepts: ConceptSet
    measures: Mapping[str, Measure]
    sampling: Sampling
    steps: int
    seed: int

    def digest(self) -> str:
        """Of all that decides an outcome beside the attack."""
        measures = {name: measure_identity(measure) for name, measure in self.measures.items()}
        made_of = self.model.digest(), self.concepts.digest(), measures, self.sampling
        return digest(*made_of, self.steps, self.seed)

    def kept(self, model: TextToImage) -> float:
        """How well a model draws what it has to keep; 0 where there is nothing."""
        if not self.concepts.retain:
            return 0.0
        few = replace(self.sampling, images=max(1, self.sampling.images // _FEWER))
        measure = next(iter(self.measures.values()))
        found = retained_quality(
            model, self.concepts.retain, measure, sampling=few, seeds=(self.seed,)
        )
        return found.mean.mean

    def outcome(self, before: float, attack: Adaptation) -> Outcome:
        """What one attack gets, and what it loses of what was kept before."""
        found = [self._one(attack, concept) for concept in self.concepts.concepts]
        score, kept = (math.fsum(values) / len(found) for values in zip(*found, strict=True))
        return Outcome(score, before - kept)

    def _one(self, attack: Adaptation, concept: Concept) -> tuple[float, float]:
        first = next(iter(self.measures))
        scores = ConceptScores(
            (concept,),
            attack.prompts((concept,)),
            {first: self.measures[first]},
            self.sampling.for_seed(self.seed),
        )

        def evaluate(model: TextToImage, step: int) -> dict[str, float]:
            return {"success": scores(model, step)[first], "kept": self.kept(model)}

        target = Target((concept,), evaluate=evaluate, evaluate_at=(self.steps,))
        curve = attack.run(self.model, target, steps=self.steps, seed=self.seed)
        return curve.score("success")[-1], curve.score("kept")[-1]


def search_attacks(
    attacks: Sequence[TextToImageAttack],
    attempts: Attempts,
    *,
    trials: int,
    most_lost: float = math.inf,
    seconds: float | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> list[SettingsSearch]:
    """Search for the settings of each attack with which it succeeds most.

    Args:
        attacks: The attacks; one that is no :class:`Adaptation` has no settings to search over and
            is left out.
        attempts: How attempts are made.
        trials: Attempts for each attack.
        most_lost: What an attack may lose of the model's other uses; no bound when omitted.
        seconds: Time for each attack.
        journal: File of all attempts, to go on where a search was cut off.
        progress: Called with what was tried and the share done so far.

    Returns:
        One search an attack.

    Raises:
        MissingExtraError: If Optuna is not installed.
        ValueError: If an argument is out of range or every attempt of an attack diverged.
    """
    tunable = [attack for attack in attacks if isinstance(attack, Adaptation)]
    made_of, before = attempts.digest(), attempts.kept(attempts.model)

    def part(text: str, share: float, *, index: int) -> None:
        if progress is not None:
            progress(text, (index + share) / len(tunable))

    return [
        search_settings(
            attack,
            partial(attempts.outcome, before),
            trials=trials,
            most_lost=most_lost,
            seconds=seconds,
            made_of=made_of,
            journal=journal,
            progress=partial(part, index=index),
        )
        for index, attack in enumerate(tunable)
    ]
