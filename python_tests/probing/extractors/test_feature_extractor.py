"""Which blocks are chosen, what is frozen, what becomes a feature, what a fingerprint sees."""

import pytest
import torch
from torch import nn

from immunize_ext.probing.extractors.feature_extractor import (
    FeatureExtractor,
    block_state,
    extract_features,
    find_stages,
    fingerprint,
    freeze_except,
    select_blocks,
)

transformers = pytest.importorskip("transformers")


def vit(layers: int = 12) -> FeatureExtractor:
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    return FeatureExtractor(transformers.ViTModel(config).eval())


def resnet() -> FeatureExtractor:
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
    )
    return FeatureExtractor(transformers.ResNetModel(config).eval())


def test_stages_of_a_vit_and_a_resnet() -> None:
    assert find_stages(vit()) == [f"layers.{i}" for i in range(12)]
    assert find_stages(resnet()) == [f"encoder.stages.{i}" for i in range(4)]
    assert find_stages(nn.Linear(2, 2)) == []


def test_stages_named_layer() -> None:
    model = nn.Module()
    model.stem = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for index in (1, 2, 3):
        model.add_module(f"layer{index}", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model.add_module("fc", nn.Linear(2, 2))
    assert find_stages(model) == ["layer1", "layer2", "layer3"]


def test_a_list_in_the_middle_is_not_taken() -> None:
    # The stem's list would be the outermost one of one class, but most weights come after it.
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Bilinear(9, 9, 9))
    assert find_stages(model) == []


def test_only_the_block_is_chosen_and_no_norm_elsewhere() -> None:
    # The released code takes every parameter with "norm" in its name beside the last block.
    extractor = vit()
    assert select_blocks(extractor, ["layers.1"]) == ["layers.1"]  # not 10 and 11
    trained = freeze_except(extractor, select_blocks(extractor, ["layers.11"]))
    assert trained
    assert all(name.startswith("layers.11.") for name in trained)
    norms = [n for n, p in extractor.model.named_parameters() if "norm" in n and p.requires_grad]
    assert norms
    assert all(name.startswith("layers.11.") for name in norms)


def test_patterns() -> None:
    extractor = resnet()
    stages = ["encoder.stages.2", "encoder.stages.3"]
    assert select_blocks(extractor, ["encoder.stages.[23]"]) == stages
    # What lies inside a chosen module is not named again.
    assert select_blocks(extractor, ["*stages.3*"]) == ["encoder.stages.3"]
    with pytest.raises(ValueError, match=r"got 'layer4', which matches none; .*encoder\.stages\.3"):
        select_blocks(extractor, ["layer4"])
    with pytest.raises(ValueError, match="must be a list of names"):
        select_blocks(extractor, "encoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a list of names"):
        select_blocks(extractor, [])


def test_freezing_stops_statistics_and_dropout() -> None:
    extractor = FeatureExtractor(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Conv2d(2, 3, 3))
    ).train()
    freeze_except(extractor, ["3"])
    assert not any(module.training for module in extractor.modules())
    before = block_state(extractor, ["1"])
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(extractor(x), extractor(x))
    after = block_state(extractor, ["1"])
    assert all(torch.equal(before[name], after[name]) for name in before)


class Tokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_pooling() -> None:
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(FeatureExtractor(Tokens())(x), x[:, 0])
    torch.testing.assert_close(FeatureExtractor(Tokens(), pool="mean")(x), x.mean(1))
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(FeatureExtractor(Tokens())(maps), maps.mean((2, 3)))
    with pytest.raises(ValueError, match="pool must be"):
        FeatureExtractor(Tokens(), pool="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must yield \(n, p\)"):
        FeatureExtractor(Tokens())(torch.zeros(3))


def test_outputs_of_transformers() -> None:
    images = torch.randn(2, 1, 8, 8)
    extractor = vit(1)
    expected = extractor.model(images).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images), expected)
    images = torch.randn(2, 1, 64, 64)
    convolutional = resnet()
    expected = convolutional.model(images).last_hidden_state.mean((2, 3))
    torch.testing.assert_close(convolutional(images), expected)

    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x,)

    with pytest.raises(ValueError, match="must yield a tensor, or an output with"):
        FeatureExtractor(Wrong())(images)


def test_features_do_not_change_the_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    model[1].eval()
    x = torch.randn(10, 3)
    first = extract_features(model, [x[:4], x[4:]])
    assert torch.equal(first, extract_features(model, [x]).reshape(10, 3)) or torch.allclose(
        first, extract_features(model, [x]), atol=1e-6
    )
    assert model.training
    assert not model[1].training
    assert int(model[2].num_batches_tracked) == 0
    with pytest.raises(ValueError, match="at least one batch"):
        extract_features(model, [])
    with pytest.raises(ValueError, match="must be finite"):
        extract_features(model, [x / 0.0])
    with pytest.raises(ValueError, match=r"must yield \(n, p\)"):
        extract_features(Tokens(), [torch.zeros(2, 3, 4)])


def test_fingerprint() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    first, without = fingerprint(model), fingerprint(model, without=["1"])
    assert fingerprint(FeatureExtractor(model)) == first
    model[1].running_mean += 1.0
    assert fingerprint(model) != first
    assert fingerprint(model, without=["1"]) == without
