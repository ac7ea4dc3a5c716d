"""The risk of a tuned ridge from few samples: against the formula by eigenvalues, and its slope."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from immunize_ext.probing.certificates import Spectrum, best_risk, expected_risk
from immunize_ext.probing.data import Task
from immunize_ext.probing.metrics import Moments, tuned_risk

SAMPLES = (3, 10, 40)


def task(n: int = 200, p: int = 8, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, p)
    y = x[:, 0] / 5 + 2 * x[:, p // 2] + torch.randn(n, generator=generator, dtype=torch.float64)
    return Task("toy", x, y, x, y)


def extractor(p: int = 8, q: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(p, q, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n", "samples"), [(200, SAMPLES), (6, (1, 2, 3))])
def test_the_best_ridge_is_that_of_the_formula_by_eigenvalues(
    n: int, samples: tuple[int, ...]
) -> None:
    """Of more samples than features, and of fewer, whose curve is that of five directions."""
    theta = extractor()
    found = tuned_risk(Moments.of(task(n)), theta @ theta.mT, samples)
    truth = [best_risk(Spectrum.of(task(n), theta), count) for count in samples]
    # Both try a grid of ridges.
    assert found.tolist() == pytest.approx(truth, rel=0.02)


def test_a_ridge_is_not_negative() -> None:
    """One large direction tells the target exactly, and many small ones shrink it: to add to them
    would be too much, and the best ridge that there is is none."""
    generator = torch.Generator().manual_seed(7)
    x = torch.linalg.qr(torch.randn(400, 40, generator=generator, dtype=torch.float64)).Q
    x = x - x.mean(0)
    x[:, 0] *= 10.0
    exact = Task("exact", x, x[:, 0], x, x[:, 0])
    spectrum = Spectrum.of(exact)
    trace = float(spectrum.variances.sum())
    risks = [float(expected_risk(spectrum, 10, ridge * trace)) for ridge in (1e-8, 1e-4, 1e-2, 0.1)]
    assert risks == sorted(risks), "less is better, down to none"
    found = float(tuned_risk(Moments.of(exact), torch.eye(40).double(), [10]))
    assert found >= risks[0] * (1 - 1e-6)
    assert found == pytest.approx(risks[0], rel=0.5)


def test_an_extractor_in_the_moments_is_one_in_the_metric() -> None:
    theta = extractor()
    one = tuned_risk(Moments.of(task()), theta @ theta.mT, SAMPLES)
    other = tuned_risk(Moments.of(task(), theta), torch.eye(8).double(), SAMPLES)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


def test_derivative_in_the_metric() -> None:
    moments = Moments.of(task())
    root = extractor().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tuned_risk(moments, t @ t.mT, SAMPLES), (root,))


def test_nobody_does_worse_than_the_mean() -> None:
    """Labels that the inputs do not tell."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(200, generator=generator, dtype=torch.float64)
    blind = Task("blind", task().x_train, y, task().x_train, y)
    found = tuned_risk(Moments.of(blind), torch.eye(8).double(), [1, 2])
    assert bool((found <= (y - y.mean()).square().mean() + 1e-12).all())
    with pytest.raises(ValueError, match=r"samples must be numbers of at least 1, got \[0\]"):
        tuned_risk(Moments.of(blind), torch.eye(8).double(), [0])
