"""The loop of the attacks on text-to-image models: what it leaves alone, refuses and repeats."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from attack_pipelines import brightness, concept, tiny_pipeline, tiny_xl_pipeline

from immunize_ext.text_to_image.attacks import (
    ATTACKS,
    Adaptation,
    AttackCurve,
    ConceptScores,
    FineTuningAttack,
    LoRAAttack,
    Target,
    TextualInversionAttack,
    load_adaptation,
    save_adaptation,
    snr_weights,
)
from immunize_ext.text_to_image.attacks.trainables import Trainables, freeze
from immunize_ext.text_to_image.metrics.generation import Sampling
from immunize_ext.text_to_image.model import TextToImage

# Bit for bit, whatever the attack is.
ALL = sorted(ATTACKS)


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage(tiny_pipeline())


def state(model: TextToImage) -> dict[str, Tensor]:
    parts = {"unet": model.unet, "vae": model.vae}
    parts |= {f"text.{i}": encoder for i, encoder in enumerate(model.text_encoders)}
    return {
        f"{part}.{name}": value.clone()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert set(before) == set(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def scores_of(attack: Any, concepts: list[Any], **settings: Any) -> ConceptScores:
    sampling = Sampling(images=2, steps=2)
    return ConceptScores(
        concepts, attack.prompts(Target(concepts)), {"brightness": brightness}, sampling, **settings
    )


@pytest.mark.parametrize(
    "name",
    ["dreambooth", "full_fine_tuning", "lora", "locon", "lora_with_text", "reinitialised"],
)
def test_an_attack_of_no_steps_is_the_model(model: TextToImage, name: str) -> None:
    attack: Any = replace(ATTACKS[name], prior=None)  # type: ignore[type-var]
    target = Target([concept()], evaluate=scores_of(attack, [concept()]), evaluate_at=[0])
    adapted = attack.adapt(model, target, steps=0)
    assert (adapted.curve.steps, adapted.curve.losses) == ([0], [])
    # torch rounds a frozen autoencoder otherwise than one that asks for gradients.
    same = model.clone()
    freeze([same.unet, same.vae, *same.text_encoders])
    sampling, prompt = Sampling(images=1, steps=2), "a photo of a cat"
    assert torch.equal(sampling.generate(adapted.model, prompt), sampling.generate(same, prompt))
    # The first point of a longer one is the same.
    longer = attack.run(model, target, steps=1)
    assert longer.scores == adapted.curve.scores


@pytest.mark.parametrize("name", ALL)
def test_every_attack_learns_on_a_clone(
    model: TextToImage, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that goes on by one when it is read: each of the three stretches between evaluations
    # is measured once, and evaluation never.
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("immunize_ext.runtime.time", clock)
    attack, wanted = ATTACKS[name], [concept()]
    before, parts = state(model), {id(m) for m in model.unet.modules()}
    words = [len(tokenizer) for tokenizer in model.tokenizers]
    grads = [p.requires_grad for p in model.unet.parameters()]
    noise = torch.get_rng_state()
    target = Target(wanted, evaluate=scores_of(attack, wanted), evaluate_at=[0, 1, 3])
    curve = attack.run(model, target, steps=3, seed=1)
    assert not differing(before, state(model))
    assert {id(m) for m in model.unet.modules()} == parts
    assert [len(tokenizer) for tokenizer in model.tokenizers] == words
    assert [p.requires_grad for p in model.unet.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), noise)
    # The attack did something: each evaluation sees another model.
    assert curve.steps == [0, 1, 3]
    assert len(set(curve.score("brightness"))) == 3
    assert len(curve.losses) == 3
    assert curve.seconds == 3.0
    assert curve.peak_memory > 0
    assert curve.config["seed"] == 1
    assert curve.config["prompts"] == list(attack.prompts(Target(wanted)).values())
    assert curve.config["images_used"] == 6


@pytest.mark.parametrize("name", ["lora", "full_fine_tuning", "custom_diffusion"])
def test_a_seed_gives_one_curve_whatever_is_evaluated(model: TextToImage, name: str) -> None:
    attack, wanted = ATTACKS[name], [concept()]

    def noisy(model: TextToImage, step: int) -> dict[str, float]:
        torch.randn(7)  # an evaluation that draws from the global generator
        return scores_of(attack, wanted)(model, step)

    everywhere = Target(wanted, evaluate=noisy, evaluate_at=[0, 1, 2, 3])
    at_the_end = Target(wanted, evaluate=noisy, evaluate_at=[3])
    often = attack.run(model, everywhere, steps=3, seed=5)
    torch.randn(3)
    once = attack.run(model, at_the_end, steps=3, seed=5)
    assert often.losses == once.losses
    assert often.score("brightness")[-1] == once.score("brightness")[0]
    other = attack.run(model, at_the_end, steps=3, seed=6)
    assert other.losses != once.losses


def test_the_start_is_the_model_itself(model: TextToImage) -> None:
    attack, wanted = FineTuningAttack(), [concept()]
    evaluate = scores_of(attack, wanted, kept=1)
    curve = attack.run(model, Target(wanted, evaluate=evaluate), steps=1)
    assert curve.steps == [0, 1]
    plain = evaluate.sampling.generate(model, attack.prompts(Target(wanted))["three"])
    # To rounding: frozen weights take other routes through the convolutions.
    assert curve.score("brightness")[0] == pytest.approx(brightness(plain, None), abs=1e-6)
    torch.testing.assert_close(evaluate.grids["three"][0], plain[:1], rtol=0.0, atol=1e-5)
    assert (evaluate.grids["three"][1] - plain[:1]).abs().max() > 1e-4


def test_several_concepts_at_once(model: TextToImage) -> None:
    attack, wanted = TextualInversionAttack(), [concept("three"), concept("five")]
    target = Target(wanted, evaluate=scores_of(attack, wanted))
    curve = attack.run(model, target, steps=2, seed=1)
    assert curve.target == "three+five"
    assert curve.config["prompts"] == [
        "a photo of the digit <new1>",
        "a photo of the digit <new2>",
    ]
    parts = [curve.score(f"brightness/{name}") for name in ("three", "five")]
    assert curve.score("brightness") == pytest.approx(
        [sum(p) / 2 for p in zip(*parts, strict=True)]
    )
    assert curve.config["images_used"] == 12
    with pytest.raises(ValueError, match="none twice"):
        attack.run(model, [wanted[0], wanted[0]], steps=1)


def test_prompts_change_what_is_learned(model: TextToImage) -> None:
    losses = {
        variant: LoRAAttack().run(model, Target([concept()], variant), steps=2).losses[0]
        for variant in ("canonical", "paraphrase", "rare_token", "name_left_out", "a red {}")
    }
    assert len(set(losses.values())) == 5


def test_fewer_images_and_smaller_batches(model: TextToImage) -> None:
    curve = LoRAAttack(images=2, batch_size=1).run(model, [concept()], steps=1)
    assert curve.config["images_used"] == 2
    # Six images in a batch of 20 are the whole set; a batch of 4 is another draw.
    assert (
        LoRAAttack(batch_size=4).run(model, [concept()], steps=1).losses
        != LoRAAttack(batch_size=6).run(model, [concept()], steps=1).losses
    )


def test_other_optimizer_and_weighting(model: TextToImage) -> None:
    plain = FineTuningAttack(scope="kv").run(model, [concept()], steps=2)
    sgd = FineTuningAttack(scope="kv", optimizer="sgd").run(model, [concept()], steps=2)
    assert sgd.losses[0] == plain.losses[0]
    assert sgd.losses[1] != plain.losses[1]
    weighted = FineTuningAttack(scope="kv", snr_gamma=5.0).run(model, [concept()], steps=1)
    assert 0.0 < weighted.losses[0] < plain.losses[0]


def test_snr_weights_of_both_predictions() -> None:
    epsilon, velocity = (
        TextToImage(tiny_pipeline(prediction=kind)).scheduler
        for kind in ("epsilon", "v_prediction")
    )
    steps = torch.tensor([0, 500, 999])
    a = epsilon.alphas_cumprod[steps]
    snr = a / (1 - a)
    capped = snr.clamp(max=5.0)
    torch.testing.assert_close(snr_weights(epsilon, steps, 5.0), capped / snr)
    torch.testing.assert_close(snr_weights(velocity, steps, 5.0), capped / (snr + 1))


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        # Signal to noise 0, 1/3, 1, 9 and infinite; the loss of x counts min(snr, gamma), and that
        # of the noise is snr, that of v is snr + 1 times as large.
        ("sample", [0.0, 1 / 3, 1.0, 5.0, 5.0]),
        ("epsilon", [1.0, 1.0, 1.0, 5 / 9, 0.0]),
        ("v_prediction", [0.0, 0.25, 0.5, 0.5, 0.0]),
    ],
)
def test_snr_weights_of_each_prediction(prediction: str, expected: list[float]) -> None:
    scheduler = SimpleNamespace(
        alphas_cumprod=torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0]),
        config=SimpleNamespace(prediction_type=prediction),
    )
    found = snr_weights(scheduler, torch.arange(5), 5.0)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_velocity_prediction() -> None:
    model = TextToImage(tiny_pipeline(prediction="v_prediction"))
    curve = LoRAAttack().run(model, [concept()], steps=2)
    assert all(math.isfinite(loss) for loss in curve.losses)


@pytest.mark.parametrize("name", ["lora", "attn2_fine_tuning", "custom_diffusion"])
def test_sdxl(name: str) -> None:
    model = TextToImage(tiny_xl_pipeline())
    before = state(model)
    attack, wanted = ATTACKS[name], [concept()]
    curve = attack.run(model, Target(wanted, evaluate=scores_of(attack, wanted)), steps=2)
    assert len(set(curve.score("brightness"))) == 2
    assert not differing(before, state(model))


# B87: trainables stay float32 beside a half-precision base, with an evaluation in between.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "attn2_fine_tuning", "textual_inversion"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = TextToImage(tiny_pipeline(dtype=dtype))
    attack, wanted = ATTACKS[name], [concept()]
    target = Target(wanted, evaluate=scores_of(attack, wanted), evaluate_at=[1, 3])
    adapted = attack.adapt(model, target, steps=3)  # type: ignore[attr-defined]
    assert {weight.dtype for weight in adapted.weights.values()} == {torch.float32}
    plain = {n: p for n, p in adapted.model.unet.named_parameters() if ".lora_" not in n}
    assert {p.dtype for p in plain.values()} == {dtype}
    assert {p.dtype for p in adapted.model.text_encoders[0].parameters()} == {dtype}


def test_masters_keep_what_half_precision_rounds_away() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    trainables = Trainables({"w": weight})
    optimizer = torch.optim.SGD(trainables.leaves, lr=1e-4)
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        trainables.collect_gradients()
        optimizer.step()
        trainables.publish()
    # bfloat16 next to 1 is 2^-8 away below: single steps of 1e-4 would all be lost.
    assert trainables.masters["w"].detach() == pytest.approx(torch.full((3,), 0.996).numpy())
    assert (weight < 1.0).all()


def test_float16_gradients_do_not_vanish() -> None:
    """A gradient of 1e-8 is zero in float16; with the scale it arrives."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    trainables = Trainables({"w": weight})
    trainables.compute_in(torch.float16)
    (weight.sum() * (1e-8 * trainables.loss_scale)).backward()
    trainables.collect_gradients()
    gradient = trainables.masters["w"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    # float16 has 10 bits; 1e-5 lies among its subnormals, a step of 6e-8 apart.
    assert gradient.tolist() == pytest.approx([1e-8, 1e-8], rel=1e-2)


def test_an_evaluation_that_casts_is_refused(model: TextToImage) -> None:
    def casting(model: TextToImage, step: int) -> dict[str, float]:
        model.unet.to(torch.bfloat16)
        return {}

    with pytest.raises(RuntimeError, match="evaluate must leave the model"):
        LoRAAttack().run(model, Target([concept()], None, casting, [0]), steps=1)


# B89
@pytest.mark.parametrize("name", ["lora", "full_fine_tuning", "textual_inversion"])
def test_checkpointing_changes_no_gradient(model: TextToImage, name: str) -> None:
    attack: Any = replace(ATTACKS[name], gradient_clip=None)  # type: ignore[type-var]
    checkpointed = replace(attack, gradient_checkpointing=True)
    calls: list[str] = []
    a = attack.adapt(model, [concept()], steps=2)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(type(module).__name__)
    )
    b = checkpointed.adapt(model, [concept()], steps=2)
    hook.remove()
    assert a.curve.losses == pytest.approx(b.curve.losses, rel=1e-6)
    for key, weight in a.weights.items():
        torch.testing.assert_close(b.weights[key], weight, rtol=1e-6, atol=1e-7)
    # Blocks really run twice a step: forward, and again in the backward pass.
    assert calls.count("ResnetBlock2D") > 2 * sum(
        type(m).__name__ == "ResnetBlock2D" for m in model.unet.modules()
    )


