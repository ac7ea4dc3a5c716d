"""Every family of denoisers behind one view: what text does to its layers, flow matching, files."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from attack_pipelines import tiny_flux_pipeline, tiny_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline

from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.objectives import (
    FlowMatching,
    NoisePrediction,
    is_flow_matching,
    objective_of,
)
from immunize_ext.text_to_image.projections import (
    attention_blocks,
    describe_projections,
    find_text_projections,
    linear_layers,
    text_entrances,
)
from immunize_ext.text_to_image.text_layers import find_text_layers

PROMPTS = ["a photo of the digit three", "a handwritten five"]
JOINT = pytest.mark.parametrize(
    "make", [tiny_sd3_pipeline, tiny_flux_pipeline], ids=["sd3", "flux"]
)
ALL = pytest.mark.parametrize(
    "make",
    [tiny_pipeline, tiny_xl_pipeline, tiny_sd3_pipeline, tiny_flux_pipeline],
    ids=["sd", "sdxl", "sd3", "flux"],
)


def _latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- what text does to layers ---------------------------------------------------------------------


@JOINT
def test_text_enters_a_joint_model_twice(make: Any) -> None:
    model = TextToImage(make())
    entrances = text_entrances(model.unet)
    assert {e.name: e.role for e in entrances} == {
        "context_embedder": "context",
        "time_text_embed.text_embedder.linear_1": "pooled",
    }
    assert [e.name for e in find_text_projections(model.unet)] == ["context_embedder"]
    assert "(1 context, 1 pooled)" in describe_projections(entrances)
    exact = {layer.name for layer in find_text_layers(model.unet) if layer.kind == "exact"}
    # The second layer of the pooled vector's network is exact too, and fed by the first.
    assert exact == {e.name for e in entrances} | {"time_text_embed.text_embedder.linear_2"}


@JOINT
def test_the_first_block_is_modulated_and_what_follows_is_propagated(make: Any) -> None:
    layers = {layer.name: layer for layer in find_text_layers(make().transformer)}
    for part in ("add_q_proj", "add_k_proj", "add_v_proj"):
        first, second = (layers[f"transformer_blocks.{i}.attn.{part}"] for i in (0, 1))
        assert (first.kind, first.rows) == ("modulated", "text")
        assert (second.kind, second.rows) == ("propagated", "text")
    # What scales and shifts by the time knows the pooled vector, and no image.
    assert layers["norm_out.linear"].kind == "modulated"
    # The image's own queries see the pooled vector by way of their scale and shift.
    assert layers["transformer_blocks.0.attn.to_q"].kind == "propagated"
    assert layers["transformer_blocks.0.attn.to_q"].rows == "image"
    assert not any(name.startswith(("x_embedder", "time_text_embed.timestep")) for name in layers)


def test_single_blocks_see_text_and_image_in_one_sequence_text_first() -> None:
    model = TextToImage(tiny_flux_pipeline())
    layers = {layer.name: layer for layer in find_text_layers(model.unet)}
    name = "single_transformer_blocks.0.attn.to_k"
    assert (layers[name].kind, layers[name].rows) == ("propagated", "joint")
    heard: list[torch.Tensor] = []
    double = model.unet.transformer_blocks[-1]
    double.register_forward_hook(lambda *a: heard.append(a[2][0]))
    single = model.unet.single_transformer_blocks[0].norm
    single.register_forward_pre_hook(lambda _, x: heard.append(x[0]))
    found = model.conditioning(PROMPTS)
    model.noise_loss(_latents(), found)
    text, both = heard
    assert both.shape[1] == found.hidden.shape[1] + 16
    assert torch.equal(both[:, : text.shape[1]], text)


def test_classes_of_a_unet() -> None:
    layers = find_text_layers(tiny_xl_pipeline().unet)
    by_name = {layer.name: layer for layer in layers}
    assert (by_name["add_embedding.linear_1"].kind, by_name["add_embedding.linear_1"].rows) == (
        "exact",
        "prompt",
    )
    assert by_name["add_embedding.linear_1"].entrance
    assert not by_name["add_embedding.linear_2"].entrance
    kinds = Counter(layer.kind for layer in layers if ".attn2.to_k" in layer.name)
    assert set(kinds) == {"exact"}
    # The pooled vector is added to the time, so residual blocks see both.
    assert by_name["mid_block.resnets.0.time_emb_proj"].kind == "modulated"
    plain = {layer.name for layer in find_text_layers(tiny_pipeline().unet)}
    assert "mid_block.resnets.0.time_emb_proj" not in plain


@ALL
def test_probing_changes_nothing(make: Any) -> None:
    unet = TextToImage(make()).unet
    unet.train()
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    random = torch.get_rng_state()
    find_text_layers(unet)
    assert all(module.training for module in unet.modules())
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in unet.modules())


@contextmanager
def _calls(denoiser: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts calls without a hook: a model with hooks is probed each time."""
    counted: list[int] = []
    forward = type(denoiser).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(denoiser), "forward", counting)
        yield counted


