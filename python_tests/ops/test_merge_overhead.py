"""What a merge costs beside its kernels: nothing is made that nobody asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from sample_inputs import compiled_only
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from immunize_ext.ops import RegularizationFactor, merge_kv


def merge(layers: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Base, weights of one concept, which want gradients, and what they merge to."""
    make = torch.Generator().manual_seed(0)
    base = [torch.randn(3, 4, generator=make, dtype=torch.float64) for _ in range(layers)]
    adapted = [(w + torch.randn(3, 4, generator=make)).requires_grad_() for w in base]
    factor = RegularizationFactor.from_embeddings(torch.eye(4, dtype=torch.float64))
    token = torch.randn(2, 4, generator=make, dtype=torch.float64)
    return base, adapted, merge_kv(base, [adapted], [token], factor)


def operators(layers: int) -> Counter[str]:
    """How often each torch operator runs in a merge and its gradient."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        _, adapted, merged = merge(layers)
        torch.autograd.grad(merged, adapted, [torch.ones_like(w) for w in merged])
    return Counter(event.name for event in record.events())


@compiled_only
def test_no_zeros_are_made_for_a_layer() -> None:
    few, many = operators(2), operators(9)
    for name in ("aten::zeros", "aten::zero_", "aten::fill_", "aten::copy_"):
        assert many[name] - few[name] <= many["aten::ones_like"] - few["aten::ones_like"], name
    assert many["aten::zeros"] == few["aten::zeros"]


@pytest.mark.parametrize("order", [1, 2])
def test_layers_that_the_loss_does_not_see_have_zero_gradients(order: int) -> None:
    _, adapted, merged = merge(3)
    loss = (merged[1] ** 3).sum()
    _, others, all_merged = merge(3)
    weighted = sum((w**3).sum() * weight for w, weight in zip(all_merged, (0, 1, 0), strict=True))
    found = torch.autograd.grad(loss, adapted, create_graph=order == 2)
    expected = torch.autograd.grad(weighted, others, create_graph=order == 2)
    if order == 2:
        found = torch.autograd.grad(found[1].pow(2).sum(), adapted)
        expected = torch.autograd.grad(expected[1].pow(2).sum(), others)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert found[1].abs().max() > 0


def test_tangents_of_incoming_gradients_alone_reach_the_gradient() -> None:
    """Forward mode over a gradient whose weights carry no tangent, with nothing recorded."""
    _, adapted, merged = merge(2)
    ways = [torch.randn_like(w) for w in merged]
    with torch.autograd.forward_ad.dual_level():
        grads = [torch.autograd.forward_ad.make_dual(torch.ones_like(w), w) for w in ways]
        found = torch.autograd.grad(merged, adapted, grads, retain_graph=True)
        tangents = [torch.autograd.forward_ad.unpack_dual(g).tangent for g in found]
    for tangent, linear in zip(tangents, torch.autograd.grad(merged, adapted, ways), strict=True):
        torch.testing.assert_close(tangent, linear)
