"""Folders of pipelines: no code of them runs, and what cannot be read is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from attack_pipelines import (
    _encoder,
    _scheduler,
    _unet,
    _vae,
    concept,
    tiny_pipeline,
    tiny_xl_pipeline,
    tokenizer,
)

from immunize_ext.storage import SUMS
from immunize_ext.text_to_image.attacks import LoRAAttack
from immunize_ext.text_to_image.metrics.similarity import ClipSimilarity, DinoSimilarity
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import find_text_projections

PROMPTS = ["a photo of the digit three"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TextToImage(tiny_pipeline()).save(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def edit(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | changes))
    # Whoever makes such a folder leaves no checksums in it.
    for sums in (file.parent / SUMS, file.parent.parent / SUMS):
        sums.unlink(missing_ok=True)


EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": ["evil", "Evil"]}, "must name a pipeline class of diffusers"),
        ({"_class_name": "Evil"}, "must name a pipeline class of diffusers, got 'Evil'"),
        ({"unet": ["evil", "Evil"]}, "unet in .* must be a class of diffusers or transformers"),
        ({"scheduler": ["evil", "Evil"]}, "scheduler in .* must be a class"),
        ({"unet": ["os", "system"]}, "unet in .* must be a class"),
        ({"unet": ["diffusers", "Evil"]}, "unet in .* must be a class"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_custom_classes_are_refused_and_never_run(
    changes: dict[str, Any], message: str, beside: bool, folder: Path
) -> None:
    edit(folder / "model_index.json", **changes)
    if beside:
        for part in (folder, folder / "unet", folder / "scheduler"):
            (part / "evil.py").write_text(EVIL)
        message = "must hold no code, got .*evil.py"
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert not list(folder.rglob("ran"))


def test_settings_that_ask_for_code_are_refused(folder: Path) -> None:
    edit(folder / "text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"})
    with pytest.raises(ValueError, match="must not ask for code"):
        TextToImage.from_pretrained(folder)
    edit(folder / "model_index.json", _class_name=3)
    (folder / "text_encoder/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        TextToImage.from_pretrained(folder)


@pytest.mark.parametrize("kind", [ClipSimilarity, DinoSimilarity])
def test_a_judge_that_asks_for_code_or_is_pickled_is_refused(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(ValueError, match="must not ask for code"):
        kind.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="must hold safetensors files"):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
def test_a_pipeline_is_loaded_as_it_was_saved(
    make: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipeline = make()
    pipeline.to(dtype)
    TextToImage(pipeline).save(tmp_path / "pipeline")
    model = TextToImage.from_pretrained(tmp_path / "pipeline")
    for part in (model.unet, model.vae, *model.text_encoders):
        assert {p.dtype for p in part.parameters()} == {dtype}
    assert model.generate(PROMPTS, steps=1).isfinite().all()
    wide = TextToImage.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    assert {p.dtype for p in wide.text_encoders[0].parameters()} == {torch.float32}


def test_variants_and_pickles(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16", safe_serialization=True)
    assert TextToImage.from_pretrained(tmp_path / "half").dtype == torch.float16
    assert TextToImage.from_pretrained(tmp_path / "half", variant="fp16").dtype == torch.float16
    with pytest.raises(ValueError, match=r"variant must be one of 'fp16' in .*got 'ema'"):
        TextToImage.from_pretrained(tmp_path / "half", variant="ema")
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match=r"must hold safetensors files, got \.bin, which are"):
        TextToImage.from_pretrained(tmp_path / "pickled")


def test_no_local_path_is_written(folder: Path, tmp_path: Path) -> None:
    again = TextToImage.from_pretrained(folder)
    assert str(tmp_path) in again.unet.config._name_or_path  # so diffusers notes it
    again.save(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        for file in (folder / part).iterdir():
            assert (tmp_path / "again" / part / file.name).read_bytes() == file.read_bytes(), file


def test_adapters_are_not_saved_under_names_that_nobody_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = TextToImage(tiny_pipeline())
    model.unet.add_adapter(peft.LoraConfig(r=1, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"to_q must be a plain layer, got the adapter .*unload"):
        model.save(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"to_q must be a plain layer, got the adapter .*unload"):
        find_text_projections(model.unet)
    assert not list(tmp_path.iterdir())


def pipeline_of(name: str, unet: Any, **parts: Any) -> Any:
    import diffusers

    words = tokenizer()
    return getattr(diffusers, name)(
        unet=unet,
        text_encoder=_encoder(words),
        tokenizer=words,
        vae=_vae(),
        scheduler=parts.pop("scheduler", _scheduler("epsilon")),
        **parts,
    )


PLAIN: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def flow() -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: pipeline_of("StableDiffusionInpaintPipeline", _unet(in_channels=9), **PLAIN),
            "StableDiffusionInpaintPipeline with a denoiser of 9 channels beside latents of 4",
        ),
        (
            lambda: pipeline_of("StableDiffusionInpaintPipeline", _unet(), **PLAIN),
            "with one that takes image",
        ),
        (
            lambda: pipeline_of("StableDiffusionImg2ImgPipeline", _unet(), **PLAIN),
            "with one that takes image",
        ),
        (
            lambda: pipeline_of(
                "StableDiffusionInstructPix2PixPipeline", _unet(in_channels=8), **PLAIN
            ),
            "a denoiser of 8 channels",
        ),
        (
            lambda: pipeline_of(
                "StableDiffusionUpscalePipeline",
                _unet(in_channels=7, num_class_embeds=10),
                low_res_scheduler=_scheduler("epsilon"),
            ),
            "a denoiser of 7 channels",
        ),
        (
            lambda: pipeline_of("StableDiffusionPipeline", _unet(num_class_embeds=10), **PLAIN),
            "a denoiser with classes",
        ),
        (
            lambda: pipeline_of("StableDiffusionPipeline", _unet(), **PLAIN, scheduler=flow()),
            r"flow matching \(FlowMatchEulerDiscreteScheduler\)",
        ),
        (
            lambda: pipeline_of(
                "StableDiffusionPipeline", _unet(attention_type="gated", norm_num_groups=4), **PLAIN
            ),
            "GLIGEN",
        ),
    ],
)
def test_other_kinds_of_pipelines_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TextToImage(make())
    assert "\n" not in str(caught.value)


def test_eight_bits_are_refused() -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    with pytest.raises(ValueError, match="weights in 8 bits"):
        TextToImage(pipeline)


def test_as_many_channels_as_groups() -> None:
    unet = _unet(block_out_channels=(4, 4), norm_num_groups=4, attention_head_dim=2)
    assert len(find_text_projections(unet)) == 8


def test_a_compiled_denoiser_is_seen_through() -> None:
    pipeline = tiny_pipeline()
    plain = pipeline.unet
    pipeline.unet = torch.compile(plain)
    model = TextToImage(pipeline)
    assert model.unet is plain
    assert type(model.clone().pipeline.unet) is type(plain)
    pytest.importorskip("peft")
    curve = LoRAAttack(targets="kv").run(model, [concept()], steps=1)
    assert len(curve.losses) == 1


def test_a_loaded_ip_adapter_is_named() -> None:
    pipeline = tiny_pipeline()
    # What load_ip_adapter leaves in the configuration.
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match="IP-Adapter"):
        TextToImage(pipeline)


def test_a_pipeline_that_was_damaged_is_not_loaded(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is missing or"):
        TextToImage.from_pretrained(folder)


def test_a_digest_tells_weights_words_and_schedules_apart() -> None:
    found = {TextToImage(tiny_pipeline()).digest() for _ in range(2)}
    assert len(found) == 1
    found.add(TextToImage(tiny_pipeline(prediction="v_prediction")).digest())
    words = TextToImage(tiny_pipeline())
    words.tokenizers[0].add_tokens(["<new>"])
    found.add(words.digest())
    moved = TextToImage(tiny_pipeline())
    with torch.no_grad():
        next(moved.vae.parameters()).flatten()[0].add_(1e-3)
    found.add(moved.digest())
    assert len(found) == 4


def test_grey_and_colour_are_brought_to_what_the_autoencoder_takes() -> None:
    colour = TextToImage(tiny_pipeline())
    grey = torch.linspace(-1.0, 1.0, 64).reshape(1, 1, 8, 8)
    assert torch.equal(colour.latents(grey), colour.latents(grey.expand(-1, 3, -1, -1)))
    pytest.importorskip("sklearn")
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline

    digits = TextToImage(load_digits_pipeline())
    # Luma weights add up to 1 to a float32 rounding.
    torch.testing.assert_close(digits.latents(grey.expand(-1, 3, -1, -1)), digits.latents(grey))


def test_one_empty_prompt_among_several_is_named() -> None:
    model = TextToImage(tiny_pipeline())
    for positions in ("tokens", "last"):
        with pytest.raises(ValueError, match="tokens of their own, got '' among 3"):
            model.token_features(["a cat", "", "a dog"], positions=positions)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens of their own, got 'a cat' among 2"):
        model.token_features(["a cat", "a cat photo"], drop_shared_prefix=True)
    assert len(model.token_features(["a cat", ""], positions="all")) == 24