@ALL
def test_a_model_is_probed_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TextToImage(make())
    first = find_text_layers(model.unet)
    with _calls(model.unet, monkeypatch) as counted:
        assert find_text_layers(model.unet) == first
        text_entrances(model.unet)
        for scope in ("kv", "attn2", "attention"):
            linear_layers("test", model.unet, scope)
        assert not counted
        # A clone has layers of its own.
        clone = model.clone()
        again = find_text_layers(clone.unet)
        assert counted
    assert [x.name for x in again] == [x.name for x in first]
    for layer in again:
        assert layer.module is clone.unet.get_submodule(layer.name)
        assert layer.module is not model.unet.get_submodule(layer.name)


def test_what_changes_a_model_makes_it_be_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_sd3_pipeline().transformer
    last = "transformer_blocks.1.attn.add_k_proj"
    gate, gated = (
        "transformer_blocks.0.norm1_context.linear",
        "transformer_blocks.0.attn.add_k_proj",
    )

    def kinds() -> dict[str, str]:
        return {layer.name: layer.kind for layer in find_text_layers(unet)}

    whole = kinds()
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    assert whole[gated] == "modulated"
    with torch.no_grad():
        unet.get_submodule(gate).weight.zero_()
    assert kinds()[gated] == "exact"
    # Past the count of writes, as some libraries do it.
    for name, parameter in unet.named_parameters():
        parameter.data.copy_(state[name])
    assert kinds() == whole
    # Another module in a layer's place, as adapters are injected.
    old = unet.get_submodule(last)
    unet.transformer_blocks[1].attn.add_k_proj = nn.Linear(old.in_features, old.out_features)
    [found] = [layer for layer in find_text_layers(unet) if layer.name == last]
    assert found.module is unet.get_submodule(last)
    assert found.module is not old
    # Hooks may do anything.
    handle = unet.get_submodule(gate).register_forward_hook(lambda _m, _x, y: 0.0 * y)
    assert kinds()[gated] == "exact"
    handle.remove()
    assert kinds() == whole
    # What is no number equals nothing.
    with torch.no_grad():
        unet.get_submodule(gate).weight[0, 0] = float("nan")
    kinds()
    with _calls(unet, monkeypatch) as counted:
        kinds()
        assert counted


def test_a_forgotten_model_is_freed() -> None:
    pipeline = tiny_pipeline()
    find_text_layers(pipeline.unet)
    gone = weakref.ref(pipeline.unet)
    del pipeline
    gc.collect()
    assert gone() is None


def test_adapters_are_probed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    unet = tiny_pipeline().unet
    plain = find_text_layers(unet)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]))
    wrapped = {layer.name: layer.module for layer in find_text_layers(unet)}
    name = next(layer.name for layer in plain if layer.name.endswith("attn2.to_k"))
    assert hasattr(wrapped[name], "base_layer")
    with _calls(unet, monkeypatch) as counted:
        find_text_layers(unet)
        assert counted


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="must be of a family that is known, got Linear"):
        find_text_layers(nn.Linear(2, 2))
    pipeline = tiny_flux_pipeline()
    pipeline.transformer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="of a family that is known, got Linear"):
        TextToImage(pipeline)
    pipeline = tiny_flux_pipeline()
    pipeline.scheduler = tiny_pipeline().scheduler
    with pytest.raises(ValueError, match=r"no flow matching \(DDIMScheduler\)"):
        TextToImage(pipeline)


@JOINT
def test_scopes_of_a_joint_model_are_nested(make: Any) -> None:
    unet = make().transformer
    entrances = {e.name for e in text_entrances(unet)}
    kv, attn2, attention = (
        set(linear_layers("test", unet, s)) for s in ("kv", "attn2", "attention")
    )
    assert kv == entrances
    assert kv < attn2 < attention
    of_tokens = {layer.name for layer in find_text_layers(unet) if layer.rows == "text"}
    assert attn2 - kv == {name for name in of_tokens if ".attn." in name}
    assert "transformer_blocks.0.attn.to_q" in attention - attn2
    blocks = attention_blocks("test", unet, "attention")
    assert not any(a != b and a.startswith(f"{b}.") for a in blocks for b in blocks)


