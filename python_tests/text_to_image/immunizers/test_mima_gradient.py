"""Gradients of a MIMA step: unrolled = finite differences; first order = its identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from attack_pipelines import tiny_pipeline
from immunizer_settings import SMALL, concepts
from torch import Tensor

from immunize_ext.bilevel import SGD, Hypergradient, HypergradientKind, Parameters, adapt
from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.text_to_image.immunizers import MIMA, DiffusionIMMA, JointTraining
from immunize_ext.text_to_image.immunizers.loop import Run
from immunize_ext.text_to_image.model import TextToImage

pytest.importorskip("accelerate")

DIRECTIONS = 3


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def slopes(
    value: Callable[[Parameters], Tensor], at: Parameters, seed: int, h: float
) -> tuple[float, float]:
    """Slope in a random direction: by the gradient, and by a five-point difference."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in at.items()}
    found = torch.autograd.grad(value(leaves), list(leaves.values()), allow_unused=True)
    way = {name: normal(*v.shape, seed=seed + i) for i, (name, v) in enumerate(at.items())}
    analytic = sum(
        float((part * way[name]).sum())
        for part, name in zip(found, leaves, strict=True)
        if part is not None
    )

    def along(t: float) -> float:
        here = {n: (v.detach() + t * way[n]).requires_grad_() for n, v in at.items()}
        return float(value(here).detach())

    numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    return analytic, numeric


# The toy: y = V tanh(K c) + b, three blocks; K and V are merged, b is averaged.


def toy(
    kind: HypergradientKind, steps: int = 1
) -> tuple[Callable[[Parameters], Tensor], Parameters]:
    theta = {
        "k": 0.3 * normal(4, 5, seed=1),
        "v": 0.3 * normal(3, 5, seed=2),
        "b": 0.3 * normal(4, seed=3),
    }
    tokens = [normal(2, 5, seed=4), normal(1, 5, seed=5)]
    targets = [normal(2, 3, seed=6), normal(1, 3, seed=7)]
    mix = normal(3, 4, seed=8)
    factor = RegularizationFactor.from_embeddings(normal(30, 5, seed=9), ridge=0.01)

    def loss(n: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
        def of(p: Mapping[str, Tensor]) -> Tensor:
            hidden = torch.tanh(tokens[n] @ p["k"].mT + p["b"])
            return (hidden @ mix.mT * (tokens[n] @ p["v"].mT) - targets[n]).square().mean()

        return of

    def value(p: Parameters) -> Tensor:
        copies = [
            adapt(p, [loss(n)] * steps, SGD(0.1), Hypergradient(kind)).parameters for n in (0, 1)
        ]
        merged = merge_kv([p["k"], p["v"]], [[c["k"], c["v"]] for c in copies], tokens, factor)
        after = {
            "k": merged[0],
            "v": merged[1],
            "b": torch.stack([copy["b"] for copy in copies]).mean(0),
        }
        return loss(0)(after) + loss(1)(after)

    return value, theta


@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_gradient_of_a_toy_is_the_finite_difference(steps: int) -> None:
    value, theta = toy("unrolled", steps=steps)
    for seed in range(DIRECTIONS):
        analytic, numeric = slopes(value, theta, 100 * seed, h=2e-5)
        # Rounding eps / h = 1e-11 of a value around 10; truncation h^4 |f^(5)| is below it.
        assert analytic == pytest.approx(numeric, rel=1e-7, abs=1e-9)


def test_first_order_leaves_the_adaptation_out() -> None:
    value, theta = toy("first_order")
    pairs = [slopes(value, theta, 100 * seed, h=2e-5) for seed in range(DIRECTIONS)]
    assert any(abs(analytic - numeric) > 1e-3 * abs(numeric) for analytic, numeric in pairs)


def test_first_order_gradient_through_the_merge_is_the_upstream_gradient() -> None:
    # W = W0 + (V - W0 C^T) B is affine in (W0, W'_1, ..., W'_N) and maps equal inputs to
    # themselves; with W'_n = W0 - const the derivative by W0 is therefore the identity.
    base = [normal(6, 8, seed=1), normal(3, 8, seed=2)]
    tokens = [normal(2, 8, seed=3), normal(3, 8, seed=4)]
    factor = RegularizationFactor.from_embeddings(normal(40, 8, seed=5), ridge=1e-3)
    leaves = [w.clone().requires_grad_() for w in base]
    adapted = [[w - 0.1 * normal(*w.shape, seed=9 + n) for w in leaves] for n in (0, 1)]
    merged = merge_kv(leaves, adapted, tokens, factor)
    assert all(not torch.allclose(m, w) for m, w in zip(merged, base, strict=True))
    upstream = [normal(*w.shape, seed=20 + i) for i, w in enumerate(base)]
    found = torch.autograd.grad(merged, leaves, upstream)
    for got, right in zip(found, upstream, strict=True):
        # kappa(T) <= 1e3 here: a thousand roundings.
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


# The tiny denoiser, through everything: adaptation, merge, average, clamp, retain term.

MOVING: dict[str, Any] = SMALL | {"inner_rate": 0.5, "hypergradient": "unrolled"}


def objective(immunizer: Any, *names: str) -> tuple[Callable[[Parameters], Tensor], Run]:
    model = TextToImage(tiny_pipeline(dtype=torch.float64))
    run = Run(immunizer, model.clone(), concepts(*names), None, None)

    def value(parameters: Parameters) -> Tensor:
        return run._objective(parameters, 0, 0)[0]

    return value, run


@pytest.mark.parametrize(
    ("immunizer", "names"),
    [
        (MIMA(**MOVING), ("three", "five")),
        (MIMA(**MOVING, inner_steps=2), ("three", "five")),
        (MIMA(**MOVING, inner_steps=2, inner_optimizer="momentum"), ("three", "five")),
        (MIMA(**MOVING, inner_steps=2, curvature="secant"), ("three", "five")),
        (MIMA(**SMALL, hypergradient="unrolled", scope="all"), ("three", "five")),
        (DiffusionIMMA(**SMALL, hypergradient="unrolled"), ("three",)),
        (JointTraining(**SMALL, hypergradient="unrolled"), ("three", "five")),
    ],
    ids=["mima", "2-steps", "momentum", "secant", "all", "imma", "joint"],
)
def test_unrolled_gradient_of_a_denoiser_is_the_finite_difference(
    immunizer: Any, names: tuple[str, ...]
) -> None:
    value, run = objective(immunizer, *names)
    for seed in range(DIRECTIONS):
        analytic, numeric = slopes(value, run.moved, 1000 * seed, h=1e-5)
        # Rounding eps / h of losses around 1, 2e-11, in slopes of 1e-2 and more; the scheduler's
        # float32 constants are the same in all evaluations.
        assert analytic == pytest.approx(numeric, rel=1e-6)
    assert run.model.dtype == torch.float64


def test_first_order_step_is_the_gradient_at_the_merged_point() -> None:
    immunizer = MIMA(**SMALL, retain_weight=0.0)
    value, run = objective(immunizer, "three", "five")
    leaves = {name: p.detach().clone().requires_grad_() for name, p in run.moved.items()}
    found = torch.autograd.grad(value(leaves), list(leaves.values()))
    merged = immunizer.adapted(run, leaves, 0)
    point = {name: tensor.detach().requires_grad_() for name, tensor in merged.items()}
    upper = torch.cat([batch.losses(run.model, point) for batch in run.draw(0, 0)]).mean()
    there = torch.autograd.grad(-upper, list(point.values()))
    for got, right in zip(found, there, strict=True):
        # kappa(T) of a few tokens of a random encoder is below 1e4.
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11)
