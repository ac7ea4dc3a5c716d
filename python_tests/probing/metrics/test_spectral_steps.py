"""Steps of conjugate gradients and slow-downs from the spectrum against runs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.probing.attacks import ATTACKS
from immunize_ext.probing.attacks.probes import conjugate_gradients, gradient_descent
from immunize_ext.probing.data import Task
from immunize_ext.probing.metrics import (
    conjugate_gradient_steps,
    gradient_descent_steps,
    spectral_slowdown,
)

seeds = st.integers(0, 2**31 - 1)
tolerances = st.sampled_from([0.5, 0.1, 1e-2, 1e-4])


def problem(seed: int, n: int, p: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, dtype=torch.float64, generator=generator)
    return x, torch.randn(n, dtype=torch.float64, generator=generator)


@given(seed=seeds, p=st.integers(1, 8), extra=st.integers(1, 9), tolerance=tolerances)
def test_conjugate_gradients_need_the_predicted_steps(
    seed: int, p: int, extra: int, tolerance: float
) -> None:
    x, y = problem(seed, p + extra, p)
    predicted = conjugate_gradient_steps(x, y, tolerance=tolerance)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    least = float((x @ best - y).square().sum())
    target = (1.0 + tolerance) * least
    for step, w in enumerate(conjugate_gradients(x, y)):
        loss = float((x @ w - y).square().sum())
        if step < predicted:
            assert loss > target * (1 - 1e-8)
        else:
            assert loss <= target * (1 + 1e-8)
            break


@given(seed=seeds, tolerance=tolerances)
def test_no_method_of_gradients_is_predicted_faster(seed: int, tolerance: float) -> None:
    x, y = problem(seed, 12, 5)
    conjugate = conjugate_gradient_steps(x, y, tolerance=tolerance)
    assert conjugate <= gradient_descent_steps(x, y, tolerance=tolerance)
    assert conjugate <= 5.0


def test_conjugate_gradients_count_distinct_eigenvalues() -> None:
    x = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert conjugate_gradient_steps(x, torch.ones(5), tolerance=0.0) == 2.0
    # An eigenvalue that y does not touch costs no step.
    y = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    assert conjugate_gradient_steps(x, y, tolerance=0.0) == 1.0


def test_edges() -> None:
    assert conjugate_gradient_steps(torch.zeros(3, 2), torch.ones(3)) == 0.0
    assert conjugate_gradient_steps(torch.eye(3), torch.zeros(3)) == 0.0
    assert conjugate_gradient_steps(torch.eye(3), torch.ones(3)) == 1.0


def test_slowdown_equals_that_of_runs() -> None:
    x, y = problem(0, 40, 5)
    theta = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64))
    task = Task("toy", x, y, x, y)
    probes = ("gradient_descent", "conjugate_gradients")
    for attacker in probes:
        best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        target = 1.1 * float((x @ best - y).square().mean())
        steps = [
            ATTACKS[attacker]
            .run(extractor, task, steps=3000)
            .steps_to("train_loss", target, below=True)
            for extractor in (theta, None)
        ]
        assert steps[0] is not None
        assert steps[1] is not None
        found = spectral_slowdown(x, y, theta, attacker=attacker)  # type: ignore[arg-type]
        assert found.ratio == pytest.approx(max(steps[0], 1) / max(steps[1], 1))
    assert spectral_slowdown(x, y, theta, theta).ratio == 1.0


def test_never_over_never_says_nothing() -> None:
    x, theta = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([1.0, 3.0]))
    assert math.isnan(spectral_slowdown(x, torch.ones(2), theta).ratio)
    assert next(gradient_descent(x, torch.ones(2))).tolist() == [0.0, 0.0]


def test_refusals() -> None:
    x, y = torch.eye(2), torch.ones(2)
    with pytest.raises(ValueError, match="attacker must be one of gradient_descent, conjugate"):
        spectral_slowdown(x, y, x, attacker="adam")  # type: ignore[arg-type]
    for count in (gradient_descent_steps, conjugate_gradient_steps):
        with pytest.raises(ValueError, match=r"y must have shape \(n,\)"):
            count(x, torch.ones(3))
        with pytest.raises(ValueError, match="tolerance must be at least 0"):
            count(x, y, tolerance=-1.0)
