"""Estimated condition numbers: against references that share no code, and against known spectra."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import integrate

from immunize_ext.probing.metrics import (
    EstimatorName,
    SampleSpectrum,
    control_variate,
    estimated_kappa,
    estimated_rir,
    kappa_slope,
    ky_fan_log_kappa,
)
from immunize_ext.probing.metrics.estimates import _marchenko_pastur_median


def gaussian(n: int, spectrum: np.ndarray, seed: int) -> torch.Tensor:
    z = np.random.default_rng(seed).standard_normal((n, len(spectrum)))
    return torch.from_numpy(z * np.sqrt(spectrum))


def estimates(x: torch.Tensor, name: EstimatorName) -> np.ndarray:
    return estimated_kappa(x, name).values.numpy()


@pytest.mark.parametrize(("n", "p"), [(60, 20), (15, 20), (8, 1)])
def test_ledoit_wolf_is_scikit_learns(n: int, p: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    x = gaussian(n, np.logspace(0, 2, p), seed=n)
    wanted, _ = covariance.ledoit_wolf(x.numpy(), assume_centered=True)
    np.testing.assert_allclose(
        estimates(x, "ledoit_wolf"), np.linalg.eigvalsh(wanted), rtol=1e-8, atol=1e-12
    )


def epanechnikov(x: float) -> float:
    return max(0.0, 0.75 / math.sqrt(5.0) * (1.0 - x * x / 5.0))


def hilbert(x: float) -> float:
    """(1/pi) p.v. integral of k(t)/(t - x) dt by quadrature."""
    edge = math.sqrt(5.0)
    if abs(x) < edge:
        return integrate.quad(epanechnikov, -edge, edge, weight="cauchy", wvar=x)[0] / math.pi
    return integrate.quad(lambda t: epanechnikov(t) / (t - x), -edge, edge)[0] / math.pi


@pytest.mark.parametrize(("n", "p"), [(40, 10), (12, 9), (9, 12)])
def test_nonlinear_shrinkage_is_the_formula_with_integrals(n: int, p: int) -> None:
    x = gaussian(n, np.logspace(0, 2, p), seed=p)
    values = np.linalg.eigvalsh(x.numpy().T @ x.numpy() / n)[-min(n, p) :]
    width = n ** (-1 / 3)
    wanted = []
    for value in values:
        scaled = [(value - other) / (width * other) for other in values]
        f = np.mean([epanechnikov(t) / (width * o) for t, o in zip(scaled, values, strict=True)])
        h = np.mean([hilbert(t) / (width * o) for t, o in zip(scaled, values, strict=True)])
        if p <= n:
            gamma = p / n
            real = 1 - gamma - math.pi * gamma * value * h
            wanted.append(value / ((math.pi * gamma * value * f) ** 2 + real**2))
        else:
            wanted.append(1.0 / (math.pi**2 * value * (f**2 + h**2)))
    if p > n:
        at_zero = np.mean([hilbert(-1.0 / width) / (width * value) for value in values])
        wanted += [1.0 / (math.pi * (p - n) / n * at_zero)] * (p - n)
    np.testing.assert_allclose(estimates(x, "nonlinear"), np.sort(wanted), rtol=1e-6)


def test_nonlinear_shrinkage_has_a_limit_at_the_ends_of_its_kernel() -> None:
    # (l_0 - l_1) / (n^(-1/3) l_1) = sqrt 5 within rounding, where the logarithm is infinite.
    n = 64
    values = torch.tensor([1.0, 1.0 + math.sqrt(5.0) / 4.0], dtype=torch.float64)
    x = torch.diag((values * n).sqrt())
    x = torch.cat([x, x.new_zeros(n - 2, 2)])
    found = estimated_kappa(x, "nonlinear").values
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("gamma", [0.05, 0.5, 1.0])
def test_the_median_of_noise_is_that_of_the_density(gamma: float) -> None:
    low, high = (1 - math.sqrt(gamma)) ** 2, (1 + math.sqrt(gamma)) ** 2

    def density(x: float) -> float:
        return math.sqrt((high - x) * (x - low)) / (2 * math.pi * gamma * x)

    below = integrate.quad(density, low, _marchenko_pastur_median(gamma), limit=200)[0]
    assert below == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("n", [400, 2000])
def test_spikes_are_inverted(n: int) -> None:
    spectrum = np.ones(100)
    spectrum[0], spectrum[-1] = 0.02, 200.0
    errors = {
        name: [
            estimated_kappa(gaussian(n, spectrum, seed), name).log_kappa - math.log(1e4)
            for seed in range(8)
        ]
        for name in ("plain", "spiked")
    }
    assert abs(np.mean(errors["spiked"])) < 0.1
    assert np.mean(errors["plain"]) > math.log1p(-100 / n) * -0.8
    # Nothing stands out of the bulk: one level.
    assert estimated_kappa(gaussian(n, np.ones(100), 0), "spiked").kappa < 1.1


@pytest.mark.parametrize(
    ("n", "plain", "nonlinear"), [(80, 2.8, -1.0), (128, 1.2, -0.8), (320, 0.4, -0.3)]
)
def test_bias_at_a_log_uniform_spectrum(n: int, plain: float, nonlinear: float) -> None:
    spectrum = np.logspace(0, 3, 64)
    bias = {
        name: np.mean(
            [
                estimated_kappa(gaussian(n, spectrum, seed), name).log_kappa - math.log(1e3)
                for seed in range(10)
            ]
        )
        for name in get_args(EstimatorName)
    }
    assert bias["plain"] == pytest.approx(plain, abs=0.3)
    assert bias["nonlinear"] == pytest.approx(nonlinear, abs=0.25)
    assert bias["ledoit_wolf"] < -1.5
    assert abs(bias["matched"]) < (0.5 if n == 80 else 0.25)


@pytest.mark.parametrize("name", get_args(EstimatorName))
def test_scale_rotation_and_blocks_change_nothing(name: EstimatorName) -> None:
    x = gaussian(60, np.logspace(0, 2, 12), seed=3)
    wanted = estimated_kappa(x, name).log_kappa
    turn = torch.linalg.qr(gaussian(12, np.ones(12), seed=4)).Q
    for other in (1e6 * x, x @ turn, list(x.split(7)), x.to(torch.float64)[torch.randperm(60)]):
        assert estimated_kappa(other, name).log_kappa == pytest.approx(wanted, abs=1e-8)


def test_plain_on_blocks_squares_nothing() -> None:
    n, kappa = 300, 1e22
    q = torch.linalg.qr(gaussian(n, np.ones(5), seed=0)).Q
    turn = torch.linalg.qr(gaussian(5, np.ones(5), seed=1)).Q
    x = q * torch.logspace(0, -11, 5, dtype=torch.float64) @ turn
    found = estimated_kappa(x.split(50), "plain").kappa
    assert found == pytest.approx(kappa, rel=1e-3)
    squared = torch.linalg.eigvalsh(x.mT @ x)
    assert abs(float(squared[-1] / squared[0])) < 1e-3 * kappa


def test_directions_that_the_data_has_not_are_left_out() -> None:
    x = gaussian(200, np.logspace(0, 1, 10), seed=1)
    wide = torch.cat([x, x[:, :3]], dim=1)
    sample = SampleSpectrum.of(wide)
    assert (sample.support, sample.features, len(sample.values)) == (10, 13, 10)
    for name in ("plain", "nonlinear", "spiked", "matched"):
        assert estimated_kappa(wide, name).log_kappa < math.log(1e3)  # type: ignore[arg-type]


def test_own_estimators_and_refusals() -> None:
    x = gaussian(9, np.ones(12), seed=0)
    assert estimated_kappa(x, lambda sample: sample.values[-2:]).values.shape == (2,)
    with pytest.raises(ValueError, match="did you mean plain"):
        estimated_kappa(x, "plan")  # type: ignore[arg-type]
    for name in ("spiked", "matched"):
        with pytest.raises(ValueError, match=r"more samples than features .* got 9 and 12"):
            estimated_kappa(x, name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a row that is not zero"):
        estimated_kappa(torch.zeros(4, 2))


def test_rir_of_one_model_is_one_and_known_values_are_taken() -> None:
    x, h = (gaussian(80, np.logspace(0, 2, 10), seed) for seed in (0, 1))
    assert estimated_rir(x, h, primary_base=x, harmful_base=h).log_rir == 0.0
    found = estimated_rir(x, h, primary_base=1.5, harmful_base=0.5, estimator="plain")
    assert found.log_i == estimated_kappa(h, "plain").log_kappa - 0.5
    assert found.log_ii == estimated_kappa(x, "plain").log_kappa - 1.5


def test_control_variate_is_the_intercept_of_a_regression() -> None:
    rng = np.random.default_rng(0)
    c = rng.standard_normal(30)
    v = 3.0 + 0.7 * c + 0.1 * rng.standard_normal(30)
    found = control_variate(torch.from_numpy(v), torch.from_numpy(c), 0.2)
    slope, intercept = np.polyfit(c - 0.2, v, 1)
    assert (found.beta, found.mean) == (pytest.approx(slope), pytest.approx(intercept))
    assert found.sd < 0.3 * v.std()
    paired = control_variate(torch.from_numpy(v), torch.from_numpy(c), 0.0, beta=1.0)
    assert paired.mean == pytest.approx(np.mean(v - c))
    # A control that never moves says nothing.
    assert control_variate(torch.ones(3), torch.ones(3), 0.0).mean == 1.0
    with pytest.raises(ValueError, match="at least 3"):
        control_variate(torch.ones(2), torch.ones(2), 0.0)


@pytest.mark.parametrize("n", [2, 4, 6, 8, 12])
def test_a_step_raises_kappa_iff_it_leans_to_the_bottom(n: int) -> None:
    """Over 10^4 draws in all; v is estimated, also from fewer samples than features."""
    draws, p, eta = 2000, 6, 1e-6
    generator = torch.Generator().manual_seed(n)
    spectrum = torch.rand(draws, p, dtype=torch.float64, generator=generator).mul(6.0).exp()
    turn = torch.linalg.qr(torch.randn(draws, p, p, dtype=torch.float64, generator=generator)).Q
    root = turn * spectrum.sqrt()[:, None]
    h = root @ root.mT
    z = torch.randn(draws, n, p, dtype=torch.float64, generator=generator) @ root.mT
    # The least eigenvector that samples show, or any: the statement is one of all vectors.
    shown = torch.linalg.svd(z, full_matrices=False).Vh[:, min(n, p) - 1]
    other = torch.nn.functional.normalize(
        torch.randn(draws, p, dtype=torch.float64, generator=generator)
    )
    chosen = torch.rand(draws, 1, generator=generator) < 0.5
    v = torch.where(chosen, shown, other)
    slope = kappa_slope(h, v)
    step = torch.eye(p, dtype=torch.float64) + math.expm1(-eta) * v[:, :, None] * v[:, None, :]
    logs = [torch.linalg.eigvalsh(m).log() for m in (h, step @ h @ step)]
    risen = (logs[1][:, -1] - logs[1][:, 0]) - (logs[0][:, -1] - logs[0][:, 0])
    ends = torch.linalg.eigh(h).eigenvectors[:, :, [0, -1]]
    leans = (ends * v[:, :, None]).sum(1).square()
    told = (leans[:, 0] - leans[:, 1]).abs() > 1e-3
    assert bool(told.any())
    assert torch.equal(risen[told] > 0.0, leans[told, 0] > leans[told, 1])
    gaps = (logs[0][:, [1, -1]] - logs[0][:, [0, -2]]).amin(-1) > 1e-2
    torch.testing.assert_close(risen[gaps] / eta, slope[gaps], rtol=0.0, atol=2e-3)


def test_ky_fan_means_do_not_see_which_vector_of_a_cluster_is_taken() -> None:
    sigma = torch.tensor([5.0, 5.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    left = torch.linalg.qr(gaussian(9, np.ones(5), seed=0)).Q
    turn = torch.linalg.qr(gaussian(5, np.ones(5), seed=1)).Q
    x = (left * sigma @ turn.mT).requires_grad_()
    (found,) = torch.autograd.grad(ky_fan_log_kappa(x, 2), x)
    top, bottom = turn[:, :2], turn[:, 3:]
    wanted = 2.0 * x.detach() @ (top @ top.mT / 50.0 - bottom @ bottom.mT / 2.0)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-12)
    assert float(ky_fan_log_kappa(x.detach(), 1)) == pytest.approx(math.log(25.0))
    assert torch.autograd.gradcheck(lambda y: ky_fan_log_kappa(y, 2), x)
    assert ky_fan_log_kappa(torch.stack([x, 2 * x]), 5).tolist() == pytest.approx([0.0, 0.0])
    for count, rows in ((0, 9), (6, 9), (1, 4)):
        with pytest.raises(ValueError, match="count must be from 1 to the 5 features"):
            ky_fan_log_kappa(x[:rows], count)


def test_a_mean_over_a_cluster_is_less_noisy_than_its_extreme() -> None:
    spectrum = np.r_[np.full(6, 1.0), np.logspace(1, 2, 8), np.full(6, 400.0)]
    found = torch.stack(
        [
            torch.stack([ky_fan_log_kappa(gaussian(100, spectrum, s), m) for s in range(20)])
            for m in (1, 6)
        ]
    )
    bias = (found.mean(1) - math.log(400.0)).abs()
    assert float(bias[1]) < 0.5 * float(bias[0])
