"""Immunization under many words: who is drawn, what the concepts weigh, how Adam adapts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from attack_pipelines import concept, tiny_pipeline
from immunizer_settings import SMALL, concepts

from immunize_ext.text_to_image.immunizers import ManyWords
from immunize_ext.text_to_image.immunizers.loop import PROBE_STEP, Run
from immunize_ext.text_to_image.model import TextToImage

SETTINGS: dict[str, Any] = {k: v for k, v in SMALL.items() if k != "inner_rate"} | {
    "rare_words": ("sks",),
    "unrelated_prompts": ("a red dog",),
    "attacker_steps": 2,
}


def run_of(**settings: Any) -> Run:
    chosen = ManyWords(**SETTINGS | settings)
    return Run(chosen, TextToImage(tiny_pipeline()), concepts(), None, None)


def leaves_of(run: Run) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in run.moved.items()}


def test_attackers_ask_by_name_by_a_rare_word_and_by_something_else() -> None:
    chosen = ManyWords(**SETTINGS)
    three = concept("three")
    own = list(three.prompts[:2])
    assert chosen.wordings(three) == [*own, "a photo of the digit sks", "a red dog"]
    assert chosen.kept_prompts(concepts()) == ["a photo of the digit sks", "a red dog"]
    # Without its name in the prompt there is no place for another word.
    nameless = concept("three", prompts=("a red cat",))
    assert chosen.other_wordings(nameless) == ["a red dog"]
    generator = torch.Generator().manual_seed(0)
    drawn = [chosen._wording(2, 4, generator) for _ in range(400)]
    assert set(drawn) == {0, 1, 2, 3}
    assert sum(index < 2 for index in drawn) / 400 == pytest.approx(0.4, abs=0.08)
    by_name = replace(chosen, own_share=1.0)
    assert {by_name._wording(2, 4, generator) for _ in range(50)} == {0, 1}
    # All of a batch ask alike.
    batch = run_of().pools[0].draw(5, generator, 3)
    assert bool((batch.conditioning.hidden == batch.conditioning.hidden[0]).all())


def test_what_is_kept_is_kept_under_those_words_too() -> None:
    run = run_of()
    # Two concepts, the empty prompt, two words.
    assert len(run.retain.pools) == 5
    assert [len(pool.latents) for pool in run.retain.pools[2:]] == [
        sum(len(pool.latents) for pool in run.retain.pools[:2])
    ] * 3


def test_without_steps_of_attackers_it_is_the_gradient_at_the_model_itself() -> None:
    run = run_of(attacker_steps=0)
    leaves = leaves_of(run)
    run.settings.prepare(run, leaves, 0)
    losses = run.settings.attacked_losses(run, leaves, 0, 0)
    assert not run.inner_losses
    losses.mean().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    again = leaves_of(run)
    attacked = run_of(attacker_steps=3, attacker_rate=1e-2)
    attacked.settings.prepare(attacked, again, 0)
    losses = attacked.settings.attacked_losses(attacked, again, 1, 0)
    losses.mean().backward()
    assert attacked.inner_losses
    assert any(not torch.equal(gradients[name], leaf.grad) for name, leaf in again.items())


@pytest.mark.parametrize(("layers", "part"), [("attn2", ".attn2."), ("attention", ".attn")])
def test_an_attacker_trains_its_layers_alone(layers: str, part: str) -> None:
    """A layer that it leaves alone still gets a gradient of what it ends at."""
    from immunize_ext.text_to_image.immunizers.many_words import _layers

    run = run_of(attackers=(layers,))
    leaves = leaves_of(run)
    assert set(_layers(run, leaves, layers)) == {name for name in leaves if part in name}
    assert set(_layers(run, leaves, "all")) == set(leaves)
    run.settings.prepare(run, leaves, 0)
    run.settings.attacked_losses(run, leaves, 0, 0).mean().backward()
    assert bool(leaves["conv_in.weight"].grad.any())


def test_concepts_that_hold_badly_weigh_more() -> None:
    """Hedge: weights go as exp(-eta times the losses so far); a probe changes nothing."""
    run = run_of(concept_rate=0.5)
    chosen: Any = run.settings
    leaves = leaves_of(run)
    chosen.prepare(run, leaves, 0)
    losses = torch.tensor([1.0, 1.0, 3.0, 3.0])
    assert float(chosen.over_concepts(run, losses, 0)) == pytest.approx(2.0)
    chosen.prepare(run, leaves, 1)
    first = torch.tensor([-0.5, -1.5]).softmax(0)
    expected = float(first[0] * 1.0 + first[1] * 3.0)
    assert float(chosen.over_concepts(run, losses, 1)) == pytest.approx(expected, rel=1e-6)
    assert float(chosen.over_concepts(run, losses, PROBE_STEP)) == pytest.approx(2.0)
    before = {name: value.clone() for name, value in run.memory.items()}
    chosen.attacked_losses(run, leaves, PROBE_STEP, 0)
    assert all(torch.equal(run.memory[name], value) for name, value in before.items())


def test_the_rate_falls_to_nothing_in_the_cooldown() -> None:
    chosen = ManyWords(steps=10, learning_rate=1.0, cooldown=0.5)
    rates = [chosen.rate(step) for step in range(10)]
    assert rates == pytest.approx([1.0] * 6 + [0.8, 0.6, 0.4, 0.2])
    assert ManyWords(steps=10, learning_rate=1.0, cooldown=0.0).rate(9) == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attackers": ()}, "attackers must be among"),
        ({"attackers": ("decoder",)}, "attackers must be among"),
        ({"attacker_steps": -1}, "attacker_steps must be at least 0"),
        ({"attacker_rate": 0.0}, "attacker_rate must be positive"),
        ({"concept_rate": -0.1}, "concept_rate must be finite"),
        ({"own_share": 1.5}, "own_share must be 0 to 1"),
        ({"cooldown": float("nan")}, "cooldown must be 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ManyWords(**settings)


def test_cvar_looks_at_the_worst_concepts_in_probes_too() -> None:
    run = run_of(weighting="cvar", worst_share=0.5)
    chosen: Any = run.settings
    losses = torch.tensor([1.0, 2.0, 4.0, 6.0])
    for step in (0, PROBE_STEP):
        assert float(chosen.over_concepts(run, losses, step)) == pytest.approx(1.5)
    assert not run.memory
