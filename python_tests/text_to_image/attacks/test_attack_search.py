"""The search for an attack's settings: never worse than its own, resumable, bounded."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from immunize_ext.text_to_image.attack_search import Attempts, search_attacks
from immunize_ext.text_to_image.attacks import (
    ATTACKS,
    Adaptation,
    LoRAAttack,
    Outcome,
    search_settings,
)
from immunize_ext.text_to_image.digits.concepts import digit_concepts
from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
from immunize_ext.text_to_image.metrics.generation import Sampling
from immunize_ext.text_to_image.model import TextToImage

pytest.importorskip("optuna")


@dataclass
class Landscape:
    """An attack's outcome as a function of its settings: best at three times its own rate."""

    tried: list[Adaptation] = field(default_factory=list)

    def __call__(self, attack: Adaptation) -> Outcome:
        self.tried.append(attack)
        off = math.log(attack.learning_rate / 0.027)
        return Outcome(math.exp(-(off**2)), attack.learning_rate)


def test_its_own_settings_come_first_and_better_ones_are_found() -> None:
    attempt = Landscape()
    found = search_settings(LoRAAttack(), attempt, trials=25)
    assert attempt.tried[0] == LoRAAttack()
    assert found.own_score == attempt(LoRAAttack()).score
    assert found.score > max(found.own_score, 0.9)
    assert found.attack == replace(LoRAAttack(), **found.settings)
    assert (found.trials, found.diverged) == (25, 0)
    every = [attack.learning_rate for attack in attempt.tried]
    assert min(every) >= 0.0009 * (1 - 1e-12)
    assert max(every) <= 0.09 * (1 + 1e-12)


def test_an_attack_that_ruins_the_model_is_not_chosen() -> None:
    found = search_settings(LoRAAttack(), Landscape(), trials=25, most_lost=0.012)
    assert found.lost <= 0.012
    assert found.score >= found.own_score
    # Where every attempt loses more, the best of them is better than nothing.
    ruined = search_settings(LoRAAttack(), Landscape(), trials=3, most_lost=-0.5)
    assert ruined.trials == 3


def test_a_search_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    whole = Landscape()

    def interrupted(attack: Adaptation) -> Outcome:
        if len(whole.tried) == 3:
            raise KeyboardInterrupt
        return whole(attack)

    with pytest.raises(KeyboardInterrupt):
        search_settings(LoRAAttack(), interrupted, trials=6, journal=journal, made_of="a")
    rest = Landscape()
    found = search_settings(LoRAAttack(), rest, trials=6, journal=journal, made_of="a")
    assert (found.trials, len(rest.tried)) == (6, 3)
    assert found.own_score == whole(LoRAAttack()).score
    again = search_settings(LoRAAttack(), rest, trials=6, journal=journal, made_of="a")
    assert len(rest.tried) == 3  # nothing is made again
    assert replace(again, seconds=0.0) == replace(found, seconds=0.0)
    # Another model, and another attack, are other searches.
    for attack, made_of in ((LoRAAttack(), "b"), (LoRAAttack(prompt="rare_token"), "a")):
        other = Landscape()
        search_settings(attack, other, trials=2, journal=journal, made_of=made_of)
        assert len(other.tried) == 2


def test_a_search_that_was_cut_off_in_its_first_attempt(tmp_path: Path) -> None:
    def interrupted(attack: Adaptation) -> Outcome:
        raise KeyboardInterrupt

    journal = tmp_path / "search.journal"
    with pytest.raises(KeyboardInterrupt):
        search_settings(LoRAAttack(), interrupted, trials=3, journal=journal)
    attempt = Landscape()
    found = search_settings(LoRAAttack(), attempt, trials=3, journal=journal)
    assert attempt.tried[0] == LoRAAttack()
    assert found.own_score == attempt(LoRAAttack()).score


def test_attempts_that_diverge() -> None:
    def above(attack: Adaptation) -> Outcome:
        if attack.learning_rate > 0.009:
            raise FloatingPointError("loss is not finite")
        return Outcome(attack.learning_rate, 0.0)

    found = search_settings(LoRAAttack(), above, trials=12)
    assert 0 < found.diverged < 12
    own = LoRAAttack(learning_rate=0.0091)
    assert math.isnan(search_settings(own, above, trials=12).own_score)
    assert found.attack.learning_rate <= 0.009

    def never(attack: Adaptation) -> Outcome:
        raise FloatingPointError("loss is not finite")

    with pytest.raises(ValueError, match="must not diverge at every setting, got 2 attempts"):
        search_settings(LoRAAttack(), never, trials=2)
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        search_settings(LoRAAttack(), never, trials=0)


def test_no_time_still_tries_the_attack_as_it_is() -> None:
    attempt = Landscape()
    found = search_settings(LoRAAttack(), attempt, trials=50, seconds=1e-9)
    assert found.trials == len(attempt.tried) == 1
    assert found.attack == LoRAAttack()


def test_on_a_pipeline() -> None:
    model = TextToImage(load_digits_pipeline())
    concepts = digit_concepts(("three", "five"), retain=("one",))
    weights = model.digest()

    def brightness(images, concept):
        return float(images.mean())

    attempts = Attempts(
        model, concepts, {"brightness": brightness}, Sampling(images=1, steps=1), 1, 10_000
    )
    attacks = [ATTACKS["kv_fine_tuning"], ATTACKS["lora"]]
    said: list[float] = []
    found = search_attacks(
        attacks, attempts, trials=2, progress=lambda text, share: said.append(share)
    )
    assert [one.attack.name for one in found] == ["kv_fine_tuning", "lora"]
    assert said == [0.25, 0.5, 0.75, 1.0]
    assert model.digest() == weights
    assert "rank" in found[1].settings
    assert "rank" not in found[0].settings
    assert re.fullmatch("[0-9a-f]{64}", attempts.digest())
    assert attempts.digest() != replace(attempts, seed=1).digest()