class Detached(TextToImage):
    """A model whose loss does not depend on anything, as with reentrant checkpointing."""

    def noise_loss(self, *args: Any, **settings: Any) -> Tensor:
        return super().noise_loss(*args, **settings).detach()


class Diverging(TextToImage):
    """A model whose loss is not finite."""

    def noise_loss(self, *args: Any, **settings: Any) -> Tensor:
        return super().noise_loss(*args, **settings) * torch.nan


def test_trainables_without_gradient_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"gradient at step 1, got no gradient for unet\."):
        LoRAAttack().run(Detached(tiny_pipeline()), [concept()], steps=2)
    unused = torch.nn.Parameter(torch.ones(2))
    trainables = Trainables({"unused": unused, "used": torch.nn.Parameter(torch.ones(2))})
    trainables.masters["used"].grad = torch.ones(2)
    trainables.masters["unused"].grad = torch.zeros(2)
    with pytest.raises(RuntimeError, match="a gradient of zeros for unused"):
        trainables.check_gradients("test", 1)
    quiet = Trainables({"unused": unused}, silent_at_first=["unused"])
    quiet.check_gradients("test", 1)
    with pytest.raises(RuntimeError, match="at step 2"):
        quiet.check_gradients("test", 2)


def test_a_loss_that_is_not_finite_is_named() -> None:
    with pytest.raises(FloatingPointError, match=r"lora.run: the loss must be finite, got nan at"):
        LoRAAttack().run(Diverging(tiny_pipeline()), [concept()], steps=2)
    weight = torch.nn.Parameter(torch.ones(2))
    trainables = Trainables({"w": weight})
    weight.grad = torch.tensor([1.0, torch.inf])
    with pytest.raises(FloatingPointError, match="gradients must be finite"):
        trainables.check_finite("test", 3)


