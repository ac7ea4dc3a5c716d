"""Erasure, merges, attacks and adapters where text enters once and attention is joint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from attack_pipelines import concept, tiny_flux_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline
from immunizer_settings import CAPTIONS, SMALL, concepts, weights

from immunize_ext.ops import read_lora
from immunize_ext.text_to_image.attacks import ATTACKS, FineTuningAttack, LoRAAttack, save_lora
from immunize_ext.text_to_image.immunizers import MIMA, ClassMerge, ConceptMerge, erase
from immunize_ext.text_to_image.immunizers.concept_merge import summary
from immunize_ext.text_to_image.immunizers.loop import Run
from immunize_ext.text_to_image.immunizers.token_rows import own_tokens
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import text_entrances
from immunize_ext.text_to_image.text_layers import find_text_layers

JOINT = pytest.mark.parametrize(
    "make", [tiny_sd3_pipeline, tiny_flux_pipeline], ids=["sd3", "flux"]
)
POOLED = pytest.mark.parametrize(
    "make",
    [tiny_xl_pipeline, tiny_sd3_pipeline, tiny_flux_pipeline],
    ids=["sdxl", "sd3", "flux"],
)


def _predicted(model: TextToImage, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(4, 4, 8, 8, generator=generator)
    with torch.no_grad():
        times = torch.tensor([100.0, 300.0, 600.0, 900.0])
        return model.predict(noisy, times, model.conditioning([prompt]))


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- erasure --------------------------------------------------------------------------------------


@POOLED
def test_the_pooled_vector_is_erased_too(make: Any) -> None:
    model = TextToImage(make())
    prompt, anchored = "a photo of the digit three", "a photo of the digit digit"
    goal = _predicted(model, anchored)
    before = _apart(_predicted(model, prompt), goal)
    [pooled] = [e for e in text_entrances(model.unet) if e.role == "pooled"]
    old = pooled.module.weight.detach().clone()
    state = weights(model)
    edit = erase(model, concepts("three"))
    after = _apart(_predicted(model, prompt), goal)
    assert after < 0.15 * before
    with torch.no_grad():
        new = pooled.module.weight.clone()
        pooled.module.weight.copy_(old)
        tokens_alone = _apart(_predicted(model, prompt), goal)
        pooled.module.weight.copy_(new)
    # Edited tokens alone leave the prompt about as far from the anchor's as it was.
    assert tokens_alone > 0.5 * before
    changed = {n for n, p in weights(model).items() if not torch.equal(p, state[n])}
    assert changed == {e.weight_name for e in text_entrances(model.unet)}
    edit.undo()
    assert all(torch.equal(p, state[name]) for name, p in weights(model).items())


@JOINT
def test_prompts_that_are_kept_move_less(make: Any) -> None:
    model = TextToImage(make())
    three, six = "a photo of the digit three", "a photo of the digit six"
    olds = {text: _predicted(model, text) for text in (three, six)}
    erase(model, [concept("three")], preserve=[six], ridge=1e-3, preserve_scale=1.0)
    moved = {text: _apart(_predicted(model, text), old) for text, old in olds.items()}
    assert moved[six] < 0.5 * moved[three]


# --- own tokens -----------------------------------------------------------------------------------


def test_own_rows_of_an_encoder_that_looks_both_ways_are_those_the_name_moves() -> None:
    model = TextToImage(tiny_flux_pipeline())
    one = concept("three", prompts=("a photo of the digit three",), anchor="digit")
    [rows] = own_tokens(model, [one], 1)
    with torch.no_grad():
        before, after = (
            model.conditioning([text]).hidden[0]
            for text in ("a photo of the digit three", "a photo of the digit digit")
        )
    # Six words and the end of the text; what lies behind is padding, whatever it is.
    share = (before - after)[:7].norm(dim=1) / before[:7].norm(dim=1)
    assert torch.equal(rows, before[:7][share > 0.25])
    assert bool(share[5] > 0.25)  # the name itself
    # An anchor of two words: what follows the name is compared with where it went.
    long = concept("three", prompts=("a photo of three red cat",), anchor="seven dog")
    [shifted] = own_tokens(model, [long], 1)
    assert 1 <= len(shifted) <= 7


def test_both_encoders_of_sd3_give_rows() -> None:
    model = TextToImage(tiny_sd3_pipeline())
    pair = concepts().concepts
    found = own_tokens(model, pair, 2)
    with torch.no_grad():
        hidden = model.conditioning(list(pair[0].prompts[:2])).hidden
    of_clip = (found[0][:, None] == hidden[:, :12].reshape(1, -1, 64)).all(-1).any(1)
    of_t5 = (found[0][:, None] == hidden[:, 12:].reshape(1, -1, 64)).all(-1).any(1)
    assert int(of_clip.sum()) == 4  # as in a UNet: name and end of text in two prompts
    assert bool(of_t5.any())
    assert bool((of_clip | of_t5).all())


# --- merges ---------------------------------------------------------------------------------------


def _copies(base: dict[str, torch.Tensor], size: float = 0.1) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        found.append(
            {
                n: w + size * torch.randn(w.shape, generator=generator, dtype=w.dtype)
                for n, w in base.items()
            }
        )
    return found


@POOLED
def test_every_entrance_answers_each_concept_as_its_own_copy_does(make: Any) -> None:
    pipeline = make()
    pipeline.to(torch.float64)
    model = TextToImage(pipeline)
    found = concepts()
    merge = ConceptMerge(model, found.concepts, CAPTIONS, ridge=1e-3)
    base = {name: p for name, p in weights(model).items() if "resnets" not in name}
    copies = _copies(base)
    merged = merge(base, copies)
    assert list(merged) == list(base)
    layers = {e.weight_name: e for e in text_entrances(model.unet)}
    assert set(merge.weights) == set(layers)
    for entrance in merge.entrances:
        for index, weight in enumerate(entrance.take(merged)):
            for rows, copy in zip(entrance.embeddings, copies, strict=True):
                wanted = rows @ entrance.take(copy)[index].mT
                assert float((rows @ weight.mT - wanted).norm() / wanted.norm()) < 1e-9
    # Through the layer itself, bias and all: the outputs for a concept's prompts are its copy's.
    [pooled] = [e for e in layers.values() if e.role == "pooled"]
    for one, copy in zip(found.concepts, copies, strict=True):
        rows = model.received(model.conditioning(one.prompts[:2]), pooled.name)
        bias = pooled.weight_name.replace("weight", "bias")
        ours = rows @ merged[pooled.weight_name].mT + merged[bias]
        theirs = rows @ copy[pooled.weight_name].mT + copy[bias]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@JOINT
def test_layers_are_merged_by_their_class(make: Any) -> None:
    settings = MIMA(**SMALL, merge="by_class", scope="attn", moment_batches=1)
    run = Run(settings, TextToImage(make()), concepts(), None, None)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in run.moved.items()}
    merged = settings.adapted(run, leaves, 0)
    assert isinstance(run.merge, ClassMerge)
    exact, by_moments = set(run.merge.exact.weights), set(run.merge.moments.factors)
    assert not exact & by_moments
    kinds = {f"{x.name}.weight": x.kind for x in find_text_layers(run.model.unet)}
    assert {kinds[name] for name in by_moments} == {"modulated", "propagated"}
    assert {"transformer_blocks.0.attn.add_k_proj.weight"} <= by_moments
    assert {n for n in merged if n.endswith(".weight") and "norm" not in n} == exact | by_moments
    draws = settings.inner_draws(run, 0)
    how = settings.differentiation()
    copies = [settings.adapt(run, leaves, [d[i] for d in draws], how) for i in range(2)]
    for entrance in run.merge.exact.entrances:
        for index, weight in enumerate(entrance.take(merged)):
            for rows, copy in zip(entrance.embeddings, copies, strict=True):
                start = entrance.take(leaves)[index]
                moved = rows @ (entrance.take(copy)[index] - start).mT
                missed = rows @ (weight - entrance.take(copy)[index]).mT
                assert float(missed.detach().norm()) < 0.02 * float(moved.detach().norm())


def test_layers_merged_by_moments_are_reported_too() -> None:
    problem = concepts()
    settings = MIMA(**SMALL, merge="by_class", scope="attn", moment_batches=1)
    run = Run(settings, TextToImage(tiny_sd3_pipeline()), problem, None, None)
    base = {n: p.detach().clone() for n, p in run.moved.items()}
    settings.adapted(run, base, 0)
    merge = run.merge
    assert isinstance(merge, ClassMerge)
    merge.reports = []
    # The copies leave alone what has constraints: all there is to say is about the others.
    copies = [
        {n: 30.0 * w if n in merge.moments.factors else base[n] for n, w in copy.items()}
        for copy in _copies(base)
    ]
    merge(base, copies)
    exact, moments = merge.reports[:-1], merge.reports[-1]
    assert all(report.left is None for report in exact)
    assert moments.left is not None
    assert len(moments.relative_change) == len(merge.moments.factors)
    assert set(moments.residual) == set(problem.names)
    assert max(max(report.relative_change) for report in exact) < 1e-6
    change, said = summary(merge.reports)
    assert change == max(moments.relative_change) > 1.0
    assert any("times its own norm" in text for text in said)


def test_moments_leave_padding_out() -> None:
    settings = MIMA(**SMALL, merge="moments", scope="attn2", moment_batches=1)
    run = Run(settings, TextToImage(tiny_flux_pipeline()), concepts(), None, None)
    from immunize_ext.text_to_image.immunizers.concept_merge import _Predicting

    [batch, _] = run.draw(0, 0)
    names = [
        "unet.transformer_blocks.0.attn.add_k_proj",
        "unet.single_transformer_blocks.0.proj_mlp",
    ]
    found = _Predicting(run.model).moments(names, [batch])
    words = int(batch.conditioning.mask.sum())
    assert 0 < words < 20
    assert found[names[0]].rows == words
    assert found[names[1]].rows == words + len(batch.latents) * 16
    # By hand: what the layer received, word by word.
    heard: list[torch.Tensor] = []
    layer = run.model.unet.get_submodule(names[0].removeprefix("unet."))
    handle = layer.register_forward_pre_hook(lambda _, x: heard.append(x[0].detach()))
    with torch.no_grad():
        batch.prediction(run.model)
    handle.remove()
    rows = heard[0][batch.conditioning.mask].double()
    torch.testing.assert_close(found[names[0]].gram, rows.mT @ rows)


# --- methods and attacks --------------------------------------------------------------------------


@JOINT
@pytest.mark.parametrize("merge", ["closed_form", "by_class"])
def test_mima_immunizes_and_what_it_saves_is_loaded(make: Any, merge: Any, tmp_path: Path) -> None:
    settings = MIMA(**SMALL, merge=merge, moment_batches=1)
    model = TextToImage(make())
    before = weights(model)
    immunized = settings.fit(model, concepts())
    after = weights(immunized.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "context_embedder.weight" in changed
    assert any(".attn.add_k_proj.weight" in name for name in changed)
    assert not any(".attn.to_q." in name or ".ff." in name for name in changed)
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())
    immunized.save(tmp_path / "out")
    again = TextToImage.from_pretrained(tmp_path / "out")
    prompts = ["a photo of the digit three"]
    torch.testing.assert_close(
        again.generate(prompts, steps=1), immunized.model.generate(prompts, steps=1)
    )


@JOINT
@pytest.mark.parametrize(
    "attack",
    [
        LoRAAttack(images=4, batch_size=2),
        LoRAAttack(targets="blocks", train_text_encoder=True, images=4, batch_size=2),
        FineTuningAttack(images=4, batch_size=2),
        ATTACKS["custom_diffusion"],
    ],
    ids=["lora", "locon_with_text", "full", "custom_diffusion"],
)
def test_attacks_train_by_flow_matching(make: Any, attack: Any) -> None:
    from dataclasses import replace

    attack = replace(attack, images=4, batch_size=2, prior=None)
    adapted = attack.adapt(TextToImage(make()), [concept()], steps=3)
    part = "transformer."
    assert any(name.startswith(part) for name in adapted.weights)
    assert all(loss > 0.0 for loss in adapted.curve.losses)
    again = attack.adapt(TextToImage(make()), [concept()], steps=3)
    assert adapted.curve.losses == again.curve.losses


def test_what_flow_matching_has_not_is_refused() -> None:
    attack = LoRAAttack(snr_gamma=5.0, images=2, batch_size=2)
    with pytest.raises(ValueError, match="snr_gamma: must be None for flow matching"):
        attack.run(TextToImage(tiny_flux_pipeline()), [concept()], steps=1)


# --- adapters -------------------------------------------------------------------------------------


@POOLED
def test_an_attacks_adapter_in_plain_diffusers(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapted = LoRAAttack(images=4, batch_size=2, alpha=2.0).adapt(
        TextToImage(make()), [concept()], steps=3
    )
    folder = save_lora(tmp_path / "adapter", adapted)
    part = adapted.model.backbone.component
    assert all(name.startswith(f"{part}.") for name in read_lora(folder))
    pipeline = make()
    pipeline.load_lora_weights(folder)
    prompts = ["a photo of the digit three"]
    untouched = TextToImage(make()).generate(prompts, steps=2)
    ours, theirs = (m.generate(prompts, steps=2) for m in (adapted.model, TextToImage(pipeline)))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert float((ours - untouched).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="must hold a LoRA adapter, got full_fine_tuning"):
        save_lora(
            tmp_path / "none", FineTuningAttack().adapt(TextToImage(make()), [concept()], steps=0)
        )


@POOLED
def test_an_erasure_as_an_adapter_in_plain_diffusers(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from immunize_ext.ops import adapter_of_change
    from immunize_ext.ops.lora_files import write_lora

    before, after = TextToImage(make()), TextToImage(make())
    erase(after, [concept("three")], ridge=1e-3)
    change = adapter_of_change(before.unet, after.unet, prefix=after.backbone.component)
    assert {f"{after.backbone.component}.{e.name}" for e in text_entrances(after.unet)} == set(
        change.layers
    )
    pipeline = make()
    pipeline.load_lora_weights(write_lora(change.layers, tmp_path / "a", format="diffusers"))
    prompts = ["a photo of the digit three"]
    torch.testing.assert_close(
        TextToImage(pipeline).generate(prompts, steps=2),
        after.generate(prompts, steps=2),
        rtol=1e-4,
        atol=1e-4,
    )
