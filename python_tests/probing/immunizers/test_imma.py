"""IMMA for linear probes: the lower level, its derivative, and what the upper level does."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from immunizer_problems import task

from immunize_ext.probing.attacks.probes import gradient_descent
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.immunizers import ImmaImmunizer
from immunize_ext.probing.immunizers.imma import probe_after_steps


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_lower_level_is_gradient_descent(steps: int) -> None:
    toy = task(1)
    expected = next(itertools.islice(gradient_descent(toy.x_train, toy.y_train), steps, None))
    found = probe_after_steps(toy.x_train, toy.y_train, steps)
    torch.testing.assert_close(found, expected)


def test_derivative_through_the_steps() -> None:
    toy = task(1, p=3, n=9)
    features = toy.x_train.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: probe_after_steps(z, toy.y_train, 3), features)


def test_scale_of_the_features_gains_nothing() -> None:
    toy = task(1)
    features = toy.x_train.clone().requires_grad_()
    scores = features @ probe_after_steps(features, toy.y_train, 4)
    (gradient,) = torch.autograd.grad((scores - toy.y_train).square().mean(), features)
    # Euler: the loss is homogeneous of degree 0 in the features.
    assert abs(float((gradient * features.detach()).sum())) < 1e-12


@pytest.mark.parametrize("unrolled", [True, False])
def test_harm_is_slowed_within_its_own_budget(unrolled: bool) -> None:
    immunizer = ImmaImmunizer(steps=60, unrolled=unrolled, first_change=0.02)
    fitted = immunizer.fit(None, Problem.of(task(1), task(2)))
    first, last = fitted.history[0], fitted.history[-1]
    assert last["harmful_loss"] > first["harmful_loss"]
    assert last["primary_loss"] < first["primary_loss"]
    assert len(fitted.history) == 61


def test_same_seed_same_result_and_no_global_state() -> None:
    state = torch.get_rng_state()
    first, second = (
        ImmaImmunizer(steps=5).fit(None, Problem.of(task(1), task(2))) for _ in range(2)
    )
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(state, torch.get_rng_state())
    other = ImmaImmunizer(steps=5, seed=1).fit(None, Problem.of(task(1), task(2)))
    assert not torch.equal(first.theta, other.theta)


def test_corridor() -> None:
    fitted = ImmaImmunizer(steps=10, corridor=(1.0, 3.0)).fit(None, Problem.of(task(1), task(2)))
    assert all(r["log_kappa_primary"] <= math.log(3.0) + 1e-7 for r in fitted.history)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="inner_steps must be finite and positive"):
        ImmaImmunizer(inner_steps=0)
    toy: Task = task(2)
    silent = replace(toy, y_train=torch.zeros_like(toy.y_train))
    with pytest.raises(ValueError, match="targets must not all be 0"):
        ImmaImmunizer(steps=1).fit(None, Problem.of(task(1), silent))
