"""Extremes of K = x^T x and |K|_F^2 without K: values, derivatives, transforms, refusals.

lambda = sigma(x)^2, so the tests compare square roots with singular values: the promise is the
accuracy of sigma, not the one that is left in a Gram matrix.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import (
    ONE_VALUE,
    SIMPLE_MATRICES,
    SpectralContract,
    bad_matrices,
    bad_policies,
)
from sample_inputs import (
    EPS,
    EPS32,
    diagonal,
    fewer_examples,
    gaussian,
    half_examples,
    symmetric_clusters,
    taking_route,
    with_spectrum,
)
from spectrum_bounds import assert_within, gradient_rtol, value_rounding
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.ops import fallback as composite
from immunize_ext.ops import gram_extremes
from immunize_ext.testing import strategies


class TestContract(SpectralContract):
    function = staticmethod(gram_extremes)
    argument = "x"
    smooth = {**SIMPLE_MATRICES, **ONE_VALUE}
    degenerate = {"rank one": (torch.ones(3, 4).double(),)}
    node = "Values"
    which = ("max", "min", "squared_frobenius")
    degree = (2, 2, 4)
    second_rtol = 1e-11
    routes_rtol = 1e-12
    independent_routes = ("kernel",)  # the composite decides once for a whole batch
    refusals = bad_matrices("x", *bad_policies(torch.eye(2)))

    def composition(self, x):
        """What published code does: form K, eigvalsh, autograd."""
        k = x.mT @ x
        eigenvalues = torch.linalg.eigvalsh(k)
        smallest = eigenvalues[..., -min(x.shape[-2:])]
        return eigenvalues[..., -1], smallest, k.square().sum((-2, -1))

    def kinked_outputs(self):
        return 0, 1  # |K|_F^2 is smooth everywhere

    def test_batch_independence_of_any_scale(self):
        """Times 2^200, |K|_F^2 is out of range and the eigenvalues are not."""
        for inputs in self.batches():
            outcome = testing.check_batch_independence(
                lambda x: gram_extremes(x)[:2], inputs, poisons=("huge", "tiny")
            )
            assert outcome == {"huge": "independent", "tiny": "independent"}

    def test_determinism_of_features_longer_than_a_block(self, route, threads):
        features = gaussian(30, 100, dtype=torch.float32)
        testing.check_determinism(self.outputs, [features])


def gradients_of(x: Tensor, **policy) -> list[Tensor]:
    """Gradients of lambda_max, lambda_min and |K|_F^2, each on its own graph."""
    found = []
    for which in range(3):
        leaf = x.detach().clone().requires_grad_()
        value = gram_extremes(leaf, **policy)[which]
        found.append(torch.autograd.grad(value.sum(), leaf)[0])
    return found


def sigma_bound(route: str, x: Tensor, sigma_max) -> Tensor:
    """Rounding of one singular value; the composite goes through K up to a stated kappa.

    There an eigenvalue has the error eps lambda_max, and its root eps sigma_max kappa / 2.
    """
    bound = value_rounding(x, sigma_max)
    if route == "composite":
        bound = bound + composite.GRAM_SAFE_CONDITION * EPS * torch.as_tensor(sigma_max)
    return bound


# --- values ---------------------------------------------------------------------------------------


@half_examples
@given(sample=strategies.matrices(layouts=("contiguous",)))
def test_values_are_squares_of_the_chosen_ones(route, sample):
    """Where sigma^4 is out of range, |K|_F^2 is infinite or zero and the eigenvalues stay."""
    found = gram_extremes(sample.matrix, rank_rtol=1e-7)
    bound = sample.value_bound + sigma_bound(route, sample.matrix, sample.sigma_max)
    assert_within(found.lambda_max.sqrt(), sample.sigma_max, bound)
    assert_within(found.lambda_min.sqrt(), sample.sigma_min, bound)
    assert torch.equal(found.rank, sample.rank)
    truth = sample.singular_values.pow(4).sum(-1)
    if bool((truth > 1e-300).all()) and bool(torch.isfinite(truth).all()):
        assert_within(found.squared_frobenius / truth, 1.0, 1e-13)


@half_examples
@given(sample=strategies.ill_conditioned(max_side=9, min_kappa=1e2, max_kappa=1e12))
def test_smallest_eigenvalue_keeps_the_digits_of_x(route, sample):
    """K has kappa up to 1e24 here: formed in float64 it would hold nothing of lambda_min."""
    found = gram_extremes(sample.matrix)
    truth = reference.gram_extremes(sample.matrix.numpy())
    bound = sigma_bound(route, sample.matrix, sample.sigma_max)
    assert_within(found.lambda_min.sqrt(), np.sqrt(truth.lambda_min), bound)
    assert_within(found.lambda_max.sqrt(), np.sqrt(truth.lambda_max), bound)
    assert found.rank == truth.rank == min(sample.matrix.shape)


def test_float32_features_are_accumulated_in_float64(route):
    """A float32 Gram matrix of kappa(x) = 1e5 has a negative eigenvalue; here kappa is right."""
    x = with_spectrum(list(np.logspace(0, -5, 10)), 50, 10).float()
    found = gram_extremes(x)
    truth = reference.gram_extremes(x.numpy())
    assert found.lambda_min.dtype == torch.float32
    np.testing.assert_allclose(found.lambda_min.numpy(), truth.lambda_min, rtol=1e-6)
    np.testing.assert_allclose((found.lambda_max / found.lambda_min).sqrt().item(), 1e5, rtol=0.01)


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_eigenvalues_are_never_negative(route, rank):
    """100 features of 10 samples in float32: 90 eigenvalues are zero but for rounding."""
    x = gaussian(10, 100, dtype=torch.float32)
    found = gram_extremes(x, rank=rank)
    truth = reference.gram_extremes(x.numpy(), rank=rank)
    np.testing.assert_allclose(found.lambda_min.numpy(), truth.lambda_min, rtol=1e-6)
    assert (found.lambda_min == 0) == (rank == "full")
    assert found.rank == 10


@half_examples
@given(sample=strategies.badly_scaled(max_kappa=100.0), exponent=st.integers(-20, 20))
def test_scale_is_carried_exactly(route, sample, exponent):
    found = gram_extremes(sample.matrix)
    scaled = gram_extremes(sample.matrix * 2.0**exponent)
    assert torch.equal(scaled.lambda_max, found.lambda_max * 4.0**exponent)
    assert torch.equal(scaled.lambda_min, found.lambda_min * 4.0**exponent)
    assert torch.equal(scaled.rank, found.rank)
    top = sample.sigma_max.reshape(())
    if 1e-70 < top < 1e70:
        assert torch.equal(scaled.squared_frobenius, found.squared_frobenius * 16.0**exponent)


@pytest.mark.parametrize(
    ("n", "p"), [(1, 1), (1, 7), (7, 1), (2, 2), (3, 40), (40, 3), (33, 32), (64, 150), (150, 64)]
)
def test_shapes(route, n, p):
    x = gaussian(n, p, seed=n + p)
    found = gram_extremes(x)
    truth = reference.gram_extremes(x.numpy())
    bound = sigma_bound(route, x, np.sqrt(truth.lambda_max))
    assert_within(found.lambda_max.sqrt(), np.sqrt(truth.lambda_max), bound)
    assert_within(found.lambda_min.sqrt(), np.sqrt(truth.lambda_min), bound)
    assert_within(found.squared_frobenius / truth.squared_frobenius, 1.0, 1e-13)
    assert [value.item() for value in found[3:]] == [value.item() for value in truth[3:]]


@pytest.mark.parametrize(
    ("x", "rank", "expected"),
    [
        # lambda_max, lambda_min, |K|_F^2, rank, multiplicity_max, multiplicity_min
        (symmetric_clusters(), "numerical", (9, 1, 180, 5, 2, 2)),
        (diagonal(3, 2), "full", (9, 4, 97, 2, 1, 1)),
        (diagonal(3, 2)[:, :1], "full", (9, 9, 81, 1, 1, 1)),
        (diagonal(3, 2, 0)[:2], "numerical", (9, 4, 97, 2, 1, 1)),
        (diagonal(3, 2, 0)[:2], "full", (9, 0, 97, 2, 1, 1)),
        (torch.ones(1, 4).double(), "full", (4, 0, 16, 1, 1, 3)),
        (torch.ones(4, 4).double(), "numerical", (16, 16, 256, 1, 1, 1)),
        (torch.zeros(2, 3).double(), "numerical", (0, 0, 0, 0, 3, 3)),
        (torch.zeros(3, 2).double(), "full", (0, 0, 0, 0, 2, 2)),
        # Tolerances are in units of sigma(x): 1e-10 counts, although its square does not in K.
        (diagonal(1, 1e-10), "full", (1, 1e-20, 1, 2, 1, 1)),
    ],
)
def test_rank_policies_and_multiplicities(route, x, rank, expected):
    found = gram_extremes(x, rank=rank)
    for value, right in zip(found[:3], expected[:3], strict=True):
        assert_within(value, right, 8 * EPS * right)
    assert [value.item() for value in found[3:]] == list(expected[3:])
    truth = reference.gram_extremes(x.numpy(), rank=rank)
    assert [value.item() for value in truth[3:]] == list(expected[3:])


# --- gradients ------------------------------------------------------------------------------------


@half_examples
@given(sample=strategies.well_conditioned(batch=None, max_side=7, max_kappa=30.0))
def test_gradient_equals_the_closed_form(route, sample):
    x = sample.matrix
    grads = gradients_of(x)
    if x.numel() == 0:
        assert all(grad.shape == x.shape for grad in grads)
        return
    gap = float(sample.gap.min())
    # Through K the gap is one of squares: smaller by 2 sigma_min / sigma_max at worst.
    rtol = gradient_rtol(x, gap if route == "kernel" else gap / 30)
    largest = 2 * sample.sigma_max[..., None, None] * sample.gradient_of("max")
    smallest = 2 * sample.sigma_min[..., None, None] * sample.gradient_of("min")
    testing.assert_gradients_close(grads[0], largest, rtol=rtol)
    testing.assert_gradients_close(grads[1], smallest, rtol=rtol)
    testing.assert_gradients_close(grads[2], 4 * x @ x.mT @ x, rtol=1e-12)


@half_examples
@given(sample=strategies.ill_conditioned(max_side=6, min_kappa=1e5, max_kappa=1e11))
def test_gradient_of_the_smallest_eigenvalue_at_high_kappa(route, sample):
    """2 sigma_min u v^T: the pair is well separated, its size is known to eps kappa."""
    x = sample.matrix
    _, smallest, _ = gradients_of(x)
    truth = reference.gram_extremes_gradient(x.numpy()).lambda_min
    kappa = float(sample.kappa)
    testing.assert_gradients_close(
        smallest, torch.from_numpy(truth), rtol=100 * max(x.shape) * EPS * kappa
    )


@fewer_examples
@given(sample=strategies.near_multiple(exact=True, max_side=7))
def test_clusters_get_the_mean(route, sample):
    grads = gradients_of(sample.matrix, cluster_rtol=1e-9)
    for grad, which, sigma in (
        (grads[0], "max", sample.sigma_max),
        (grads[1], "min", sample.sigma_min),
    ):
        truth = 2 * sigma[..., None, None] * sample.gradient_of(which)
        testing.assert_gradients_close(grad, truth, rtol=1e-11)


@fewer_examples
@given(sample=strategies.matrices(max_side=6, layouts=("contiguous",)))
def test_euler_identities(route, sample):
    """Degree 2 for both eigenvalues; degree 4 for |K|_F^2, where its range allows."""
    testing.check_euler_identity(lambda x: gram_extremes(x)[:2], [sample.matrix], 2)
    if bool(((sample.sigma_max > 1e-70) & (sample.sigma_max < 1e70)).all()):
        testing.check_euler_identity(
            lambda x: gram_extremes(x).squared_frobenius, [sample.matrix], 4
        )


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_degenerate_features_have_finite_gradients(route, rank):
    """Zero, constant (all rows equal) and fewer samples than features."""
    assert not torch.stack(gradients_of(torch.zeros(3, 4).double(), rank=rank)).any()
    constant = gaussian(1, 6).expand(8, 6).contiguous()
    found = gram_extremes(constant, rank=rank)
    grads = gradients_of(constant, rank=rank)
    few = gradients_of(gaussian(2, 5), rank=rank)
    assert found.rank == 1
    assert all(torch.isfinite(grad).all() for grad in (*grads, *few))
    if rank == "full":
        assert not grads[1].any()
        assert not few[1].any()


def test_second_derivative_of_the_norm_does_not_mind_clusters():
    testing.check_double_backward(
        lambda x: gram_extremes(x).squared_frobenius, [symmetric_clusters()]
    )


def test_forward_mode_at_a_cluster_is_refused():
    x = symmetric_clusters()
    with pytest.raises(NotImplementedError, match="repeated"):
        torch.func.jvp(lambda x: gram_extremes(x).lambda_max, (x,), (x,))


# --- memory, determinism, independence ------------------------------------------------------------


def test_composite_batch_does_not_depend_on_an_ill_conditioned_element():
    """Its switch to the singular values of x is one for the whole batch: equal up to rounding."""
    good, bad = gaussian(3, 3, seed=1), diagonal(1.0, 1e-3, 1e-9)
    with taking_route("composite"):
        alone = gram_extremes(good)
        both = gram_extremes(torch.stack([good, bad]))
    assert_within(both.lambda_min[0], alone.lambda_min, 1e-12 * alone.lambda_max)


# --- refusals -------------------------------------------------------------------------------------


def test_float32_overflow_of_the_norm_is_infinite_as_documented():
    found = gram_extremes(diagonal(1e15, 1e14).float())
    assert torch.isinf(found.squared_frobenius)
    assert_within(found.lambda_max / 1e30, 1.0, EPS32)
