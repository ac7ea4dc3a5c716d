"""Moments of what layers receive: sums, sharing, convolutions, files, one factor an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sample_inputs import gaussian
from torch import Tensor, nn

from immunize_ext.ops import (
    InputMoments,
    LayerMoments,
    collect_moments,
    convolution_matrix,
    factor_layers,
    merge_moments,
)
from immunize_ext.storage import save_checkpoint


class Attention(nn.Module):
    """q, k, v of one tensor, out of another, and a layer behind a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 3) for _ in range(3))
        self.out, self.side = nn.Linear(3, 2), nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor, *, other: Tensor | None = None, side: bool = False) -> Tensor:
        mixed = self.q(x) * self.k(x) + self.v(x if other is None else other)
        return self.out(mixed) + (self.side(x) if side else 0.0)


def inputs_of(layer: nn.Module, model: nn.Module, batches: list[Tensor]) -> Tensor:
    """The rows, all of them, by a hook of torch's own."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, __: seen.append(args[0].reshape(-1, 4)))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(seen)


def test_sums_and_sharing() -> None:
    torch.manual_seed(0)
    model, batches = Attention(), [gaussian(5, 4, seed=1), gaussian(2, 3, 4, seed=2)]
    moments = collect_moments(model, ["q", "k", "v", "out"], batches)
    assert moments.groups() == [("q", "k", "v"), ("out",)]
    rows = inputs_of(model.q, model, batches)
    torch.testing.assert_close(moments["q"].gram, rows.mT @ rows, rtol=1e-13, atol=1e-13)
    assert moments["q"].rows == 11
    torch.testing.assert_close(moments["v"].mean, rows.mT @ rows / 11, rtol=1e-13, atol=1e-13)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert repr(moments) == "LayerMoments(4 layers, 2 inputs)"
    alone = collect_moments(model, ["q", "k"], batches, share=False)
    assert alone.groups() == [("q",), ("k",)]
    assert torch.equal(alone["k"].gram, moments["k"].gram)


def test_batches_are_summed_in_float64_whatever_the_model_computes_in() -> None:
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    batches = [gaussian(300, 4, seed=k, dtype=torch.bfloat16) for k in range(3)]
    found = collect_moments(nn.Sequential(layer), ["0"], batches)["0"]
    rows = torch.cat(batches).double()
    assert found.gram.dtype == torch.float64
    torch.testing.assert_close(found.gram, rows.mT @ rows, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(2, 3, (3, 2), stride=2, dilation=(1, 2), padding=(2, 0)),
        nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"),
        nn.Conv1d(2, 3, 3, padding=1, stride=2),
    ],
    ids=["padded", "strided", "reflected", "one-dimensional"],
)
def test_patches_are_what_a_convolution_multiplies(convolution: nn.Module) -> None:
    """|conv(x) - bias|^2 is tr(W G W^T), which pins the moments for every W."""
    convolution = convolution.double()
    size = (6, 7) if isinstance(convolution, nn.Conv2d) else (9,)
    x = gaussian(2, 2, *size, seed=1)
    moments = collect_moments(nn.Sequential(convolution), ["0"], [x])["0"]
    for seed in range(3):
        with torch.no_grad():
            convolution.weight.copy_(gaussian(*convolution.weight.shape, seed=seed))
            convolution.bias.zero_()
            outputs = convolution(x)
        w = convolution_matrix(convolution.weight.detach())
        assert moments.rows == outputs.numel() // outputs.shape[1]
        torch.testing.assert_close((w @ moments.gram @ w.mT).trace(), outputs.square().sum())


def test_calls_by_keyword_and_by_position() -> None:
    model, x = Attention(), gaussian(5, 4, seed=1)
    truth = collect_moments(model, ["v"], [x])["v"]
    other = collect_moments(model, ["v"], [{"x": 2 * x, "other": x}, (x,)])["v"]
    assert torch.equal(other.gram, 2 * truth.gram)


def test_a_tensor_changed_in_place_is_another_one() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            return first + self.b(x.mul_(2))

    moments = collect_moments(Changing(), ["a", "b"], [gaussian(5, 4, seed=1)])
    assert len(moments.groups()) == 2
    assert torch.equal(moments["b"].gram, 4 * moments["a"].gram)


def test_layers_that_part_later_are_refused() -> None:
    model, x = Attention(), gaussian(5, 4, seed=1)
    batches: list[Any] = [x, {"x": x, "other": 2 * x}]
    with pytest.raises(ValueError, match=r"got another one at 'v' in a later call; .*share=False"):
        collect_moments(model, ["q", "v"], batches)
    moments = collect_moments(model, ["q", "v"], batches, share=False)
    assert torch.equal(2 * moments["v"].gram, 5 * moments["q"].gram)
    with pytest.raises(ValueError, match="at 'side' in a later call"):
        collect_moments(model, ["q", "side"], [{"x": x, "side": True}, x])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "layers must be different names, at least one"),
        (["q", "q"], "layers must be different names"),
        (["nothing"], "got no such module at 'nothing'"),
        ([""], "got Attention at ''"),
        (["side"], "every layer must get an input, got none at 'side'"),
    ],
)
def test_bad_layers_are_named(layers: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^collect_moments: .*{message}"):
        collect_moments(Attention(), layers, [gaussian(5, 4)])


def test_grouped_convolutions_and_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="convolutions with one group, got 2 at '0'"):
        collect_moments(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), ["0"], [])
    x = gaussian(5, 4)
    x[3, 1] = torch.nan
    model = Attention()
    with pytest.raises(ValueError, match="the input of 'q' must be finite"):
        collect_moments(model, ["q"], [x])
    assert not model.q._forward_pre_hooks


def test_moments_of_a_wrapped_layer() -> None:
    peft = pytest.importorskip("peft")
    model, x = Attention(), gaussian(5, 4, seed=1)
    truth = collect_moments(model, ["q"], [x])["q"].gram
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"]))
    found = collect_moments(wrapped, ["base_model.model.q"], [x])["base_model.model.q"].gram
    assert torch.equal(found, truth)


# --- files ----------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    moments = collect_moments(Attention(), ["q", "k", "out"], [gaussian(5, 4)], tag="digits")
    moments.save(path)
    found = LayerMoments.load(path, tag="digits")
    assert found.tag == "digits"
    assert found.groups() == moments.groups()
    assert list(found) == list(moments)
    for layer in moments:
        assert torch.equal(found[layer].gram, moments[layer].gram)
        assert found[layer].rows == moments[layer].rows
    with pytest.raises(ValueError, match="must hold the moments of 'faces', got 'digits'"):
        LayerMoments.load(path, tag="faces")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    kind, values = "immunize_ext.LayerMoments/1", {"layers": [["q"]], "rows": [3], "tag": None}
    eye = torch.eye(2).double()
    for tensors, message in (
        ({"0": eye, "more": eye}, "nothing else, got .*more"),
        ({"0": eye[:1]}, r"finite float64 matrices \(d, d\)"),
        ({"0": eye.float()}, "got torch.float32"),
        ({"0": eye * torch.inf}, "finite float64"),
    ):
        save_checkpoint(path, tensors, kind=kind, values=values)
        with pytest.raises(ValueError, match=rf"^LayerMoments\.load: .*{message}"):
            LayerMoments.load(path)
    with pytest.raises(FileNotFoundError):
        LayerMoments.load(tmp_path / "nothing")


# --- one factor an input --------------------------------------------------------------------------


def test_one_factor_for_layers_that_share_an_input_in_every_concept() -> None:
    model, layers = Attention(), ["q", "k", "v", "out"]
    concepts = [collect_moments(model, layers, [gaussian(9, 4, seed=k)]) for k in range(2)]
    held = collect_moments(model, layers, [gaussian(9, 4, seed=5)])
    factors = factor_layers(concepts, regularization=held)
    assert factors["q"] is factors["k"] is factors["v"]
    assert len({id(factor) for factor in factors.values()}) == 2
    parted = collect_moments(model, layers, [gaussian(9, 4, seed=5)], share=False)
    apart = factor_layers(concepts, regularization=parted)
    assert len({id(factor) for factor in apart.values()}) == 4
    base = [model.get_submodule(name).weight.detach() for name in layers]
    copies = [[w + 0.1 * gaussian(*w.shape, seed=n) for w in base] for n in range(2)]
    one = merge_moments(base, copies, [factors[name] for name in layers])
    two = merge_moments(base, copies, [apart[name] for name in layers])
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_factors_of_different_layers_are_refused() -> None:
    some = LayerMoments({"q": InputMoments(torch.eye(2).double(), 2)})
    other = LayerMoments({"k": InputMoments(torch.eye(2).double(), 2)})
    with pytest.raises(ValueError, match=r"moments must be of the same layers, got \['k', 'q'\]"):
        factor_layers([some, other])
    with pytest.raises(ValueError, match="got none"):
        factor_layers([])
