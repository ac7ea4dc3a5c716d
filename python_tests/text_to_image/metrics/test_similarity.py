"""CLIP, DINO and LPIPS on tiny random models of the real classes: ranges and known pairs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunize_ext._extras import MissingExtraError
from immunize_ext.text_to_image.metrics.similarity import (
    ClipSimilarity,
    DinoSimilarity,
    LpipsDistance,
    check_images,
)

SIZE = 16


def images(count: int = 3, *, channels: int = 3, side: int = SIZE, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def clip() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 20,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
            "bos_token_id": 18,
            "eos_token_id": 19,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": 4,
        },
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


@pytest.fixture(scope="module", params=["Dinov2", "ViT"])
def dino(request: pytest.FixtureRequest) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        hidden_size=16,
        intermediate_size=32,
        mlp_ratio=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=4,
    )
    return getattr(transformers, f"{request.param}Model")(config)


class Tokens(dict[str, Tensor]):
    def to(self, device: torch.device) -> Tokens:
        return Tokens({name: value.to(device) for name, value in self.items()})


def tokenizer(prompts: list[str], **_: Any) -> Tokens:
    """Ids by letter; begins and ends as CLIP's does."""
    ids = [[18, *(1 + ord(letter) % 17 for letter in prompt[:4]), 19] for prompt in prompts]
    longest = max(map(len, ids))
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
    padded = [row + [0] * (longest - len(row)) for row in ids]
    return Tokens(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask))


def test_identical_images_are_alike_clip(clip: Any) -> None:
    similarity = ClipSimilarity(clip)
    assert similarity.image_image(images(), images(), pairs="matched") == pytest.approx(1.0)
    assert similarity.image_image(images(), images(seed=1), pairs="matched") < 1.0 - 1e-4


def test_identical_images_are_alike_dino(dino: Any) -> None:
    similarity = DinoSimilarity(dino)
    assert similarity.image_image(images(), images(), pairs="matched") == pytest.approx(1.0)
    assert similarity.image_image(images(), images(seed=1), pairs="matched") < 1.0 - 1e-6


def test_all_pairs_are_the_mean_of_single_pairs(dino: Any) -> None:
    similarity = DinoSimilarity(dino, batch_size=2)
    a, b = images(3), images(2, seed=1)
    single = [similarity.image_image(x[None], y[None]) for x in a for y in b]
    assert similarity.image_image(a, b) == pytest.approx(sum(single) / 6, abs=1e-6)
    assert similarity.image_image(a, b) == pytest.approx(similarity.image_image(b, a), abs=1e-12)


