"""What changed between two models as an adapter: its rank, what it misses, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_inputs import gaussian
from torch import Tensor, nn

from immunize_ext.ops import adapter_of_change, write_lora


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.norm = nn.LayerNorm(5)
        self.to_k, self.to_out = nn.Linear(20, 12), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.to_k(x))


def changed(before: nn.Module, **deltas: Tensor) -> Any:
    after = copy.deepcopy(before)
    with torch.no_grad():
        for name, delta in deltas.items():
            after.get_parameter(name.replace("__", ".")).add_(delta)
    return after


def low(o: int, d: int, r: int, seed: int = 0) -> Tensor:
    return gaussian(o, r, seed=seed) @ gaussian(r, d, seed=seed + 1)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-2, 1.0, 30.0])
def test_rounding_adds_no_rank(model: Model, dtype: torch.dtype, size: float) -> None:
    """The update's own rank, in whatever dtype the weights are stored."""
    before = model.to(dtype)
    after = copy.deepcopy(before)
    with torch.no_grad():
        w0 = before.to_k.weight.detach().double()
        after.to_k.weight.copy_(w0 + size * low(12, 20, 3))
    found = adapter_of_change(before, after)
    (name,) = found.layers
    assert name == "unet.to_k"
    assert found.ranks[name] == found.layers[name].rank <= 3
    if size >= 1.0:  # far above the rounding of the weights
        assert found.ranks[name] == 3
    w = after.to_k.weight.detach().double()
    delta = w - w0
    if dtype != torch.float64:  # what rounding had made of it
        assert torch.linalg.matrix_rank(delta) == 12
    layer = found.layers[name]
    missed = delta - layer.up.double() @ layer.down.double()
    # One rounding of the weights, and one of the factors.
    bound = torch.finfo(dtype).eps * w.norm() + 4 * torch.finfo(torch.float32).eps * delta.norm()
    assert missed.norm() <= bound
    assert found.residuals[name] == pytest.approx((missed.norm() / delta.norm()).item(), rel=1e-6)


def test_a_lower_rank_is_the_best_of_that_rank(model: Model) -> None:
    before = model.double()
    delta = low(12, 20, 5)
    found = adapter_of_change(before, changed(before, to_k__weight=delta), rank=2)
    sigma = torch.linalg.svdvals(delta)
    assert found.ranks == {"unet.to_k": 5}
    assert found.layers["unet.to_k"].rank == 2
    truth = float(sigma[2:].norm() / sigma.norm())
    assert found.residuals["unet.to_k"] == pytest.approx(truth, rel=1e-9)


def test_biases_and_convolutions(model: Model) -> None:
    before = model.double()
    kernel, bias = gaussian(3, 2, 3, 3, seed=1), gaussian(7, seed=2)
    found = adapter_of_change(
        before, changed(before, conv__weight=kernel, to_out__bias=bias), prefix="model"
    )
    conv, out = found.layers["model.conv"], found.layers["model.to_out"]
    assert (conv.kernel, conv.bias) == ((2, 3, 3), None)
    torch.testing.assert_close(conv.up @ conv.down, kernel.flatten(1))
    assert out.bias is not None
    torch.testing.assert_close(out.bias, bias)
    assert found.ranks["model.to_out"] == 0
    assert (out.rank, bool(out.up.any())) == (1, False)


def test_peft_makes_one_model_of_the_other(model: Model, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    after = changed(
        model, to_k__weight=low(12, 20, 4).float(), to_out__bias=gaussian(7, seed=3).float()
    )
    found = adapter_of_change(model, after, prefix="model")
    folder = write_lora(found.layers, tmp_path / "adapter", format="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    x = gaussian(6, 20, seed=4).float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), after(x), rtol=1e-5, atol=1e-5)
        assert (after(x) - model(x)).abs().max() > 1.0


def test_what_no_adapter_holds_is_refused(model: Model) -> None:
    for name, delta in (
        ("norm__weight", torch.ones(5)),
        ("grouped__weight", torch.ones(4, 2, 3, 3)),
    ):
        after = changed(model, to_k__weight=low(12, 20, 1).float(), **{name: delta})
        with pytest.raises(
            ValueError, match=f"got {name.replace('__', '.')}, which no LoRA adapter"
        ):
            adapter_of_change(model, after)
    with pytest.raises(ValueError, match="got the same weights"):
        adapter_of_change(model, copy.deepcopy(model))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        adapter_of_change(model, model, rank=0)
    with pytest.raises(ValueError, match=r"must have the same tensors, got .* and . more in one"):
        adapter_of_change(model, nn.Sequential(nn.Linear(2, 2)))
