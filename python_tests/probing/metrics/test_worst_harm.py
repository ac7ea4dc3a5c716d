"""One number for several harms: between their mean and the least of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.probing.metrics import conditional_value_at_risk, soft_minimum

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


def test_refusals() -> None:
    v = torch.ones(2)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0"):
            conditional_value_at_risk(v, share)
    for eta in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="eta must be finite"):
            soft_minimum(v, eta)
    with pytest.raises(ValueError, match=r"values must have shape \(h,\)"):
        soft_minimum(v[:0], 1.0)
