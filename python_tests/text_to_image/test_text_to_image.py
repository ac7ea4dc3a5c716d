"""The view on a pipeline that the training loops have."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from attack_pipelines import WIDTH, tiny_pipeline, tiny_xl_pipeline

from immunize_ext.text_to_image.backbones.unet import time_ids
from immunize_ext.text_to_image.model import TextToImage

PROMPTS = ["a photo of the digit three", "a handwritten five"]
MAKERS = pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline], ids=["sd", "sdxl"])


def _latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@MAKERS
def test_conditioning_is_what_the_denoiser_receives(make):
    model = TextToImage(make())
    received = {}
    handle = model.unet.register_forward_pre_hook(
        lambda _, args, kwargs: received.update(kwargs), with_kwargs=True
    )
    model.generate(PROMPTS, steps=1, guidance=1.0)
    handle.remove()
    found = model.conditioning(PROMPTS)
    assert torch.equal(found.hidden, received["encoder_hidden_states"])
    added = received.get("added_cond_kwargs")
    if found.pooled is None:
        assert not added
    else:
        assert torch.equal(found.pooled, added["text_embeds"])
        model.noise_loss(_latents(), found)
        times = time_ids(_latents(), model.image_size // 8)
        assert torch.equal(times, added["time_ids"][: len(times)].to(times))


@MAKERS
def test_mask_marks_the_words(make):
    model = TextToImage(make())
    mask = model.conditioning(PROMPTS).mask
    assert mask.sum(1).tolist() == [6, 3]
    assert not bool(mask[:, 0].any())  # start of text
    assert bool(mask[0, 1:7].all())


@MAKERS
def test_conditioning_is_differentiable_in_the_text_encoders(make):
    model = TextToImage(make())
    for encoder in model.text_encoders:
        encoder.requires_grad_(True)
    model.noise_loss(_latents(), model.conditioning(PROMPTS)).backward()
    for encoder in model.text_encoders:
        assert bool(encoder.get_input_embeddings().weight.grad.any())


def test_token_features():
    model = TextToImage(tiny_pipeline())
    hidden = model.conditioning(PROMPTS).hidden
    words = model.token_features(PROMPTS)
    assert torch.equal(words, torch.cat([hidden[0, 1:7], hidden[1, 1:4]]))
    assert not words.requires_grad
    last = model.token_features(PROMPTS, positions="last")
    assert torch.equal(last, torch.stack([hidden[0, 6], hidden[1, 3]]))
    assert len(model.token_features(PROMPTS, positions="all")) == 2 * 12
    # "a" is shared, what follows is not.
    own = model.token_features(PROMPTS, drop_shared_prefix=True)
    assert torch.equal(own, torch.cat([hidden[0, 2:7], hidden[1, 2:4]]))
    with pytest.raises(ValueError, match="tokens of their own"):
        model.token_features([""])
    # B: the last token of an empty prompt is no start-of-text row.
    with pytest.raises(ValueError, match="tokens of their own"):
        model.token_features([""], positions="last")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_loss_by_hand(prediction):
    model = TextToImage(tiny_pipeline(prediction=prediction, dtype=torch.float64))
    x = _latents().double()
    noise, t = _latents(1).double(), torch.tensor([10, 900])
    text = model.conditioning(PROMPTS)
    found = model.noise_loss(x, text, noise=noise, timesteps=t, reduction="none")
    kept = model.scheduler.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
    noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
    target = {
        "epsilon": noise,
        "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * x,
        "sample": x,
    }[prediction]
    with torch.no_grad():
        predicted = model.unet(noisy, t, encoder_hidden_states=text.hidden).sample
    expected = (predicted - target).square().mean((1, 2, 3))
    # The schedule's own table is float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(
        model.noise_loss(x, text, noise=noise, timesteps=t), found.mean(), rtol=1e-12, atol=0.0
    )


def test_noise_loss_draws_from_the_generator_alone():
    model = TextToImage(tiny_pipeline())
    text = model.conditioning(PROMPTS)
    before = torch.get_rng_state()
    first, second = (
        model.noise_loss(_latents(), text, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    one_text = model.noise_loss(_latents(), text.select(torch.tensor([0])))
    assert one_text.isfinite()


@MAKERS
def test_functional_parameters_leave_the_model_alone(make):
    model = TextToImage(make())
    name = next(n for n, _ in model.unet.named_parameters() if n.endswith("attn2.to_k.weight"))
    value = dict(model.unet.named_parameters())[name].detach().clone()
    moved = (value + 0.1).requires_grad_()
    arguments = {"noise": _latents(1), "timesteps": torch.tensor([10, 900])}
    text = model.conditioning(PROMPTS)
    with torch.no_grad():
        same = model.noise_loss(_latents(), text, **arguments)
    found = model.noise_loss(_latents(), text, parameters={name: moved}, **arguments)
    assert found != same
    (gradient,) = torch.autograd.grad(found, moved)
    assert bool(gradient.any())
    assert torch.equal(dict(model.unet.named_parameters())[name], value)


def test_half_models_lose_in_float32():
    model = TextToImage(tiny_pipeline(dtype=torch.bfloat16))
    loss = model.noise_loss(_latents().bfloat16(), model.conditioning(PROMPTS))
    assert loss.dtype == torch.float32


def test_bad_arguments_are_named():
    model = TextToImage(tiny_pipeline())
    text = model.conditioning(PROMPTS)
    with pytest.raises(ValueError, match="at least one"):
        model.conditioning([])
    with pytest.raises(ValueError, match="1 or 3 rows, got 2"):
        model.noise_loss(torch.zeros(3, 4, 8, 8), text)
    with pytest.raises(ValueError, match="noise and timesteps"):
        model.noise_loss(_latents(), text, timesteps=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[-1, 1\], got \[0, 255\]"):
        model.latents(torch.tensor([0.0, 255.0]).reshape(1, 1, 1, 2).expand(1, 3, 8, 2))
    with pytest.raises(ValueError, match=r"shape \(b, c, h, w\)"):
        model.latents(torch.zeros(3, 8, 8))
    pipeline = tiny_pipeline()
    pipeline.vae = None
    with pytest.raises(ValueError, match="must have vae"):
        TextToImage(pipeline)


@MAKERS
def test_images_do_not_depend_on_the_batch(make):
    model = TextToImage(make())
    together = model.generate(PROMPTS, steps=2, seed=4)
    assert together.dtype == torch.float32
    assert 0.0 <= float(together.min()) <= float(together.max()) <= 1.0
    alone = model.generate(PROMPTS[1:], steps=2, seed=5)
    # Rounding of batched products, then of the autoencoder: a few float32 steps of values near 1.
    torch.testing.assert_close(alone, together[1:], atol=1e-4, rtol=0.0)


def test_generation_leaves_everything_as_it_was():
    model = TextToImage(tiny_pipeline())
    model.unet.train()
    model.pipeline.set_progress_bar_config(desc="mine")
    random = torch.get_rng_state()
    model.generate(PROMPTS, steps=1)
    assert model.unet.training
    assert model.pipeline._progress_bar_config == {"desc": "mine"}
    assert torch.equal(torch.get_rng_state(), random)


@MAKERS
def test_clones_are_equal_and_apart(make):
    model = TextToImage(make())
    clone = model.clone()
    assert type(clone.pipeline) is type(model.pipeline)
    assert torch.equal(clone.generate(PROMPTS, steps=2), model.generate(PROMPTS, steps=2))
    ours = {p.data_ptr() for p in model.unet.parameters()}
    assert not ours & {p.data_ptr() for p in clone.unet.parameters()}
    processors = {n: type(p) for n, p in model.unet.attn_processors.items()}
    assert {n: type(p) for n, p in clone.unet.attn_processors.items()} == processors
    clone.tokenizers[0].add_tokens(["<v1>"])
    assert "<v1>" not in model.tokenizers[0].get_vocab()


@MAKERS
def test_saved_is_loaded(make, tmp_path):
    model = TextToImage(make())
    model.save(tmp_path / "a" / "pipeline")
    again = TextToImage.from_pretrained(tmp_path / "a" / "pipeline")
    assert torch.equal(again.generate(PROMPTS, steps=2), model.generate(PROMPTS, steps=2))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["pipeline"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save(tmp_path / "a" / "pipeline")
    with torch.no_grad():
        model.unet.conv_in.bias.add_(1.0)
    model.save(tmp_path / "a" / "pipeline", overwrite=True)
    again = TextToImage.from_pretrained(tmp_path / "a" / "pipeline")
    assert torch.equal(again.unet.conv_in.bias, model.unet.conv_in.bias)


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    model = TextToImage(tiny_pipeline())
    model.save(tmp_path / "pipeline")

    def full(folder, **_):
        (folder / "unet").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.pipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path / "pipeline", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]
    TextToImage.from_pretrained(tmp_path / "pipeline")


def test_overwriting_spares_what_is_no_pipeline(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        TextToImage(tiny_pipeline()).save(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        TextToImage.from_pretrained(tmp_path / "thesis")


def test_math_attention_differentiates_twice_and_is_restored():
    model = TextToImage(tiny_pipeline())
    enabled = torch.backends.cuda.flash_sdp_enabled()
    key = next(p for n, p in model.unet.named_parameters() if n.endswith("attn2.to_k.weight"))
    with model.math_attention():
        loss = model.noise_loss(_latents(), model.conditioning(PROMPTS))
        (first,) = torch.autograd.grad(loss, key, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), key)
    assert bool(second.any())
    assert torch.backends.cuda.flash_sdp_enabled() == enabled


def test_width_of_the_tiny_pipeline():
    # The other tests are about nothing if the fixture has no text.
    assert TextToImage(tiny_pipeline()).conditioning(PROMPTS).hidden.shape == (2, 12, WIDTH)
