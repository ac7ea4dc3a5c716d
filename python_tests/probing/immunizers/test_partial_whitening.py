"""Whitening in part: between the features as they are and the whitened ones."""

from __future__ import annotations

import pytest
import torch

from immunize_ext.probing.data import Problem, digits_task
from immunize_ext.probing.immunizers import METHODS, PartialWhiteningImmunizer
from immunize_ext.probing.metrics.hessian import with_ridge


def test_kappa_falls_by_the_power_and_the_ends_are_known() -> None:
    problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
    found = {p: PartialWhiteningImmunizer(power=p).fit(None, problem) for p in (0.0, 0.3, 1.0)}
    before = found[0.3].history[0]["log_kappa_primary"]
    for power, immunized in found.items():
        assert immunized.history[1]["log_kappa_primary"] == pytest.approx((1 - power) * before)
    identity = torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(found[0.0].theta @ found[0.0].theta.mT, identity)
    # Up to a rotation and a scale, whitening is the method of that name.
    rows = with_ridge(problem.primary.x_train, 1e-2)
    grams = [
        (z.mT @ z) / (z.mT @ z).trace()
        for z in (rows @ found[1.0].theta, rows @ METHODS["whitening"].fit(None, problem).theta)
    ]
    torch.testing.assert_close(*grams)
    given = PartialWhiteningImmunizer(power=0.3).fit(2.0 * identity, problem)
    assert given.history[1]["log_kappa_harmful"] == pytest.approx(
        found[0.3].history[1]["log_kappa_harmful"]
    )


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"power must be between 0 and 1, got 1\.5"):
        PartialWhiteningImmunizer(power=1.5)
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        PartialWhiteningImmunizer(ridge=0.0)
