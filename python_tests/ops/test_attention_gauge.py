"""A basis inside each head: nothing to see from outside, and nothing that cannot be undone."""

from __future__ import annotations

import copy
import importlib
from functools import partial
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


def gauged(model: nn.Module, names: list[str] | None = None, **promised: bool) -> nn.Module:
    other = copy.deepcopy(model)
    found = find_attention(other, **promised)
    assert found
    for name, layers in found.items():
        if names is None or name in names:
            c = layers.query.out_features // layers.heads
            e = layers.output.in_features // layers.heads
            keys = gauge(3, layers.key.out_features // c, c, 9.2) if layers.free_keys else None
            layers.gauge(keys=keys, values=gauge(4, layers.value.out_features // e, e, 9.2))
    return other


SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
IMAGES = SIZE | {"image_size": 8, "patch_size": 4, "num_channels": 1}
WORDS = SIZE | {"vocab_size": 40, "max_position_embeddings": 12, "pad_token_id": 0}
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16}
KOSMOS = {"embed_dim": 16, "layers": 2, "attention_heads": 4, "ffn_dim": 32}
GEMMA = {
    "layer_types": ["full_attention"] * 2,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 40,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 2,
}
GROUPS = WORDS | {"num_key_value_heads": 2, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 2}


def answering(
    name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Any]:
    """A small model of transformers with random weights, biases too, and what it answers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{name.removesuffix('Model')}Config")(**settings)
    model = (
        getattr(transformers, name, None)
        or importlib.import_module(
            configuration.__module__.replace("configuration", "modeling")
        ).__dict__[name]
    )
    model = model(configuration).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images, words = torch.randn(2, 1, 8, 8, dtype=dtype), torch.arange(3, 11).reshape(2, 4)

    def answer(one: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = one(images if "image_size" in settings else words).last_hidden_state
        return found

    return model, answer


@pytest.mark.parametrize(
    ("name", "settings", "keys"),
    [
        ("BertModel", WORDS, True),
        ("RobertaModel", WORDS, True),
        ("CLIPTextModel", WORDS, True),
        ("OPTModel", WORDS | OPT, True),
        ("CLIPVisionModel", IMAGES, True),
        ("SiglipVisionModel", IMAGES | {"vision_use_head": False}, True),
        ("ViTModel", IMAGES, True),
        ("DeiTModel", IMAGES, True),
        ("Dinov2Model", IMAGES, True),
        ("LlamaModel", GROUPS, False),
        ("MistralModel", GROUPS, False),
        ("GemmaModel", GROUPS, False),
        ("Qwen2Model", GROUPS, False),
        ("Qwen3Model", GROUPS, False),
    ],
)
def test_known_attention_is_found_and_kept(name: str, settings: dict[str, Any], keys: bool) -> None:
    model, answer = answering(name, settings)
    found = find_attention(model)
    assert len(found) == 2
    assert {one[4:7] for one in found.values()} == {(4, keys, True)}
    moved, balanced = gauged(model), gauged(model)
    for layers in find_attention(balanced).values():
        layers.balance()
    before = answer(model)
    for other in (moved, balanced):
        assert float((answer(other) - before).abs().max()) < 1e-10 * float(before.abs().max())
    for path, layers in find_attention(moved).items():
        assert torch.equal(layers.key.weight, found[path].key.weight) != keys
        assert not torch.allclose(layers.value.weight, found[path].value.weight)
    if not keys:
        with pytest.raises(ValueError, match=r"keys must be left alone in transformers\..*rotary"):
            next(iter(found.values())).gauge(keys=torch.eye(4).expand(2, 4, 4))


def refused(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    found = find_attention(model)
    assert found
    for layers in found.values():
        eye = torch.eye(layers.output.in_features // layers.heads, dtype=torch.float64)
        kept = {name: eye.expand(99, *eye.shape) for name in ("keys", "values")}
        for call in (layers.balance, *(partial(layers.gauge, **{k: v}) for k, v in kept.items())):
            with pytest.raises(ValueError, match=f"left alone in {layers.module}.*your promise"):
                call()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("RoFormerModel", WORDS | {"embedding_size": 16}),  # rotary positions as sinusoidal_pos
        ("RoFormerModel", WORDS | {"embedding_size": 16, "rotary_value": True}),
        ("BitNetModel", GROUPS),  # a norm before W_O
        ("OlmoModel", WORDS | {"clip_qkv": 0.5}),
        ("Kosmos2TextModel", WORDS | KOSMOS),  # the same norm by another name
        ("Gemma3nTextModel", GROUPS | GEMMA),  # v_norm
    ],
)
def test_what_is_not_known_is_left_alone(name: str, settings: dict[str, Any]) -> None:
    """In each of these a balance of keys and values would answer something else."""
    model, answer = answering(name, settings, torch.float32)
    refused(model)
    before, moved = answer(model), copy.deepcopy(model)
    for layers in find_attention(moved, keys=True, values=True).values():
        layers.balance()
    assert float((answer(moved) - before).abs().max()) > 1e-3 * float(before.abs().max())


def test_processors_of_diffusers_decide() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    audio = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=2,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=2,
        cross_attention_dim=8,
        time_proj_dim=4,
        global_states_input_dim=8,
        cross_attention_input_dim=8,
    )
    refused(audio)
    processors = diffusers.models.attention_processor
    attention = processors.Attention(8, heads=2, dim_head=4).double()
    x = torch.randn(2, 5, 8).double()
    for processor in (
        processors.AttnProcessor(),
        processors.AttnProcessor2_0(),
        processors.SlicedAttnProcessor(1),
    ):
        attention.set_processor(processor)
        (found,) = find_attention(attention).values()
        assert found.free_keys
        assert found.free_values
        torch.testing.assert_close(gauged(attention)(x), attention(x), rtol=0, atol=1e-11)
    attention.norm_q = nn.LayerNorm(4)
    (found,) = find_attention(attention).values()
    assert (found.free_keys, found.free_values) == (False, True)


def test_a_forward_or_parent_of_ones_own_is_not_known() -> None:
    transformers = pytest.importorskip("transformers")
    model, _ = answering("BertModel", WORDS)
    block = model.encoder.layer[0].attention

    class Own(type(block.self)):  # type: ignore[misc]
        """Nothing is known of what derives from a known module."""

    changed = []
    for change in range(4):
        other = copy.deepcopy(block)
        if change == 0:
            other.self.__class__ = Own
        elif change == 1:
            other.self.forward = lambda x: x
        elif change == 2:
            holder = nn.Module()
            holder.self, holder.output = other.self, other.output
            other = holder
        else:
            other.self.config = copy.deepcopy(other.self.config)
            other.self.config._attn_implementation = "one's own"
        changed.append(other)
    refused(nn.ModuleList(changed))
    plain = next(iter(find_attention(block).values()))
    assert plain.free_keys
    assert transformers.BertModel is type(model)
    nn.utils.parametrizations.weight_norm(block.self.key)
    assert find_attention(block) == {}


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


def block() -> nn.Module:
    found = nn.Module()
    for name in ("to_q", "to_k", "to_v"):
        found.add_module(name, nn.Linear(4, 4))
    found.to_out = nn.ModuleList([nn.Linear(4, 4)])
    found.heads = 2
    return found


def test_a_promise_is_the_callers_and_added_keys_keep_all() -> None:
    one = block()
    refused(one)
    for keys, values in ((True, None), (None, True), (True, True)):
        (layers,) = find_attention(one, keys=keys, values=values).values()
        assert (layers.free_keys, layers.free_values) == (bool(keys), bool(values))
        kept = layers.weights()[0 if values else 2].clone()
        layers.balance()
        assert torch.equal(kept, layers.weights()[0 if values else 2]) != (keys is values)
    one.add_k_proj = nn.Linear(4, 4)
    assert find_attention(one) == {}


def test_bad_gauges_are_refused_by_name_and_leave_the_model() -> None:
    one = block().half()
    before = copy.deepcopy(one.state_dict())
    (layers,) = find_attention(one, keys=True, values=True).values()
    w, eye = layers.weights(), torch.eye(2).expand(2, 2, 2)
    with pytest.raises(ValueError, match=r"set: output must have shape \(4, 4\), got \(4, 5\)"):
        layers.set(HeadWeights(*(2.0 * m for m in w[:3]), torch.ones(4, 5)))
    with pytest.raises(ValueError, match=r"set: query must have shape \(4, 5\), got \(4, 4\)"):
        layers.set(w._replace(query=torch.ones(4, 4)))
    for part in range(4):
        far = HeadWeights(*((1e6 if i == part else 2.0) * m.float() for i, m in enumerate(w)))
        with pytest.raises(
            ValueError, match=rf"{w._fields[part]} in torch\.float16 must be finite"
        ):
            layers.set(far)
    with pytest.raises(ValueError, match=r"value in torch\.float16 must be finite"):
        layers.gauge(keys=eye * 2.0, values=eye * 1e8)
    with pytest.raises(ValueError, match="values must be finite"):
        layers.gauge(keys=eye, values=eye * float("nan"))
    with pytest.raises(torch.linalg.LinAlgError):
        layers.gauge(keys=eye * 0.0, values=eye * 2.0)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    w = weights(0, 2, 2, 3, 2)
    with pytest.raises(ValueError, match="attention_gauge: heads must divide"):
        attention_gauge(w, heads=4)
    with pytest.raises(ValueError, match=r"keys must have shape \(2, 3, 3\)"):
        attention_gauge(w, keys=torch.eye(3), heads=2)
    with pytest.raises(ValueError, match="key and value must have rows"):
        attention_gauge(w._replace(value=w.value[:3]), heads=2)