# --- the view -------------------------------------------------------------------------------------


@JOINT
def test_the_denoiser_is_called_as_the_pipeline_calls_it(make: Any) -> None:
    pipeline = make()
    model = TextToImage(pipeline)
    received: list[dict[str, Any]] = []
    outputs: list[torch.Tensor] = []
    handles = [
        model.unet.register_forward_pre_hook(
            lambda _, args, kwargs: received.append(kwargs), with_kwargs=True
        ),
        model.unet.register_forward_hook(lambda *a: outputs.append(a[2][0])),
    ]
    model.generate(PROMPTS, steps=1, guidance=1.0)
    [theirs], [output] = received, outputs
    with torch.no_grad():
        found = model.conditioning(PROMPTS)
    assert torch.equal(found.hidden, theirs["encoder_hidden_states"])
    assert torch.equal(found.pooled, theirs["pooled_projections"])
    # The same noisy latents by our call: unpacked where the pipeline packs them.
    noisy = theirs["hidden_states"]
    if noisy.dim() == 3:
        noisy = pipeline._unpack_latents(noisy, 8, 8, 1)
    time = theirs["timestep"] * (1000.0 if "img_ids" in theirs else 1.0)
    ours = model.predict(noisy, time, found)
    for handle in handles:
        handle.remove()
    assert received[1].keys() >= {"timestep"}
    for name in ("hidden_states", "timestep", "img_ids", "txt_ids"):
        if name in theirs:
            torch.testing.assert_close(received[1][name], theirs[name])
    expected = output if output.dim() == 4 else pipeline._unpack_latents(output, 8, 8, 1)
    torch.testing.assert_close(ours, expected)


def test_distilled_guidance_is_given() -> None:
    model = TextToImage(tiny_flux_pipeline(guidance=True))
    seen: list[torch.Tensor] = []
    model.unet.register_forward_pre_hook(
        lambda _, a, k: seen.append(k["guidance"]), with_kwargs=True
    )
    model.noise_loss(_latents(), model.conditioning(PROMPTS))
    assert seen[0].tolist() == [3.5, 3.5]


@JOINT
def test_masks_mark_words_and_no_padding(make: Any) -> None:
    model = TextToImage(make())
    found = model.conditioning(PROMPTS)
    parts = len(model.segments(found.hidden.shape[1]))
    assert found.mask.sum(1).tolist() == [6 * parts, 3 * parts]
    assert sum(s.length for s in model.segments(found.hidden.shape[1])) == found.hidden.shape[1]


def test_without_t5_its_positions_hold_nothing() -> None:
    model = TextToImage(tiny_sd3_pipeline(t5=False))
    found = model.conditioning(PROMPTS)
    assert found.mask.sum(1).tolist() == [6, 3]
    assert not bool(found.hidden[:, 12:].any())


@JOINT
def test_clones_and_files(make: Any, tmp_path: Path) -> None:
    model = TextToImage(make())
    clone = model.clone()
    images = model.generate(PROMPTS, steps=2)
    assert images.shape == (2, 3, 8, 8)
    assert torch.equal(clone.generate(PROMPTS, steps=2), images)
    model.save(tmp_path / "pipeline")
    again = TextToImage.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(again.generate(PROMPTS, steps=2), images)
    assert again.digest() == model.digest()


def test_a_denoiser_without_a_size_keeps_the_one_it_is_given(tmp_path: Path) -> None:
    model = TextToImage(tiny_flux_pipeline())
    assert model.image_size == 8
    model.image_size = 12
    assert model.clone().generate(PROMPTS, steps=1).shape[-2:] == (12, 12)
    model.save(tmp_path / "pipeline")
    assert TextToImage.from_pretrained(tmp_path / "pipeline").image_size == 12
    fixed = TextToImage(tiny_sd3_pipeline())
    fixed.image_size = 12
    assert fixed.image_size == 8


@ALL
def test_what_a_layer_receives_of_text_alone(make: Any) -> None:
    model = TextToImage(make())
    found = model.conditioning(PROMPTS)
    for entrance in text_entrances(model.unet):
        rows = model.received(found, entrance.name)
        if entrance.role == "pooled":
            assert torch.equal(rows[:, : found.pooled.shape[1]], found.pooled)
        else:
            assert torch.equal(rows, found.hidden)
    assert not any(m._forward_pre_hooks for m in model.unet.modules())


# --- flow matching --------------------------------------------------------------------------------


