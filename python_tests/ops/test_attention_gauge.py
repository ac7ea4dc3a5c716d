"""A basis inside each head: nothing to see from outside, and nothing that cannot be undone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from immunize_ext import reference
from immunize_ext.ops import (
    HeadWeights,
    attention_gauge,
    balance_attention,
    find_attention,
    log_condition_number,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, heads: int, groups: int, c: int, e: int, d: int = 7) -> HeadWeights:
    shapes = (heads * c, d), (groups * c, d), (groups * e, d), (d, heads * e)
    return HeadWeights(*(draw(seed + i, *shape) for i, shape in enumerate(shapes)))


def gauge(seed: int, groups: int, side: int, log_kappa: float) -> Tensor:
    """Matrices with kappa(R^T R) = e^log_kappa."""
    left, right = (torch.linalg.qr(draw(seed + i, groups, side, side)).Q for i in (0, 1))
    sigma = torch.logspace(0.0, -0.25 * log_kappa, side, base=np.e**2, dtype=torch.float64)
    return left * sigma @ right


def attend(w: HeadWeights, x: Tensor, heads: int) -> Tensor:
    q, k, v = (x @ m.mT for m in w[:3])
    q = q.unflatten(-1, (heads, -1)).transpose(-2, -3)
    k, v = (
        part.unflatten(-1, (-1, q.shape[-1] if part is k else w.output.shape[1] // heads))
        for part in (k, v)
    )
    k, v = (p.transpose(-2, -3).repeat_interleave(heads // p.shape[-2], -3) for p in (k, v))
    mixed = torch.softmax(q @ k.mT, -1) @ v
    return mixed.transpose(-2, -3).flatten(-2) @ w.output.mT


@given(st.integers(0, 2**31), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.floats(0.0, 9.2))
def test_attention_answers_what_it_did(
    seed: int, heads_groups: tuple[int, int], log_kappa: float
) -> None:
    heads, groups = heads_groups
    w, x = weights(seed, heads, groups, 3, 2), draw(seed + 9, 5, 7)
    r, s = gauge(seed + 10, groups, 3, log_kappa), gauge(seed + 12, groups, 2, log_kappa)
    moved = attention_gauge(w, keys=r, values=s, heads=heads)
    before, after = attend(w, x, heads), attend(moved, x, heads)
    slack = 100 * torch.finfo(torch.float64).eps * np.exp(log_kappa / 2)
    assert float((after - before).abs().max()) <= slack * float(before.abs().max() + 10)
    back = attention_gauge(moved, keys=torch.linalg.inv(r), values=torch.linalg.inv(s), heads=heads)
    for one, other in zip(back, w, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * slack)


@given(st.integers(0, 2**31), st.sampled_from([(2, 2), (4, 2)]))
def test_balancing_undoes_every_gauge(seed: int, heads_groups: tuple[int, int]) -> None:
    heads, groups = heads_groups
    w = weights(seed, heads, groups, 3, 2)
    far = attention_gauge(
        w, keys=gauge(seed, groups, 3, 9.2), values=gauge(seed + 5, groups, 2, 9.2), heads=heads
    )
    one, other = (balance_attention(m, heads=heads) for m in (w, far))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    x = draw(seed + 9, 5, 7)
    torch.testing.assert_close(attend(one, x, heads), attend(w, x, heads), rtol=0, atol=1e-10)
    key = one.key.reshape(groups, 3, 7)
    off = key @ key.mT - torch.diag_embed((key @ key.mT).diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) < 1e-10


def test_gauge_is_the_reference_and_differentiable() -> None:
    w, r, s = weights(0, 2, 2, 3, 2), gauge(5, 2, 3, 3.0), gauge(7, 2, 2, 3.0)
    found = attention_gauge(w, keys=r, values=s, heads=2)
    arrays: Any = tuple(m.numpy() for m in w)
    expected = reference.attention_gauge(arrays, r.numpy(), s.numpy())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=1e-12)
    inputs = [t.clone().requires_grad_() for t in (*w, r, s)]

    def moved(q: Tensor, k: Tensor, v: Tensor, o: Tensor, r: Tensor, s: Tensor) -> Any:
        return tuple(attention_gauge(HeadWeights(q, k, v, o), keys=r, values=s, heads=2))

    assert gradcheck(moved, inputs, check_forward_ad=True)


def test_orthogonal_gauge_leaves_log_kappa_and_others_reach_the_pencil() -> None:
    """Of the keys of one head: nothing for R in O(c), log kappa_H of the pencil for K_P^-1/2."""
    w, primary, harmful = weights(0, 1, 1, 3, 2), draw(20, 40, 7), draw(21, 40, 7)
    primary[:, 0] *= 9.0
    rotation = torch.linalg.qr(draw(22, 1, 3, 3)).Q
    same = attention_gauge(w, keys=rotation, heads=1)
    for x in (primary, harmful):
        assert float(log_condition_number(x @ same.key.mT)) == pytest.approx(
            float(log_condition_number(x @ w.key.mT)), abs=1e-12
        )
    gram = (primary @ w.key.mT).mT @ (primary @ w.key.mT)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.sqrt() @ vectors.mT  # R^-T = K_P^-1/2
    moved = attention_gauge(w, keys=root[None], heads=1)
    assert float(log_condition_number(primary @ moved.key.mT)) == pytest.approx(0.0, abs=1e-10)
    pencil = torch.linalg.eigvals(torch.linalg.solve(gram, w.key @ harmful.mT @ harmful @ w.key.mT))
    expected = 0.5 * float((pencil.real.max() / pencil.real.min()).log())
    assert float(log_condition_number(harmful @ moved.key.mT)) == pytest.approx(expected, abs=1e-9)


def gauged(model: nn.Module, names: list[str] | None = None) -> nn.Module:
    other = copy.deepcopy(model)
    found = find_attention(other)
    assert found
    for name, layers in found.items():
        if names is None or name in names:
            group, _ = layers.key.out_features, layers.query
            c, e = (
                layers.query.out_features // layers.heads,
                layers.output.in_features // layers.heads,
            )
            keys = gauge(3, group // c, c, 9.2) if layers.free_keys else None
            layers.gauge(keys=keys, values=gauge(4, layers.value.out_features // e, e, 9.2))
    return other


def test_transformers_attention_is_found_and_kept() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = transformers.ViTConfig(
        **size, intermediate_size=16, image_size=8, patch_size=4, num_channels=1
    )
    text = transformers.CLIPTextConfig(**size, intermediate_size=16, vocab_size=20)
    images, words = torch.randn(2, 1, 8, 8).double(), torch.arange(6).reshape(2, 3)
    for model, inputs in (
        (transformers.ViTModel(vit, add_pooling_layer=False), images),
        (transformers.CLIPTextModel(text), words),
    ):
        model = model.double().eval()
        assert len(find_attention(model)) == 2
        moved, balanced = gauged(model), gauged(model)
        for layers in find_attention(balanced).values():
            layers.balance()
        with torch.no_grad():
            before = model(inputs).last_hidden_state
            for other in (moved, balanced):
                assert float((other(inputs).last_hidden_state - before).abs().max()) < 1e-11
        assert not torch.allclose(
            next(iter(find_attention(moved).values())).key.weight,
            next(iter(find_attention(model).values())).key.weight,
        )


def test_rotary_attention_keeps_its_keys() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        vocab_size=20,
    )
    model = transformers.LlamaModel(config).double().eval()
    (layers,) = find_attention(model).values()
    assert (layers.heads, layers.free_keys) == (4, False)
    with pytest.raises(ValueError, match="keys must be None where rotary"):
        layers.gauge(keys=torch.eye(4).expand(2, 4, 4))
    words = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        before, after = (m(words).last_hidden_state for m in (model, gauged(model)))
    assert float((after - before).abs().max()) < 1e-11


def test_the_pipeline_of_digits_predicts_what_it_did() -> None:
    pytest.importorskip("diffusers")
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline

    unet = load_digits_pipeline().unet.double().eval()
    names = [name for name in find_attention(unet) if name.endswith("attn2")]
    assert names
    torch.manual_seed(0)
    config = unet.config
    size = config.sample_size
    noise = torch.randn(1, config.in_channels, size, size).double()
    text = torch.randn(1, 5, config.cross_attention_dim).double()
    with torch.no_grad():
        before, after = (m(noise, 7, text).sample for m in (unet, gauged(unet, names)))
    assert float((after - before).abs().max()) < 1e-10


def test_norms_of_queries_keep_the_keys_and_added_keys_keep_all() -> None:
    block = nn.Module()
    for name in ("to_q", "to_k", "to_v"):
        block.add_module(name, nn.Linear(4, 4))
    block.to_out = nn.ModuleList([nn.Linear(4, 4)])
    block.heads, block.norm_q = 2, nn.LayerNorm(2)
    (layers,) = find_attention(nn.ModuleDict({"one": block})).values()
    assert not layers.free_keys
    block.add_k_proj = nn.Linear(4, 4)
    assert find_attention(nn.ModuleDict({"one": block})) == {}


def test_bad_gauges_are_refused_by_name_and_leave_the_model() -> None:
    w = weights(0, 2, 2, 3, 2)
    with pytest.raises(ValueError, match="attention_gauge: heads must divide"):
        attention_gauge(w, heads=4)
    with pytest.raises(ValueError, match=r"keys must have shape \(2, 3, 3\)"):
        attention_gauge(w, keys=torch.eye(3), heads=2)
    with pytest.raises(ValueError, match="key and value must have rows"):
        attention_gauge(w._replace(value=w.value[:3]), heads=2)
    with pytest.raises(ValueError, match="values must be finite"):
        attention_gauge(w, values=torch.full((2, 2, 2), float("nan")), heads=2)
    with pytest.raises(torch.linalg.LinAlgError):
        attention_gauge(w, keys=torch.zeros(2, 3, 3), heads=2)
