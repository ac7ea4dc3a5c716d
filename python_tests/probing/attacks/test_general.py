"""Attackers for any loss against what theory says of them."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from immunize_ext.probing.attacks import ATTACKS, knows
from immunize_ext.probing.attacks.losses import LOSSES
from immunize_ext.probing.attacks.probes import (
    conjugate_gradients,
    descent,
    gradient_descent,
    lbfgs,
    line_search,
    line_search_descent,
    nesterov,
    nonlinear_conjugate_gradients,
    standardised_descent,
    whitened_descent,
    whitened_general,
)

seeds = st.integers(0, 2**31 - 1)
SQUARED, LOGISTIC = LOSSES["squared"], LOSSES["logistic"]


def problem(seed: int, n: int = 15, p: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, p, dtype=torch.float64, generator=generator)
    y = torch.randn(n, dtype=torch.float64, generator=generator)
    return z, torch.where(y > 0, 1.0, -1.0).double()


def take(iterates: Iterator[torch.Tensor], count: int) -> torch.Tensor:
    return torch.stack(list(itertools.islice(iterates, count)))


@given(seed=seeds)
def test_squared_loss_gives_the_special_forms(seed: int) -> None:
    z, y = problem(seed)
    for general, special in (
        (descent, gradient_descent),
        (line_search, line_search_descent),
        (whitened_general, whitened_descent),
    ):
        found, expected = take(general(z, y, SQUARED), 12), take(special(z, y), 12)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    found = take(nonlinear_conjugate_gradients(z, y, SQUARED), 5)
    torch.testing.assert_close(found, take(conjugate_gradients(z, y), 5), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [SQUARED, LOGISTIC], ids=["squared", "logistic"])
def test_nesterov_is_its_recurrence(loss: Any) -> None:
    """w' = v - g(v) / L, v' = w' + t / (t + 3) (w' - w), written down from the paper."""
    z, y = problem(3)
    step = 1.0 / (loss.curvature * float(torch.linalg.matrix_norm(z, 2)) ** 2)
    w = v = torch.zeros(z.shape[1], dtype=torch.float64)
    expected = [w]
    for t in range(6):
        following = v - step * (z.mT @ loss.slope(z @ v, y))
        v = following + t / (t + 3) * (following - w)
        w = following
        expected.append(w)
    torch.testing.assert_close(take(nesterov(z, y, loss), 7), torch.stack(expected))


def test_directions_of_nonlinear_conjugate_gradients() -> None:
    """d' = -g' + max(0, g'.(g' - g) / g.g) d, of Polak and Ribiere: other than on a parabola, where
    every formula gives the same."""
    z, y = problem(5)
    w = take(nonlinear_conjugate_gradients(z, y, LOGISTIC), 5)
    g = [z.mT @ LOGISTIC.slope(z @ each, y) for each in w]
    direction = -g[0]
    for k in range(4):
        move = w[k + 1] - w[k]
        cosine = float(move @ direction / (move.norm() * direction.norm()))
        assert cosine == pytest.approx(1.0, abs=1e-9), k
        beta = max(0.0, float(g[k + 1] @ (g[k + 1] - g[k]) / (g[k] @ g[k])))
        direction = -g[k + 1] + beta * direction


def test_lbfgs_follows_the_secants_it_remembers() -> None:
    """Its second step is along -H g with H the BFGS matrix of one pair and Barzilai and Borwein's
    scale, its third along that of two pairs; the matrices are formed here."""
    z, y = problem(7)
    w = take(lbfgs(z, y, LOGISTIC), 4)
    g = [z.mT @ LOGISTIC.slope(z @ each, y) for each in w]
    identity = torch.eye(z.shape[1], dtype=torch.float64)
    for k in (1, 2):
        pairs = [(w[i + 1] - w[i], g[i + 1] - g[i]) for i in range(k)]
        s, change = pairs[-1]
        h = (s @ change) / (change @ change) * identity
        for s, change in pairs:
            rho = 1.0 / (s @ change)
            v = identity - rho * torch.outer(change, s)
            h = v.mT @ h @ v + rho * torch.outer(s, s)
        move = w[k + 1] - w[k]
        direction = -h @ g[k]
        assert float(move @ direction / (move.norm() * direction.norm())) == pytest.approx(1.0)


def test_lbfgs_steps_as_far_as_the_slope_says() -> None:
    """Wolfe: less loss in proportion to the slope, of which at most nine tenths are left.

    A large feature that says nothing of y makes the first step of its curvature far too short.
    """
    z, y = problem(9)
    z[:, 0] = 20.0 * (z[:, 0] - y * (z[:, 0] @ y) / len(y))
    w = take(lbfgs(z, y, LOGISTIC), 6)
    for before, after in itertools.pairwise(w):
        move = after - before
        g, renewed = (z.mT @ LOGISTIC.slope(z @ each, y) for each in (before, after))
        assert float(renewed @ move) >= 0.9 * float(g @ move)
        less = LOGISTIC.total(z @ before, y) - LOGISTIC.total(z @ after, y)
        assert float(less) >= -1e-4 * float(g @ move)


@given(seed=seeds)
def test_nesterov_keeps_to_its_bound(seed: int) -> None:
    z, y = problem(seed)
    best = torch.linalg.lstsq(z, y[:, None]).solution[:, 0]
    lipschitz = torch.linalg.eigvalsh(z.mT @ z)[-1]
    for step, w in enumerate(take(nesterov(z, y, SQUARED), 60)):
        excess = float(SQUARED.total(z @ w, y) - SQUARED.total(z @ best, y))
        assert excess <= float(2.0 * lipschitz * best.square().sum()) / (step + 1) ** 2 + 1e-12


def newton(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Minimum of the logistic loss plus nothing; only for data that is not separable."""
    w = torch.zeros(z.shape[1], dtype=z.dtype)
    for _ in range(100):
        half = torch.sigmoid(z @ w)
        hessian = z.mT @ (half * (1 - half))[:, None].mul(z)
        w = w - 0.7 * torch.linalg.solve(hessian, z.mT @ LOGISTIC.slope(z @ w, y))
    return w


