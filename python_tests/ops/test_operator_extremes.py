"""Extremes of operators that are known by their products."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from sample_inputs import gaussian
from scipy.sparse.linalg import ArpackError, eigsh

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


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("side", [65, 200])
def test_a_multiple_of_the_identity(sign, side):
    """Nothing is left of it once it is shifted by its own size; all of it is one cluster."""
    a = torch.tensor(3.0 * sign, dtype=torch.float64, requires_grad=True)
    found = operator_extremes(lambda v, a: a * v, side, [a])
    assert [x.item() for x in found[:2]] == pytest.approx([3.0 * sign] * 2, rel=1e-12)
    assert found[2:] == (side, side)
    for value in found[:2]:
        (grad,) = torch.autograd.grad(value, a, retain_graph=True)
        assert grad.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "values",
    [
        np.repeat([0.0, 1.0], [50, 50]),
        np.repeat([1.0, 3.0], [50, 50]),
        np.concatenate([np.zeros(295), np.arange(1.0, 6.0)]),
        np.repeat([-2.0, 1.0, 3.0], [7, 80, 13]),
    ],
    ids=["projector", "two values", "rank 5", "below the limit"],
)
def test_large_clusters(values):
    side = len(values)
    h = of_spectrum(values, seed=9).requires_grad_()
    calls = 0

    def product(v, h):
        nonlocal calls
        calls += 1
        return h @ v

    found, truth = operator_extremes(product, side, [h]), symmetric_extremes(h)
    assert calls < 2500
    assert found[2:] == truth[2:]
    for got, right in zip(found[:2], truth[:2], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(got, h, retain_graph=True)
        (true,) = torch.autograd.grad(right, h, retain_graph=True)
        torch.testing.assert_close(grad, true, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_null_space_too_large_is_refused_by_name_and_its_value_given(scale):
    """At the end that is asked for; the other one is as it always is."""
    side = 520
    a = (scale * gaussian(5, side, seed=5)).requires_grad_()
    found = operator_extremes(gram_product, side, [a])
    assert abs(found.lambda_min.item()) < 1e-9
    assert found.multiplicity_min == 17
    with pytest.raises(NotImplementedError, match="more than 16 eigenvalues equal it, above side"):
        torch.autograd.grad(found.lambda_min, a, retain_graph=True)
    if scale:
        (grad,) = torch.autograd.grad(found.lambda_max, a)
        (true,) = torch.autograd.grad(symmetric_extremes(a @ a.mT).lambda_max, a)
        torch.testing.assert_close(grad, true, rtol=1e-6, atol=1e-8)


def test_gradients_of_clusters_are_the_same_twice(monkeypatch):
    """Of three different values, where Lanczos' method ends early and draws where to go on."""
    h = of_spectrum(np.repeat([-2.0, 1.0, 3.0], [7, 80, 13]), seed=6).requires_grad_()
    drawn = []

    def watched(*args, **options):
        drawn.append(options.get("rng"))
        return eigsh(*args, **options)

    monkeypatch.setattr("scipy.sparse.linalg.eigsh", watched)
    grads = []
    for _ in range(2):
        found = operator_extremes(lambda v, h: h @ v, 100, [h])
        grads.append(torch.autograd.grad(found.lambda_max - found.lambda_min, h)[0])
    assert torch.equal(*grads)
    if "rng" in inspect.signature(eigsh).parameters:  # else ARPACK draws from a state of its own
        assert {type(rng) for rng in drawn} == {np.random.Generator}


@pytest.mark.parametrize("side", [8, 70])
def test_products_of_a_hessian(side):
    """The product is a derivative itself, and its own derivative that of third order."""
    w = gaussian(side, 1, seed=7)[:, 0]
    x = gaussian(3 * side, side, seed=8) / side**0.5

    def loss(w):
        return torch.nn.functional.softplus(x @ w).sum()

    def product(v, w):
        (grad,) = torch.autograd.grad(loss(w), w, create_graph=True)
        (found,) = torch.autograd.grad(grad @ v, w, create_graph=True)
        return found

    def without_graph(v, w):
        (grad,) = torch.autograd.grad(loss(w), w, create_graph=True)
        return torch.autograd.grad(grad @ v, w)[0]

    leaf = w.clone().requires_grad_()
    truth = symmetric_extremes(torch.autograd.functional.hessian(loss, leaf, create_graph=True))
    found = operator_extremes(product, side, [leaf])
    for got, right in zip(found[:2], truth[:2], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)
        (grad,) = torch.autograd.grad(got, leaf, retain_graph=True)
        (true,) = torch.autograd.grad(right, leaf, retain_graph=True)
        torch.testing.assert_close(grad, true, rtol=1e-5, atol=1e-8)
    with torch.no_grad():
        assert operator_extremes(without_graph, side, [w])[:2] == found[:2]
    once = operator_extremes(without_graph, side, [leaf]).lambda_max
    with pytest.raises(ValueError, match=r"product must be differentiable .* create_graph=True"):
        torch.autograd.grad(once, leaf)


@pytest.mark.parametrize("factor", [2.0, 0.0])
def test_second_derivatives_by_what_comes_in_and_by_other_tensors_are_refused(factor):
    a, b = (gaussian(9, 8, seed=k).requires_grad_() for k in (4, 5))
    c = torch.tensor(factor, dtype=torch.float64, requires_grad=True)
    found = operator_extremes(lambda v, a, b: gram_product(v, a) + gram_product(v, b), 8, [a, b])
    (grad,) = torch.autograd.grad(c * found.lambda_max, a, create_graph=True)
    for cause in (c, b):
        with pytest.raises(NotImplementedError, match="operator_extremes: second derivatives"):
            torch.autograd.grad(grad.sum(), cause, retain_graph=True)


def test_an_error_of_arpack_is_one_of_ours(monkeypatch):
    def failing(*args, **options):
        raise ArpackError(-9)

    monkeypatch.setattr("scipy.sparse.linalg.eigsh", failing)
    with pytest.raises(NotConvergedError, match="operator_extremes: residuals must fall") as caught:
        operator_extremes(lambda v: 2.0 * v, 100)
    assert isinstance(caught.value.__cause__, ArpackError)


def test_a_pair_that_is_none_is_searched_for_again(monkeypatch):
    """Once is not yet a failure, three times are one."""
    h = of_spectrum(np.linspace(1.0, 3.0, 100))
    wrong = 0

    def spoiling(*args, **options):
        nonlocal wrong
        values, vectors = eigsh(*args, **options)
        if options["which"] != "LM" and wrong > 0:
            wrong -= 1
            vectors = np.roll(vectors, 1, axis=0)
        return values, vectors

    monkeypatch.setattr("scipy.sparse.linalg.eigsh", spoiling)
    wrong = 2
    found = operator_extremes(lambda v: h @ v, 100)
    assert [x.item() for x in found[:2]] == pytest.approx([3.0, 1.0], rel=1e-12)
    wrong = 3
    with pytest.raises(NotConvergedError, match="operator_extremes: residuals must fall"):
        operator_extremes(lambda v: h @ v, 100)
