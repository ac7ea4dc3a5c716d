"""What each attack on a text-to-image model moves, and nothing beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from attack_pipelines import WIDTH, concept, tiny_pipeline, tiny_xl_pipeline

from immunize_ext.text_to_image.attacks import (
    CustomDiffusionAttack,
    DreamBoothAttack,
    DreamBoothLoRAAttack,
    FineTuningAttack,
    LoRAAttack,
    PriorPreservation,
    ReinitialisedAttack,
    TextualInversionAttack,
    prior_preservation_loss,
)
from immunize_ext.text_to_image.attacks.prior import class_prompt
from immunize_ext.text_to_image.attacks.trainables import NewToken
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import find_text_projections


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage(tiny_pipeline())


def moved(before: Any, after: Any) -> set[str]:
    """Names of the state that differs; rows that were added do not count."""
    old, new = before.state_dict(), after.state_dict()
    return {name for name, value in old.items() if not torch.equal(value, new[name])}


# --- LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["kv", "attn2", "attention"])
@pytest.mark.parametrize("rank", [1, 4])
def test_lora_shapes(model: TextToImage, targets: Any, rank: int) -> None:
    adapted = LoRAAttack(targets=targets, rank=rank).adapt(model, [concept()], steps=1)
    wanted = {projection.name for projection in find_text_projections(model.unet)}
    parts = {
        "kv": ("attn2.to_k", "attn2.to_v"),
        "attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        "attention": (".to_q", ".to_k", ".to_v", ".to_out.0"),
    }[targets]
    expected = {name for name, _ in model.unet.named_modules() if name.endswith(parts)}
    reached = {name[len("unet.") :].partition(".lora_")[0] for name in adapted.weights}
    assert reached == expected
    assert wanted <= reached
    for name, weight in adapted.weights.items():
        assert rank in weight.shape
        # B starts at zero; after one step every one of them has moved.
        assert ".lora_A." in name or weight.abs().max() > 0.0


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 8.0}, 2.0),
        ({"rank": 4, "alpha": 8.0, "rs_lora": True}, 4.0),
        ({"rank": 4, "rs_lora": True}, 2.0),
    ],
)
def test_lora_scale(model: TextToImage, settings: dict[str, Any], scale: float) -> None:
    """The layer acts as W + scale B A."""
    adapted = LoRAAttack(targets="kv", **settings).adapt(model, [concept()], steps=2)
    name = find_text_projections(model.unet)[0].name
    layer = adapted.model.unet.get_submodule(name)
    a = adapted.weights[f"unet.{name}.lora_A.default.weight"]
    b = adapted.weights[f"unet.{name}.lora_B.default.weight"]
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    weight = model.unet.get_submodule(name).weight
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ (weight + scale * b @ a).mT, rtol=1e-5, atol=1e-6)


def test_lora_inits(model: TextToImage) -> None:
    starts = {}
    for init in ("kaiming", "gaussian"):
        attack = LoRAAttack(targets="kv", rank=8, init=init, learning_rate=1e-12)  # type: ignore[arg-type]
        weights = attack.adapt(model, [concept()], steps=2, seed=1).weights
        again = attack.adapt(model, [concept()], steps=2, seed=1).weights
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        starts[init] = torch.cat([w.flatten() for n, w in weights.items() if ".lora_A." in n])
    # Kaiming with a = sqrt(5) is uniform on +-1/sqrt(d); the gaussian has spread 1/rank.
    assert starts["kaiming"].abs().max() <= 1.0 / math.sqrt(WIDTH) + 1e-6
    assert starts["kaiming"].std() == pytest.approx(1.0 / math.sqrt(3 * WIDTH), rel=0.1)
    assert starts["gaussian"].std() == pytest.approx(1.0 / 8, rel=0.1)


def test_lora_leaves_the_base_weights(model: TextToImage) -> None:
    adapted = LoRAAttack().adapt(model, [concept()], steps=2)
    after = {
        name.replace(".base_layer", ""): value
        for name, value in adapted.model.unet.state_dict().items()
        if ".lora_" not in name
    }
    before = model.unet.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_locon_reaches_every_layer_of_the_blocks(model: TextToImage) -> None:
    """Attention, feed-forward, convolutions and samplers; not the time embedding or the ends."""
    adapted = LoRAAttack(targets="blocks").adapt(model, [concept()], steps=2)
    reached = {name[len("unet.") :].partition(".lora_")[0] for name in adapted.weights}
    within = ("down_blocks", "mid_block", "up_blocks")
    assert reached == {
        name
        for name, module in model.unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(within)
    }
    for part in (".ff.net.", ".attn1.", ".attn2.", ".resnets.0.conv1", ".downsamplers.", "proj_in"):
        assert any(part in name for name in reached), part
    assert all(bool(weight.any()) for weight in adapted.weights.values())


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_xl_pipeline])
def test_lora_with_text_encoder(build: Any) -> None:
    """Factors in UNet and text encoders move, the weights under them do not."""
    model = TextToImage(build())
    adapted = LoRAAttack(targets="kv", train_text_encoder=True).adapt(model, [concept()], steps=2)
    for index, encoder in enumerate(model.text_encoders):
        prefix = f"text_encoder.{index}."
        own = {name: w for name, w in adapted.weights.items() if name.startswith(prefix)}
        layers = {name[len(prefix) :].partition(".lora_")[0] for name in own}
        parts = ("q_proj", "k_proj", "v_proj", "out_proj")
        assert layers == {name for name, _ in encoder.named_modules() if name.endswith(parts)}
        assert any(bool(weight.any()) for name, weight in own.items() if ".lora_B." in name)
        after = {
            name.replace(".base_layer", ""): value
            for name, value in adapted.model.text_encoders[index].state_dict().items()
        }
        assert all(torch.equal(after[name], w) for name, w in encoder.state_dict().items())
    frozen = LoRAAttack(targets="kv").adapt(model, [concept()], steps=2)
    assert adapted.curve.losses[0] == frozen.curve.losses[0]
    assert frozen.text_lora is None


def test_lora_refuses_an_adapter_and_bad_settings(model: TextToImage) -> None:
    adapted = LoRAAttack().adapt(model, [concept()], steps=1)
    with pytest.raises(ValueError, match="adapter"):
        LoRAAttack().run(adapted.model, [concept()], steps=1)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoRAAttack(rank=0)
    with pytest.raises(ValueError, match="alpha must be positive"):
        LoRAAttack(alpha=0.0)
    with pytest.raises(ValueError, match="'kaiming' or 'gaussian'"):
        LoRAAttack(init="zeros")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scope must be one of"):
        LoRAAttack(targets="attn1").run(model, [concept()], steps=1)  # type: ignore[arg-type]


# --- fine-tuning --------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "all_but_attn2", "attention", "attn2", "kv"])
def test_scopes_of_fine_tuning(model: TextToImage, scope: Any) -> None:
    adapted = FineTuningAttack(scope=scope).adapt(model, [concept()], steps=1)
    changed = moved(model.unet, adapted.model.unet)
    inside = {
        "all": lambda name: True,
        "all_but_attn2": lambda name: ".attn2." not in name,
        "attention": lambda name: ".attn1." in name or ".attn2." in name,
        "attn2": lambda name: ".attn2." in name,
        "kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    }[scope]
    assert changed == {name for name, _ in model.unet.named_parameters() if inside(name)}
    assert not moved(model.text_encoders[0], adapted.model.text_encoders[0])
    assert not moved(model.vae, adapted.model.vae)


@pytest.mark.parametrize("layers", ["kv", "attn2"])
def test_layers_are_drawn_anew_before_the_first_step(model: TextToImage, layers: Any) -> None:
    """Not at step 0, within the bound of a new layer, and by the seed."""
    attack = ReinitialisedAttack(layers=layers, learning_rate=1e-12, weight_decay=0.0)
    assert not moved(model.unet, attack.adapt(model, [concept()], steps=0).model.unet)
    once, again, other = (
        attack.adapt(model, [concept()], steps=1, seed=seed).model.unet for seed in (1, 1, 2)
    )
    drawn = {
        f"{name}.weight": module
        for name, module in once.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(("attn2.to_k", "attn2.to_v"))
        | (layers == "attn2" and name.endswith(("attn2.to_q", "attn2.to_out.0")))
    }
    for name, module in drawn.items():
        weight = once.get_parameter(name)
        assert (weight - model.unet.get_parameter(name)).abs().max() > 1e-3
        assert weight.abs().max() <= 1.0 / math.sqrt(module.in_features) + 1e-6
        assert torch.equal(weight, again.get_parameter(name))
        assert not torch.equal(weight, other.get_parameter(name))
    for name, parameter in model.unet.named_parameters():
        if name.removesuffix(".bias").removesuffix(".weight") + ".weight" not in drawn:
            torch.testing.assert_close(once.get_parameter(name), parameter, rtol=0, atol=1e-9)


def test_half_precision_masters_follow_what_is_drawn() -> None:
    model = TextToImage(tiny_pipeline(dtype=torch.bfloat16))
    attack = ReinitialisedAttack(learning_rate=1e-12)
    adapted = attack.adapt(model, [concept()], steps=1)
    name = f"{find_text_projections(model.unet)[0].name}.weight"
    drawn = adapted.model.unet.get_parameter(name)
    assert not torch.equal(drawn, model.unet.get_parameter(name))
    assert torch.equal(adapted.weights[f"unet.{name}"].bfloat16(), drawn)


def test_text_encoder_fine_tuning(model: TextToImage) -> None:
    attack = FineTuningAttack(scope="kv", train_text_encoder=True)
    adapted = attack.adapt(model, [concept()], steps=2)
    changed = moved(model.text_encoders[0], adapted.model.text_encoders[0])
    assert any("q_proj" in name for name in changed)
    # Its features were computed anew at every step: the second loss is another one.
    frozen = FineTuningAttack(scope="kv").run(model, [concept()], steps=2)
    assert adapted.curve.losses[0] == frozen.losses[0]
    assert adapted.curve.losses[1] != frozen.losses[1]
    with pytest.raises(ValueError, match="scope must be"):
        FineTuningAttack(scope="decoder")  # type: ignore[arg-type]


def test_unused_layers_of_a_text_encoder_may_stay() -> None:
    """SDXL takes the last but one layer: the last one gets no gradient, and that is no mistake."""
    model = TextToImage(tiny_xl_pipeline())
    attack = FineTuningAttack(scope="kv", train_text_encoder=True)
    adapted = attack.adapt(model, [concept()], steps=1)
    for before, after in zip(model.text_encoders, adapted.model.text_encoders, strict=True):
        assert moved(before, after)


# --- DreamBooth ---------------------------------------------------------------------------------


# B88: the published case, and shapes that would broadcast silently.
@pytest.mark.parametrize("prior_weight", [0.0, 0.5, 1.0])
def test_prior_preservation_splits_weights_with_losses(prior_weight: float) -> None:
    loss = prior_preservation_loss(
        torch.ones(4), prior_weight=prior_weight, weights=torch.tensor([1.0, 2.0, 3.0, 4.0])
    )
    assert loss.item() == 1.5 + prior_weight * 3.5


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2), torch.tensor(1.0), torch.ones(0)])
def test_prior_preservation_asserts_shapes(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(2 B,\)"):
        prior_preservation_loss(bad, prior_weight=1.0)


@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones(1), torch.ones(4, 1)])
def test_prior_preservation_asserts_weights(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="one weight a sample"):
        prior_preservation_loss(torch.ones(4), prior_weight=1.0, weights=bad)


def test_prior_preservation_in_the_loop(model: TextToImage) -> None:
    """With weight 0 the gradient is that of the instance images alone, whatever the class says."""

    def first_step(**settings: Any) -> Any:
        prior = PriorPreservation(images=4, sampling_steps=2, **settings)
        attack = DreamBoothAttack(scope="kv", prior=prior, gradient_clip=None, snr_gamma=5.0)
        return attack.adapt(model, [concept()], steps=1)

    off, other = first_step(weight=0.0), first_step(weight=0.0, class_prompt="a red cat")
    assert off.curve.losses == pytest.approx(other.curve.losses, rel=1e-6)
    on = first_step(weight=1.0)
    assert on.curve.losses[0] > off.curve.losses[0]
    assert on.curve.config["class_prompts"] == ["a photo of the digit"]
    assert other.curve.config["class_prompts"] == ["a red cat"]
    assert on.curve.config["prior"]["weight"] == 1.0


def test_dreambooth_without_prior_is_fine_tuning(model: TextToImage) -> None:
    dreambooth = DreamBoothAttack(prior=None, prompt="canonical", learning_rate=1e-3)
    tuning = FineTuningAttack(learning_rate=1e-3)
    a, b = (attack.run(model, [concept()], steps=2) for attack in (dreambooth, tuning))
    assert a.losses == b.losses


def test_dreambooth_lora_moves_factors_only(model: TextToImage) -> None:
    prior = PriorPreservation(images=2, sampling_steps=2)
    adapted = DreamBoothLoRAAttack(prior=prior).adapt(model, [concept()], steps=1)
    assert all(".lora_" in name for name in adapted.weights)
    assert adapted.curve.config["prompts"] == ["a photo of the digit sks"]


@pytest.mark.parametrize(
    ("prompt", "name", "anchor", "expected"),
    [
        ("a photo of the digit three", "three", "digit", "a photo of the digit"),
        ("a photo of a three", "three", "digit", "a photo of a digit"),
        ("a photo of a three", "three", "a photo of a digit", "a photo of a digit"),
        ("An artwork of Van Gogh", "van_gogh", "painting", "An artwork of painting"),
        ("three", "three", "digit", "digit"),
    ],
)
def test_class_prompts(prompt: str, name: str, anchor: str, expected: str) -> None:
    assert class_prompt(concept(name, prompts=(prompt,), anchor=anchor)) == expected


def test_prior_needs_a_class(model: TextToImage) -> None:
    nameless = concept(anchor=None)
    with pytest.raises(ValueError, match="must have an anchor"):
        DreamBoothAttack().run(model, [nameless], steps=1)
    with pytest.raises(ValueError, match="weight must be finite"):
        PriorPreservation(weight=-1.0)
    with pytest.raises(ValueError, match="at least 1"):
        PriorPreservation(images=0)


# --- new words ----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_xl_pipeline])
def test_textual_inversion_moves_one_row(build: Any) -> None:
    model = TextToImage(build())
    adapted = TextualInversionAttack().adapt(model, [concept()], steps=3)
    assert not moved(model.unet, adapted.model.unet)
    for index, (before, after) in enumerate(
        zip(model.text_encoders, adapted.model.text_encoders, strict=True)
    ):
        old = before.get_input_embeddings().weight
        new = after.get_input_embeddings().weight
        assert len(new) == len(old) + 1
        assert torch.equal(new[:-1], old)
        # It started as the anchor and went on from there.
        anchor = old[model.tokenizers[index]("digit", add_special_tokens=False)["input_ids"][0]]
        assert 0.0 < (new[-1] - anchor).abs().max() <= 3 * 2.5e-2
        assert torch.equal(new[-1], adapted.weights[f"token.{index}.<new1>"])
        rest = moved(before, after) - {
            name
            for name, p in before.named_parameters()
            if p is before.get_input_embeddings().weight
        }
        assert not rest


def test_custom_diffusion_moves_keys_values_and_a_row(model: TextToImage) -> None:
    prior = PriorPreservation(images=2, sampling_steps=2)
    adapted = CustomDiffusionAttack(prior=prior).adapt(model, [concept()], steps=1)
    expected = {projection.weight_name for projection in find_text_projections(model.unet)}
    assert moved(model.unet, adapted.model.unet) == expected
    assert set(adapted.weights) == {f"unet.{name}" for name in expected} | {"token.0.<new1>"}
    kinds = [type(processor) for processor in model.unet.attn_processors.values()]
    assert [type(p) for p in adapted.model.unet.attn_processors.values()] == kinds


# B92: weights stay in the layers, so any attention processor gives the same images.
def test_custom_diffusion_needs_no_processor_of_its_own(model: TextToImage) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    adapted = CustomDiffusionAttack(prior=None).adapt(model, [concept()], steps=2)
    prompts = ["a photo of the digit <new1>"]
    images = adapted.model.generate(prompts, steps=2)
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        adapted.model.unet.set_attn_processor(processor)
        again = adapted.model.generate(prompts, steps=2)
        torch.testing.assert_close(again, images, rtol=1e-5, atol=1e-5)


# B91
@pytest.mark.parametrize("token", ["<V1>", "<new1>", "<My-Cat>"])
def test_new_tokens_stay_whole(token: str) -> None:
    model = TextToImage(tiny_pipeline())
    added = NewToken(model, token, "cat dog")
    words = model.tokenizers[0]
    assert words(token, add_special_tokens=False)["input_ids"] == added.ids
    text = words(f"a photo of {token} and cat", add_special_tokens=False)["input_ids"]
    assert text.count(added.ids[0]) == 1
    weight = model.text_encoders[0].get_input_embeddings().weight
    ids = words("cat dog", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(added.rows[0], weight[ids].mean(0))
    with pytest.raises(ValueError, match="must be new"):
        NewToken(model, token)
    with pytest.raises(ValueError, match="must be new"):
        NewToken(model, "cat")


def test_a_new_token_acts_where_it_stands() -> None:
    model = TextToImage(tiny_pipeline())
    before = model.conditioning(["a photo of cat", "red dog"]).hidden
    added = NewToken(model, "<V1>", "cat")
    # As long as it equals the word it started from, it means the same.
    with_token = model.conditioning(["a photo of <V1>", "red dog"]).hidden
    torch.testing.assert_close(with_token, before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        # Not the same for all features: a layer norm would take that away.
        added.rows[0].add_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    changed = model.conditioning(["a photo of <V1>", "red dog"]).hidden
    assert (changed[0] - before[0]).abs().max() > 1e-2
    torch.testing.assert_close(changed[1], before[1], rtol=1e-5, atol=1e-6)
    added.settle()
    torch.testing.assert_close(model.conditioning(["a photo of <V1>", "red dog"]).hidden, changed)
    assert not model.text_encoders[0].get_input_embeddings()._forward_hooks


def test_a_new_token_does_not_end_the_text() -> None:
    """Old CLIP configurations take the largest id for the end of text."""
    model = TextToImage(tiny_xl_pipeline())
    before = model.conditioning(["a photo of cat"])
    NewToken(model, "<V1>", "cat")
    after = model.conditioning(["a photo of <V1>"])
    assert before.pooled is not None
    assert after.pooled is not None
    torch.testing.assert_close(after.pooled, before.pooled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.hidden, before.hidden, rtol=1e-5, atol=1e-6)


def test_new_words_for_several_concepts(model: TextToImage) -> None:
    wanted = [concept("three"), concept("five")]
    attack = TextualInversionAttack(prompt="paraphrase")
    assert attack.prompts(wanted) == {
        "three": "a handwritten <new1>",
        "five": "a handwritten <new2>",
    }
    adapted = attack.adapt(model, wanted, steps=1)
    assert adapted.tokens == ("<new1>", "<new2>")
    assert not torch.equal(adapted.weights["token.0.<new1>"], adapted.weights["token.0.<new2>"])
    with pytest.raises(ValueError, match=r"must hold \{\}"):
        TextualInversionAttack(token="<v>").run(model, wanted, steps=1)


def test_where_a_word_starts(model: TextToImage) -> None:
    starts = {}
    for initializer in ("anchor", "name", "red", "", "unheard"):
        attack = TextualInversionAttack(initializer=initializer, learning_rate=1e-12)
        starts[initializer] = attack.adapt(model, [concept()], steps=1).weights["token.0.<new1>"]
    weight = model.text_encoders[0].get_input_embeddings().weight
    words = model.tokenizers[0].get_vocab()
    for initializer, word in (("anchor", "digit"), ("name", "three"), ("red", "red")):
        torch.testing.assert_close(starts[initializer], weight[words[word]].detach())
    for initializer in ("", "unheard"):
        torch.testing.assert_close(starts[initializer], weight.mean(0).detach())


@pytest.mark.parametrize("variant", ["rare_token", "name_left_out"])
def test_new_words_need_their_place(variant: str) -> None:
    with pytest.raises(ValueError, match="leave room for the new word"):
        TextualInversionAttack(prompt=variant)
