"""Learning rates of attacks, tuned alike and on seeds that no result uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from immunize_ext.seams import Progress
from immunize_ext.text_to_image.attacks.adaptation import Adaptation
from immunize_ext.text_to_image.attacks.target import Evaluate, Target
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage

AttackT = TypeVar("AttackT", bound=Adaptation)


def rate_grid(attack: AttackT, rates: Sequence[float]) -> list[AttackT]:
    """The same attack at several learning rates, each under a name of its own.

    A protection that holds against one rate only shows as such when all of them are measured: the
    worst of them is what an attacker gets who tries them.

    Args:
        attack: The attack.
        rates: The rates.

    Returns:
        One attack a rate.

    Example:
        >>> from immunize_ext.text_to_image.attacks import LoRAAttack
        >>> [attack.name for attack in rate_grid(LoRAAttack(), (1e-3, 1e-2))]
        ['lora_lr_0.001', 'lora_lr_0.01']
    """
    return [
        replace(attack, name=f"{attack.name}_lr_{rate:g}", learning_rate=rate) for rate in rates
    ]


@dataclass(frozen=True)
class RateSearch:
    """An attack with the learning rate that served it best.

    Attributes:
        attack: The attack at that rate.
        rate: The rate.
        table: Mean score by rate; ``-inf`` where the attack failed (loss or gradient not finite).
        score: Which score was maximised, and where on the curve.
        seeds: Seeds used; keep them out of the results.
    """

    attack: Adaptation
    rate: float
    table: dict[float, float]
    score: str
    seeds: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the attack itself, for JSON."""
        return {
            "attack": self.attack.name,
            "rate": self.rate,
            "table": {f"{rate:g}": value for rate, value in self.table.items()},
            "score": self.score,
            "seeds": list(self.seeds),
        }


def tune_learning_rate(
    attack: Adaptation,
    model: TextToImage,
    concepts: Sequence[Concept],
    evaluate: Evaluate,
    *,
    rates: Sequence[float],
    steps: int,
    seeds: Sequence[int],
    reserved_seeds: Sequence[int] = (),
    score: str = "accuracy",
    evaluate_at: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> RateSearch:
    """Choose a learning rate for an attack: the one with the highest score on tuning seeds.

    Attack the unprotected model to compare protections with one attacker, or the immunized one for
    an attacker who knows it; say which beside the result. Every attack and every method has to get
    the same number of rates and seeds.

    Args:
        attack: The attack.
        model: What is attacked; it is not changed.
        concepts: What the attack wants.
        evaluate: Scores of the model under attack, as in :class:`Target`.
        rates: Rates to try.
        steps: Steps of each attack.
        seeds: Seeds to tune on.
        reserved_seeds: Seeds of the results; none of ``seeds`` may be among them.
        score: Which score to maximise.
        evaluate_at: Steps whose mean score counts; the last step when omitted.
        progress: Called with what was done and the share done so far.

    Returns:
        The attack at the best rate. Of equal rates the smallest is taken: it changes the model
        least.

    Raises:
        ValueError: If there is no rate or seed, a seed is reserved, every rate failed, or
            ``evaluate`` does not give the score.

    Example:
        >>> from immunize_ext.text_to_image.attacks import ATTACKS
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concepts
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> def distance(model, step):  # of the weights from zero: what a judge of images would be
        ...     return {"score": float(model.unet.conv_out.weight.detach().norm())}
        >>> model = TextToImage(load_digits_pipeline())
        >>> concepts = digit_concepts(("three",)).concepts
        >>> found = tune_learning_rate(
        ...     ATTACKS["kv_fine_tuning"], model, concepts, distance,
        ...     rates=[1e-3, 1e-4], steps=1, seeds=[0], score="score",
        ... )
        >>> found.rate, sorted(found.table)  # both leave that layer alone: the smaller one
        (0.0001, [0.0001, 0.001])
    """
    name = "tune_learning_rate"
    if not rates or not seeds:
        raise ValueError(f"{name}: rates and seeds must not be empty, got {rates} and {seeds}")
    shared = sorted(set(seeds) & set(reserved_seeds))
    if shared:
        raise ValueError(
            f"{name}: seeds must not be those of the results, got {shared} among both; tune on "
            "other seeds"
        )
    table: dict[float, float] = {}
    where = [steps] if evaluate_at is None else list(evaluate_at)
    target = Target(concepts, evaluate=evaluate, evaluate_at=where)
    total, done = len(set(rates)) * len(seeds), 0
    for rate in sorted(set(rates)):
        values = []
        for seed in seeds:
            try:
                attempt = replace(attack, learning_rate=rate)
                curve = attempt.run(model, target, steps=steps, seed=seed)
                found = curve.score(score)
                values.append(math.fsum(found) / len(found))
            except FloatingPointError:
                values.append(-math.inf)
            done += 1
            if progress is not None:
                progress(f"tuning {attack.name}: rate {rate:g}, seed {seed}", done / total)
        table[rate] = math.fsum(values) / len(values) if -math.inf not in values else -math.inf
    best = max(table, key=lambda rate: (table[rate], -rate))
    if table[best] == -math.inf:
        raise ValueError(
            f"{name}: rates must hold one that does not diverge, got {sorted(table)}; add smaller "
            "ones"
        )
    at = "mean over steps " + ", ".join(map(str, where))
    return RateSearch(
        replace(attack, learning_rate=best), best, table, f"{score}, {at}", tuple(seeds)
    )
