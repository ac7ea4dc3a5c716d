"""Theorems 4.1 to 4.3 of the condition-number paper as properties.

Matrices are built from a spectrum, so that the extremes are simple and known.
"""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well
from immunize_ext.probing.immunizers import ill_step_bound, well_step_bound

seeds = st.integers(0, 2**31 - 1)
fractions = st.floats(0.01, 0.99)


def rotation(p: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(p, p, dtype=torch.float64, generator=generator)).Q


@st.composite
def matrices(draw: st.DrawFn, rows: int | None = None) -> torch.Tensor:
    """A matrix with singular values between 1 and 30 whose extremes are simple."""
    p = draw(st.integers(2, 6))
    steps = draw(st.lists(st.floats(1.05, 2.0), min_size=p - 1, max_size=p - 1))
    sigma = torch.tensor([1.0, *steps], dtype=torch.float64).cumprod(0)
    generator = torch.Generator().manual_seed(draw(seeds))
    n = p if rows is None else p + rows
    left = rotation(n, generator)[:, :p]
    return left @ torch.diag(sigma) @ rotation(p, generator)


def kappa(s: torch.Tensor) -> float:
    sigma = torch.linalg.svdvals(s)
    return float(sigma[0] / sigma[-1])


def gradient(function: object, at: torch.Tensor) -> torch.Tensor:
    leaf = at.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(function(leaf), leaf)  # type: ignore[operator]
    return result


@given(s=matrices(rows=2))
def test_theorem_4_1_bounds(s: torch.Tensor) -> None:
    sigma = torch.linalg.svdvals(s)
    k, value, spread = len(sigma), float(r_ill(s)), kappa(s)
    scale = 2.0 * k / ((spread**2 - 1.0) * float(sigma[-1]) ** 2)
    assert scale / (k - 1) * (1 - 1e-9) <= value <= scale * (1 + 1e-9)
    assert 1.0 / math.log(spread) <= float(sigma[0]) ** 2 * value * (1 + 1e-9)


@given(s=matrices(rows=2))
def test_theorem_4_1_gradient(s: torch.Tensor) -> None:
    left, sigma, right = torch.linalg.svd(s, full_matrices=False)
    k = len(sigma)
    denominator = s.square().sum() / (2 * k) - sigma[-1] ** 2 / 2
    expected = (sigma[-1] * torch.outer(left[:, -1], right[-1]) - s / k) / denominator**2
    torch.testing.assert_close(gradient(r_ill, s), expected, rtol=1e-7, atol=1e-10)


@given(s=matrices(rows=2), fraction=fractions)
def test_theorem_4_1_step_on_r_ill_raises_kappa(s: torch.Tensor, fraction: float) -> None:
    sigma = torch.linalg.svdvals(s)
    k = len(sigma)
    denominator = float(s.square().sum() / (2 * k) - sigma[-1] ** 2 / 2)
    eta = fraction * denominator**2 * k / (k - 1)
    assert kappa(s - eta * gradient(r_ill, s)) > kappa(s)


@given(s=matrices(rows=2), fraction=fractions)
def test_step_on_r_well_lowers_kappa(s: torch.Tensor, fraction: float) -> None:
    sigma = torch.linalg.svdvals(s)
    p = len(sigma)
    # sigma_1 shrinks until it meets the smallest, sigma_2 grows up to the old sigma_1.
    meeting = float((sigma[0] - sigma[-1]) / (sigma[0] * (1 - 1 / p) + sigma[-1] / p))
    bound = min(meeting, p * float(sigma[0] / sigma[1] - 1.0))
    assert kappa(s - fraction * bound * gradient(r_well, s)) < kappa(s)


def task_gram(seed: int, p: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * p, p, dtype=torch.float64, generator=generator)
    theta = torch.randn(p, p, dtype=torch.float64, generator=generator)
    assume(kappa(x @ theta) < 1e3)
    return x, theta


@given(seed=seeds, p=st.integers(2, 6))
def test_theorem_4_2(seed: int, p: int) -> None:
    x, theta = task_gram(seed, p)
    gram = x.mT @ x
    hessian = theta.mT @ gram @ theta
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    assume(eigenvalues[-1] - eigenvalues[-2] > 1e-3 * eigenvalues[-1])
    assume(eigenvalues[1] - eigenvalues[0] > 1e-3 * eigenvalues[0])
    top, low = vectors[:, -1], vectors[:, 0]
    well = 2 * gram @ theta @ (eigenvalues[-1] * torch.outer(top, top) - hessian / p)
    denominator = hessian.square().sum() / (2 * p) - eigenvalues[0] ** 2 / 2
    ill = 2 * gram @ theta @ (eigenvalues[0] * torch.outer(low, low) - hessian / p)
    for function, expected in ((gram_r_well, well), (gram_r_ill, ill / denominator**2)):
        found = gradient(lambda t, f=function: f(x @ t), theta)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))


