"""The trained pipeline of digits that comes with the package."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from immunize_ext.text_to_image.digits import pipeline as module
from immunize_ext.text_to_image.digits.images import DIGIT_NAMES
from immunize_ext.text_to_image.digits.judge import DigitJudge
from immunize_ext.text_to_image.digits.pipeline import (
    WEIGHTS,
    build_digits_pipeline,
    caption_words,
    load_digits_pipeline,
)
from immunize_ext.text_to_image.model import TextToImage

FOLDER = Path(str(files("immunize_ext.text_to_image.digits") / WEIGHTS))


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage(load_digits_pipeline())


def test_plain_diffusers_loads_it():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a photo of the digit three", num_inference_steps=2).images
    assert image.size == (8, 8)


def test_size_and_formats():
    found = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in found) <= 4_000_000
    assert {path.suffix for path in found} <= {".json", ".txt", ".safetensors", ".md"}
    # Tokenizer files as older and newer versions of transformers read them.
    names = {path.name for path in (FOLDER / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= names


def test_the_card_names_these_weights():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        digest = hashlib.sha256((FOLDER / f"{part}.safetensors").read_bytes()).hexdigest()
        assert digest in card


@pytest.mark.slow
def test_it_draws_what_it_is_asked_for(model):
    judge = DigitJudge()
    scores = [
        judge.score(model.generate([f"a photo of the digit {name}"] * 32, seed=9), digit)
        for digit, name in enumerate(DIGIT_NAMES)
    ]
    # 0.986 of 500; 320 images have a standard error of 0.007.
    assert sum(scores) / 10 > 0.96
    assert min(scores) > 0.8


def test_the_autoencoder_passes_images_through(model):
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.latents(images)
    # Rounding as derived where the weights are set: eps (s + B / 4) = 2e-5 at most.
    assert float((latents - images).abs().max()) < 2e-5
    with torch.no_grad():
        back = model.vae.decode(latents).sample
        drawn = model.vae.encode(images).latent_dist.sample()
    assert float((back - images).abs().max()) < 4e-5
    assert float((drawn - latents).abs().max()) < 1e-5


def test_known_words_are_one_token_each(model):
    tokenizer = model.tokenizers[0]
    for word in caption_words():
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    ids = [tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in caption_words()]
    assert len(set(ids)) == len(ids)
    # Others fall apart, and stay apart from each other.
    assert len(tokenizer("threefive", add_special_tokens=False)["input_ids"]) > 1


def test_building_is_deterministic_and_touches_nothing_else(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        random = torch.get_rng_state()
        heard = []
        for name in ("a", "b"):
            build_digits_pipeline(
                tmp_path / name, steps=3, seed=5, progress=lambda *words: heard.append(words)
            )
        assert torch.equal(torch.get_rng_state(), random)
    finally:
        torch.set_num_threads(threads)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            other = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == other.read_bytes(), path.name
    assert heard[-1][1] == 1.0
    with pytest.raises(FileExistsError, match="--force"):
        build_digits_pipeline(tmp_path / "a", steps=3)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        build_digits_pipeline(tmp_path / "c", steps=0)


def test_what_it_shall_not_learn_it_never_sees(tmp_path, monkeypatch):
    seen = []
    captions = module._captions

    def note(labels, generator):
        seen.extend(labels)
        return captions(labels, generator)

    monkeypatch.setattr(module, "_captions", note)
    build_digits_pipeline(tmp_path / "a", steps=1, without=("three", "five"))
    left = [name for name in DIGIT_NAMES if name not in ("three", "five")]
    assert {DIGIT_NAMES[label] for label in seen} == set(left)
    for without in (("cat",), DIGIT_NAMES):
        with pytest.raises(ValueError, match="without must name some of"):
            build_digits_pipeline(tmp_path / "b", without=without)
