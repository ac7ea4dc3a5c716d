"""A merge that C++ records: which derivatives reach the rules in Python, and that they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sample_inputs import compiled_only, gaussian
from torch import Tensor

from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.ops.merge import solve_merge
from immunize_ext.ops.merge_derivatives import ApplyBackwardRule, ApplyRule
from immunize_ext.ops.merge_saddle import RULES

pytestmark = compiled_only

SHAPES = [(2, 3), (4, 3), (2, 3), (4, 3), (2, 3), (4, 3), (1, 3), (1, 3), (5, 3), ()]
WEIGHTS = [gaussian(2, 3, seed=9), gaussian(4, 3, seed=10)]


def inputs() -> list[Tensor]:
    """Two layers, two concepts for each, their tokens, captions and a ridge."""
    found = [gaussian(*shape, seed=seed) for seed, shape in enumerate(SHAPES[:-1])]
    return [*found, torch.tensor(0.4, dtype=torch.float64)]


def merge(*arguments: Tensor) -> list[Tensor]:
    base, first, second = arguments[:2], arguments[2:4], arguments[4:6]
    factor = RegularizationFactor.from_embeddings(arguments[8], ridge=arguments[9], relative=False)
    return merge_kv(base, [first, second], arguments[6:8], factor)


def loss(*arguments: Tensor) -> Tensor:
    merged = merge(*arguments)
    return sum(((w.sin() * x).sum() for w, x in zip(merged, WEIGHTS, strict=True)), torch.zeros(()))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rules in Python that are asked during the test."""
    found: list[str] = []

    def watched(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            found.append(name)
            return apply(*args)

        return wrapper

    rules = {
        "apply": ApplyRule,
        "backward": ApplyBackwardRule,
        "map": RULES["merge_constraint_map"],
    }
    for name, rule in rules.items():
        monkeypatch.setattr(rule, "apply", staticmethod(watched(name, rule.apply)))
    return found


def test_the_first_gradient_needs_no_python(asked: list[str]) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    found = torch.autograd.grad(loss(*leaves), leaves)
    assert asked == []
    expected = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*inputs())
    assert set(asked) == {"apply", "backward", "map"}, "transforms have the rules"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_what_needs_the_rules_finds_them(asked: list[str]) -> None:
    """Derivatives of the derivative, in both modes, and tangents of the inputs."""
    leaves = [t.requires_grad_() for t in inputs()]
    first = torch.autograd.grad(loss(*leaves), leaves[:2], create_graph=True)
    assert "backward" in asked
    assert "apply" not in asked
    second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
    assert all(t.abs().max() > 0 for t in second)
    asked.clear()
    tangents = tuple(torch.ones_like(t) for t in inputs())
    moved = torch.func.jvp(loss, tuple(inputs()), tangents)[1]
    assert set(asked) == {"apply", "map"}
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(moved, sum(g.sum() for g in gradients), rtol=1e-11, atol=1e-12)


def test_rules_in_python_give_the_same_gradients(asked: list[str]) -> None:
    """torch.func asks them; both have the formulas, which are written twice."""
    arguments = inputs()
    of_rules = torch.func.grad(loss, tuple(range(len(arguments))))(*arguments)
    assert {"apply", "map"} <= set(asked)
    asked.clear()
    leaves = [x.clone().requires_grad_() for x in arguments]
    recorded = torch.autograd.grad(loss(*leaves), leaves)
    assert not asked
    for one, other in zip(recorded, of_rules, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_many_gradients_at_once() -> None:
    """Incoming gradients under vmap meet a node that knows nothing of it."""
    leaves = [t.requires_grad_() for t in inputs()]
    merged = merge(*leaves)
    ways = [torch.stack([gaussian(*w.shape, seed=k) for k in range(3)]) for w in merged]

    def pulled(*grads: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(merged, leaves, grads, retain_graph=True)

    found = torch.func.vmap(pulled)(*ways)
    for k in range(3):
        one = pulled(*(way[k] for way in ways))
        for batch, single in zip(found, one, strict=True):
            torch.testing.assert_close(batch[k], single, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wanted", [[0], [3], [6], [8], [9], [1, 4], [5, 7]])
def test_gradients_of_some_inputs_are_those_of_all(wanted: Sequence[int]) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    everything = torch.autograd.grad(loss(*leaves), leaves)
    value = loss(*leaves)
    found = torch.autograd.grad(value, [leaves[k] for k in wanted], retain_graph=True)
    alone = [t.requires_grad_(k in wanted) for k, t in enumerate(inputs())]
    again = torch.autograd.grad(loss(*alone), [alone[k] for k in wanted])
    for k, one, other in zip(wanted, found, again, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, everything[k], rtol=1e-12, atol=1e-13)


def test_a_weight_that_was_changed_since_is_refused() -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    changed = leaves[2] * 1.0
    value = loss(*leaves[:2], changed, *leaves[3:])
    changed.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_only_merged_weights_are_recorded() -> None:
    leaves = [t.requires_grad_() for t in inputs()[:8]]
    factor = RegularizationFactor.identity(3)
    concepts = [leaves[2:4], leaves[4:6]]
    found = solve_merge(
        leaves[:2], concepts, leaves[6:8], factor, None, float("inf"), "raise", None
    )
    assert all(w.requires_grad for w in found.merged)
    assert not any(r.requires_grad for r in found.residual)
    assert found.merged[0].grad_fn is found.merged[1].grad_fn


def test_compiled_backward() -> None:
    """The node is called as it is from a backward pass that was compiled."""
    leaves = [t.requires_grad_() for t in inputs()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    value = loss(*leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        value.backward()
    for leaf, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, other, rtol=1e-12, atol=1e-13)
