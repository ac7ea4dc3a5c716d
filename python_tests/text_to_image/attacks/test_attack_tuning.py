"""Learning rates tuned on other seeds."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from attack_pipelines import concept, tiny_pipeline
from torch import Tensor

from immunize_ext.text_to_image.attacks import FineTuningAttack, tune_learning_rate
from immunize_ext.text_to_image.model import TextToImage


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage(tiny_pipeline())


def movement(model: TextToImage, step: int) -> dict[str, float]:
    """A score that is best at a known rate: how far the first K weight went from 2e-3 a step."""
    start = TextToImage(tiny_pipeline()).unet.state_dict()
    name = next(n for n in start if n.endswith("attn2.to_k.weight"))
    went = float((model.unet.state_dict()[name] - start[name]).abs().max())
    return {"accuracy": -abs(math.log(max(went, 1e-9) / (2e-3 * max(step, 1))))}


def tune(model: TextToImage, **settings: Any) -> Any:
    arguments: dict[str, Any] = {"rates": (2e-4, 2e-3, 2e-2), "steps": 2, "seeds": (10, 11)}
    attack = FineTuningAttack(scope="kv", weight_decay=0.0)
    return tune_learning_rate(attack, model, [concept()], movement, **(arguments | settings))


def test_the_best_rate_wins(model: TextToImage) -> None:
    seen: list[float] = []
    tuned = tune(model, progress=lambda _, share: seen.append(share))
    assert tuned.rate == tuned.attack.learning_rate == 2e-3
    assert sorted(tuned.table) == [2e-4, 2e-3, 2e-2]
    assert max(tuned.table.values()) == tuned.table[2e-3]
    assert tuned.to_dict()["seeds"] == [10, 11]
    assert "steps 2" in tuned.score
    assert seen == pytest.approx([i / 6 for i in range(1, 7)])


def test_of_equal_rates_the_smallest(model: TextToImage) -> None:
    attack = FineTuningAttack(scope="kv")
    tuned = tune_learning_rate(
        attack,
        model,
        [concept()],
        lambda *_: {"accuracy": 1.0},
        rates=(1e-2, 1e-3),
        steps=1,
        seeds=(10,),
    )
    assert tuned.rate == 1e-3


def test_seeds_of_results_are_refused(model: TextToImage) -> None:
    with pytest.raises(ValueError, match=r"got \[11\] among both"):
        tune(model, reserved_seeds=range(5, 12, 3))
    with pytest.raises(ValueError, match="must not be empty"):
        tune(model, seeds=())
    with pytest.raises(ValueError, match="must not be empty"):
        tune(model, rates=())


class DivergesWhenMoved(TextToImage):
    """Its loss is not finite once a weight has left its start by more than 0.5."""

    def noise_loss(self, *args: Any, **settings: Any) -> Tensor:
        loss = super().noise_loss(*args, **settings)
        largest = max(float(p.detach().abs().max()) for p in self.unet.parameters())
        return loss * (math.nan if largest > 1.5 else 1.0)


def test_rates_that_diverge_lose() -> None:
    model = DivergesWhenMoved(tiny_pipeline())
    tuned = tune(model, rates=(2e-3, 10.0), steps=3, seeds=(10,))
    assert tuned.table[10.0] == -math.inf
    assert tuned.rate == 2e-3
    with pytest.raises(ValueError, match="add smaller"):
        tune(model, rates=(10.0,), steps=3)
