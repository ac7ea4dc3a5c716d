"""Nothing to ask for: no tokens, a concept without any, a layer without rows."""

from __future__ import annotations

import pytest
import torch
from sample_inputs import gaussian, taking_route

from immunize_ext.ops import RegularizationFactor, as_lora, merge_kv, merge_report
from immunize_ext.ops.erasure import uce

D = 4
FACTOR = RegularizationFactor.from_embeddings(gaussian(9, D, seed=1))
NONE = gaussian(0, D)
INF = float("inf")


@pytest.mark.parametrize("hardness", [INF, 2.0])
@pytest.mark.parametrize("contradictions", ["raise", "average"])
def test_without_tokens_the_base_stays(route: str, hardness: float, contradictions: str) -> None:
    base = [gaussian(3, D, seed=2).requires_grad_(), gaussian(2, D, seed=3).requires_grad_()]
    adapted = [[w.detach() + 1 for w in base]]
    values = [gaussian(3, 0), gaussian(2, 0)]
    with taking_route(route):
        for concepts, given in ((adapted, None), (None, values)):
            merged = merge_kv(
                base,
                concepts,
                [NONE],
                FACTOR,
                values=given,
                hardness=hardness,
                contradictions=contradictions,
            )
            assert all(torch.equal(w, w0) for w, w0 in zip(merged, base, strict=True))
            (grad,) = torch.autograd.grad(merged[0].sum(), base[:1])
            assert torch.equal(grad, torch.ones_like(grad))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_concept_without_tokens_changes_nothing_for_the_others(route: str, place: int) -> None:
    base = [gaussian(3, D, seed=2)]
    tokens = [gaussian(1, D, seed=4), gaussian(2, D, seed=5)]
    adapted = [[gaussian(3, D, seed=6)], [gaussian(3, D, seed=7)]]
    with taking_route(route):
        truth = merge_kv(base, adapted, tokens, FACTOR)
        more_tokens, more = list(tokens), list(adapted)
        empty = gaussian(3, D, seed=8).requires_grad_()
        more_tokens.insert(place, NONE)
        more.insert(place, [empty])
        found = merge_kv(base, more, more_tokens, FACTOR)
        (grad,) = torch.autograd.grad(found[0].sum(), empty)
    assert torch.equal(found[0], truth[0])
    assert not grad.any()


@pytest.mark.parametrize("values", [False, True])
def test_a_layer_without_rows_among_others(route: str, values: bool) -> None:
    outputs = (0, 3)
    base = [gaussian(o, D, seed=o) for o in outputs]
    token = gaussian(1, D, seed=4)
    adapted = [[w + 1 for w in base]]
    wanted = [gaussian(o, 1, seed=o) for o in outputs]
    given = (None, wanted) if values else (adapted, None)
    alone = (None, wanted[1:]) if values else ([adapted[0][1:]], None)
    with taking_route(route):
        nothing, merged = merge_kv(base, given[0], [token], FACTOR, values=given[1])
        (truth,) = merge_kv(base[1:], alone[0], [token], FACTOR, values=alone[1])
        # Repeats that contradict each other are looked for in the other layers as well.
        pair = [torch.cat([token, token])]
        agree = [torch.cat([v, v], 1) for v in wanted]
        merge_kv(base, None, pair, FACTOR, values=agree)
    assert nothing.shape == (0, D)
    assert torch.equal(merged, truth)


def test_adapter_report_and_erasure_of_nothing(route: str) -> None:
    base = [gaussian(3, D, seed=2)]
    problem = (base, [[base[0] + 1]], [NONE], FACTOR)
    with taking_route(route):
        adapter = as_lora(*problem)
        report = merge_report(merge_kv(*problem), *problem, names=["nothing"])
        erased = uce(base, NONE, NONE)
    assert adapter.down.shape == (0, D)
    assert report.residual == {"nothing": 0.0}
    assert report.relative_change == [0.0]
    assert report.tokens == report.rank == 0
    assert torch.equal(erased[0], base[0])


def test_concepts_of_one_name_are_told_apart() -> None:
    """Two concepts that both become "art": the second must not hide the first in a report."""
    base = [gaussian(3, D, seed=2)]
    tokens = [gaussian(1, D, seed=4), gaussian(1, D, seed=5)]
    problem = (base, [[base[0] + 1], [base[0] + 2]], tokens, FACTOR)
    report = merge_report(merge_kv(*problem), *problem, names=["art", "art"])
    assert list(report.residual) == ["art", "art (2)"]
