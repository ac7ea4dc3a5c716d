"""What pages and comparisons read out of the results of a text-to-image run, of any schema."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from immunize_ext.quantities import Slowdown, binomial_interval, corrected_share
from immunize_ext.report.words import real
from immunize_ext.text_to_image.metrics.gaps import Delay
from immunize_ext.text_to_image.metrics.generation import JudgeErrors
from immunize_ext.text_to_image.names import find_names

SIDES = ("unprotected", "immunized")


# Results of schema 1 name attacks and methods by key alone; these are all that there were.
_SCHEMA_1_LABELS = {
    "lora": "LoRA",
    "lora_attn2": "LoRA on cross-attention",
    "full_fine_tuning": "Full fine-tuning",
    "attn2_fine_tuning": "Fine-tuning of cross-attention",
    "kv_fine_tuning": "Fine-tuning of K and V",
    "dreambooth": "DreamBooth",
    "dreambooth_without_prior": "DreamBooth without prior preservation",
    "dreambooth_lora": "DreamBooth with LoRA",
    "textual_inversion": "Textual Inversion",
    "custom_diffusion": "Custom Diffusion",
    "mima": "MIMA",
    "imma": "IMMA",
    "joint_training": "Joint training",
    "merge_only": "Merge of separate immunizations",
    "loss_ascent": "Plain loss ascent",
}


def in_words(name: str) -> str:
    """An attack or a method that results do not label."""
    return _SCHEMA_1_LABELS.get(name, name.replace("_", " ").capitalize())


@dataclass(frozen=True)
class Score:
    """A mean over seeds (and concepts), with its range over the seeds.

    Attributes:
        mean: Mean over seeds; NaN where nothing was measured.
        low: Least seed.
        high: Largest seed.
        seeds: How many.
        trials: Images behind the mean, where it is a share of them; 0 where it is something else.
        errors: Of the judge that counted them, where it says so.
    """

    mean: float
    low: float
    high: float
    seeds: int
    trials: int = 0
    errors: JudgeErrors | None = None

    @classmethod
    def of(
        cls,
        spread: Mapping[str, Any] | None,
        trials: int = 0,
        errors: JudgeErrors | None = None,
    ) -> Score:
        """Take what ``Spread.to_dict`` wrote."""
        if spread is None:
            return cls(math.nan, math.nan, math.nan, 0)
        known = [v for v in map(real, spread["values"]) if not math.isnan(v)]
        ends = real(spread["mean"]), real(spread["min"]), real(spread["max"])
        return cls(*ends, len(known), trials, errors)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of a share of images, ``None`` of anything else.

        Clopper-Pearson; where the judge's errors are known, of the share corrected for them
        (:func:`immunize_ext.quantities.corrected_share`).
        """
        if not self.trials or math.isnan(self.mean):
            return None
        counted = round(self.mean * self.trials)
        if self.errors is None:
            return binomial_interval(counted, self.trials)
        judge = self.errors
        found = corrected_share(
            (counted, self.trials),
            (round(judge.sensitivity * judge.images), judge.images),
            (math.ceil(judge.false_positives * judge.others - 1e-9), judge.others),
        )
        return found.low, found.high

    def extent(self) -> str:
        """The interval, or the range over seeds; nothing for one seed of another measure."""
        if self.interval is not None:
            return "{:.1%} to {:.1%}".format(*self.interval)
        return f"{self.low:.2f} to {self.high:.2f}" if self.seeds > 1 else ""


