"""The projection that keeps kappa_P in a corridor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from immunizer_problems import kappa, task

from immunize_ext.probing.immunizers import project_to_corridor
from immunize_ext.probing.immunizers.corridor import check_corridor

seeds = st.integers(0, 2**31 - 1)


@given(seed=seeds, low=st.floats(1.0, 1e3), width=st.floats(1.0, 1e3))
def test_kappa_is_in_the_corridor_and_stays(seed: int, low: float, width: float) -> None:
    x = task(seed % 1000).x_train
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    corridor = (low, low * width)
    projected = project_to_corridor(theta, x, corridor)
    after = kappa(x, projected)
    assert corridor[0] * (1 - 1e-6) <= after <= corridor[1] * (1 + 1e-6)
    again = project_to_corridor(projected, x, corridor)
    torch.testing.assert_close(again, projected, rtol=1e-6, atol=1e-8)


@given(seed=seeds)
def test_eigenvectors_and_geometric_centre_stay(seed: int) -> None:
    x, theta = task(seed % 1000).x_train, torch.eye(5, dtype=torch.float64)
    before = torch.linalg.svd(x @ theta, full_matrices=False)
    after = torch.linalg.svd(x @ project_to_corridor(theta, x, (1.0, 4.0)), full_matrices=False)
    # theta^T K theta before and after share their eigenvectors: they commute.
    first = (before.Vh.mT * before.S.square()) @ before.Vh
    second = (after.Vh.mT * after.S.square()) @ after.Vh
    torch.testing.assert_close(first @ second, second @ first, rtol=1e-8, atol=1e-10)
    middle = math.log(float(before.S[0] * before.S[-1]))
    assert math.log(float(after.S[0] * after.S[-1])) == pytest.approx(middle, abs=1e-8)


def test_inside_nothing_changes() -> None:
    x, theta = task(0).x_train, torch.eye(5, dtype=torch.float64)
    value = kappa(x, theta)
    assert project_to_corridor(theta, x, (0.9 * value, 1.1 * value)) is theta


def test_refusals() -> None:
    x, theta = task(0).x_train, torch.eye(5, dtype=torch.float64)
    check_corridor("fit", None)
    for corridor in ((0.5, 2.0), (3.0, 2.0), (1.0, math.inf), (math.nan, 2.0)):
        with pytest.raises(ValueError, match="corridor must be two numbers 1 <= low <= high"):
            project_to_corridor(theta, x, corridor)
    with pytest.raises(ValueError, match="must be regular, got a singular one"):
        project_to_corridor(theta, x[:3], (1.0, 2.0))
    with pytest.raises(ValueError, match="got equal ones; let the corridor start at 1"):
        project_to_corridor(theta, theta, (2.0, 3.0))
