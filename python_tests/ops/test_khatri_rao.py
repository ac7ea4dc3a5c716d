"""The kernel of per-sample gradients: values, derivatives, transforms, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operator_contract import OperatorContract, Refusal
from sample_inputs import gaussian
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.ops import (
    kfac_extremes,
    khatri_rao_fallback,
    khatri_rao_gram,
    log_condition_number,
)


def layer(*batch: int, n: int = 4, t: int = 2, d: int = 3, o: int = 5, seed: int = 1):
    return gaussian(*batch, n, t, d, seed=seed), gaussian(*batch, n, t, o, seed=seed + 1)


def gram(a: Tensor, g: Tensor | None = None):
    """One argument is enough to be refused for it."""
    return khatri_rao_gram(a, a if g is None else g, bias=True)


class TestContract(OperatorContract):
    function = staticmethod(gram)
    name = "khatri_rao_gram"
    argument = "activations"
    smooth = {
        "pairs": layer(),
        "outer products": layer(n=3, t=4, d=2, o=2),
        "one token": layer(n=5, t=1),
        "batch": layer(2, 3, n=2),
        "one sample": layer(n=1, t=1, d=1, o=1),
    }
    degenerate = {"zero": (torch.zeros(2, 2, 3).double(), gaussian(2, 2, 2))}
    node = "_KhatriRao"
    large = layer(2, n=61, t=3, d=30, o=20)
    poisons = {"zero": "independent", "rank_one": "independent", "nan": "raised"}
    refusals = [
        Refusal((torch.zeros(3),), "activations must have shape"),
        Refusal((torch.zeros(0, 3),), "activations must have shape"),
        Refusal((torch.zeros(2, 2, dtype=torch.int64),), "activations must .*floating-point"),
        Refusal((torch.zeros(2, 3), torch.zeros(3, 3)), "gradients must have the samples"),
        Refusal((torch.zeros(2, 2, 3), torch.zeros(2, 3, 3)), "gradients must have the samples"),
        Refusal((torch.full((2, 2), 1e200, dtype=torch.float64),), "must have products below"),
        Refusal((torch.ones(2, 2), torch.full((2, 2), torch.inf)), "gradients must be finite"),
    ]
    # Products are differentiable to every order, and in both inputs at once: tests below.
    test_third_derivative_is_refused = None
    test_second_derivative_is_refused_at_kinks = None
    test_second_derivative_equals_the_reference = None
    test_jacobian_and_hessian = None

    def sample(self, *batch, seed=1, dtype=torch.float64):
        return tuple(x.to(dtype) for x in layer(*batch, seed=seed))

    def truth(self, a, g):
        return (reference.khatri_rao_gram(a.numpy(), g.numpy(), bias=True),)

    def true_gradients(self, inputs, cotangents):
        a, g = (x.numpy() for x in inputs)
        return reference.khatri_rao_gram_gradient(a, g, cotangents[0].numpy(), bias=True)

    def composition(self, a, g):
        a = torch.nn.functional.pad(a, (0, 1), value=1.0)
        j = torch.einsum("...ntd,...nto->...ndo", a, g)
        return (torch.einsum("...ido,...jdo->...ij", j, j),)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n", "t", "d", "o"),
    [
        (11, 1, 130, 3),  # depths beyond one block, panels not full
        (24, 1, 24, 25),
        (25, 5, 40, 33),  # by pairs, tokens across panels
        (13, 7, 30, 200),
        (14, 40, 9, 70),  # by outer products
        (97, 3, 5, 2),
        (100, 2, 200, 150),
        (3, 60, 13, 1),
    ],
)
def test_sides(route, n, t, d, o, bias):
    """Values and gradients, each alone too, where blocks end."""
    a, g = layer(n=n, t=t, d=d, o=o, seed=n)
    truth = reference.khatri_rao_gram(a.numpy(), g.numpy(), bias)
    found = khatri_rao_gram(a, g, bias=bias)
    np.testing.assert_allclose(found.numpy(), truth, rtol=1e-11, atol=1e-11 * truth.max())
    assert torch.equal(found, found.mT)
    weights = gaussian(n, n, seed=3)
    right = reference.khatri_rao_gram_gradient(a.numpy(), g.numpy(), weights.numpy(), bias)
    leaves = [a.requires_grad_(), g.requires_grad_()]
    both = torch.autograd.grad(khatri_rao_gram(*leaves, bias=bias), leaves, weights)
    for k, (grad, true) in enumerate(zip(both, right, strict=True)):
        testing.assert_gradients_close(grad, torch.from_numpy(true), rtol=1e-11)
        inputs = [x if k == which else x.detach() for which, x in enumerate(leaves)]
        (alone,) = torch.autograd.grad(khatri_rao_gram(*inputs, bias=bias), leaves[k], weights)
        assert torch.equal(alone, grad)


def test_layers_add_up_and_matrices_are_samples_of_one_token(route):
    a, g = gaussian(6, 4, seed=1), gaussian(6, 3, seed=2)
    b, h = layer(n=6, seed=3)
    one = khatri_rao_gram(a, g, bias=True)
    assert torch.equal(one, khatri_rao_gram(a[:, None], g[:, None], bias=True))
    found = khatri_rao_gram([a, b], [g, h], bias=[True, False])
    torch.testing.assert_close(found, one + khatri_rao_gram(b, h))
    # A bias is the weight of a number that is always 1, and tokens of zeros are none.
    ones = torch.cat([a, torch.ones(6, 1).double()], dim=1)
    torch.testing.assert_close(one, khatri_rao_gram(ones, g))
    padded = [torch.cat([x, torch.zeros_like(x)], dim=1) for x in (b, h)]
    torch.testing.assert_close(khatri_rao_gram(b, h), khatri_rao_gram(*padded))


def test_known_values(route):
    """Orthonormal activations: K is diagonal, with squared norms of what comes back."""
    g = gaussian(5, 3, seed=4)
    found = khatri_rao_gram(torch.eye(5).double(), g)
    torch.testing.assert_close(found, g.square().sum(1).diag())
    # All samples alike: every entry is the squared norm of the one gradient.
    a, g = (x[:1].expand(4, -1, -1) for x in layer(seed=5))
    size = (a[0].mT @ g[0]).square().sum()
    torch.testing.assert_close(khatri_rao_gram(a, g), size.expand(4, 4))


def test_numbers_of_layers_are_named():
    a, g = layer()
    with pytest.raises(ValueError, match=r"khatri_rao_gram: .* one entry a layer, got 2, 1 and 2"):
        khatri_rao_gram([a, a], [g])
    with pytest.raises(ValueError, match="must have the same samples in every layer"):
        khatri_rao_gram([a, a[:3]], [g, g[:3]])


@pytest.mark.parametrize("t", [1, 4])
def test_derivatives_of_every_order_and_direction(route, t):
    """Third derivatives by finite differences of the second; the Hessian by both modes."""
    a, g = layer(n=2, t=t, d=2, o=2)

    def scalar(a: Tensor, g: Tensor) -> Tensor:
        return khatri_rao_gram(a, g, bias=True).sin().sum()

    def slope(*inputs: Tensor) -> Tensor:
        return torch.stack([x.square().sum() for x in torch.func.grad(scalar, (0, 1))(*inputs)])

    leaves = [x.clone().requires_grad_() for x in (a, g)]
    assert torch.autograd.gradgradcheck(slope, leaves, fast_mode=True)
    forward = torch.func.jacfwd(torch.func.jacfwd(scalar, (0, 1)), (0, 1))(a, g)
    reverse = torch.func.hessian(scalar, (0, 1))(a, g)
    for rows, others in zip(forward, reverse, strict=True):
        for found, right in zip(rows, others, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)


def test_log_kappa_of_the_kernel_as_a_loss(route):
    a, g = layer(n=3, t=2, d=4, o=3)
    leaves = [a.requires_grad_(), g.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: log_condition_number(khatri_rao_gram(*x)), leaves)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e200])
@pytest.mark.parametrize("t", [1, 4])
def test_what_is_not_finite_is_refused_in_forward_mode_too(route, t, number):
    a, g = layer(n=3, t=t, d=2, o=2)
    a[1, 0, 1] = number
    words = "products below" if number == 1e200 else "activations must be finite"
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(ValueError, match=rf"khatri_rao_gram: .*{words}"):
            transform(khatri_rao_gram)(a, g)


def test_what_overflows_its_dtype_is_refused(route):
    a = torch.full((2, 3), 1e12)
    with pytest.raises(ValueError, match=r"must have products within torch\.float32"):
        khatri_rao_gram(a, a)
    assert khatri_rao_gram(a.double(), a.double()).isfinite().all()
    with pytest.raises(ValueError, match=r"kfac_extremes: .* products within torch\.float32"):
        kfac_extremes(a, a)


@pytest.mark.parametrize("t", [2, 40])
def test_blocks_count_the_whole_batch(monkeypatch, t):
    """No block has more numbers than it may, unless one row or column has."""
    a, g = layer(6, n=4, t=t, d=5, o=4)
    whole = khatri_rao_fallback.composed_gram(a, g, False)
    weights = gaussian(6, 4, 4, seed=3)
    gradients = khatri_rao_fallback.composed_gradient(weights, a, g, False, True, True)
    least = 6 * 4 * (t * t if t == 2 else 4)
    monkeypatch.setattr(khatri_rao_fallback, "_MOST_NUMBERS", 2 * least)
    sizes = []
    blocks = khatri_rao_fallback._blocks

    def counted(side, numbers):
        found = blocks(side, numbers)
        sizes.append((numbers, len(range(side)[found[0]])))
        return found

    monkeypatch.setattr(khatri_rao_fallback, "_blocks", counted)
    torch.testing.assert_close(khatri_rao_fallback.composed_gram(a, g, False), whole)
    again = khatri_rao_fallback.composed_gradient(weights, a, g, False, True, True)
    torch.testing.assert_close(again, gradients)
    assert sizes == [(least, 2)] * 2


# --- K-FAC ----------------------------------------------------------------------------------------


def kronecker(a: Tensor, g: Tensor) -> Tensor:
    n = a.shape[-2]
    return torch.kron(a.mT @ a / n, g.mT @ g / n)


def test_kfac_extremes_are_those_of_the_kronecker_product(route):
    a, g = gaussian(9, 4, seed=6), gaussian(9, 3, seed=7)
    found = kfac_extremes(a, g)
    values = torch.linalg.eigvalsh(kronecker(a, g))
    torch.testing.assert_close(found.lambda_max, values[-1])
    torch.testing.assert_close(found.lambda_min, values[0])
    assert found.rank == 12
    leaves = [a.requires_grad_(), g.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: kfac_extremes(*x)[:2], leaves)


def test_kfac_gradient_at_repeated_values_is_the_mean_over_the_eigenspace(route):
    a = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
    g = torch.diag(torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64)).requires_grad_()
    found = torch.autograd.grad(kfac_extremes(a, g).lambda_max, (a, g))
    # lambda = (a_1^2 / 3) (g_1^2 / 3), each factor's top twice: half of the derivative to each.
    right = [
        torch.diag(torch.tensor(entries, dtype=torch.float64))
        for entries in ([2.0, 2.0, 0.0], [4.0 / 3.0, 4.0 / 3.0, 0.0])
    ]
    for grad, true in zip(found, right, strict=True):
        torch.testing.assert_close(grad, true)


def test_kfac_factors_need_not_fit_the_dtype(route):
    """Gradients of 1e20 have squares beyond float32, activations of 1e-20 none above zero."""
    a, g = gaussian(9, 4, seed=6), gaussian(9, 3, seed=7)
    right = kfac_extremes(a, g)
    found = kfac_extremes((1e-20 * a).float(), (1e20 * g).float())
    assert found.lambda_max.dtype == torch.float32
    torch.testing.assert_close(found[:2], tuple(x.float() for x in right[:2]), rtol=1e-5, atol=0)
    assert found.rank == right.rank
    # What float32 cannot tell from zero does not count, in float64 either.
    thin = torch.cat([a[:, :3], a[:, :3].sum(1, keepdim=True)], dim=1).float()
    assert kfac_extremes(thin, g.float()).rank == 9


def test_kfac_refusals():
    with pytest.raises(ValueError, match="kfac_extremes: gradients must be finite"):
        kfac_extremes(torch.ones(2, 2), torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="kfac_extremes: gradients must have the samples"):
        kfac_extremes(torch.ones(3, 2), torch.ones(2, 2))
