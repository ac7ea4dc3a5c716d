"""MIMA with every merge: what each of them optimises, resumption, scopes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_pipelines import tiny_pipeline
from immunizer_settings import SMALL, concepts, weights

from immunize_ext.ops import merge_moments
from immunize_ext.text_to_image.immunizers import MIMA, GatedMerge, Merge, MomentMerge
from immunize_ext.text_to_image.immunizers.loop import OUTER, Run
from immunize_ext.text_to_image.model import TextToImage

pytest.importorskip("accelerate")


def started(**changes: Any) -> tuple[MIMA, Run, dict[str, torch.Tensor]]:
    """A run before its first step, and its parameters."""
    settings = MIMA(**SMALL | changes)
    run = Run(settings, TextToImage(tiny_pipeline()), concepts(), None, None)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in run.moved.items()}
    return settings, run, leaves


def copies_of(settings: MIMA, run: Run, leaves: dict[str, torch.Tensor]) -> list[Any]:
    draws = settings.inner_draws(run, 0)
    return [
        settings.adapt(run, leaves, [draw[index] for draw in draws], settings.differentiation())
        for index in range(len(run.pools))
    ]


@pytest.mark.parametrize(
    ("kind", "scope"),
    [
        ("closed_form", "attn"),
        ("moments", "attn"),
        ("gated", "attn"),
        ("mean", "kv"),
        ("own_copies", "kv"),
    ],
)
def test_runs_and_goes_on_after_a_stop(kind: Any, scope: Any, tmp_path: Path) -> None:
    settings = replace(MIMA(**SMALL), merge=kind, scope=scope, checkpoint_every=1, moment_batches=1)
    base, whole = (
        TextToImage(tiny_pipeline()),
        settings.fit(TextToImage(tiny_pipeline()), concepts()),
    )
    changed = [
        name for name, w in weights(whole.model).items() if not torch.equal(w, weights(base)[name])
    ]
    assert changed
    assert any(".attn1." in name for name in changed) == (scope == "attn")
    if scope == "kv":
        assert all(name.endswith(("to_k.weight", "to_v.weight")) for name in changed)
    replace(settings, steps=1).fit(TextToImage(tiny_pipeline()), concepts(), resume=tmp_path)
    resumed = settings.fit(TextToImage(tiny_pipeline()), concepts(), resume=tmp_path)
    for name, w in weights(resumed.model).items():
        assert torch.equal(w, weights(whole.model)[name])
    assert whole.config["merge"] == kind


def test_the_mean_is_the_mean_of_every_parameter() -> None:
    settings, run, leaves = started(merge="mean", scope="attn")
    adapted = settings.adapted(run, leaves, 0)
    assert type(run.merge) is Merge
    one, two = copies_of(settings, run, leaves)
    for name in leaves:
        torch.testing.assert_close(adapted[name], (one[name] + two[name]) / 2)


def test_own_copies_meet_their_own_concept() -> None:
    settings, run, leaves = started(merge="own_copies")
    losses = settings.attacked_losses(run, leaves, 0, 0)
    copies = copies_of(settings, run, leaves)
    draws = run.draw(0, OUTER)
    truth = [d.losses(run.model, copy) for d, copy in zip(draws, copies, strict=True)]
    assert torch.equal(losses, torch.cat(truth))
    assert run.merge is None


def test_moments_merge_linear_layers_and_average_the_rest() -> None:
    settings, run, leaves = started(merge="moments", scope="all", moment_batches=2)
    adapted = settings.adapted(run, leaves, 0)
    merge = run.merge
    assert isinstance(merge, MomentMerge)
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in merge.factors}
    assert {"to_k", "to_q", "conv1", "conv2", "linear_1"} <= kinds
    factors = merge.factors
    names = list(factors)
    block = next(name for name in names if name.endswith("attn1.to_q.weight"))
    assert factors[block] is factors[block.replace("to_q", "to_v")]
    (text,) = {
        id(factors[n]) for n in names if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    assert text != id(factors[block])
    copies = copies_of(settings, run, leaves)
    (merged,) = merge_moments([leaves[block]], [[c[block]] for c in copies], factors[block])
    assert torch.equal(adapted[block], merged)
    mean = (copies[0][block] + copies[1][block]) / 2
    assert not torch.allclose(merged, mean, rtol=1e-4, atol=1e-6)
    for name in leaves:
        if name not in factors:
            torch.testing.assert_close(adapted[name], (copies[0][name] + copies[1][name]) / 2)
    loss = settings.attacked_losses(run, leaves, 0, 0).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(leaves.values())))


def test_gates_go_between_base_mean_and_moments_and_down_the_loss() -> None:
    settings, run, leaves = started(merge="gated", scope="attn", moment_batches=1)
    adapted = settings.adapted(run, leaves, 0)
    merge = run.merge
    assert isinstance(merge, GatedMerge)
    copies = copies_of(settings, run, leaves)
    name = next(n for n in merge.factors if n.endswith("attn1.to_q.weight"))
    assert merge.groups[name] > 1
    assert merge.groups[name.replace("to_q", "to_out.0")] == 1
    (merged,) = merge_moments([leaves[name]], [[c[name]] for c in copies], merge.factors[name])
    mean = (copies[0][name] + copies[1][name]) / 2
    torch.testing.assert_close(adapted[name], (leaves[name] + mean + merged) / 3)

    def loss() -> torch.Tensor:
        return settings.attacked_losses(run, leaves, 0, 0).mean()

    first = loss()
    (-first).backward()  # as the loop does: theta descends what the gates go up
    moved = run.memory["gates"]
    assert float(moved.abs().amax()) == pytest.approx(settings.gate_rate, rel=1e-5)
    assert float(loss().detach()) < float(first.detach())
    # Probes, which go through no backward pass, leave them.
    assert torch.equal(run.memory["gates"], moved)
    shares = settings.diagnosis(run, leaves, 1)
    assert sum(v for k, v in shares.items() if k.startswith("gate")) == pytest.approx(1.0)


def test_merges_that_cannot_be_are_refused() -> None:
    for changes, words in (
        ({"merge": "ties"}, "merge must be one of closed_form, moments, gated, mean, own_copies"),
        ({"moment_batches": 0}, "moment_batches must be at least 1"),
        ({"merge": "own_copies", "variant": "alternating"}, "must have one model to go on from"),
        ({"merge": "gated", "variant": "alternating"}, "merge must be another one"),
        ({"gate_rate": -1.0}, "gate_rate must be finite and at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            MIMA(**SMALL | changes)