@JOINT
def test_the_loss_of_rectified_flow_by_hand(make: Any) -> None:
    model = TextToImage(make())
    x, noise, t = _latents(), _latents(1), torch.tensor([100.0, 900.0])
    text = model.conditioning(PROMPTS)
    found = model.noise_loss(x, text, noise=noise, timesteps=t, reduction="none")
    sigma = (t / 1000.0).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        predicted = model.predict((1 - sigma) * x + sigma * noise, t, text)
    expected = (predicted - (noise - x)).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("shift", "dynamic"), [(1.0, False), (3.0, False), (3.0, True)])
def test_times_are_logit_normal_and_shifted(shift: float, dynamic: bool) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    objective = objective_of(scheduler)
    assert isinstance(objective, FlowMatching)
    count = 4000
    times = objective.draw(count, torch.Generator().manual_seed(0))
    assert times.shape == (count,)
    sigma = times.double() / 1000.0
    s = 1.0 if dynamic else shift
    # Back through the shift, the logit is standard normal.
    u = sigma / (s - (s - 1.0) * sigma)
    n = (u / (1.0 - u)).log()
    assert abs(float(n.mean())) < 5.0 / math.sqrt(count)
    assert abs(float(n.var()) - 1.0) < 5.0 * math.sqrt(2.0 / count)
    # The schedule's own table holds the same sigmas for the same u.
    if not dynamic:
        table = scheduler.sigmas[500]  # of u = 0.5
        torch.testing.assert_close(float(table), s * 0.5 / (1 + (s - 1) * 0.5), rtol=1e-4, atol=0.0)


def test_one_rule_says_what_flow_matching_is() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Own(FlowMatchEulerDiscreteScheduler):
        """Named otherwise."""

    class FlowOfNoise(type(tiny_pipeline().scheduler)):
        """Predicts noise, whatever it is called."""

    flow, noise = Own(), FlowOfNoise()
    assert is_flow_matching(flow)
    assert not is_flow_matching(noise)
    assert isinstance(objective_of(flow), FlowMatching)
    assert isinstance(objective_of(noise), NoisePrediction)
    for make, fits, other in [
        (tiny_pipeline, noise, flow),
        (tiny_sd3_pipeline, flow, noise),
        (tiny_flux_pipeline, flow, noise),
    ]:
        pipeline = make()
        pipeline.scheduler = fits
        TextToImage(pipeline)
        pipeline.scheduler = other
        with pytest.raises(ValueError, match=r"flow matching \((Own|FlowOfNoise)\)"):
            TextToImage(pipeline)


def test_mixing_agrees_with_the_scheduler() -> None:
    objective = objective_of(TextToImage(tiny_sd3_pipeline()).scheduler)
    t = objective.scheduler.timesteps[[10, 700]]
    mixed = objective.mix(_latents(), _latents(1), t)
    theirs = objective.scheduler.scale_noise(_latents(), t, _latents(1))
    torch.testing.assert_close(mixed, theirs, rtol=1e-5, atol=1e-6)


def test_noise_prediction_draws_what_it_always_drew() -> None:
    objective = objective_of(tiny_pipeline().scheduler)
    assert isinstance(objective, NoisePrediction)
    drawn = objective.draw(5, torch.Generator().manual_seed(1))
    assert torch.equal(
        drawn, torch.randint(0, 1000, (5,), generator=torch.Generator().manual_seed(1))
    )
    objective.scheduler = SimpleNamespace(config=SimpleNamespace(prediction_type="score"))
    with pytest.raises(ValueError, match=r"NoisePrediction\.target: prediction_type must be eps"):
        objective.target(_latents(), _latents(), torch.zeros(2))


@pytest.mark.parametrize(
    "make",
    [partial(tiny_sd3_pipeline, qk_norm="rms_norm"), tiny_flux_pipeline],
    ids=["sd3.5", "flux"],
)
def test_the_loss_can_be_differentiated_twice(make: Any) -> None:
    model = TextToImage(make())
    name = "transformer_blocks.0.attn.add_k_proj.weight"
    weight = model.unet.get_parameter(name)
    moved = (weight.detach() + 0.01).requires_grad_()
    text = model.conditioning(PROMPTS)
    with model.math_attention():
        loss = model.noise_loss(
            _latents(),
            text,
            noise=_latents(1),
            timesteps=torch.tensor([100.0, 900.0]),
            parameters={name: moved},
        )
        (first,) = torch.autograd.grad(loss, moved, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), moved)
    assert bool(first.any())
    assert bool(second.any())
