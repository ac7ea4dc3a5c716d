"""StreamedGram: equal to all rows in memory, whatever the blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import EPS, fewer_examples, gaussian, with_spectrum
from spectrum_bounds import VALUE_UNITS, assert_within

from immunize_ext.ops import StreamedGram, gram_extremes


def objective(extremes):
    return (
        extremes.lambda_max.log()
        - extremes.lambda_min.log()
        + extremes.squared_frobenius.sqrt() / extremes.lambda_max
    )


def in_memory(x):
    leaf = x.detach().clone().requires_grad_()
    value = objective(gram_extremes(leaf))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@fewer_examples
@given(data=st.data())
def test_equals_all_rows_together(data):
    n, p = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    x = gaussian(n, p, seed=data.draw(st.integers(0, 1000)))
    blocks = list(x.split(data.draw(st.integers(1, n))))
    streamed, truth = StreamedGram(blocks), gram_extremes(x)
    assert streamed.rows == n
    for found, right in zip(streamed.extremes[3:], truth[3:], strict=True):
        assert torch.equal(found, right)
    bound = 4 * VALUE_UNITS * max(n, p) * EPS * truth.lambda_max
    assert_within(streamed.extremes.lambda_max, truth.lambda_max, bound)
    assert_within(streamed.extremes.lambda_min, truth.lambda_min, bound)
    assert_within(
        streamed.extremes.squared_frobenius, truth.squared_frobenius, bound * truth.lambda_max * p
    )
    value, derivative = streamed.derivative(objective)
    right_value, right_grad = in_memory(x)
    kappa = float((truth.lambda_max / truth.lambda_min).sqrt())
    torch.testing.assert_close(value, right_value, rtol=0, atol=1e-12 * kappa**2)
    # The vectors of the smallest value are known to eps kappa over their gap.
    if kappa < 1e3:
        # The size of its terms, which may cancel.
        scale = float(right_grad.norm() + truth.lambda_min.rsqrt())
        assert float((2 * x @ derivative - right_grad).norm()) <= 1e-9 * kappa**2 * scale


@pytest.mark.parametrize("kappa", [1e6, 1e9, 1e12])
def test_condition_number_is_not_squared(kappa):
    sigma = [1.0, 0.5, 0.1, 1 / kappa]
    x = with_spectrum(sigma, 60, 4, seed=3)
    # The default rank tolerance, 60 eps, lies below 1 / kappa.
    extremes = StreamedGram(list(x.split(7))).extremes
    assert extremes.rank.item() == 4
    assert_within(extremes.lambda_min.sqrt(), 1 / kappa, VALUE_UNITS * 60 * EPS)


@pytest.mark.parametrize(
    "sigma", [[2.0, 2.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [2.0, 1.0, 0.0]]
)
def test_clusters_and_rank(sigma):
    x = with_spectrum(sigma, 20, 3, seed=4)
    streamed = StreamedGram(list(x.split(6)))
    truth = gram_extremes(x)
    assert [int(v) for v in streamed.extremes[3:]] == [int(v) for v in truth[3:]]
    _, derivative = streamed.derivative(objective)
    torch.testing.assert_close(2 * x @ derivative, in_memory(x)[1], rtol=1e-10, atol=1e-12)


def test_zero_smallest_eigenvalue_has_no_gradient():
    x = with_spectrum([2.0, 1.0, 0.0], 9, 3, seed=5)
    streamed = StreamedGram([x], rank="full")
    assert streamed.extremes.lambda_min.item() == 0.0
    assert float(streamed.derivative(lambda e: e.lambda_min)[1].abs().max()) == 0.0


def test_deep_extractor_by_blocks_equals_the_whole():
    """Gradients of a network, with one block's graph alive at a time."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    network.double()
    inputs = gaussian(50, 5, seed=6)
    value = objective(gram_extremes(network(inputs)))
    truth = torch.autograd.grad(value, list(network.parameters()))
    streamed = StreamedGram(lambda: (network(block) for block in inputs.split(8)))
    found = streamed.backward(objective)
    assert math.isclose(found.item(), value.item(), rel_tol=1e-11)
    for parameter, right in zip(network.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-9, atol=1e-11)


def test_float32_is_computed_in_float64():
    x = gaussian(30, 4, seed=7).float()
    found, truth = StreamedGram(list(x.split(7))).extremes, gram_extremes(x.double())
    torch.testing.assert_close(found.lambda_min, truth.lambda_min, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (iter([torch.ones(2, 2)]), "iterable twice"),
        ([], "at least one row"),
        ([torch.ones(0, 3)], "at least one row"),
        ([torch.ones(2, 2), torch.ones(2, 3)], "one width"),
        ([torch.ones(2, 2), torch.full((1, 2), torch.nan)], "finite.*block 1"),
        ([torch.ones(2)], "shape"),
        ([torch.ones(2, 2, dtype=torch.int64)], "floating-point"),
    ],
)
def test_bad_blocks_are_refused(blocks, message):
    with pytest.raises(ValueError, match=f"StreamedGram: blocks must.*{message}"):
        StreamedGram(blocks)


def test_another_second_pass_is_refused():
    passes = [[gaussian(4, 2).requires_grad_()], [gaussian(3, 2).requires_grad_()]]
    streamed = StreamedGram(lambda: passes.pop(0))
    with pytest.raises(ValueError, match="same rows in each pass, got 3 after 4"):
        streamed.backward(lambda e: e.lambda_max)
    with pytest.raises(ValueError, match="must require gradients"):
        StreamedGram([gaussian(4, 2)]).backward(lambda e: e.lambda_max)
    with pytest.raises(ValueError, match="must return a scalar"):
        StreamedGram([gaussian(4, 2)]).derivative(lambda e: torch.ones(2))
