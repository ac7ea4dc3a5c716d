"""Attackers of deep extractors: what each trains, what it leaves alone, what it learns."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from immunize_ext.probing.attacks import FineTuningAttack
from immunize_ext.probing.attacks.fine_tuning import _Learner, _Start
from immunize_ext.probing.extractors import FeatureExtractor

Pair = tuple[torch.Tensor, torch.Tensor]


def ring(n: int = 200) -> Pair:
    """Points inside and outside a circle: no linear head tells them apart."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return x, (x.norm(dim=1) > 1.1).long()


def body() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2.0)
    # What comes out is the point itself, nearly: a head alone has next to nothing to go on.
    with torch.no_grad():
        made[0].weight[:2] = 0.1 * torch.eye(2)
        made[0].bias[:2] = 0.0
        made[3].weight.zero_()
        made[3].weight[:, :2] = 10.0 * torch.eye(2)
    return made


def trained(part: Any, **more: Any) -> Any:
    settings = {"learning_rates": (1e-2, 5e-2), "evaluate_at": (0, 5, 150), "batch_size": 64}
    attack = FineTuningAttack(part, **{**settings, **more})
    return attack.run(body(), ring(), ring())


def test_more_that_is_trained_learns_what_a_head_cannot() -> None:
    found = {p: trained(p).accuracy[150] for p in ("head", "last_block", "lora", "full")}
    # A line cuts a ring badly.
    assert found["head"] < 0.75
    assert found["full"] > 0.9
    assert found["lora"] > found["head"] + 0.1
    assert found["last_block"] > found["head"] + 0.1


def test_each_part_trains_what_it_says() -> None:
    # Head: 2 x (2 + 1). Last layer 16 x 2 + 2, first 2 x 16 + 16. LoRA rank 1: 2 + 16 and 16 + 2.
    sizes = {part: trained(part, rank=1, evaluate_at=(0,)).trained for part in ("head", "lora")}
    assert sizes == {"head": 6, "lora": 6 + 18 + 18}
    assert trained("last_block", evaluate_at=(0,)).trained == 6 + 34
    assert trained("last_block", blocks=("0",), evaluate_at=(0,)).trained == 6 + 48
    assert trained("full", evaluate_at=(0,)).trained == 6 + 34 + 48
    with pytest.raises(ValueError, match="blocks must be at most the 2 blocks"):
        trained("last_block", blocks=3)


def test_nothing_is_learnt_in_no_step_and_the_model_is_left_alone() -> None:
    model = FeatureExtractor(body()).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    x, y = ring()
    found = FineTuningAttack("lora", evaluate_at=(0, 3)).run(model, (x, y), (x, y))
    # A head of zeros says class 0 of everything.
    assert found.accuracy[0] == pytest.approx(float((y == 0).double().mean()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_scale_of_features_is_no_protection() -> None:
    scaled = body()
    with torch.no_grad():
        scaled[3].weight.mul_(1024.0)
        scaled[3].bias.mul_(1024.0)
    attack = FineTuningAttack("head", learning_rates=(1e-2,), evaluate_at=(20,), batch_size=64)
    one, other = (attack.run(model, ring(), ring()) for model in (body(), scaled))
    assert one.accuracy == other.accuracy


def test_an_adapter_adds_its_product_to_every_dense_weight() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(4 * 4, 5)
    ).double()
    start = _Start(torch.zeros(5), 1.0, 2)
    learner = _Learner(FineTuningAttack("lora", rank=2, seed=3), model, start, 1e-2)
    assert set(learner.factors) == {"0.weight", "3.weight"}
    for weight, first, second in learner.factors.values():
        assert first.shape == (2, math.prod(weight.shape[1:]))
        with torch.no_grad():
            second.copy_(torch.ones_like(second))
    with torch.no_grad():
        learner.head.normal_(generator=torch.Generator().manual_seed(0))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("0", "3"):
            weight, first, second = learner.factors[f"{name}.weight"]
            changed.get_submodule(name).weight.add_((second @ first).reshape(weight.shape))
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    expected = changed(x).float() @ learner.head[:, :-1].mT + learner.head[:, -1]
    torch.testing.assert_close(learner.scores(x), expected)


def test_the_best_rate_of_each_budget_counts_and_one_that_runs_away_is_none() -> None:
    found = trained("head", learning_rates=(1e-5, 5e-2), evaluate_at=(5, 40))
    alone = trained("head", learning_rates=(5e-2,), evaluate_at=(5, 40))
    assert all(found.accuracy[step] >= alone.accuracy[step] for step in (5, 40))
    assert set(found.rates.values()) <= {1e-5, 5e-2}
    far = trained("full", learning_rates=(1e20,), evaluate_at=(0, 5))
    assert 0.0 <= far.accuracy[5] <= 1.0
    assert trained("full", seed=1) == trained("full", seed=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"part": "tail"}, "part must be one of head"),
        ({"learning_rates": ()}, "learning rates must be finite and positive"),
        ({"head_learning_rate": 0.0}, "learning rates must be finite and positive"),
        ({"evaluate_at": (5, 5)}, "evaluate_at must ascend"),
        ({"evaluate_at": ()}, "evaluate_at must ascend"),
        ({"rank": 0}, "batch_size and rank must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FineTuningAttack(**settings)


def test_labels_are_classes() -> None:
    x, y = ring()
    with pytest.raises(ValueError, match="labels must be classes from 0 on"):
        FineTuningAttack("head").run(body(), (x, 2 * y - 1), (x, y))
