"""as_lora: the merge as an exact adapter, loaded back by PEFT and by diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunize_ext.errors import ContradictoryTargetsError, NumericalWarning
from immunize_ext.ops import (
    MergeAdapter,
    RegularizationFactor,
    as_lora,
    lora_state_dict,
    merge_kv,
    save_lora,
)

D = 16


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def problem(base: list[Tensor]) -> tuple[Any, ...]:
    concepts = [
        [
            w + 0.1 * random(*w.shape, seed=10 * n + layer, dtype=w.dtype)
            for layer, w in enumerate(base)
        ]
        for n in range(2)
    ]
    d = base[0].shape[1]
    embeddings = [random(2, d, seed=4), random(3, d, seed=5)]
    factor = RegularizationFactor.from_embeddings(random(50, d, seed=3), ridge=0.01)
    return base, concepts, embeddings, factor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adapter_reproduces_the_merge(dtype: torch.dtype) -> None:
    args = problem([random(o, D, seed=o, dtype=dtype) for o in (6, 9)])
    adapter, merged = as_lora(*args), merge_kv(*args)
    assert adapter.down.shape == (5, D)
    for up, w0, w in zip(adapter.up, args[0], merged, strict=True):
        delta = up.to(torch.float64) @ adapter.down.to(torch.float64)
        # W is rounded once to its own dtype; the adapter to its accumulation dtype.
        eps = torch.finfo(dtype).eps
        bound = 4 * eps * (w0.abs().double() + up.abs().double() @ adapter.down.abs().double())
        assert ((w0.double() + delta - w.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delta_in_float32_keeps_what_rounding_of_the_merged_weights_loses(
    dtype: torch.dtype,
) -> None:
    """Merged half weights answer within their rounding; the adapter within that of float32.

    A stored weight is off by eps/2 |w| at most (eps: spacing relative to 1), so an output by
    eps/2 sum_k |w_k| |x_k|. The adapter leaves W0 as it is and adds R (B x) in float32: R is a
    float32 sum of d products, off by d eps32 sum |W_n - W0| |c|.
    """
    args = problem([random(o, D, seed=o, dtype=dtype) for o in (6, 9)])
    adapter, merged = as_lora(*args), merge_kv(*args)
    exact = merge_kv(
        [w.double() for w in args[0]], [[w.double() for w in ws] for ws in args[1]], *args[2:]
    )
    x = random(D, 7, seed=9)
    lost = 0.0
    for layer, (w0, w, truth) in enumerate(zip(args[0], merged, exact, strict=True)):
        assert w.dtype == dtype
        assert adapter.up[layer].dtype == adapter.down.dtype == torch.float32
        right = truth @ x
        rounding = torch.finfo(dtype).eps / 2 * (truth.abs() @ x.abs())
        stored = (w.double() @ x - right).abs()
        assert (stored <= 1.01 * rounding).all()
        delta = adapter.up[layer].double() @ (adapter.down.double() @ x)
        kept = (w0.double() @ x + delta - right).abs()
        spread = sum(
            (ws[layer].double() - w0.double()).abs() @ e.abs().mT @ part.double().abs() @ x.abs()
            for ws, e, part in zip(args[1], args[2], adapter.down.split([2, 3]), strict=True)
        )
        assert (kept <= 2 * D * torch.finfo(torch.float32).eps * spread).all()
        lost = max(lost, float(stored.max()))
        assert float(kept.max()) < 1e-2 * lost


def test_repeated_tokens_leave_the_rank() -> None:
    base, concepts, embeddings, factor = problem([random(6, D, seed=6)])
    twice = (base, [concepts[0], concepts[0]], [embeddings[0], embeddings[0]], factor)
    adapter = as_lora(*twice)
    assert adapter.down.shape[0] == 2
    torch.testing.assert_close(
        base[0] + adapter.up[0] @ adapter.down, merge_kv(*twice)[0], rtol=1e-12, atol=1e-12
    )


def test_contradictions_are_refused_as_in_merge_kv() -> None:
    base, concepts, embeddings, factor = problem([random(6, D, seed=6)])
    with pytest.raises(ContradictoryTargetsError):
        as_lora(base, concepts, [embeddings[0], embeddings[0]], factor)


def test_modules_must_match_the_layers() -> None:
    adapter = MergeAdapter(torch.ones(1, 3), [torch.ones(2, 1), torch.ones(2, 1)])
    with pytest.raises(ValueError, match="2 different names"):
        lora_state_dict(adapter, ["a"], format="peft")
    with pytest.raises(ValueError, match="2 different names"):
        lora_state_dict(adapter, ["a", "a"], format="peft")
    with pytest.raises(ValueError, match="'peft' or 'diffusers'"):
        lora_state_dict(adapter, ["a", "b"], format="kohya")  # type: ignore[arg-type]


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    adapter = MergeAdapter(torch.ones(1, 3), [torch.ones(2, 1)])
    target = tmp_path / "adapter"
    target.mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        save_lora(adapter, ["a"], target, format="peft")
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    adapter = MergeAdapter(torch.ones(1, 3), [torch.ones(2, 1)])
    with pytest.raises(ValueError, match="different names"):
        save_lora(adapter, ["a", "b"], tmp_path / "adapter", format="peft")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_one_bad_layer_does_not_cost_the_adapter(format: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    args = problem([random(o, D, seed=o) for o in (6, 9, 4)])
    truth = as_lora(*args)
    args[1][1][2][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"\[1\]\[2\] must be finite"):
        as_lora(*args)
    with pytest.warns(NumericalWarning, match="1 of 3 layers .* layer 2"):
        adapter = as_lora(*args, on_error="skip")
    assert adapter.skipped == (2,)
    assert torch.equal(adapter.down, truth.down)
    assert torch.equal(adapter.up[0], truth.up[0])
    assert torch.equal(adapter.up[1], truth.up[1])
    assert adapter.up[2].shape == (4, 5)
    assert not adapter.up[2].any()
    folder = save_lora(adapter, ["a", "b", "c"], tmp_path / "adapter", format=format)
    (file,) = folder.glob("*.safetensors")
    owners = {name.split(".")[-3] for name in safetensors.load_file(file)}
    assert owners == {"a", "b"}
    if format == "peft":
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["target_modules"] == "a|b"


def test_peft_wraps_the_modules_of_the_merge_and_no_other(tmp_path: Path) -> None:
    """A list of names would match every name that ends like one of them."""
    peft = pytest.importorskip("peft")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_k = nn.Linear(D, 6, bias=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_k = nn.Linear(D, 6, bias=False)
            self.block, self.xblock = Block(), Block()
            self.deep = nn.ModuleDict({"block": Block()})

        def forward(self, x: Tensor) -> Tensor:
            return self.to_k(x) + self.block.to_k(x) + self.deep["block"].to_k(x)

    model = Model()
    names = ["to_k", "block.to_k"]
    args = problem([model.get_submodule(name).weight.detach() for name in names])
    folder = save_lora(as_lora(*args), names, tmp_path / "adapter", format="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    wrapped = [n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert wrapped == names
    for name, weight in zip(names, merge_kv(*args), strict=True):
        module = loaded.base_model.model.get_submodule(name)
        found = module.weight + module.get_delta_weight("default")
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=D,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model.eval()


def text_projections(unet: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("attn2.to_k", "attn2.to_v"))
    }


def output(unet: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = unet(
            random(1, 1, 8, 8, seed=7, dtype=torch.float32),
            torch.tensor([3]),
            random(1, 4, D, seed=8, dtype=torch.float32),
        ).sample
    return result


def merged_and_adapter(unet: nn.Module) -> tuple[Tensor, MergeAdapter, list[str]]:
    """Output of the UNet with merged weights, and the same merge as an adapter."""
    layers = text_projections(unet)
    args = problem([layer.weight.detach() for layer in layers.values()])
    edited = copy.deepcopy(unet)
    for name, w in zip(layers, merge_kv(*args), strict=True):
        edited.get_submodule(name).weight.data.copy_(w)
    return output(edited), as_lora(*args), list(layers)


def test_peft_loads_the_adapter(unet: nn.Module, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    expected, adapter, names = merged_and_adapter(unet)
    folder = save_lora(adapter, names, tmp_path / "adapter", format="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(unet), str(folder)).eval()
    before = output(unet)
    torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3  # the edit does something


def test_diffusers_loads_the_adapter(unet: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors.torch")
    expected, adapter, names = merged_and_adapter(unet)
    folder = save_lora(adapter, names, tmp_path / "adapter", format="diffusers")
    state = safetensors.load_file(folder / "pytorch_lora_weights.safetensors")
    loaded = copy.deepcopy(unet)
    loaded.load_lora_adapter(state, prefix="unet")
    torch.testing.assert_close(output(loaded), expected, rtol=1e-5, atol=1e-5)
