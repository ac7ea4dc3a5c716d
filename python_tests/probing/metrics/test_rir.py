"""RIR: identities, policies, what zero and infinity mean, groups."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.errors import NumericalWarning
from immunize_ext.probing.metrics import grouped_rir, log_kappa, relative_immunization_ratio
from immunize_ext.probing.metrics.rir import OFFICIAL_FLOOR, RelativeImmunizationRatio, RirPolicy

POLICIES: tuple[RirPolicy, ...] = ("ridge", "rank_aware", "official")
seeds = st.integers(0, 2**31 - 1)


def features(rows: int, p: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, p, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=seeds, rows=st.integers(1, 12), p=st.integers(1, 8))
def test_identical_models_give_exactly_one(policy: RirPolicy, seed: int, rows: int, p: int) -> None:
    theta = features(p, p, seed)
    for theta0, extractor in ((theta, theta), (None, torch.eye(p, dtype=torch.float64))):
        ratio = relative_immunization_ratio(
            features(rows, p, seed + 1),
            features(rows, p, seed + 2),
            extractor,
            theta0,
            policy=policy,
        )
        assert (ratio.rir, ratio.i, ratio.ii) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("policy", ["ridge", "rank_aware"])
@given(seed=seeds, exponent=st.integers(-60, 60))
def test_scale_of_theta_does_not_matter(policy: RirPolicy, seed: int, exponent: int) -> None:
    x_primary, x_harmful, theta = features(9, 4, seed), features(9, 4, seed + 1), features(4, 4)
    first, second = (
        relative_immunization_ratio(x_primary, x_harmful, scale * theta, policy=policy)
        for scale in (1.0, 10.0**exponent)
    )
    assert second.log_rir == pytest.approx(first.log_rir, abs=1e-9)


@given(seed=seeds)
def test_rotations_do_not_matter(seed: int) -> None:
    x_primary, x_harmful, theta = features(9, 4, seed), features(9, 4, seed + 1), features(4, 4, 3)
    rotation = torch.linalg.qr(features(4, 4, seed + 2)).Q
    first, second = (
        relative_immunization_ratio(x_primary, x_harmful, extractor)
        for extractor in (theta, theta @ rotation)
    )
    assert second.log_rir == pytest.approx(first.log_rir, abs=1e-8)


def test_swapping_the_roles_inverts_rir() -> None:
    x_primary, x_harmful, theta = features(9, 4, 0), features(9, 4, 1), features(4, 4, 2)
    there = relative_immunization_ratio(x_primary, x_harmful, theta)
    back = relative_immunization_ratio(x_harmful, x_primary, theta)
    assert there.rir * back.rir == pytest.approx(1.0)
    assert there.i == back.ii


@pytest.mark.parametrize("policy", POLICIES)
def test_values_against_numpy(policy: RirPolicy) -> None:
    x_primary, x_harmful, theta = features(9, 4, 0), features(3, 4, 1), features(4, 4, 2)
    ratio = relative_immunization_ratio(x_primary, x_harmful, theta, policy=policy, ridge=1e-2)

    def kappa(x: torch.Tensor, extractor: torch.Tensor) -> float:
        gram = (x.mT @ x).numpy()
        if policy == "ridge":
            gram = gram + 1e-2 * np.linalg.eigvalsh(gram)[-1] * np.eye(4)
        hessian = extractor.numpy().T @ gram @ extractor.numpy()
        if policy == "official":
            # Of x theta: an eigenvalue that is 0 is 1e-6 then, and not that plus a rounding error.
            sigma = np.zeros(4)
            found = np.linalg.svd((x @ extractor).numpy(), compute_uv=False)
            sigma[: len(found)] = found
            eigenvalues = sigma**2 + 1e-6
            return float(eigenvalues.max() / eigenvalues.min())
        eigenvalues = np.linalg.eigvalsh(hessian)
        return eigenvalues[-1] / eigenvalues[eigenvalues > 1e-12 * eigenvalues[-1]].min()

    identity = torch.eye(4, dtype=torch.float64)
    assert ratio.i == pytest.approx(kappa(x_harmful, theta) / kappa(x_harmful, identity), rel=1e-6)
    assert ratio.ii == pytest.approx(kappa(x_primary, theta) / kappa(x_primary, identity), rel=1e-6)
    assert ratio.rir == pytest.approx(ratio.i / ratio.ii)
    if policy == "rank_aware":
        assert (ratio.rank_harmful, ratio.rank_primary) == (3, 4)
        assert (ratio.rank_harmful_base, ratio.rank_primary_base) == (3, 4)


def test_one_direction_without_data_counts_as_the_floor_however_rounding_falls() -> None:
    """The published test, above 1e-6 or not, is a toss of a coin there."""
    for seed in range(20):
        x, theta = features(3, 4, seed), features(4, 4, seed + 100)
        found, counted = log_kappa(x @ theta, policy="official")
        largest = float(torch.linalg.matrix_norm(x @ theta, 2)) ** 2
        assert float(found) == pytest.approx(math.log(largest / 1e-6 + 1.0), rel=1e-9)
        assert int(counted) == 4
    assert int(log_kappa(torch.zeros(3, 2), policy="official")[1]) == 0


def test_official_floor_makes_rank_deficient_ratios_ones_of_largest_eigenvalues() -> None:
    # The smaller eigenvalue, 1e-8, vanishes beside the floor of 1e-6, whatever theta makes of it.
    x = torch.diag(torch.tensor([1.0, 1e-4], dtype=torch.float64))
    theta = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    ratio = relative_immunization_ratio(x, x, theta, policy="official")
    smallest = 1e-8 + OFFICIAL_FLOOR
    assert ratio.i == pytest.approx((9 + OFFICIAL_FLOOR) / (1 + OFFICIAL_FLOOR))
    assert math.exp(ratio.log_kappa_harmful) == pytest.approx(9.0 / smallest, rel=1e-5)


def test_ridge_stands_before_theta() -> None:
    # A ridge after theta would cap both condition numbers at 1 / r, and RIR at about 1.
    x = features(3, 6)
    theta = torch.diag(torch.logspace(0, 6, 6, dtype=torch.float64))
    ratio = relative_immunization_ratio(x, features(3, 6, 1), theta, ridge=1e-2)
    assert math.exp(ratio.log_kappa_harmful) > 1e8


def test_zero_and_infinity() -> None:
    zero = torch.zeros(3, 2, dtype=torch.float64)
    x, identity = features(5, 2), torch.eye(2, dtype=torch.float64)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    harmless = relative_immunization_ratio(x, x, nothing, policy="rank_aware")
    assert (harmless.i, harmless.ii) == (math.inf, math.inf)
    assert math.isnan(harmless.rir)  # both infinite: says nothing
    same = relative_immunization_ratio(zero, zero, identity, policy="rank_aware")
    assert (same.i, same.ii, same.rir) == (1.0, 1.0, 1.0)
    gone = relative_immunization_ratio(x, x, identity, nothing, policy="rank_aware")
    assert (gone.i, gone.ii) == (0.0, 0.0)


def test_ratios_do_not_overflow() -> None:
    def ratio(harmful: float, primary: float) -> RelativeImmunizationRatio:
        return RelativeImmunizationRatio("ridge", 0.0, harmful, 0.0, primary, 0.0, 2, 2, 2, 2)

    assert ratio(800.0, 790.0).rir == pytest.approx(math.exp(10.0))
    assert ratio(800.0, 0.0).rir == math.inf
    assert ratio(0.0, 800.0).rir == 0.0
    assert ratio(500.0, -500.0).log_rir == 1000.0


def test_float32_input_is_computed_in_float64() -> None:
    x_primary, x_harmful, theta = features(9, 4, 0), features(9, 4, 1), features(4, 4, 2)
    exact = relative_immunization_ratio(x_primary.float(), x_harmful.float(), theta.float())
    again = relative_immunization_ratio(
        x_primary.float().double(), x_harmful.float().double(), theta.float().double()
    )
    assert exact == again


def test_refusals() -> None:
    x, theta = features(9, 4), features(4, 4)
    with pytest.raises(ValueError, match="policy must be"):
        relative_immunization_ratio(x, x, theta, policy="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ridge must be finite"):
        relative_immunization_ratio(x, x, theta, ridge=-1.0)
    with pytest.raises(ValueError, match=r"x_primary must have shape \(n, 4\)"):
        relative_immunization_ratio(features(9, 5), x, theta)


def test_log_kappa_is_batched() -> None:
    batch = features(3 * 9, 4).reshape(3, 9, 4)
    for policy in ("rank_aware", "official"):
        kappa, rank = log_kappa(batch, policy=policy)  # type: ignore[arg-type]
        singles = [log_kappa(x, policy=policy)[0] for x in batch]  # type: ignore[arg-type]
        torch.testing.assert_close(kappa, torch.stack(singles))
        assert rank.tolist() == [4, 4, 4]


def test_groups_of_identical_models_give_ones() -> None:
    x = features(60, 5)
    result = grouped_rir(x, x, x, x, groups=4, group_size=20)
    assert result.rir.tolist() == [1.0] * 4


def test_groups_take_the_ratio_per_group() -> None:
    primary, harmful, theta = features(60, 5), features(80, 5, 1), features(5, 5, 2)
    result = grouped_rir(
        primary @ theta, primary, harmful @ theta, harmful, groups=6, group_size=30
    )
    assert result.rir.shape == result.i.shape == result.ii.shape == (6,)
    torch.testing.assert_close(result.rir, result.i / result.ii)
    again = grouped_rir(primary @ theta, primary, harmful @ theta, harmful, groups=6, group_size=30)
    assert torch.equal(result.rir, again.rir)
    other = grouped_rir(
        primary @ theta, primary, harmful @ theta, harmful, groups=6, group_size=30, seed=1
    )
    assert not torch.equal(result.rir, other.rir)


def test_one_group_of_everything_is_the_full_data_ratio() -> None:
    primary, harmful, theta = features(60, 5), features(60, 5, 1), features(5, 5, 2)
    grouped = grouped_rir(
        primary @ theta, primary, harmful @ theta, harmful, groups=1, group_size=60
    )
    full = relative_immunization_ratio(primary, harmful, theta, policy="official")
    assert float(grouped.rir) == pytest.approx(full.rir, rel=1e-9)


def test_groups_refuse_and_warn() -> None:
    x = features(60, 5)
    with pytest.raises(ValueError, match="primary_base must have the 60 samples"):
        grouped_rir(x, x[:50], x, x)
    with pytest.raises(ValueError, match="at least group_size=100"):
        grouped_rir(x, x, x, x)
    with pytest.warns(NumericalWarning, match="rank-deficient"):
        grouped_rir(x, x, x, x, groups=2, group_size=3)
