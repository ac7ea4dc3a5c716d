"""One number for several harms: between their mean and the least of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.worst_case import (
    conditional_value_at_risk,
    harm_weights,
    soft_minimum,
    value_at_risk_weights,
)

values = st.lists(st.floats(-10.0, 10.0), min_size=1, max_size=9)


@given(values=values, share=st.floats(0.01, 1.0))
def test_value_at_risk_is_its_maximum_over_thresholds(values: list[float], share: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    # The maximum over t is attained at a value; at shares below one harm, at the least.
    share = max(share, 1.0 / len(values))
    truth = max(float(t - (t - v).clamp(min=0.0).sum() / (share * len(v))) for t in v)
    assert float(conditional_value_at_risk(v, share)) == pytest.approx(truth, abs=1e-9)
    assert float(v.min()) <= truth + 1e-9
    assert truth <= float(v.mean()) + 1e-9


@given(values=values, eta=st.just(0.0) | st.floats(1e-3, 50.0))
def test_soft_minimum_is_between_minimum_and_mean(values: list[float], eta: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    found = float(soft_minimum(v, eta))
    assert float(v.min()) - 1e-9 <= found <= float(v.mean()) + 1e-9
    assert float(soft_minimum(v, eta + 1.0)) <= found + 1e-9


def test_its_gradient_is_the_exponentiated_weights() -> None:
    v = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(soft_minimum(v, 0.7), v)
    torch.testing.assert_close(grad, torch.softmax(-0.7 * v.detach(), 0))


@given(values=values, share=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_weights_are_a_distribution_that_no_order_changes(
    values: list[float], share: float, seed: int
) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    weights = value_at_risk_weights(v, share)
    assert float(weights.min()) >= 0.0
    assert float(weights.sum()) == pytest.approx(1.0)
    # None counts more than one in s H, which is what makes it CVaR.
    assert float(weights.max()) <= max(1.0 / (share * len(values)), 1.0) + 1e-12 or len(values) == 1
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    again = conditional_value_at_risk(v[order], share)
    assert float(again) == pytest.approx(float(conditional_value_at_risk(v, share)), abs=1e-12)
    for kind in ("mean", "exponentiated"):
        here = harm_weights(kind, v, v, rate=0.3, share=share)  # type: ignore[arg-type]
        there = harm_weights(kind, v[order], v[order], rate=0.3, share=share)  # type: ignore[arg-type]
        torch.testing.assert_close(here[order], there)


def test_share_of_all_is_the_mean_and_of_none_the_least() -> None:
    v = torch.tensor([3.0, -1.0, 2.0, 7.0], dtype=torch.float64)
    assert float(conditional_value_at_risk(v, 1.0)) == pytest.approx(2.75)
    assert float(conditional_value_at_risk(v, 1e-9)) == -1.0
    # Three of four: the worst three alike, the share cuts none.
    assert float(conditional_value_at_risk(v, 0.75)) == pytest.approx(4.0 / 3.0)
    v.requires_grad_()
    (grad,) = torch.autograd.grad(conditional_value_at_risk(v, 0.6), v)
    # 2.4 harms: two whole ones and 0.4 of the third.
    torch.testing.assert_close(grad, torch.tensor([0.4, 1.0, 1.0, 0.0], dtype=torch.float64) / 2.4)


def test_multiplicative_weights_on_a_fixed_vector() -> None:
    """After t steps of the same values weights are exp(-eta t phi), whatever the last one says."""
    phi = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    before = torch.zeros(3, dtype=torch.float64)
    for step in range(5):
        found = harm_weights("exponentiated", phi.flip(0), before, rate=0.7, share=1.0)
        expected = torch.exp(-0.7 * step * phi)
        torch.testing.assert_close(found, expected / expected.sum())
        before = before + phi
    alike = torch.full((3,), 1.0 / 3.0, dtype=torch.float64)
    torch.testing.assert_close(
        harm_weights("exponentiated", phi, before, rate=0.0, share=1.0), alike
    )
    torch.testing.assert_close(harm_weights("mean", phi, before, rate=0.7, share=0.1), alike)
    far = harm_weights("exponentiated", phi, 1e6 * phi, rate=1.0, share=1.0)
    assert far.tolist() == [1.0, 0.0, 0.0]


@given(seed=st.integers(0, 99))
def test_hedge_is_as_good_as_the_least_harm_but_for_its_bound(seed: int) -> None:
    """Sum over steps of the weighted mean <= that of the least + log H / eta + eta T / 8."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(40, 4, generator=generator, dtype=torch.float64)
    before, paid, eta = torch.zeros(4, dtype=torch.float64), 0.0, 0.5
    for phi in rows:
        weights = harm_weights("exponentiated", phi, before, rate=eta, share=1.0)
        paid += float(weights @ phi)
        before = before + phi
    assert paid <= float(before.min()) + math.log(4.0) / eta + eta * len(rows) / 8.0


def test_refusals() -> None:
    v = torch.ones(2)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0"):
            conditional_value_at_risk(v, share)
    for eta in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="eta must be finite"):
            soft_minimum(v, eta)
    with pytest.raises(ValueError, match="weighting must be one of mean, exponentiated, cvar"):
        harm_weights("worst", v, v, rate=1.0, share=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rate must be finite"):
        harm_weights("mean", v, v, rate=-1.0, share=0.5)
    with pytest.raises(ValueError, match=r"values must have shape \(h,\)"):
        soft_minimum(v[:0], 1.0)