def test_input_is_what_the_model_was_trained_with(clip: Any) -> None:
    """Features equal those of hand-made pixel values of the right size."""
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    similarity = ClipSimilarity(clip, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = (images() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    torch.testing.assert_close(similarity.features(images()), expected)


def test_other_sizes_and_grey_images(clip: Any) -> None:
    similarity = ClipSimilarity(clip)
    grey = images(2, channels=1)
    torch.testing.assert_close(
        similarity.features(grey), similarity.features(grey.expand(-1, 3, -1, -1))
    )
    small = similarity.features(images(2, side=8))
    wide = similarity.features(torch.rand(2, 3, 20, 33))
    assert small.shape == wide.shape == (2, 8)


def test_prompts(clip: Any) -> None:
    similarity = ClipSimilarity(clip, tokenizer)
    value = similarity.image_text(images(2), ["cat", "dogs"])
    assert -1.0 <= value <= 1.0
    single = [
        similarity.image_text(image[None], [prompt])
        for image in images(2)
        for prompt in ("cat", "dogs")
    ]
    assert value == pytest.approx(sum(single) / 4, abs=1e-6)
    assert similarity.image_text(images(2), ["cat", "dogs"], pairs="matched") == pytest.approx(
        (single[0] + single[3]) / 2, abs=1e-6
    )
    with pytest.raises(ValueError, match="list of prompts"):
        similarity.image_text(images(1), "cat")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        ClipSimilarity(clip).image_text(images(1), ["cat"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images() * 2.0 - 1.0, r"\(images \+ 1\) / 2"),
        (images() * 255.0, "divide by 255"),
        ((images() * 255.0).to(torch.uint8), "must be floating"),
        (images()[0], "shape"),
        (images(channels=2), "1 or 3 channels"),
        (images() * torch.nan, "finite"),
        (images(0), "at least one image"),
    ],
)
def test_wrong_range_is_refused_everywhere(clip: Any, bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipSimilarity(clip).image_image(bad, images())
    with pytest.raises(ValueError, match=f"references .*{message}|references must .*{message}"):
        LpipsDistance(distance).distance(images(), bad)


def test_rounding_beyond_the_range_is_no_mistake() -> None:
    edge = torch.tensor([-1e-5, 1.0 + 1e-5]).view(1, 1, 1, 2)
    checked = check_images("test", "images", edge)
    assert checked.min() == 0.0
    assert checked.max() == 1.0


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Stands in for the LPIPS network: squared distance, the largest possible one is 4."""
    return (a - b).square().mean((1, 2, 3), keepdim=True)


def test_lpips_known_pairs() -> None:
    lpips = LpipsDistance(distance)
    assert lpips.distance(images(), images(), pairs="matched") == 0.0
    assert lpips.similarity(images(), images(), pairs="matched") == 1.0
    # Black and white are 2 apart in the range that the network gets.
    black, white = torch.zeros(1, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert lpips.distance(black, white) == pytest.approx(4.0)


def test_lpips_all_pairs() -> None:
    lpips = LpipsDistance(distance)
    a, b = images(2), images(3, seed=1)
    single = [lpips.distance(x[None], y[None]) for x in a for y in b]
    assert lpips.distance(a, b) == pytest.approx(sum(single) / 6)
    with pytest.raises(ValueError, match="as many on both sides"):
        lpips.distance(a, b, pairs="matched")
    with pytest.raises(ValueError, match="size of images"):
        lpips.distance(a, images(side=8))
    with pytest.raises(ValueError, match="one distance a pair"):
        LpipsDistance(lambda x, y: x - y).distance(a, a)


def test_lpips_takes_networks() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.ones(3))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return ((a - b).square() * self.weights.view(3, 1, 1)).mean((1, 2, 3))

    assert LpipsDistance(Network()).distance(images(), images(), pairs="matched") == 0.0


@pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is not None, reason="torchmetrics is installed"
)
def test_missing_torchmetrics_is_named() -> None:
    with pytest.raises(MissingExtraError, match="torchmetrics is not installed"):
        LpipsDistance.from_torchmetrics()


def test_unknown_network_and_pairs(clip: Any) -> None:
    with pytest.raises(ValueError, match="'alex'"):
        LpipsDistance.from_torchmetrics("resnet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'all' or 'matched'"):
        ClipSimilarity(clip).image_image(images(), images(), pairs="some")  # type: ignore[arg-type]


def test_local_folders(dino: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dino.save_pretrained(tmp_path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = DinoSimilarity.from_pretrained(tmp_path)
    assert loaded.mean == (0.1, 0.2, 0.3)
    expected = DinoSimilarity(dino, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    torch.testing.assert_close(loaded.features(images()), expected.features(images()))
    with pytest.raises(FileNotFoundError, match=r"must be a folder with a model \(config.json\)"):
        DinoSimilarity.from_pretrained(tmp_path / "missing")
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: object, **__: object) -> None:
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match="run `hf download openai/clip-vit-base-patch32`"):
        ClipSimilarity.from_pretrained("openai/clip-vit-base-patch32")
    # Under a hub's name it is the same model, on the device that it is put on.
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    named = DinoSimilarity.from_pretrained("owner/dino")
    torch.testing.assert_close(named.features(images()), loaded.features(images()))