@pytest.mark.parametrize(
    ("probe", "steps"),
    [
        (descent, 3000),
        (line_search, 600),
        (nesterov, 800),
        (nonlinear_conjugate_gradients, 60),
        (lbfgs, 60),
        (standardised_descent, 3000),
        (whitened_general, 3000),
    ],
)
def test_logistic_minimum_is_reached(probe: object, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(60, 3, dtype=torch.float64, generator=generator)
    z = z @ torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    noise = torch.randn(60, dtype=torch.float64, generator=generator)
    y = torch.where(z @ torch.ones(3).double() + 2.0 * noise > 0, 1.0, -1.0).double()
    last = next(itertools.islice(probe(z, y, LOGISTIC), steps, None))  # type: ignore[operator]
    torch.testing.assert_close(last, newton(z, y), rtol=1e-4, atol=1e-5)


@given(seed=seeds)
@settings(max_examples=30)
def test_line_searches_never_raise_the_loss(seed: int) -> None:
    z, y = problem(seed)
    for probe in (line_search, nonlinear_conjugate_gradients, lbfgs):
        for loss in (SQUARED, LOGISTIC):
            totals = [float(loss.total(z @ w, y)) for w in take(probe(z, y, loss), 15)]
            assert all(b <= a * (1 + 1e-10) + 1e-12 for a, b in itertools.pairwise(totals))


@given(seed=seeds)
def test_lbfgs_reaches_the_least_squares_solution(seed: int) -> None:
    z, y = problem(seed)
    last = take(lbfgs(z, y, SQUARED), 60)[-1]
    assert float((z.mT @ (z @ last - y)).norm()) <= 1e-6 * float(z.norm() * y.norm())


@given(seed=seeds, exponent=st.integers(0, 5))
def test_whitening_does_not_see_theta_under_the_logistic_loss(seed: int, exponent: int) -> None:
    z, y = problem(seed)
    theta = torch.diag(torch.logspace(0, exponent, 4, dtype=torch.float64))
    plain = take(whitened_general(z, y, LOGISTIC), 20) @ z.mT
    immunized = take(whitened_general(z @ theta, y, LOGISTIC), 20) @ (z @ theta).mT
    torch.testing.assert_close(immunized, plain, rtol=1e-6, atol=1e-7)


@given(seed=seeds, exponent=st.integers(0, 5))
def test_standardising_does_not_see_a_diagonal_theta(seed: int, exponent: int) -> None:
    z, y = problem(seed)
    theta = torch.diag(torch.logspace(0, exponent, 4, dtype=torch.float64))
    plain = take(standardised_descent(z, y, SQUARED), 20) @ z.mT
    immunized = take(standardised_descent(z @ theta, y, SQUARED), 20) @ (z @ theta).mT
    torch.testing.assert_close(immunized, plain, rtol=1e-7, atol=1e-8)


CASES = [(name, loss) for name in ATTACKS for loss in LOSSES if knows(ATTACKS[name], loss)]


def few_rates(name: str, loss: str, count: int) -> Any:
    """The attack, with the first of its learning rates where it has some."""
    attack: Any = replace(ATTACKS[name], loss=loss)  # type: ignore[type-var]
    return replace(attack, learning_rates=attack.rates[:count]) if attack.rates else attack


@pytest.mark.parametrize(("name", "loss"), CASES)
@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_no_scale_of_the_features_helps_the_defender(name: str, loss: str, scale: float) -> None:
    z, y = problem(3)
    attack = few_rates(name, loss, 3)
    plain = take(attack.iterates(z, y, LOSSES[loss]), 12)
    scaled = take(attack.iterates(scale * z, y, LOSSES[loss]), 12)
    torch.testing.assert_close(scale * scaled, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "loss"), CASES)
@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (1, 1), (70, 2)])
def test_every_attacker_starts_at_zero_and_stays_finite(
    name: str, loss: str, shape: tuple[int, int]
) -> None:
    z, y = problem(0, *shape)
    attack = few_rates(name, loss, 2)
    weights = take(attack.iterates(z, y, LOSSES[loss]), 30)
    assert weights.shape == (30, shape[1], max(1, len(attack.rates)))
    assert not weights[0].any()
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_every_attacker_survives_features_that_are_zero(name: str, loss: str) -> None:
    zeros, ones = torch.zeros(5, 3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    attack = few_rates(name, loss, 2)
    assert not take(attack.iterates(zeros, ones, LOSSES[loss]), 4).any()
