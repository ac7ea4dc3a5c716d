"""The ceiling over ridges and the angles between leading subspaces."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.probing.immunizers import closed_form_theta
from immunize_ext.probing.metrics import (
    ceiling_table,
    leading_subspace_angles,
    log_rir_ceiling,
    principal_angles,
)

seeds = st.integers(0, 2**31 - 1)


def inputs(seed: int, p: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, h = torch.randn(2, 3 * p, p, dtype=torch.float64, generator=generator)
    return x, h, torch.randn(p, p, dtype=torch.float64, generator=generator)


@given(seed=seeds)
def test_no_theta_is_above_any_ceiling(seed: int) -> None:
    rows = ceiling_table(*inputs(seed))
    for row in rows:
        assert row.log_rir is not None
        assert row.log_rir <= row.log_ceiling + 1e-8
        assert row.share == pytest.approx(math.exp(row.log_rir - row.log_ceiling))


@given(seed=seeds, strength=st.floats(1.0, 100.0))
def test_closed_form_has_its_ridge_s_ceiling(seed: int, strength: float) -> None:
    x, h, _ = inputs(seed)
    theta = closed_form_theta(x, h, strength=strength, ridge=1e-3)
    shares = {row.ridge: row.share for row in ceiling_table(x, h, theta)}
    assert shares[1e-3] == pytest.approx(1.0, rel=1e-6)


def test_rows_are_ordered_and_growth_is_per_decade() -> None:
    x, h, theta = inputs(0)
    rows = ceiling_table(x, h, ridges=(1e-4, 1e-1, 1e-2))
    assert [row.ridge for row in rows] == [1e-1, 1e-2, 1e-4]
    logs = [log_rir_ceiling(x, h, ridge=row.ridge) for row in rows]
    assert [row.log_ceiling for row in rows] == logs
    assert rows[0].growth_per_decade is None
    assert rows[1].growth_per_decade == pytest.approx(math.exp(logs[1] - logs[0]))
    assert rows[2].growth_per_decade == pytest.approx(math.exp((logs[2] - logs[1]) / 2))
    assert rows[0].log_rir is rows[0].share is None
    against = ceiling_table(x, h, theta, theta)
    assert all(row.log_rir == 0.0 for row in against)


def test_rank_deficient_data_makes_the_ceiling_grow() -> None:
    x, h, _ = inputs(0)
    x[:, 0] = 0.0
    growth = ceiling_table(x, h)[-1].growth_per_decade
    assert growth is not None
    assert growth > 9.0


def test_ceiling_refusals() -> None:
    x, h, _ = inputs(0)
    for ridges in ((), (0.0,), (math.inf,)):
        with pytest.raises(ValueError, match="ridges must be positive numbers"):
            ceiling_table(x, h, ridges=ridges)


@given(seed=seeds, p=st.integers(2, 7), small=st.booleans())
def test_angles_equal_those_of_scipy(seed: int, p: int, small: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = p // 2
    first = torch.linalg.qr(torch.randn(p, k, dtype=torch.float64, generator=generator)).Q
    noise = torch.randn(p, k, dtype=torch.float64, generator=generator)
    second = torch.linalg.qr(first + 1e-7 * noise if small else noise).Q
    expected = scipy.linalg.subspace_angles(first.numpy(), second.numpy())[::-1]
    found = principal_angles(first, second)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-14)


@given(seed=seeds, count=st.integers(1, 5))
def test_angles_do_not_see_a_rotation(seed: int, count: int) -> None:
    x, h, theta = inputs(seed)
    rotation = torch.linalg.qr(theta).Q
    plain = leading_subspace_angles(x, h, torch.eye(5), count=count)
    rotated = leading_subspace_angles(x, h, rotation, count=count)
    torch.testing.assert_close(plain.after, plain.before)
    torch.testing.assert_close(rotated.after, plain.before, rtol=1e-5, atol=1e-6)
    assert rotated.gap_after == pytest.approx(plain.gap_before)


def test_equal_tasks_have_no_angle_and_whitening_no_gap() -> None:
    x, h, theta = inputs(1)
    same = leading_subspace_angles(x, x, theta, count=2)
    assert float(same.before.max()) < 1e-12
    assert float(same.after.max()) < 1e-12
    whitened = leading_subspace_angles(x, h, closed_form_theta(x, h, strength=1.0, ridge=0.0))
    assert whitened.gap_after == math.inf  # all five of five
    whitened = leading_subspace_angles(
        x, h, closed_form_theta(x, h, strength=1.0, ridge=0.0), count=2
    )
    assert whitened.gap_after == pytest.approx(1.0)


def test_angle_refusals() -> None:
    x, h, theta = inputs(0)
    with pytest.raises(ValueError, match="count must be at least 1"):
        leading_subspace_angles(x, h, theta, count=0)
    with pytest.raises(ValueError, match="count must be at most 5"):
        leading_subspace_angles(x, h, theta, count=6)
    with pytest.raises(ValueError, match=r"second must have the shape \(p, k\)"):
        principal_angles(torch.eye(3), torch.eye(2))


def test_gaps_are_of_eigenvalues() -> None:
    """Singular values 4, 3, 1 of the features: eigenvalues 16, 9, 1 of what is learned from."""
    primary = torch.diag(torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64))
    harmful = torch.diag(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    found = leading_subspace_angles(primary, harmful, torch.eye(3, dtype=torch.float64), count=1)
    assert found.gap_before == found.gap_after == pytest.approx(16.0 / 9.0)
    found = leading_subspace_angles(primary, harmful, 2.0 * torch.eye(3).double(), count=2)
    assert found.gap_after == pytest.approx(4.0)
