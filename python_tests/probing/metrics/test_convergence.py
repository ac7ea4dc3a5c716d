"""Steps, slow-downs, norm ratios; the prediction from the spectrum against a real run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.probing.attacks.probes import gradient_descent
from immunize_ext.probing.metrics import gradient_descent_steps, norm_ratio
from immunize_ext.quantities import Slowdown, slowdown, steps_to_threshold


def test_steps_to_threshold() -> None:
    losses = torch.tensor([4.0, 2.0, 1.0, 3.0, 0.5])
    assert steps_to_threshold(losses, 5.0) == 0
    assert steps_to_threshold(losses, 1.0) == 2
    assert steps_to_threshold(losses, 0.4) is None
    assert steps_to_threshold(torch.tensor([torch.nan, 1.0]), 1.0) == 1


def test_slowdown() -> None:
    assert slowdown(30, 10, 1000) == (3.0, False)
    assert slowdown(None, 10, 1000) == (100.0, True)
    # Being there at once counts as one step.
    assert slowdown(0, 0, 128) == (1.0, False)
    assert slowdown(5, 0, 128) == (5.0, False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1.0, False), "1.0x"),
        ((0.634, False), "0.63x"),
        ((0.999, False), "1.0x"),
        ((3.26, False), "3.3x"),
        ((9.96, False), "10x"),
        ((34.2, False), "34x"),
        ((128.0, True), ">128x"),
    ],
)
def test_slowdown_text(value: tuple[float, bool], text: str) -> None:
    assert str(Slowdown(*value)) == text


def test_norm_ratio() -> None:
    weights = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    optimum = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(norm_ratio(weights, optimum), torch.tensor([1.0, 16 / 25, 0.0]))
    assert norm_ratio(weights[:1], torch.zeros(2)).tolist() == [0.0]


@given(seed=st.integers(0, 2**31 - 1), p=st.integers(1, 6), extra=st.integers(1, 9))
def test_prediction_equals_a_run(seed: int, p: int, extra: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(p + extra, p, dtype=torch.float64, generator=generator)
    y = torch.randn(p + extra, dtype=torch.float64, generator=generator)
    predicted = gradient_descent_steps(x, y)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    least = float((x @ best - y).square().sum())
    for step, w in enumerate(gradient_descent(x, y)):
        loss = float((x @ w - y).square().sum())
        if step < predicted:
            assert loss > 1.1 * least * (1 - 1e-9)
        else:
            assert loss <= 1.1 * least * (1 + 1e-9)
            break


def test_prediction_at_the_edges() -> None:
    x = torch.eye(3, dtype=torch.float64)
    assert gradient_descent_steps(x, torch.ones(3)) == 1.0  # one step is exact
    assert gradient_descent_steps(x, torch.zeros(3)) == 0.0
    assert gradient_descent_steps(torch.zeros(3, 2), torch.ones(3)) == 0.0
    uneven = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert gradient_descent_steps(uneven, torch.ones(2)) == math.inf  # loss 0 is never reached
    # y orthogonal to the columns: w = 0 is the optimum.
    column = torch.tensor([[1.0], [0.0]])
    assert gradient_descent_steps(column, torch.tensor([0.0, 1.0])) == 0.0