def test_progress_and_plain_curves(model: TextToImage) -> None:
    seen: list[tuple[str, float]] = []
    curve = LoRAAttack(name="mine").run(
        model, [concept()], steps=2, progress=lambda text, share: seen.append((text, share))
    )
    assert seen == [("mine: step 1 of 2", 0.5), ("mine: step 2 of 2", 1.0)]
    # Without an evaluation there is nothing to score, and losses all the same.
    assert curve.steps == []
    assert repr(curve) == "AttackCurve('mine' on 'three', 2 steps, no score)"
    assert AttackCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    with pytest.raises(ValueError, match="fields of a curve"):
        AttackCurve.from_dict({"attack": "lora"})
    with pytest.raises(ValueError, match="one value for each"):
        AttackCurve.from_dict(curve.to_dict() | {"scores": {"accuracy": [1.0]}})
    with pytest.raises(ValueError, match="name must be one of"):
        curve.score("accuracy")


def test_scores_must_not_change_their_names(model: TextToImage) -> None:
    target = Target([concept()], evaluate=lambda _, step: {f"score{step}": 1.0})
    with pytest.raises(ValueError, match="same scores at every step"):
        LoRAAttack().run(model, target, steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"images": 0}, "images"),
        ({"batch_size": 0}, "batch_size"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"optimizer": "lion"}, "'adamw' or 'sgd'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuningAttack(**settings)