class Measured:
    """The evaluation in the results of a run.

    Args:
        results: Content of ``results.json``, with an evaluation.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        found = results["evaluation"]
        self._labels = results.get("attacks", {})
        self._found = found
        self.attacks: list[str] = found["attacks"]
        self.targets: list[str] = found["targets"]
        self.measure: str = found["measures"][0]
        self.seeds: list[int] = found["seeds"]
        self.threshold = real(found["threshold"])
        self.strongest: str = found["strongest"]
        images = found.get("images", results.get("config", {}).get("images", 0))
        self.shares: list[str] = found.get("shares", ["accuracy"])
        self._of_each = images
        self._images = images if self.measure in self.shares else 0
        self._errors = _pooled_errors(found.get("judge_errors", {}).values())

    def label(self, attack: str) -> str:
        """An attack in words."""
        label: str = self._labels.get(attack, {}).get("label") or in_words(attack)
        return label

    def steps(self, attack: str) -> list[int]:
        """Steps at which an attack was judged."""
        steps: list[int] = self._found["summary"][attack]["msgr"]["steps"]
        return steps

    def scores(self, side: str, attack: str) -> list[Score]:
        """Mean score over targets at each step."""
        trials = self._images * len(self.targets) * len(self.seeds)
        return [
            Score.of(spread, trials, self._errors)
            for spread in self._found["summary"][attack][side]
        ]

    @property
    def knows_errors(self) -> bool:
        """Whether intervals hold the errors of the judge."""
        return self._errors is not None

    @property
    def others(self) -> list[str]:
        """Measures beside the one that counts."""
        return list(self._found["measures"][1:])

    def beside(self, measure: str, side: str, attack: str) -> list[float]:
        """Mean of another measure over targets and seeds, at each step."""
        curves = [
            curve["scores"][measure]
            for compared in self._found["comparisons"]
            if (compared["role"], compared["attack"]) == ("target", attack)
            for curve in compared["curves"][side]
        ]
        return [math.fsum(map(real, at)) / len(at) for at in zip(*curves, strict=True)]

    def unattacked(self) -> dict[str, dict[str, dict[str, Score]]]:
        """Scores before any attack, mean over targets: by wording, measure and side."""
        by_wording: dict[str, list[Mapping[str, Any]]] = {}
        for one in self._found.get("step_zero", ()):
            by_wording.setdefault(one["wording"], []).append(one)
        return {
            wording: {
                measure: {
                    side: self._over_targets([one[side][measure] for one in found], measure)
                    for side in SIDES
                }
                for measure in self._found["measures"]
            }
            for wording, found in by_wording.items()
        }

    def _over_targets(self, spreads: Sequence[Mapping[str, Any]], measure: str) -> Score:
        by_seed = zip(*(spread["values"] for spread in spreads), strict=True)
        score = _over_seeds([math.fsum(map(real, at)) / len(at) for at in by_seed])
        trials = self._of_each * len(spreads) * len(self.seeds) if measure in self.shares else 0
        errors = self._errors if measure == self.measure else None
        return replace(score, trials=trials, errors=errors)

    def asks_by_other_words(self) -> bool:
        """Whether any attack on a target asks by something else than the concept's name."""
        return any(
            prompt is not None and not find_names(prompt, [compared["concept"]])
            for compared in self._found["comparisons"]
            if compared["role"] == "target"
            for prompt in compared["curves"]["immunized"][0]["config"].get("prompts", [None])
        )

    def delay(self, attack: str) -> Delay:
        """Delay of an attack."""
        found = self._found["summary"][attack]["delay"]
        ratio = found["ratio"]
        slowdown = None if ratio is None else Slowdown(real(ratio), bool(found["censored"]))
        return Delay(
            real(found["threshold"]),
            found["unprotected"],
            found["immunized"],
            found["budget"],
            slowdown,
        )

    def gap(self, kind: str, attack: str, step: int) -> Score:
        """``"msgr"``, ``"control_sgr"`` or ``"new_word_sgr"`` at a step."""
        found = self._found["summary"][attack][kind]
        return Score.of(None if found is None else found["at"][str(step)])

    def least_gap(self, attack: str, step: int) -> tuple[str, Score]:
        """The concept that is protected least at a step, and its SGR."""
        by_concept = self._found["summary"][attack]["sgr"]
        found = {name: Score.of(one["at"][str(step)]) for name, one in by_concept.items()}
        known = {name: score for name, score in found.items() if not math.isnan(score.mean)}
        return min((known or found).items(), key=lambda item: item[1].mean)

    def msgr_at_threshold(self, attack: str) -> Score:
        """MSGR at the step where the unprotected model is taught again; NaN if it never was."""
        return Score.of(self._found["summary"][attack]["msgr_at_threshold"])

    def msgr_interval(self, attack: str, step: int) -> tuple[float, float] | None:
        """What MSGR may be given how few images were judged; 95 %, on the pooled counts.

        Both shares get an interval of 97.5 %, so that both hold together.
        """
        index = self.steps(attack).index(step)
        pair = [self.scores(side, attack)[index] for side in SIDES]
        if not all(score.trials for score in pair):
            return None
        (low0, high0), (low1, high1) = (
            binomial_interval(round(s.mean * s.trials), s.trials, confidence=0.975) for s in pair
        )
        if low0 <= 0.0:
            return None
        return 1.0 - high1 / low0, 1.0 - low1 / high0

    def reached(self, attack: str) -> Score:
        """Highest mean score on the immunized model after step 0."""
        after = zip(self.steps(attack), self.scores("immunized", attack), strict=True)
        return max((score for step, score in after if step > 0), key=lambda score: score.mean)

    def cost(self, attack: str) -> Mapping[str, Any]:
        """What an attack costs its user."""
        cost: Mapping[str, Any] = self._found["costs"][attack]
        return cost

    def retained(self, when: str) -> Score:
        """Quality of what the model shall still draw, ``"before"`` or ``"after"``."""
        found = self._found[f"retained_{when}"].get(self.measure)
        if found is None:
            return Score.of(None)
        return Score.of(found["mean"], self._images * len(found["by_concept"]) * len(self.seeds))

    def retained_change(self) -> Score:
        """The same, after minus before."""
        return Score.of(self._found["retained_change"])

    def with_role(self, role: str) -> Iterator[tuple[str, dict[str, list[Score]]]]:
        """Concepts of a role under the primary attack, with scores by side at each step."""
        for compared in self._found["comparisons"]:
            if (compared["role"], compared["attack"]) == (role, self.attacks[0]):
                sides = {
                    side: [_over_seeds(at) for at in zip(*self._runs(compared, side), strict=True)]
                    for side in SIDES
                }
                yield compared["concept"], sides

    def _runs(self, compared: Mapping[str, Any], side: str) -> list[Sequence[Any]]:
        return [curve["scores"][self.measure] for curve in compared["curves"][side]]

    @property
    def definitions(self) -> Mapping[str, Any]:
        """What the numbers are, by name."""
        definitions: Mapping[str, Any] = self._found["definitions"]
        return definitions


def _pooled_errors(found: Iterable[Mapping[str, Any]]) -> JudgeErrors | None:
    """Errors on all targets together; ``None`` if the judge did not say them."""
    known = [JudgeErrors(**one) for one in found]
    if not known:
        return None
    return JudgeErrors(
        math.fsum(one.sensitivity for one in known) / len(known),
        math.fsum(one.false_positives for one in known) / len(known),
        sum(one.images for one in known),
        # The same images are the others of every target.
        known[0].others,
    )


def _over_seeds(values: Sequence[Any]) -> Score:
    known = [real(value) for value in values]
    return Score(math.fsum(known) / len(known), min(known), max(known), len(known))