def preconditioned_step(
    x: torch.Tensor, theta: torch.Tensor, function: object, eta: float
) -> torch.Tensor:
    full = gradient(lambda t: function(x @ t), theta)  # type: ignore[operator]
    return theta - eta * torch.linalg.solve(x.mT @ x, full)


@given(seed=seeds, p=st.integers(2, 6), fraction=fractions)
def test_theorem_4_3_r_well(seed: int, p: int, fraction: float) -> None:
    x, theta = task_gram(seed, p)
    bound = well_step_bound(x @ theta)
    updated = preconditioned_step(x, theta, gram_r_well, fraction * bound)
    before, after = kappa(x @ theta), kappa(x @ updated)
    # A pair of nearly equal largest eigenvalues leaves no room for a visible change.
    sigma = torch.linalg.svdvals(x @ theta)
    assume(float(sigma[0] / sigma[1]) > 1.001)
    assert after < before


@given(seed=seeds, p=st.integers(2, 6), fraction=fractions)
def test_theorem_4_3_r_ill(seed: int, p: int, fraction: float) -> None:
    # At half of the bound theta is singular: kappa is infinite there, and large around it.
    assume(abs(fraction - 0.5) > 1e-3)
    x, theta = task_gram(seed, p)
    sigma = torch.linalg.svdvals(x @ theta)
    assume(float(sigma[-2] / sigma[-1]) > 1.001)
    updated = preconditioned_step(x, theta, gram_r_ill, fraction * ill_step_bound(x @ theta))
    assert kappa(x @ updated) > kappa(x @ theta)


def test_printed_bound_of_theorem_4_3_part_1_is_too_long() -> None:
    # min{ 1 / ((1 - 1/p) sigma_1), ... } as printed: at half of it theta is singular.
    x = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    theta = torch.eye(2, dtype=torch.float64)
    first, second = 1.0 / (0.5 * 9.0), (3.0 - 1.0) / (1.0 * 1.0)
    updated = preconditioned_step(x, theta, gram_r_well, 0.5 * min(first, second))
    assert kappa(x @ updated) > 1e10
    assert well_step_bound(x) < 0.5 * min(first, second)


def test_bounds_are_sharp() -> None:
    generator = torch.Generator().manual_seed(0)
    x, theta = (torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (8, 4))
    features = x @ theta
    beyond = preconditioned_step(x, theta, gram_r_ill, 1.01 * ill_step_bound(features))
    assert torch.linalg.svdvals(x @ beyond)[-1] > torch.linalg.svdvals(features)[-1]
    singular = preconditioned_step(x, theta, gram_r_ill, 0.5 * ill_step_bound(features))
    assert kappa(x @ singular) > 1e10


@pytest.mark.parametrize("multiplicity", [2, 3])
def test_bound_of_a_repeated_largest_value(multiplicity: int) -> None:
    sigma = torch.tensor([4.0] * multiplicity + [2.0, 1.0], dtype=torch.float64)
    x, theta = torch.diag(sigma), torch.eye(len(sigma), dtype=torch.float64)
    bound = well_step_bound(x)
    assert bound > 0
    updated = preconditioned_step(x, theta, gram_r_well, 0.9 * bound)
    assert kappa(x @ updated) < kappa(x)


def test_bounds_at_the_edges() -> None:
    assert well_step_bound(torch.eye(3)) == math.inf  # nothing to lower
    assert ill_step_bound(torch.ones(3, 1)) == math.inf  # rank 1 has one value
    assert well_step_bound(torch.zeros(3, 2)) == math.inf
    # One sample, two features: sigma_1 is the only value; theta keeps its rank up to the bound.
    assert well_step_bound(torch.tensor([[2.0, 0.0]])) == pytest.approx(0.5 / (0.5 * 4.0))
    with pytest.raises(ValueError, match="well_step_bound: features must have shape"):
        well_step_bound(torch.zeros(2, 3, 2))