def test_arguments_out_of_range(model: TextToImage) -> None:
    attack = LoRAAttack()
    with pytest.raises(ValueError, match="steps must be at least 0"):
        attack.run(model, [concept()], steps=-1)
    with pytest.raises(ValueError, match="at least one concept"):
        attack.run(model, [], steps=1)
    for bad in ([2], [1, 0], [-1]):
        with pytest.raises(ValueError, match="evaluate_at"):
            attack.run(model, Target([concept()], evaluate_at=bad), steps=1)
    with pytest.raises(ValueError, match="must have images"):
        attack.run(model, [concept(count=0)], steps=1)


# B90 and its kin: what is saved gives the same images when loaded, and not those of the base.
@pytest.mark.parametrize("name", ALL)
def test_saved_is_loaded(model: TextToImage, name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    attack, wanted = ATTACKS[name], [concept()]
    assert isinstance(attack, Adaptation)
    adapted = attack.adapt(model, wanted, steps=2, seed=3)
    file = tmp_path / "weights.safetensors"
    save_adaptation(file, adapted)
    prompts = [adapted.curve.config["prompts"][0]]
    before = state(model)
    loaded = load_adaptation(model, file)
    assert not differing(before, state(model))
    # From fresh parts too, as another process would.
    fresh = load_adaptation(TextToImage(tiny_pipeline()), file)
    expected = adapted.model.generate(prompts, steps=2)
    assert torch.equal(loaded.generate(prompts, steps=2), expected)
    assert torch.equal(fresh.generate(prompts, steps=2), expected)
    assert not torch.equal(model.generate(prompts, steps=2), expected)


def test_a_trained_text_encoder_is_saved_too(model: TextToImage, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    attack = FineTuningAttack(scope="kv", train_text_encoder=True)
    adapted = attack.adapt(model, [concept()], steps=2)
    save_adaptation(tmp_path / "weights.safetensors", adapted)
    loaded = load_adaptation(model, tmp_path / "weights.safetensors")
    prompts = ["a photo of the digit three"]
    assert torch.equal(loaded.conditioning(prompts)[0], adapted.model.conditioning(prompts)[0])
    assert not torch.equal(loaded.conditioning(prompts)[0], model.conditioning(prompts)[0])


def test_an_evaluation_that_fails_leaves_the_model(model: TextToImage) -> None:
    def failing(_: TextToImage, step: int) -> dict[str, float]:
        raise RuntimeError("out of memory")

    before, noise = state(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        LoRAAttack().run(model, Target([concept()], evaluate=failing), steps=1)
    assert not differing(before, state(model))
    assert torch.equal(torch.get_rng_state(), noise)


def test_weights_of_another_model_are_refused(model: TextToImage, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    adapted = FineTuningAttack(scope="kv").adapt(model, [concept()], steps=1)
    file = tmp_path / "weights.safetensors"
    name = next(iter(adapted.weights))
    save_adaptation(file, adapted._replace(weights={name: adapted.weights[name][:1]}))
    with pytest.raises(ValueError, match="must have shape"):
        load_adaptation(model, file)
    save_adaptation(file, adapted._replace(weights={"unet.nowhere": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"no place for unet\.nowhere"):
        load_adaptation(model, file)
    save_adaptation(file, adapted._replace(weights={name: adapted.weights[name] * torch.nan}))
    with pytest.raises(ValueError, match="finite"):
        load_adaptation(model, file)
    lora = LoRAAttack().adapt(model, [concept()], steps=1)
    missing = dict(list(lora.weights.items())[1:])
    save_adaptation(file, lora._replace(weights=missing))
    with pytest.raises(ValueError, match="got nothing for unet"):
        load_adaptation(model, file)
    with pytest.raises(FileNotFoundError):
        load_adaptation(model, tmp_path / "missing.safetensors")


def test_scores_fit_the_concepts() -> None:
    with pytest.raises(ValueError, match=r"got none for \['three'\]"):
        ConceptScores([concept()], {}, {"brightness": brightness})
    with pytest.raises(ValueError, match="must not be empty"):
        ConceptScores([], {}, {"brightness": brightness})
    with pytest.raises(ValueError, match="at least 1"):
        Sampling(images=0)
