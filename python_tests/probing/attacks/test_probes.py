"""Each probe against the closed form of what it does."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.probing.attacks.probes import (
    closed_form_ridge,
    conjugate_gradients,
    gradient_descent,
    line_search_descent,
    whitened_descent,
)
from immunize_ext.probing.metrics import norm_ratio

PROBES = {
    "gradient_descent": gradient_descent,
    "line_search": line_search_descent,
    "conjugate_gradients": conjugate_gradients,
    "whitened": whitened_descent,
    "closed_form_ridge": closed_form_ridge,
}

seeds = st.integers(0, 2**31 - 1)


def problem(seed: int, n: int = 12, p: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, p, dtype=torch.float64, generator=generator)
    return z, torch.randn(n, dtype=torch.float64, generator=generator)


def take(iterates: Iterator[torch.Tensor], count: int) -> torch.Tensor:
    return torch.stack(list(itertools.islice(iterates, count)))


def optimum(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.linalg.lstsq(z, y[:, None]).solution[:, 0]


@given(seed=seeds)
def test_gradient_descent_keeps_to_the_bound_of_eq_2(seed: int) -> None:
    z, y = problem(seed)
    weights = take(gradient_descent(z, y), 40)
    eigenvalues = torch.linalg.eigvalsh(z.mT @ z)
    rate = 1.0 - eigenvalues[0] / eigenvalues[-1]
    ratios = norm_ratio(weights, optimum(z, y))
    assert (ratios <= rate ** torch.arange(40) * (1 + 1e-9) + 1e-20).all()


@given(seed=seeds)
def test_gradient_descent_equals_its_closed_form(seed: int) -> None:
    z, y = problem(seed)
    weights = take(gradient_descent(z, y), 20)
    eigenvalues, vectors = torch.linalg.eigh(z.mT @ z)
    best = vectors.mT @ optimum(z, y)
    for t in (0, 1, 7, 19):
        expected = vectors @ ((1.0 - (1.0 - eigenvalues / eigenvalues[-1]) ** t) * best)
        torch.testing.assert_close(weights[t], expected, rtol=1e-9, atol=1e-10)


@given(seed=seeds)
def test_line_search_is_exact(seed: int) -> None:
    z, y = problem(seed)
    weights = take(line_search_descent(z, y), 10)
    for before, after in itertools.pairwise(weights):
        direction = z.mT @ (z @ before - y)
        slope = (z @ direction) @ (z @ after - y)
        scale = (z @ direction).norm() * y.norm()
        # At the minimum along the line the derivative along it is 0.
        assert abs(float(slope)) <= 1e-9 * float(scale) + 1e-20
        # And it moved along the line only.
        step = after - before
        across = step - direction * (step @ direction) / (direction @ direction + 1e-300)
        assert float(across.norm()) <= 1e-9 * float(step.norm()) + 1e-15


@given(seed=seeds)
def test_line_search_is_no_worse_per_step_than_a_constant_step(seed: int) -> None:
    z, y = problem(seed)
    w = next(itertools.islice(gradient_descent(z, y), 3, None))
    gradient = z.mT @ (z @ w - y)
    constant = w - gradient / torch.linalg.eigvalsh(z.mT @ z)[-1]
    curvature = (z @ gradient).square().sum()
    exact = w - gradient * gradient.square().sum() / curvature
    assert float((z @ exact - y).norm()) <= float((z @ constant - y).norm()) * (1 + 1e-12)


@given(seed=seeds, p=st.integers(1, 6))
def test_conjugate_gradients_end_after_p_steps(seed: int, p: int) -> None:
    z, y = problem(seed, n=3 * p, p=p)
    weights = take(conjugate_gradients(z, y), p + 4)
    torch.testing.assert_close(weights[p], optimum(z, y), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weights[-1], optimum(z, y), rtol=1e-6, atol=1e-7)


@given(seed=seeds)
def test_conjugate_gradients_reduce_the_loss_most(seed: int) -> None:
    z, y = problem(seed)
    losses = {
        name: (take(PROBES[name](z, y), 5) @ z.mT - y).square().sum(-1)
        for name in ("gradient_descent", "line_search", "conjugate_gradients")
    }
    for name in ("gradient_descent", "line_search"):
        assert (losses["conjugate_gradients"] <= losses[name] * (1 + 1e-9)).all()


@given(seed=seeds, n=st.integers(2, 12), p=st.integers(1, 12))
def test_whitened_descent_is_at_the_optimum_after_one_step(seed: int, n: int, p: int) -> None:
    z, y = problem(seed, n, p)
    start, first, second = take(whitened_descent(z, y), 3)
    assert not start.any()
    residual = z @ first - y
    assert float((z.mT @ residual).norm()) <= 1e-8 * float(z.norm() * y.norm())
    torch.testing.assert_close(z @ second, z @ first, rtol=1e-8, atol=1e-8)


@given(seed=seeds)
def test_closed_form_ridge_minimises_generalized_cross_validation(seed: int) -> None:
    z, y = problem(seed)
    n, rank = z.shape
    solution = take(closed_form_ridge(z, y), 2)[1]
    whitened = torch.linalg.svd(z, full_matrices=False)[0]
    coefficients = whitened.mT @ y
    shrinkage = torch.linspace(0, 1, 20001, dtype=torch.float64)
    misfit = (y - shrinkage[:, None] * (whitened @ coefficients)).square().sum(-1)
    best = shrinkage[(n * misfit / (n - rank * shrinkage) ** 2).argmin()]
    torch.testing.assert_close(z @ solution, best * whitened @ coefficients, rtol=0, atol=1e-3)


@given(seed=seeds, exponent=st.integers(0, 6))
def test_whitening_and_closed_form_do_not_see_theta(seed: int, exponent: int) -> None:
    z, y = problem(seed)
    theta = torch.diag(torch.logspace(0, exponent, 4, dtype=torch.float64))
    for probe in (whitened_descent, closed_form_ridge):
        plain = z @ take(probe(z, y), 2)[1]
        immunized = (z @ theta) @ take(probe(z @ theta, y), 2)[1]
        torch.testing.assert_close(immunized, plain, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (4, 4), (1, 1)])
def test_probes_start_at_zero_and_stay_finite(name: str, shape: tuple[int, int]) -> None:
    z, y = problem(0, *shape)
    weights = take(PROBES[name](z, y), 30)
    assert not weights[0].any()
    assert torch.isfinite(weights).all()
    assert weights.shape == (30, shape[1])


@pytest.mark.parametrize("name", PROBES)
def test_probes_survive_features_that_are_zero(name: str) -> None:
    weights = take(PROBES[name](torch.zeros(5, 3, dtype=torch.float64), torch.ones(5).double()), 3)
    assert not weights.any()


@pytest.mark.parametrize("name", PROBES)
def test_probes_survive_targets_that_are_zero(name: str) -> None:
    weights = take(PROBES[name](problem(0)[0], torch.zeros(12, dtype=torch.float64)), 5)
    torch.testing.assert_close(weights, torch.zeros_like(weights))
