"""Extremes of operators that are known by their products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sample_inputs import gaussian

from immunize_ext.errors import NotConvergedError
from immunize_ext.ops import operator_extremes, symmetric_extremes


def gram_product(v, a):
    return a.mT @ (a @ v)


def of_spectrum(values, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    h = torch.from_numpy((q * np.asarray(values)) @ q.T)
    return (h + h.mT) / 2


@pytest.mark.parametrize("side", [1, 5, 64, 65, 150])
def test_values_and_gradients_are_those_of_the_matrix(side):
    a = gaussian(side + 20, side, seed=side).requires_grad_()
    found = operator_extremes(gram_product, side, [a])
    truth = symmetric_extremes(a.mT @ a)
    for which in range(2):
        torch.testing.assert_close(found[which], truth[which], rtol=1e-9, atol=1e-9)
        (grad,) = torch.autograd.grad(found[which], a, retain_graph=True)
        (right,) = torch.autograd.grad(truth[which], a, retain_graph=True)
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-5)
    assert found[2:] == truth[2:]


@pytest.mark.parametrize("side", [40, 120])
def test_clusters_are_counted_and_their_gradient_is_the_mean(side):
    values = np.linspace(-1.0, 2.0, side)
    values[-3:], values[:2] = 3.0, -2.0
    h = of_spectrum(values, seed=side).requires_grad_()
    found = operator_extremes(lambda v, h: h @ v, side, [h])
    assert (found.multiplicity_max, found.multiplicity_min) == (3, 2)
    truth = symmetric_extremes(h)
    for got, right in ((found.lambda_max, truth.lambda_max), (found.lambda_min, truth.lambda_min)):
        (grad,) = torch.autograd.grad(got, h, retain_graph=True)
        (true,) = torch.autograd.grad(right, h, retain_graph=True)
        torch.testing.assert_close(grad, true, rtol=1e-6, atol=1e-8)


def test_float32_scale_and_determinism():
    h = of_spectrum(np.linspace(1.0, 9.0, 100)) * 1e-12
    one = operator_extremes(lambda v: h.float() @ v, 100, dtype=torch.float32)
    assert one.lambda_max.dtype == torch.float32
    assert one.lambda_max.item() == pytest.approx(9e-12, rel=1e-4)
    assert one.lambda_min.item() == pytest.approx(1e-12, rel=1e-3)
    again = operator_extremes(lambda v: h.float() @ v, 100, dtype=torch.float32)
    assert again == one
    zero = operator_extremes(lambda v: 0.0 * v, 100)
    assert (zero.lambda_max, zero.lambda_min) == (0.0, 0.0)


def test_several_tensors_and_only_those_that_need_gradients():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    a = gaussian(90, 80, seed=3)
    found = operator_extremes(lambda v, s, a: s * gram_product(v, a), 80, [scale, a])
    (grad,) = torch.autograd.grad(found.lambda_max, scale)
    torch.testing.assert_close(2.0 * grad, found.lambda_max.detach())


def test_second_derivatives_and_forward_mode_are_refused():
    a = gaussian(9, 8, seed=4).requires_grad_()
    found = operator_extremes(gram_product, 8, [a])
    (grad,) = torch.autograd.grad(found.lambda_max, a, create_graph=True)
    with pytest.raises(NotImplementedError, match="operator_extremes: second derivatives"):
        torch.autograd.grad(grad.square().sum() + a.sum(), a)
    with pytest.raises(NotImplementedError, match="operator_extremes: forward-mode"):
        torch.func.jvp(
            lambda x: operator_extremes(gram_product, 8, [x]).lambda_max,
            (a.detach(),),
            (a.detach(),),
        )


def test_what_did_not_converge_says_so():
    values = np.concatenate([[0.0], 1e-9 * np.arange(1, 300) ** 2])
    h = of_spectrum(np.concatenate([values, [1.0]]))
    with pytest.raises(NotConvergedError, match="operator_extremes: residuals must fall") as caught:
        operator_extremes(lambda v: h @ v, 301, restarts=1, rtol=1e-15)
    assert caught.value.products > 30


@pytest.mark.parametrize(
    ("product", "options", "message"),
    [
        (lambda v: v[:-1], {}, "product must return a tensor of shape"),
        (lambda v: 3.0, {}, "product must return a tensor of shape .* got float"),
        (lambda v: v / 0.0, {}, "product must be finite"),
        (lambda v: v.cumsum(0), {}, "product must be that of a symmetric operator"),
        (lambda v: v, {"rtol": 0.0}, "rtol must be in"),
        (lambda v: v, {"restarts": 0}, "restarts must be at least 1"),
        (lambda v: v, {"dtype": torch.float16}, "dtype must be float32 or float64"),
    ],
)
@pytest.mark.parametrize("side", [6, 100])
def test_bad_arguments_are_named(product, options, message, side):
    with pytest.raises(ValueError, match=f"^operator_extremes: .*{message}"):
        operator_extremes(product, side, **options)
