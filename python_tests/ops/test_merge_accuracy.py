"""Merges whose T is nearly singular, against fifty digits: the value and every gradient.

Two tokens at an angle a make kappa(T) = 1/a^2. A backward stable solve loses eps/a of the result; T
formed and factorised loses eps/a^2, and a gradient with T^-1 on either side of a cotangent eps/a^4.
"""

from __future__ import annotations

import merge_in_fifty_digits as exact
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_inputs import EPS, gaussian, taking_route
from torch import Tensor

from immunize_ext.ops import RegularizationFactor, merge_kv

D, OUT, CAPTIONS = 3, 2, 5
# Each example is solved thirty times with ninety digits.
few = settings(max_examples=4, deadline=None)


def arguments(c: Tensor, mu: float, seed: int) -> dict[str, Tensor]:
    s = len(c)
    return {
        "base": gaussian(OUT, D, seed=seed),
        "values": gaussian(OUT, s, seed=seed + 1),
        "c": c,
        "c_reg": gaussian(CAPTIONS, D, seed=seed + 2),
        "ridge": torch.tensor([[0.3]]).double(),
        "inverse_hardness": torch.full((s, 1), 1 / mu, dtype=torch.float64),
    }


def merge(given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """W, and the leaves that gradients shall reach."""
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    leaves["hardness"] = given["inverse_hardness"].reciprocal().requires_grad_()
    factor = RegularizationFactor.from_embeddings(
        leaves["c_reg"], ridge=leaves["ridge"].reshape(()), relative=False
    )
    (merged,) = merge_kv(
        [leaves["base"]],
        None,
        [leaves["c"]],
        factor,
        values=[leaves["values"]],
        hardness=leaves["hardness"].reshape(-1),
    )
    return merged, leaves


def relative(found: Tensor, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - truth) / np.linalg.norm(truth))


def check(route: str, c: Tensor, mu: float, seed: int, bound: float) -> None:
    given = arguments(c, mu, seed)
    upstream = gaussian(OUT, D, seed=seed + 3)
    with taking_route(route):
        merged, leaves = merge(given)
        names = [name for name in leaves if name != "inverse_hardness"]
        found = torch.autograd.grad(merged, [leaves[name] for name in names], upstream)
    with mpmath.workdps(90):
        points = [exact.matrix(value) for value in given.values()]
        points[4] = points[4][0]
        truth = exact.numbers(exact.merge(*points))
    assert relative(merged.detach(), truth) <= bound
    gradients = exact.gradients(upstream, **given)
    for name, grad in zip(names, found, strict=True):
        if name == "hardness":
            if not np.isinf(mu):
                # d(1/mu) = -dmu/mu^2
                assert relative(-grad * mu**2, gradients["inverse_hardness"]) <= bound
            continue
        assert relative(grad, gradients[name]) <= bound, name


@few
@given(exponent=st.floats(1, 5), seed=st.integers(0, 1000))
def test_two_tokens_at_a_small_angle(route: str, exponent: float, seed: int) -> None:
    angle = 10.0**-exponent
    token = gaussian(1, D, seed=seed + 10)
    c = torch.cat([token, token + angle * gaussian(1, D, seed=seed + 11)])
    check(route, c, np.inf, seed, 2e3 * EPS / angle)


@pytest.mark.parametrize("angle", [1e-4, 1e-5])
def test_gradients_at_the_angles_of_a_report(route: str, angle: float) -> None:
    """3e-4 and 0.1 of dC were lost here by E (dB A) E."""
    token = gaussian(1, D, seed=9)
    c = torch.cat([token, token + angle * gaussian(1, D, seed=10)])
    check(route, c, np.inf, 1, 100 * EPS / angle)


@pytest.mark.parametrize("mu", [1e4, 1e6, 1e8])
def test_more_soft_tokens_than_columns(route: str, mu: float) -> None:
    """T is C Q^-1 C^T of rank d, and 1/mu holds the rest: dC_reg was off by 4e4 at mu 1e8."""
    check(route, gaussian(2 * D, D, seed=20), mu, 2, 300 * EPS * mu)


def test_constraints_of_nearly_equal_tokens_are_met(route: str) -> None:
    """|W c - v| / |v| at distance 1e-5: 3e-6 by E A^T, 1e-7 by a Cholesky solve, here eps/1e-5."""
    token = gaussian(1, 16, seed=1)
    c = torch.cat([token, token + 1e-5 * gaussian(1, 16, seed=2), gaussian(3, 16, seed=3)])
    base, values = gaussian(6, 16, seed=4), gaussian(6, 5, seed=5)
    factor = RegularizationFactor.from_embeddings(gaussian(60, 16, seed=6))
    with taking_route(route):
        (merged,) = merge_kv([base], None, [c], factor, values=[values])
    missed = (merged @ c.mT - values).norm(dim=0) / values.norm(dim=0)
    assert float(missed.max()) <= 100 * EPS / 1e-5
