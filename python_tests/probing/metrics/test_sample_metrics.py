"""Few-sample error and the bias of RIR over groups."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.errors import NumericalWarning
from immunize_ext.probing.data import Task
from immunize_ext.probing.metrics import (
    few_sample_error,
    grouped_linear_rir,
    relative_immunization_ratio,
)


def toy(*, labels: bool = False, p: int = 5) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, p, dtype=torch.float64, generator=generator)
    y = x.sum(1) + 0.5 * torch.randn(90, dtype=torch.float64, generator=generator)
    y = torch.where(y > 0, 1.0, -1.0).double() if labels else y
    return Task("toy", x[:60], y[:60], x[60:], y[60:])


def test_few_sample_error_is_ridge_regression_on_all_samples() -> None:
    task = toy()
    found = few_sample_error(task, samples=60, draws=1, ridges=[0.01])
    # The bordered normal equations: no ridge on the intercept.
    x, y = task.x_train, task.y_train
    largest = torch.linalg.eigvalsh((x - x.mean(0)).mT @ (x - x.mean(0)))[-1]
    bordered = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], dim=1)
    ridge = 0.01 * largest * torch.diag(torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64))
    head = torch.linalg.solve(bordered.mT @ bordered + ridge, bordered.mT @ y)
    expected = float((task.x_test @ head[:5] + head[5] - task.y_test).square().mean())
    assert found.loss == pytest.approx(expected)
    assert (found.loss_spread, found.error_rate, found.ridge) == (0.0, None, 0.01)


def test_heads_have_an_intercept() -> None:
    """Neither the origin of the inputs nor that of the targets is told to the attacker."""
    task = toy()
    moved = Task(
        "moved", task.x_train + 7.0, task.y_train - 30.0, task.x_test + 7.0, task.y_test - 30.0
    )
    plain, shifted = (few_sample_error(one, samples=10) for one in (task, moved))
    assert shifted.loss == pytest.approx(plain.loss, rel=1e-9)
    assert shifted.constant_loss == pytest.approx(plain.constant_loss, rel=1e-9)


def test_the_best_constant_stands_beside_the_error() -> None:
    """Labels that the inputs do not tell, four in five of one class: the head has no skill."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 4, dtype=torch.float64, generator=generator) + 1.0
    y = torch.where(torch.arange(500) % 5 == 0, -1.0, 1.0).double()
    found = few_sample_error(Task("majority", x[:250], y[:250], x[250:], y[250:]), samples=200)
    assert found.constant_error_rate == pytest.approx(0.2)
    assert found.constant_loss == pytest.approx(0.64)  # 1 - 0.6 ** 2
    assert found.error_rate is not None
    assert found.error_rate == pytest.approx(0.2, abs=0.01)
    assert found.loss == pytest.approx(0.64, abs=0.02)
    assert few_sample_error(toy()).constant_error_rate is None


@given(seed=st.integers(0, 1000))
def test_a_rotation_of_the_features_costs_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator)).Q
    plain, rotated = few_sample_error(toy(), draws=3), few_sample_error(toy(), theta, draws=3)
    assert rotated.loss == pytest.approx(plain.loss, rel=1e-8)


def test_the_best_ridge_counts() -> None:
    ridges = (1e-6, 1e-2, 1.0, 100.0)
    found = few_sample_error(toy(labels=True), samples=10, ridges=ridges)
    singles = [few_sample_error(toy(labels=True), samples=10, ridges=[r]) for r in ridges]
    best = min(singles, key=lambda single: single.loss)
    assert found.ridge == best.ridge
    assert found == pytest.approx(best)
    assert found.error_rate is not None


def test_a_bad_basis_costs_generalisation() -> None:
    theta = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.01, 0.01], dtype=torch.float64))
    plain, biased = (few_sample_error(toy(), t, samples=6) for t in (None, theta))
    assert biased.loss > plain.loss


def test_few_sample_refusals() -> None:
    with pytest.raises(ValueError, match="samples must be between 1 and 60"):
        few_sample_error(toy(), samples=61)
    with pytest.raises(ValueError, match="ridges must be positive"):
        few_sample_error(toy(), ridges=[0.0])
    with pytest.raises(ValueError, match=r"theta must have shape \(5, q\)"):
        few_sample_error(toy(), torch.eye(4))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(2, 400, 30, dtype=torch.float64, generator=generator)
    decay = torch.logspace(0, -2, 30, dtype=torch.float64)
    return x * decay, h * decay.flip(0), torch.diag(decay.flip(0))


@pytest.mark.parametrize("policy", ["ridge", "official", "rank_aware"])
def test_whole_data_as_one_group_has_no_bias(policy: str) -> None:
    x, h, theta = inputs()
    found = grouped_linear_rir(x, h, theta, groups=1, group_size=400, policy=policy)  # type: ignore[arg-type]
    assert found.log_bias == pytest.approx(0.0, abs=1e-9)
    assert found.log_spread == 0.0
    assert found.policy == found.full.policy == policy
    expected = relative_immunization_ratio(x, h, theta, policy=policy, ridge=1e-3)  # type: ignore[arg-type]
    assert found.full == expected
    assert found.ridge == (1e-3 if policy == "ridge" else 0.0)


def test_small_groups_are_biased_beyond_their_spread() -> None:
    x, h, theta = inputs()
    found = grouped_linear_rir(x, h, theta, group_size=31, policy="rank_aware")
    assert abs(found.log_bias) > found.log_spread
    assert found.mean_rir == pytest.approx(float(found.groups.rir.mean()))
    again = grouped_linear_rir(x, h, theta, group_size=31, policy="rank_aware")
    assert torch.equal(found.groups.log_i, again.groups.log_i)
    other = grouped_linear_rir(x, h, theta, group_size=31, policy="rank_aware", seed=1)
    assert not torch.equal(found.groups.log_i, other.groups.log_i)


def test_nothing_changed_gives_one_in_every_group() -> None:
    x, h, _ = inputs()
    found = grouped_linear_rir(x, h, torch.eye(30).double())
    assert found.groups.rir.tolist() == [1.0] * 20
    assert found.log_bias == 0.0
    assert math.exp(found.full.log_rir) == 1.0


def test_grouped_refusals_and_warning() -> None:
    x, h, theta = inputs()
    with pytest.warns(NumericalWarning, match="groups of 20 samples with 30 features"):
        grouped_linear_rir(x, h, theta, groups=2, group_size=20, policy="rank_aware")
    with pytest.raises(ValueError, match="group_size between 1 and the 400 samples"):
        grouped_linear_rir(x, h, theta, group_size=401)
    with pytest.raises(ValueError, match="policy must be 'ridge', 'rank_aware' or 'official'"):
        grouped_linear_rir(x, h, theta, policy="exact")  # type: ignore[arg-type]
