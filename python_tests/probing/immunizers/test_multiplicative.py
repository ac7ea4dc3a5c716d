"""The multiplicative update: what one step does to log kappa, and where many lead."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from immunizer_problems import kappa, task

from immunize_ext.probing.data import Problem
from immunize_ext.probing.immunizers import MultiplicativeImmunizer, multiplicative_step
from immunize_ext.probing.metrics import log_rir_ceiling

seeds = st.integers(0, 999)


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    return task(seed).x_train, task(seed + 1).x_train, theta


@given(seed=seeds, fraction=st.floats(0.01, 0.99))
def test_a_primary_step_lowers_log_kappa_by_four_eta(seed: int, fraction: float) -> None:
    x, h, theta = inputs(seed)
    logs = 2.0 * torch.linalg.svdvals(x @ theta).log()
    # No extreme may pass its neighbour.
    room = float(torch.minimum(logs[0] - logs[1], logs[-2] - logs[-1])) / 2.0
    eta = fraction * room
    after = multiplicative_step(theta, x, h, eta_primary=eta, eta_harmful=0.0)
    fallen = math.log(kappa(x, theta)) - math.log(kappa(x, after))
    assert fallen == pytest.approx(4.0 * eta, abs=1e-8)


@given(seed=seeds, eta=st.floats(0.001, 2.0))
def test_a_harmful_step_raises_log_kappa_by_four_eta_whatever_its_size(
    seed: int, eta: float
) -> None:
    x, h, theta = inputs(seed)
    after = multiplicative_step(theta, x, h, eta_primary=0.0, eta_harmful=eta)
    risen = math.log(kappa(h, after)) - math.log(kappa(h, theta))
    assert risen == pytest.approx(4.0 * eta, abs=1e-6)


@given(seed=seeds)
def test_step_equals_the_full_exponential(seed: int) -> None:
    x, h, theta = inputs(seed)
    exponent = torch.zeros(5, 5, dtype=torch.float64)
    for rows, eta in ((x, -0.2), (h, 0.3)):
        right = torch.linalg.svd(rows @ theta).Vh
        exponent += eta * (torch.outer(right[0], right[0]) - torch.outer(right[-1], right[-1]))
    found = multiplicative_step(theta, x, h, eta_primary=0.2, eta_harmful=0.3)
    torch.testing.assert_close(found, theta @ torch.matrix_exp(exponent), rtol=1e-9, atol=1e-9)


@given(seed=seeds)
def test_small_joint_steps_raise_rir(seed: int) -> None:
    x, h, theta = inputs(seed)
    before = math.log(kappa(h, theta)) - math.log(kappa(x, theta))
    after = multiplicative_step(theta, x, h, eta_primary=1e-5, eta_harmful=1e-5)
    tops = [torch.linalg.svd(rows @ theta).Vh for rows in (x, h)]
    gap = torch.outer(tops[0][0], tops[0][0]) - torch.outer(tops[0][-1], tops[0][-1])
    gap -= torch.outer(tops[1][0], tops[1][0]) - torch.outer(tops[1][-1], tops[1][-1])
    assume(float(gap.norm()) > 0.1)
    assert math.log(kappa(h, after)) - math.log(kappa(x, after)) > before


def test_many_steps_come_close_to_the_ceiling() -> None:
    primary, harmful = task(1), task(2)
    history = MultiplicativeImmunizer().fit(None, Problem.of(primary, harmful)).history
    ceiling = log_rir_ceiling(primary.x_train, harmful.x_train, ridge=1e-2)
    assert 0.9 * ceiling < history[-1]["log_rir"] <= ceiling + 1e-8


def test_corridor_and_refusals() -> None:
    fitted = MultiplicativeImmunizer(steps=20, corridor=(4.0, 4.0)).fit(
        None, Problem.of(task(1), task(2))
    )
    assert all(r["log_kappa_primary"] == pytest.approx(math.log(4.0)) for r in fitted.history)
    with pytest.raises(ValueError, match="eta_harmful must be finite and positive"):
        MultiplicativeImmunizer(eta_harmful=-1.0)
