"""Adapter files: what PEFT and diffusers write is read, and what we write they load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_inputs import gaussian
from torch import Tensor, nn

from immunize_ext.ops import (
    InputMoments,
    LayerMoments,
    LoraLayer,
    factor_layers,
    merge_lora_adapters,
    merge_moments,
    read_lora,
    write_lora,
)

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")


class Model(nn.Module):
    """A convolution and two linear layers, one of which ends like the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.to_k, self.block = nn.Linear(3, 4), nn.ModuleDict({"to_k": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["to_k"](self.to_k(self.conv(x).mean((-2, -1))))


LAYERS = ("conv", "to_k", "block.to_k")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def trained(model: Model, seed: int, **settings: Any) -> Any:
    """An adapter of PEFT whose factors are no zeros."""
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_modules": ["conv", "to_k"], **settings}
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def update_of(wrapped: Any, layer: str) -> Tensor:
    """What PEFT adds to a weight, as a matrix."""
    module = wrapped.base_model.model.get_submodule(layer)
    return module.get_delta_weight("default").detach().flatten(1)


SETTINGS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"block.to_k": 3}, "alpha_pattern": {"^to_k": 5, "conv": 7}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_peft_wrote_is_read(model: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    wrapped = trained(model, 1, **settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    found = read_lora(tmp_path / "adapter", prefix="unet")
    assert set(found) == {f"unet.{name}" for name in LAYERS}
    assert found["unet.conv"].kernel == (2, 3, 3)
    for name in LAYERS:
        layer = found[f"unet.{name}"]
        delta = layer.scale * layer.up @ layer.down
        torch.testing.assert_close(delta, update_of(wrapped, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_peft_loads_a_merged_adapter(model: Model, tmp_path: Path, rank: int | None) -> None:
    """Layers of several ranks, scales of both, a convolution: outputs of the dense merge."""
    adapters = [trained(model, 1, use_rslora=True), trained(model, 2, target_modules=["to_k"])]
    for n, wrapped in enumerate(adapters):
        wrapped.save_pretrained(tmp_path / str(n))
    read = [read_lora(tmp_path / str(n)) for n in range(2)]
    moments = [
        LayerMoments(
            {
                f"unet.{name}": InputMoments(h.mT @ h, len(h))
                for name, d in zip(LAYERS, (18, 3, 4), strict=True)
                for h in [gaussian(30, d, seed=n)]
            }
        )
        for n in range(2)
    ]
    factors = factor_layers(moments)
    merged = merge_lora_adapters(read, factors, rank=rank)
    assert merged["unet.conv"].rank == 2
    assert merged["unet.to_k"].rank == (rank or 4)
    folder = write_lora(merged, tmp_path / "merged", format="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    for name in LAYERS:
        w0 = model.get_submodule(name).weight.detach()
        found = update_of(loaded, name).reshape(w0.shape)
        if rank is not None and name != "conv":
            assert torch.linalg.matrix_rank(found.flatten(1), rtol=1e-5) == rank
            continue
        copies = [
            w0 + update_of(wrapped, name).reshape(w0.shape)
            if n == 0 or name != "conv"
            else w0.clone()
            for n, wrapped in enumerate(adapters)
        ]
        (dense,) = merge_moments([w0], [[w] for w in copies], factors[f"unet.{name}"])
        torch.testing.assert_close(found, dense - w0, rtol=1e-4, atol=1e-5)


def test_a_name_that_ends_like_another_has_its_own_rank(model: Model, tmp_path: Path) -> None:
    layers = {
        "unet.to_k": LoraLayer(gaussian(4, 3).float(), gaussian(3, 3).float()),
        "unet.block.to_k": LoraLayer(gaussian(4, 1).float(), gaussian(1, 4).float(), scale=2.0),
    }
    folder = write_lora(layers, tmp_path / "adapter", format="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    for name, layer in layers.items():
        found = update_of(loaded, name.removeprefix("unet."))
        torch.testing.assert_close(found, layer.scale * layer.up @ layer.down)
    read = read_lora(folder)
    assert {name: layer.rank for name, layer in read.items()} == {
        "unet.to_k": 3,
        "unet.block.to_k": 1,
    }


def test_biases_of_up_factors(model: Model, tmp_path: Path) -> None:
    """PEFT scales them as it scales the update; a merge knows nothing of them."""
    wrapped = trained(model, 1, lora_bias=True)
    wrapped.save_pretrained(tmp_path / "adapter")
    read = read_lora(tmp_path / "adapter")
    layer, scale = wrapped.base_model.model.to_k, 1.5
    assert torch.equal(read["unet.to_k"].bias, layer.lora_B["default"].bias)
    assert read["unet.to_k"].scale == scale
    one = {"unet.to_k": read["unet.to_k"], "unet.conv": read["unet.conv"]._replace(bias=None)}
    again = write_lora(one, tmp_path / "again", format="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(again)).base_model.model
    x = gaussian(5, 3).float()
    torch.testing.assert_close(loaded.to_k(x), layer(x))
    assert not loaded.conv.lora_B["default"].bias.any()
    found = read_lora(again)
    assert found["unet.conv"].bias is None
    torch.testing.assert_close(found["unet.to_k"].bias, scale * read["unet.to_k"].bias)
    with pytest.raises(ValueError, match=r"got a bias \(lora_bias\) of 'unet\.to_k'"):
        merge_lora_adapters([one, read])


def small_unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_files_of_diffusers_out_and_in(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = small_unet()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["attn2.to_k", "conv1"])
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    state = peft.get_peft_model_state_dict(unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "adapter",
        unet_lora_layers=state,
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    read = read_lora(tmp_path / "adapter")
    assert all(layer.scale == 3.0 for layer in read.values())
    written = write_lora(merge_lora_adapters([read]), tmp_path / "again", format="diffusers")
    loaded = small_unet()
    loaded.load_lora_adapter(
        safetensors.load_file(written / "pytorch_lora_weights.safetensors"), prefix="unet"
    )
    inputs = (
        gaussian(1, 1, 8, 8).float(),
        torch.tensor([3]),
        gaussian(1, 4, 16).float(),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(*inputs).sample, unet(*inputs).sample, rtol=1e-4, atol=1e-4
        )
        assert (unet(*inputs).sample - small_unet()(*inputs).sample).abs().max() > 1e-2
    unet.save_lora_adapter(tmp_path / "alone")
    alone = read_lora(tmp_path / "alone")
    assert {name.removeprefix("unet.") for name in read} == {
        name.removeprefix("unet.") for name in alone
    }
    assert all(layer.scale == 3.0 for layer in alone.values())


def test_older_names_with_alpha(tmp_path: Path) -> None:
    state = {
        "unet.to_k.lora.down.weight": torch.ones(2, 3),
        "unet.to_k.lora.up.weight": torch.ones(4, 2),
        "unet.to_k.alpha": torch.tensor(1.0),
    }
    safetensors.save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    layer = read_lora(tmp_path)["unet.to_k"]
    assert (layer.rank, layer.scale) == (2, 0.5)


# --- merging without moments ----------------------------------------------------------------------


def test_without_moments_the_merge_is_the_weighted_mean() -> None:
    one, two = (
        {"unet.a": LoraLayer(gaussian(4, 2, seed=n), gaussian(2, 3, seed=9 - n), scale=1.0 + n)}
        for n in range(2)
    )
    merged = merge_lora_adapters([one, two], weights=[1.0, 3.0])["unet.a"]
    truth = (
        one["unet.a"].up @ one["unet.a"].down + 6.0 * two["unet.a"].up @ two["unet.a"].down
    ) / 4
    torch.testing.assert_close(merged.up @ merged.down, truth, rtol=1e-13, atol=1e-13)
    cut = merge_lora_adapters([one, two], weights=[1.0, 3.0], rank=1)["unet.a"]
    u, sigma, vt = torch.linalg.svd(truth)
    torch.testing.assert_close(cut.up @ cut.down, sigma[0] * torch.outer(u[:, 0], vt[0]))


def test_narrow_factors_are_merged_in_float32() -> None:
    layer = LoraLayer(gaussian(4, 2).half(), gaussian(2, 3).half())
    merged = merge_lora_adapters([{"unet.a": layer}, {"unet.a": layer}])["unet.a"]
    assert merged.up.dtype == merged.down.dtype == torch.float32
    assert torch.equal(merged.up, torch.cat([layer.up, layer.up], -1).float())


# --- refusals -------------------------------------------------------------------------------------


def test_dora_is_refused(model: Model, tmp_path: Path) -> None:
    trained(model, 1, use_dora=True, target_modules=["to_k"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds DoRA, .*merge_moments or merge_kv"):
        read_lora(tmp_path)


GOOD = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet.a.bias": torch.ones(4)}, r"nothing else, got 'unet\.a\.bias'"),
        ({"lora_unet_a.lora_down.weight": torch.ones(2, 3)}, "must hold both factors"),
        ({"lora_unet_a.alpha": torch.ones(())}, "names of another tool"),
        ({"unet.b.lora_A.weight": torch.ones(2, 3)}, r"both factors of unet\.b, got no up"),
        ({"unet.a.lora_B.weight": torch.ones(4, 3)}, r"factors \(r, d\) and \(o, r\) of unet\.a"),
        ({"unet.a.lora_magnitude_vector": torch.ones(4)}, "holds DoRA"),
        ({"unet.a.lora_B.bias": torch.ones(2)}, r"a bias \(4,\) of unet\.a, got \(2,\)"),
    ],
)
def test_other_files_are_refused(changes: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    safetensors.save_file({**GOOD, **changes}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=f"^read_lora: .*{message}"):
        read_lora(tmp_path / "adapter.safetensors")


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must be a safetensors file or a folder"):
        read_lora(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="must be a safetensors file, got"):
        read_lora(tmp_path / "adapter.safetensors")
    safetensors.save_file({}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="must hold factors of LoRA, got none"):
        read_lora(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, FileNotFoundError, "PEFT keeps lora_alpha in it"),
        ("{", ValueError, "must be JSON"),
        ('{"peft_type": "LOHA"}', ValueError, "must be the config of a LoRA adapter, got 'LOHA'"),
        ('{"peft_type": "LORA", "fan_in_fan_out": true}', ValueError, "transposed weights"),
        ('{"peft_type": "LORA", "modules_to_save": ["a"]}', ValueError, "whole modules"),
    ],
)
def test_configs_of_peft(config: str | None, error: type, message: str, tmp_path: Path) -> None:
    state = {name.replace("unet.", "base_model.model."): t for name, t in GOOD.items()}
    safetensors.save_file(state, tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(error, match=f"^read_lora: .*{message}"):
        read_lora(tmp_path)


def test_adapters_that_do_not_fit_each_other() -> None:
    one = {"unet.a": LoraLayer(torch.ones(4, 2), torch.ones(2, 3))}
    other = {"unet.a": LoraLayer(torch.ones(5, 2), torch.ones(2, 3))}
    with pytest.raises(ValueError, match=r"of one model, got 'unet\.a' from 3 to 5 in adapter 1"):
        merge_lora_adapters([one, other])
    with pytest.raises(ValueError, match=r"got none for .unet\.a."):
        merge_lora_adapters([one], {})
    with pytest.raises(ValueError, match="weights must be 1 positive numbers"):
        merge_lora_adapters([one], weights=[0.0])
    with pytest.raises(ValueError, match="weights must not be given with factors"):
        merge_lora_adapters([one], {}, weights=[1.0])
    with pytest.raises(ValueError, match="must hold at least one, got none"):
        merge_lora_adapters([])


def test_what_cannot_be_written(tmp_path: Path) -> None:
    layer = LoraLayer(torch.ones(4, 2), torch.ones(2, 3))
    with pytest.raises(
        ValueError, match="one model for format 'peft', got parts text_encoder, unet"
    ):
        write_lora({"unet.a": layer, "text_encoder.b": layer}, tmp_path / "x", format="peft")
    with pytest.raises(ValueError, match="format must be"):
        write_lora({"unet.a": layer}, tmp_path / "x", format="kohya")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one, got none"):
        write_lora({}, tmp_path / "x", format="peft")
    with pytest.raises(FileExistsError):
        write_lora({"unet.a": layer}, tmp_path, format="diffusers")
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"
