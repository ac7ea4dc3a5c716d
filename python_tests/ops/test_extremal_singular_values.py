"""Largest and smallest singular value: values, derivatives, transforms, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
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
    with_spectrum,
)
from spectrum_bounds import assert_within, gradient_rtol, value_rounding
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.ops import SingularExtremes, extremal_singular_values
from immunize_ext.testing import strategies


def extremes(a: Tensor) -> tuple[Tensor, Tensor]:
    found = extremal_singular_values(a)
    return found.sigma_max, found.sigma_min


class TestContract(SpectralContract):
    function = staticmethod(extremal_singular_values)
    smooth = {**SIMPLE_MATRICES, **ONE_VALUE}
    degenerate = {"rank one": (torch.ones(3, 4).double(),)}
    node = "Values"
    which = ("max", "min")
    degree = 1
    gradient_rtol = routes_rtol = 1e-13
    poisons = {
        **dict.fromkeys(("zero", "rank_one", "huge", "tiny"), "independent"),
        "nan": "raised",
    }
    refusals = bad_matrices("a", *bad_policies(torch.eye(2)))

    def composition(self, a):
        sigma = torch.linalg.svdvals(a)
        return sigma[..., 0], sigma[..., -1]


def gradients_of(a: Tensor, **policy) -> tuple[Tensor, Tensor]:
    """Gradients of sigma_max and of sigma_min, each on its own graph."""
    found = []
    for which in (0, 1):
        leaf = a.detach().clone().requires_grad_()
        value = extremal_singular_values(leaf, **policy)[which]
        found.append(torch.autograd.grad(value.sum(), leaf)[0])
    return found[0], found[1]


def assert_equals_reference(a: Tensor, found: SingularExtremes, **policy) -> None:
    """Values and ranks of the reference on the same numbers."""
    default = max(a.shape[-2:]) * (EPS if a.dtype == torch.float64 else EPS32)
    policy.setdefault("rank_rtol", default)
    truth = reference.extremal_singular_values(a.double().numpy(), **policy)
    bound = value_rounding(a, truth.sigma_max)
    assert_within(found.sigma_max, truth.sigma_max, bound)
    assert_within(found.sigma_min, truth.sigma_min, bound)
    assert found.rank.tolist() == truth.rank.tolist()


# --- values ---------------------------------------------------------------------------------------


@half_examples
@given(sample=strategies.matrices(layouts=("contiguous",)))
def test_values_are_the_chosen_ones(route, sample):
    found = extremal_singular_values(sample.matrix, rank_rtol=1e-9)
    bound = sample.value_bound + value_rounding(sample.matrix, sample.sigma_max)
    assert_within(found.sigma_max, sample.sigma_max, bound)
    assert_within(found.sigma_min, sample.sigma_min, bound)
    assert torch.equal(found.rank, sample.rank)


@half_examples
@given(sample=strategies.ill_conditioned(max_side=9, max_kappa=1e12))
def test_smallest_value_keeps_its_digits_up_to_kappa_1e12(route, sample):
    found = extremal_singular_values(sample.matrix)
    assert_equals_reference(sample.matrix, found)
    # The chosen sigma_min itself moved by the rounding of the matrix, value_bound of it.
    bound = sample.value_bound + value_rounding(sample.matrix, sample.sigma_max)
    assert_within(found.sigma_min, sample.sigma_min, bound)


@half_examples
@given(
    sample=strategies.ill_conditioned(dtype=torch.float32, max_side=6, min_kappa=1e2, max_kappa=1e5)
)
def test_float32_input_is_decomposed_in_float64(route, sample):
    """Up to the rank tolerance of float32, sigma_min is right to the last float32 digit."""
    found = extremal_singular_values(sample.matrix)
    truth = reference.extremal_singular_values(sample.matrix.double().numpy())
    assert found.sigma_min.dtype == torch.float32
    # 12 kappa eps64 is below 1e-9 here; what is left is the cast.
    np.testing.assert_allclose(found.sigma_min.numpy(), truth.sigma_min, rtol=2 * EPS32)
    np.testing.assert_allclose(found.sigma_max.numpy(), truth.sigma_max, rtol=2 * EPS32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@half_examples
@given(data=st.data())
def test_scale_is_carried_exactly(route, dtype, data):
    """1e-150 .. 1e150 in float64, 1e-18 .. 1e18 in float32: a power of two scales every output."""
    sample = data.draw(strategies.badly_scaled(dtype=dtype, max_kappa=10.0))
    exponent = data.draw(st.integers(-20, 20))
    found = extremal_singular_values(sample.matrix)
    scaled = extremal_singular_values(sample.matrix * 2.0**exponent)
    assert_equals_reference(sample.matrix, found)
    assert torch.equal(scaled.sigma_max, found.sigma_max * 2.0**exponent)
    assert torch.equal(scaled.sigma_min, found.sigma_min * 2.0**exponent)
    assert torch.equal(scaled.rank, found.rank)


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param((1.7e308, 1e308), id="top of the range"),
        pytest.param((2.0**1023, 2.0**1000), id="largest power of two"),
        pytest.param((2.0**-1022, 2.0**-1030), id="subnormal"),
        pytest.param((2.0**-1073, 2.0**-1074), id="smallest numbers there are"),
    ],
)
def test_ends_of_the_range(route, entries):
    a = diagonal(*entries)
    found = extremal_singular_values(a)
    grads = gradients_of(a)
    assert (found.sigma_max.item(), found.sigma_min.item()) == entries
    assert found.rank == 2
    assert torch.equal(grads[0], diagonal(1.0, 0.0))
    assert torch.equal(grads[1], diagonal(0.0, 1.0))


@pytest.mark.parametrize(
    ("n", "p"), [(1, 1), (1, 7), (7, 1), (2, 2), (3, 40), (40, 3), (33, 32), (64, 150), (150, 64)]
)
def test_shapes(route, n, p):
    a = gaussian(n, p, seed=n + p)
    found = extremal_singular_values(a)
    assert_equals_reference(a, found)
    assert (found.multiplicity_max, found.multiplicity_min) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_exact_numbers(route, dtype):
    """Wide half matrices keep their rank: eps(bfloat16) times 200 columns would leave none."""
    a = gaussian(8, 200, dtype=dtype)
    found = extremal_singular_values(a)
    assert found.rank == 8
    assert_equals_reference(a, found)


NONE = torch.zeros(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "rank", "expected"),
    [
        (symmetric_clusters(), "numerical", (3, 1, 5, 2, 2)),
        (2 * torch.eye(3).double(), "numerical", (2, 2, 3, 3, 3)),
        (2 * torch.eye(3).double(), "full", (2, 2, 3, 3, 3)),
        (torch.ones(5, 5).double(), "numerical", (5, 5, 1, 1, 1)),
        (torch.ones(5, 5).double(), "full", (5, 0, 1, 1, 4)),
        (diagonal(1, 0.5, 1e-17, 1e-17), "numerical", (1, 0.5, 2, 1, 1)),
        (diagonal(1, 0.5, 1e-17, 1e-17), "full", (1, 0, 2, 1, 2)),
        (diagonal(0.0, 0, 1, 1), "full", (1, 0, 2, 2, 2)),
        (torch.tensor([[0.0, 1], [1, 0]]).double(), "full", (1, 1, 2, 2, 2)),
        (NONE, "numerical", (0, 0, 0, 3, 3)),
        (NONE, "full", (0, 0, 0, 3, 3)),
        (torch.tensor([[-4.0]]).double(), "numerical", (4, 4, 1, 1, 1)),
    ],
)
def test_rank_policies_and_multiplicities(route, a, rank, expected):
    found = extremal_singular_values(a, rank=rank)
    assert_within(found.sigma_max, expected[0], 4 * EPS * expected[0])
    assert_within(found.sigma_min, expected[1], 4 * EPS * expected[0])
    assert [value.item() for value in found[2:]] == list(expected[2:])
    if expected[1] == 0:
        assert found.sigma_min == 0, "reported as exactly zero, not as rounding"


@half_examples
@given(sample=strategies.rank_deficient(max_side=7))
def test_deficient_matrices_under_both_policies(route, sample):
    numerical = extremal_singular_values(sample.matrix, rank_rtol=1e-9)
    full = extremal_singular_values(sample.matrix, rank="full", rank_rtol=1e-9)
    assert full.sigma_min == 0
    assert torch.equal(full.rank, sample.rank)
    assert torch.equal(numerical.sigma_max, full.sigma_max)
    assert full.multiplicity_min == min(sample.matrix.shape) - sample.rank
    assert_within(
        numerical.sigma_min,
        sample.sigma_min,
        sample.value_bound + value_rounding(sample.matrix, sample.sigma_max),
    )


@half_examples
@given(sample=strategies.near_multiple(min_exponent=-14, max_exponent=-2))
def test_cluster_tolerance_separates_near_from_equal(route, sample):
    """With a tolerance of 1e-8, gaps of 1e-9 join and gaps of 1e-6 do not; rounding is 1e-14."""
    gap = float(sample.gap)
    equal = bool((sample.multiplicity_max > 1) | (sample.multiplicity_min > 1))
    assume(equal or gap < 1e-9 or gap > 1e-6)
    found = extremal_singular_values(sample.matrix, cluster_rtol=1e-8)
    sigma = sample.singular_values
    joined = 1e-7 * sigma[0]
    assert found.multiplicity_max == int((sigma[0] - sigma <= joined).sum())
    assert found.multiplicity_min == int((sigma - sigma[-1] <= joined).sum())


@pytest.mark.parametrize(
    "a",
    [
        pytest.param(diagonal(1, 1 - 1e-9), id="gap 1e-9"),
        pytest.param(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), id="two signs"),
        pytest.param(diagonal(1, 1 - 1e-6, 0.5, *[0.1] * 9), id="gap 1e-6"),
    ],
)
def test_slowly_converging_spectra(route, a):
    """Where power iterations oscillate or stop early, sigma_max is 1 and its pair is valid."""
    found = extremal_singular_values(a)
    grad, _ = gradients_of(a)
    assert_within(found.sigma_max, 1.0, 4 * EPS)
    # <gradient, A> = sigma_max and nuclear norm 1 hold for every subgradient and for nothing else.
    assert_within((grad * a).sum(), 1.0, 100 * EPS)
    assert_within(torch.linalg.svdvals(grad).sum(), 1.0, 100 * EPS)


def test_float32_and_float64_agree_on_a_large_symmetric_matrix(route):
    a = gaussian(200, 200)
    a = (a + a.mT).float()
    single, double = extremal_singular_values(a), extremal_singular_values(a.double())
    assert_within(single.sigma_max, double.sigma_max, 2 * EPS32 * double.sigma_max)
    assert_within(single.sigma_min, double.sigma_min, 2 * EPS32 * double.sigma_max)
    assert 0 <= single.sigma_min <= single.sigma_max


@pytest.mark.slow
def test_more_matrices_than_a_grid_dimension_holds():
    """65,537 matrices of 2 x 2, against the closed form of their singular values."""
    a = gaussian(65_537, 2, 2)
    found = extremal_singular_values(a)
    square, determinant = a.square().sum((-2, -1)), torch.linalg.det(a).abs()
    root = (square + 2 * determinant).sqrt()
    other = (square - 2 * determinant).clamp(min=0).sqrt()
    bound = 1e-7 * found.sigma_max  # the closed form cancels: sqrt(eps)
    assert bool(((found.sigma_max - (root + other) / 2).abs() <= bound).all())
    assert bool(((found.sigma_min - (root - other).abs() / 2).abs() <= bound).all())


# --- gradients ------------------------------------------------------------------------------------


@half_examples
@given(sample=strategies.well_conditioned(batch=None, max_side=7))
def test_gradient_is_the_singular_pair(route, sample):
    """The chosen singular vectors are the truth; the computed ones move by eps / gap."""
    grads = gradients_of(sample.matrix)
    if sample.matrix.numel() == 0:
        assert grads[0].shape == grads[1].shape == sample.matrix.shape
        return
    rtol = gradient_rtol(sample.matrix, float(sample.gap.min()))
    testing.assert_gradients_close(grads[0], sample.gradient_of("max"), rtol=rtol)
    testing.assert_gradients_close(grads[1], sample.gradient_of("min"), rtol=rtol)


@half_examples
@given(sample=strategies.badly_scaled(max_side=6, max_kappa=100.0))
def test_gradient_does_not_depend_on_the_scale(route, sample):
    grads = gradients_of(sample.matrix)
    rtol = gradient_rtol(sample.matrix, float(sample.gap))
    testing.assert_gradients_close(grads[0], sample.gradient_of("max"), rtol=rtol)
    testing.assert_gradients_close(grads[1], sample.gradient_of("min"), rtol=rtol)


@fewer_examples
@given(sample=strategies.matrices(max_side=6, layouts=("contiguous",)))
def test_gradient_is_a_subgradient_everywhere(route, sample):
    """Euler: <A, gradient> = sigma; and in norm never more than a unit pair, at any gap."""
    grads = gradients_of(sample.matrix, rank_rtol=1e-9)
    testing.check_euler_identity(extremes, [sample.matrix], 1)
    for grad in grads:
        assert float(torch.linalg.matrix_norm(grad)) <= 1 + 100 * EPS


@pytest.mark.parametrize(
    ("a", "of_max", "of_min"),
    [
        (symmetric_clusters(), [0, 0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0, 0]),
        (diagonal(3.0, 3, 3, 1), [1 / 3] * 3 + [0], [0, 0, 0, 1]),
        (-2 * torch.eye(4).double(), [-0.25] * 4, [-0.25] * 4),
    ],
)
def test_repeated_extreme_gets_the_mean_over_its_cluster(route, a, of_max, of_min):
    grads = gradients_of(a)
    for grad, entries in zip(grads, (of_max, of_min), strict=True):
        assert_within(grad, diagonal(*entries), 4 * EPS)


@fewer_examples
@given(sample=strategies.near_multiple(exact=True, max_side=7, batch=(2,)))
def test_clusters_are_independent_of_basis_and_order(route, sample):
    """Equal values of rotated matrices differ by rounding, hence a tolerance above that."""
    policy = {"cluster_rtol": 1e-9}

    def largest_and_smallest(a: Tensor) -> tuple[Tensor, Tensor]:
        found = extremal_singular_values(a, **policy)
        return found.sigma_max, found.sigma_min

    grads = gradients_of(sample.matrix, **policy)
    # Distance of the clusters to their neighbours is at least 0.2 of the largest value.
    rtol = 1000 * EPS
    testing.assert_gradients_close(grads[0], sample.gradient_of("max"), rtol=rtol)
    testing.assert_gradients_close(grads[1], sample.gradient_of("min"), rtol=rtol)
    testing.check_orthogonal_invariance(
        largest_and_smallest, [sample.matrix], rtol=10 * rtol, cancellation_scale=1.0
    )


def test_row_order_does_not_choose_the_subgradient(route):
    a = symmetric_clusters()
    straight, turned = gradients_of(a), gradients_of(a.flip(0))
    assert_within(turned[0].flip(0), straight[0], 4 * EPS)
    assert_within(turned[1].flip(0), straight[1], 4 * EPS)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14, 0.0])
def test_closing_gap_keeps_the_gradient_bounded(route, gap):
    """A pair that closes: one vector pair above the tolerance, the mean below, nothing larger.

    No jitter either: the values themselves stay where they are.
    """
    a = with_spectrum([3.0, 3.0 - 3.0 * gap, 2.0, 1.5, 1.0, 0.5], 6, 6, seed=4)
    found = extremal_singular_values(a)
    grad, _ = gradients_of(a)
    norm = float(torch.linalg.matrix_norm(grad))
    single, double = 1.0, 0.5**0.5
    assert min(abs(norm - single), abs(norm - double)) <= 1e-12
    assert_within(found.sigma_max, 3.0, 3 * 20 * 6 * EPS)
    if gap >= 1e-12:
        assert abs(norm - single) <= 1e-12


def test_wider_tolerance_smooths(route):
    a = diagonal(3.0, 2.99, 2.0, 1.01, 1.0)
    found = extremal_singular_values(a, cluster_rtol=0.01)
    grads = gradients_of(a, cluster_rtol=0.01)
    assert (found.sigma_max, found.sigma_min) == (3.0, 1.0)
    assert (found.multiplicity_max, found.multiplicity_min) == (2, 2)
    assert_within(grads[0].diagonal(), torch.tensor([0.5, 0.5, 0, 0, 0]), 4 * EPS)
    assert_within(grads[1].diagonal(), torch.tensor([0, 0, 0, 0.5, 0.5]), 4 * EPS)


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_zero_and_deficient_matrices_have_finite_gradients(route, rank):
    zero = torch.zeros(4, 3).double()
    ones = torch.ones(5, 5).double()
    assert not torch.cat(gradients_of(zero, rank=rank)).any()
    of_max, of_min = gradients_of(ones, rank=rank)
    assert_within(of_max, torch.ones(5, 5).double() / 5, 4 * EPS)
    assert_within(of_min, torch.ones(5, 5).double() / 5 * (rank == "numerical"), 4 * EPS)
    if rank == "full":
        assert not of_min.any(), "the least-norm element at sigma_min = 0 is zero"


def test_outputs_that_are_not_used_contribute_nothing(route):
    """A NaN from 0 * inf in the unused branch would show, and so would its cluster."""
    a = diagonal(3.0, 1.0, 1.0).requires_grad_()
    found = extremal_singular_values(a)
    (grad,) = torch.autograd.grad(found.sigma_max, a, create_graph=True)
    assert torch.equal(grad, diagonal(1.0, 0.0, 0.0))
    # sigma_min is a cluster here, but its gradient is not asked for.
    (second,) = torch.autograd.grad((grad * gaussian(3, 3)).sum(), a)
    assert torch.isfinite(second).all()
    assert not any(value.requires_grad for value in found[2:])


@pytest.mark.parametrize("which", ["max", "min"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (6, 4)])
@pytest.mark.parametrize("log_kappa", [1, 4, 7])
def test_second_derivative_equals_the_closed_form(route, which, shape, log_kappa):
    """Whatever kappa is: with n <= p nothing in the Hessian of sigma_min divides by sigma_min.

    With more rows than columns, and for the pair's part outside the ranges, it truly does, and its
    own size grows with kappa.
    """
    sigma = [1.0, 0.6, 0.3, 10.0**-log_kappa]
    a = with_spectrum(sigma, *shape, seed=5).requires_grad_()
    direction = gaussian(*shape, seed=6)
    value = extremal_singular_values(a)[0 if which == "max" else 1]
    (grad,) = torch.autograd.grad(value, a, create_graph=True)
    (found,) = torch.autograd.grad((grad * direction).sum(), a)
    truth = reference.extremal_singular_values_hvp(
        a.detach().numpy(), direction.numpy(), which=which
    )
    # The relative gap to the neighbours is 0.3: eps / 0.3 from the vectors, times 1000 in all.
    # Non-square matrices carry a term 1 / sigma_min, known to eps kappa of itself.
    square = shape[0] == shape[1]
    rtol = 1000 * EPS * (1.0 if square or which == "max" else 10.0**log_kappa)
    testing.assert_gradients_close(found, torch.from_numpy(truth), rtol=rtol)


def test_second_derivative_exists_where_the_other_extreme_is_a_cluster(route):
    one_sided = diagonal(3.0, 3.0, 1.0)
    testing.check_double_backward(
        lambda a: extremal_singular_values(a).sigma_min, [one_sided], smooth_radius=0.3
    )


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_second_derivative_near_a_cluster_grows_as_one_over_the_gap(route, gap):
    a = diagonal(1.0, 1.0 - gap, 0.3).requires_grad_()
    direction = torch.zeros(3, 3).double()
    direction[0, 1] = direction[1, 0] = 1.0
    (grad,) = torch.autograd.grad(extremal_singular_values(a).sigma_max, a, create_graph=True)
    (found,) = torch.autograd.grad((grad * direction).sum(), a)
    # For a symmetric direction: D u = D v = e_2 / gap, so the product is (e_2 e_1^T + e_1 e_2^T) /
    # gap.
    assert_within(found, direction / gap, 100 * EPS / gap**2)


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_forward_mode_at_clusters_and_at_zero(rank):
    cluster = symmetric_clusters()
    with pytest.raises(NotImplementedError, match="repeated"):
        torch.func.jvp(lambda a: extremal_singular_values(a).sigma_max, (cluster,), (cluster,))
    ones = torch.ones(3, 3).double()
    _, tangent = torch.func.jvp(
        lambda a: extremal_singular_values(a, rank=rank).sigma_min, (ones,), (ones,)
    )
    # Numerically the only value is 3 and simple; in full rank the smallest is 0 with gradient 0.
    assert_within(tangent, 3.0 if rank == "numerical" else 0.0, 20 * EPS)


# --- memory, determinism, independence ------------------------------------------------------------


@fewer_examples
@given(sample=strategies.matrices(max_side=6))
def test_arguments_stay_as_they_are(route, sample):
    """Column-major, sliced and offset views; nothing in or around them is written to."""
    found = extremal_singular_values(sample.matrix)
    plain = extremal_singular_values(sample.matrix.clone(memory_format=torch.contiguous_format))
    assert sample.guard is None or sample.guard.changed_entries() == 0
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)


def test_double_backward_of_a_batch_with_a_degenerate_element():
    """A cluster elsewhere in the batch is refused only if its own derivative is asked for."""
    a = torch.stack([diagonal(3.0, 2.0), torch.eye(2).double()])
    a.requires_grad_()
    largest = extremal_singular_values(a).sigma_max
    (grad,) = torch.autograd.grad(largest[0], a, create_graph=True)
    (second,) = torch.autograd.grad((grad * gaussian(2, 2, 2)).sum(), a)
    assert torch.isfinite(second).all()
    assert second[0].any()
    assert not second[1].any()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 3, 4, 6, 8, 16, 33, 64])
def test_default_tolerance_catches_rotated_multiples(side):
    """Their values spread over up to 7 eps at any side; a relative distance of 1e-13 is none."""
    rng = np.random.default_rng(side)
    for _ in range(20):
        left, right = (np.linalg.qr(rng.standard_normal((side, side)))[0] for _ in range(2))
        found = extremal_singular_values(torch.from_numpy(3.0 * left @ right.T))
        assert (found.multiplicity_max, found.multiplicity_min) == (side, side)
        apart = np.linspace(1.0, 1.0 + 1e-13 * side * (side - 1), side)
        found = extremal_singular_values(torch.from_numpy((left * apart) @ right.T))
        assert (found.multiplicity_max, found.multiplicity_min) == (1, 1)
