"""No result depends on the size of the features, also where their squares leave the range.

Features are multiplied by powers of two, which change no digit: so equality is to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sample_inputs import gaussian
from torch import Tensor

from immunize_ext.probing import evaluate
from immunize_ext.probing.attacks import ATTACKS, compare_attack
from immunize_ext.probing.certificates import certify
from immunize_ext.probing.data import Problem, Task
from immunize_ext.probing.immunizers import METHODS
from immunize_ext.probing.metrics import (
    few_sample_error,
    grouped_rir,
    line_search_norm_ratio,
    log_rir_ceiling,
    pencil,
    relative_immunization_ratio,
    with_ridge,
)

EXPONENTS = [-550, 10, 500]
FAR = [-550, 500]

every_scale = pytest.mark.parametrize("exponent", EXPONENTS)


def task(seed: int, count: int = 40) -> Task:
    """Labels of a noisy linear rule on features of kappa 100 or so."""
    x = gaussian(count, 5, seed=seed) * torch.tensor([3.0, 1.0, 1.0, 0.5, 0.2])
    y = torch.sign(x @ gaussian(5, seed=seed + 10) + 0.3 * gaussian(count, seed=seed + 20))
    return Task("toy", x[: count // 2], y[: count // 2], x[count // 2 :], y[count // 2 :])


PRIMARY, HARMFUL = task(1), task(2)
THETA = torch.eye(5, dtype=torch.float64) + 0.3 * gaussian(5, 5, seed=9)


def sized(exponent: int, *tasks: Task) -> list[Task]:
    scale = 2.0**exponent
    return [replace(t, x_train=t.x_train * scale, x_test=t.x_test * scale) for t in tasks]


def numbers(value: Any) -> Any:
    """Nested values without what is made of the size itself."""
    absolute = ("official", "spectra", "warnings", "seconds")
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items() if key not in absolute}
    return value


@every_scale
@pytest.mark.parametrize("policy", ["ridge", "rank_aware"])
def test_ratios(policy, exponent):
    one = relative_immunization_ratio(PRIMARY.x_train, HARMFUL.x_train, THETA, policy=policy)
    primary, harmful = sized(exponent, PRIMARY, HARMFUL)
    for theta in (THETA, THETA * 2.0**exponent):
        assert one == relative_immunization_ratio(
            primary.x_train, harmful.x_train, theta, policy=policy
        )
    groups = {"groups": 3, "group_size": 8, "policy": policy}
    pairs = [(t.x_train @ THETA, t.x_train) for t in (PRIMARY, HARMFUL)]
    base = grouped_rir(*pairs[0], *pairs[1], **groups)
    scaled = grouped_rir(*(x * 2.0**exponent for pair in pairs for x in pair), **groups)
    torch.testing.assert_close(scaled.log_i, base.log_i, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(scaled.log_ii, base.log_ii, rtol=1e-13, atol=1e-13)


@every_scale
def test_ridge_pencil_and_ceiling(exponent):
    scale = 2.0**exponent
    rows: Tensor = with_ridge(PRIMARY.x_train, 1e-3)
    assert torch.equal(with_ridge(PRIMARY.x_train * scale, 1e-3), rows * scale)
    inputs = PRIMARY.x_train, HARMFUL.x_train
    one, other = pencil(*inputs), pencil(*(x * scale for x in inputs))
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.basis, other.basis * scale)
    assert log_rir_ceiling(*inputs, THETA) == log_rir_ceiling(*(x * scale for x in inputs), THETA)


@every_scale
def test_learning(exponent):
    (scaled,) = sized(exponent, PRIMARY)
    ratios = [line_search_norm_ratio(t.x_train, t.y_train, steps=9) for t in (PRIMARY, scaled)]
    torch.testing.assert_close(*ratios, rtol=1e-12, atol=1e-14)
    assert few_sample_error(PRIMARY, samples=10) == few_sample_error(scaled, samples=10)


@every_scale
@pytest.mark.parametrize("name", list(ATTACKS))
def test_attackers(name, exponent):
    (scaled,) = sized(exponent, HARMFUL)
    given = {"attacker": name, "base_budget": 10, "limit": 2.0}
    assert compare_attack(scaled, THETA, **given) == compare_attack(HARMFUL, THETA, **given)


@every_scale
@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if not method.sees_scale])
def test_immunizers(name, exponent):
    method = METHODS[name]
    if hasattr(method, "steps"):
        method = replace(method, steps=3)
    one = method.fit(None, Problem.of(PRIMARY, HARMFUL))
    other = method.fit(None, Problem.of(*sized(exponent, PRIMARY, HARMFUL)))
    assert torch.equal(one.theta, other.theta)
    # What a regularizer alone minimises has the unit of lambda^2.
    records = [
        [{k: v for k, v in record.items() if k != "objective"} for record in found.history]
        for found in (one, other)
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("exponent", FAR)
@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.sees_scale])
def test_methods_with_steps_of_absolute_size_refuse_what_overflows(name, exponent):
    with pytest.raises(ValueError, match=r"between 2\^-200 and 2\^200, .* by 2.0 \*\* -?\d+$"):
        METHODS[name].fit(None, Problem.of(*sized(exponent, PRIMARY, HARMFUL)))


@every_scale
def test_evaluation(exponent):
    immunized = METHODS["closed-form"].fit(None, Problem.of(PRIMARY, HARMFUL))
    scaled = sized(exponent, PRIMARY, HARMFUL)
    one, other = (
        evaluate(immunized, *tasks, base_budget=20, limit=2.0, attacks=[ATTACKS["whitened"]])
        for tasks in ((PRIMARY, HARMFUL), scaled)
    )
    assert numbers(one.to_dict()) == numbers(other.to_dict())
    said = [w for w in other.warnings if "of a size of about" in w]
    assert len(said) == (abs(exponent) > 200)


def test_certificate():
    immunized = METHODS["closed-form"].fit(None, Problem.of(PRIMARY, HARMFUL))
    scaled = sized(-550, PRIMARY, HARMFUL)
    one, other = (certify(immunized, *t, draws=1) for t in ((PRIMARY, HARMFUL), scaled))
    assert replace(one, seconds={}) == replace(other, seconds={})
