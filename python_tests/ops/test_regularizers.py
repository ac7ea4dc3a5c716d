"""R_well and R_ill of a matrix and of a Gram matrix: values, derivatives, transforms, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from operator_contract import SpectralContract, bad_matrices, bad_policies
from sample_inputs import (
    EPS,
    EPS32,
    diagonal,
    fewer_examples,
    gaussian,
    half_examples,
    with_spectrum,
)
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.errors import EqualSingularValuesError
from immunize_ext.ops import condition_number, extremal_singular_values, gram_extremes
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well, with_extremes
from immunize_ext.testing import strategies

WELL = [r_well, gram_r_well]
# R_well has no rank policy.
WELL_POLICIES = [r for r in bad_policies(torch.eye(2)) if "rank" not in r.options]
ILL = [r_ill, gram_r_ill]
EVERY = [*WELL, *ILL]
# Homogeneous of degree 2 in S; K is of degree 2 in x.
DEGREE = {r_well: 2, gram_r_well: 4, r_ill: -2, gram_r_ill: -4}


def name_of(function) -> str:
    return function.__name__


every_function = pytest.mark.parametrize("function", EVERY, ids=name_of)
every_well = pytest.mark.parametrize("function", WELL, ids=name_of)
every_ill = pytest.mark.parametrize("function", ILL, ids=name_of)


def value_of(function, a: Tensor, **options) -> np.ndarray:
    return getattr(reference, function.__name__)(a.double().numpy(), **options)


def reference_gradient(function, a: Tensor, **options) -> Tensor:
    found = getattr(reference, f"{function.__name__}_gradient")(a.double().numpy(), **options)
    return torch.from_numpy(np.asarray(found))


def gradient_of(function, a: Tensor, **options) -> Tensor:
    leaf = a.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf, **options).sum(), leaf)[0]


def spread(a: Tensor, power: int) -> tuple[float, float]:
    """D over |S|_F^2 / (2 k), and sigma_min / gap to the next, of S or of K (power 2)."""
    sigma = torch.linalg.svdvals(a.double()).pow(power)
    share = 1 - float(sigma[-1] ** 2 / sigma.square().mean())
    return share, float(sigma[0])


def power_of(function) -> int:
    return 2 if function.__name__.startswith("gram") else 1


class RegularizerContract(SpectralContract):
    gradient_rtol = routes_rtol = 1e-10
    independent_routes = ("kernel",)
    finite_message = "must be finite"  # named by the operator that it is composed of

    def composition(self, a):
        """The published procedure: all eigenvalues of K, or all singular values of S."""
        function, k = type(self).function, min(a.shape[-2:])
        if power_of(function) == 2:
            gram = a.mT @ a
            sigma = torch.linalg.eigvalsh(gram).flip(-1)
            squares, width = gram.square().sum((-2, -1)), a.shape[-1]
        else:
            sigma = torch.linalg.svdvals(a)
            squares, width = a.square().sum((-2, -1)), k
        if function in WELL:
            return (sigma[..., 0].square() / 2 - squares / (2 * width),)
        return (1 / (squares / (2 * k) - sigma[..., k - 1].square() / 2),)


class IllContract(RegularizerContract):
    # R_ill of equal values is infinite.
    poisons = dict.fromkeys(("zero", "rank_one", "nan"), "raised")

    def test_batch_with_a_floor_is_independent(self):
        self.skip_where_batches_change_bits()
        for inputs in self.batches():
            outcome = testing.check_batch_independence(
                lambda a: type(self).function(a, floor=1e-6),
                inputs,
                poisons=("rank_one", "zero"),
                may_raise=(),
            )
            assert set(outcome.values()) == {"independent"}


class TestRWell(RegularizerContract):
    function = staticmethod(r_well)
    argument = "s"
    node = "Regularizer"
    vmap_rtol = 1e-12  # by the composition, the fused operator takes plain tensors
    degree = 2
    degenerate = {"rank one": (torch.ones(5, 5).double(),), "zero": (torch.zeros(4, 3).double(),)}
    refusals = bad_matrices("s", *WELL_POLICIES)


class TestRIll(IllContract):
    function = staticmethod(r_ill)
    argument = "s"
    node = "Regularizer"
    vmap_rtol = 1e-12
    degree = -2
    refusals = bad_matrices("s", *bad_policies(torch.eye(2)))


class TestGramRWell(RegularizerContract):
    function = staticmethod(gram_r_well)
    argument = "x"
    node = "Regularizer"
    vmap_rtol = 1e-12
    degree = 4
    refusals = bad_matrices("x", *WELL_POLICIES)


class TestGramRIll(IllContract):
    function = staticmethod(gram_r_ill)
    argument = "x"
    node = "Regularizer"
    vmap_rtol = 1e-12
    degree = -4
    refusals = bad_matrices("x", *bad_policies(torch.eye(2)))


# --- values ---------------------------------------------------------------------------------------


@every_function
@half_examples
@given(sample=strategies.well_conditioned(min_side=2, max_side=8, max_kappa=100.0, batch=None))
def test_value_equals_the_reference(route, function, sample):
    a = sample.matrix
    found = function(a)
    assert found.shape == a.shape[:-2]
    assert found.dtype == a.dtype
    if a.numel() == 0:
        return
    truth = np.asarray(value_of(function, a))
    # A difference of squares: what is left of it is known to eps times the squares themselves.
    sigma = torch.linalg.svdvals(a).pow(power_of(function))
    squares = sigma[..., 0].square()
    if function in WELL:
        bound = 200 * EPS * squares
    else:
        mean = sigma.square().mean(-1)
        bound = 200 * EPS * squares / mean * (mean * torch.from_numpy(truth)) * truth
    assert bool(((found - torch.from_numpy(truth)).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_by_hand(route, dtype):
    """diag(3, 2, 1): R_well = 13/6 and R_ill = 6/11, with their gradients."""
    s = diagonal(3, 2, 1).to(dtype)
    rtol = 10 * torch.finfo(dtype).eps
    x = diagonal(3, 2, 1).sqrt().to(dtype)  # K is the same matrix
    assert float(r_well(s)) == pytest.approx(13 / 6, rel=rtol)
    assert float(r_ill(s)) == pytest.approx(6 / 11, rel=rtol)
    assert float(gram_r_well(x)) == pytest.approx(13 / 6, rel=10 * rtol)
    assert float(gram_r_ill(x)) == pytest.approx(6 / 11, rel=10 * rtol)
    well, ill = gradient_of(r_well, s), gradient_of(r_ill, s)
    assert well.dtype == ill.dtype == dtype
    testing.assert_gradients_close(well, diagonal(2, -2 / 3, -1 / 3), rtol=rtol)
    of_ill = diagonal(-1, -2 / 3, 2 / 3) * (6 / 11) ** 2
    testing.assert_gradients_close(ill, of_ill, rtol=10 * rtol)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 4)])
def test_gram_form_is_the_matrix_form_of_the_gram_matrix(route, shape):
    x = gaussian(*shape)
    k = x.mT @ x
    torch.testing.assert_close(gram_r_well(x), r_well(k), rtol=1e-12, atol=1e-12)
    if shape[0] > 1:
        # K has rank min(n, p), and its sigma_min is the smallest that counts.
        torch.testing.assert_close(gram_r_ill(x), r_ill(k), rtol=1e-9, atol=0)


@every_function
@pytest.mark.parametrize("normaliser", [1.5, 3, 7.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_given_normalisers(route, function, normaliser, as_tensor):
    """Published code divides by other widths: p for R_well, k for R_ill, a number or a tensor."""
    a = with_spectrum([3.0, 2.0, 0.5], 4, 3)
    name = "p" if function in WELL else "k"
    given_value = torch.tensor(float(normaliser)) if as_tensor else normaliser
    found = function(a, **{name: given_value})
    grad = gradient_of(function, a, **{name: given_value})
    truth = value_of(function, a, **{name: normaliser})
    assert float(found) == pytest.approx(float(truth), rel=1e-12)
    testing.assert_gradients_close(
        grad, reference_gradient(function, a, **{name: normaliser}), rtol=1e-12
    )


@every_function
def test_one_normaliser_per_matrix(route, function):
    a = gaussian(2, 4, 3)
    name = "p" if function in WELL else "k"
    widths = torch.tensor([2.0, 5.0]).double()
    together = function(a, **{name: widths})
    alone = torch.stack([function(a[b], **{name: float(widths[b])}) for b in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


@every_well
@half_examples
@given(sample=strategies.matrices(max_side=6, layouts=("contiguous",)))
def test_well_is_not_negative_and_zero_at_its_minimum(route, function, sample):
    """Up to the rounding of a difference: exactly equal values give a few eps sigma_max^2."""
    a = sample.matrix
    assume(1e-60 < float(sample.sigma_max) < 1e60 or float(sample.sigma_max) == 0)
    found = float(function(a))
    largest = float(sample.sigma_max) ** (2 * power_of(function))
    assert found >= -100 * EPS * largest
    equal = bool((sample.singular_values == sample.sigma_max).all())
    full = a.shape[-1] <= a.shape[-2] or function is r_well
    if equal and full:
        assert found <= 100 * EPS * largest


@every_ill
@half_examples
@given(sample=strategies.well_conditioned(min_side=2, max_side=6, max_kappa=1e3, min_gap=0.1))
def test_ill_obeys_its_bounds(route, function, sample):
    """Theorem 4.1: 2k / ((k-1)(kappa^2-1) s^2) <= R_ill <= 2k / ((kappa^2-1) s^2), s = sigma_min.

    And 1 / log kappa <= sigma_max^2 R_ill.
    """
    a, power = sample.matrix, power_of(function)
    k, kappa = min(a.shape), float(sample.kappa) ** power
    assume(kappa > 1.1)
    smallest, largest = float(sample.sigma_min) ** power, float(sample.sigma_max) ** power
    found = float(function(a))
    upper = 2 * k / ((kappa**2 - 1) * smallest**2)
    assert upper / (k - 1) * (1 - 1e-9) <= found <= upper * (1 + 1e-9)
    assert 1 / math.log(kappa) <= largest**2 * found * (1 + 1e-9)


@fewer_examples
@given(
    sample=strategies.well_conditioned(min_side=2, max_side=6, max_kappa=50.0, min_gap=0.1),
    share=st.floats(0.01, 0.9),
)
def test_step_along_the_gradient_of_ill_raises_kappa(route, sample, share):
    """Theorem 4.1, 4: every step below k / (k - 1) D^2 does."""
    s = sample.matrix
    k = min(s.shape)
    denominator = 1 / float(r_ill(s))
    moved = s - share * k / (k - 1) * denominator**2 * gradient_of(r_ill, s)
    before, after = float(condition_number(s)), float(condition_number(moved, rank_rtol=0.0))
    # Beyond the step that makes sigma_min zero it grows again with the other sign.
    assert after > before * (1 - 1e-12)


@fewer_examples
@given(
    sample=strategies.well_conditioned(min_side=2, max_side=6, max_kappa=50.0, min_gap=0.1),
    share=st.floats(0.01, 0.9),
)
def test_step_along_the_gradient_of_well_lowers_kappa(route, sample, share):
    """Small enough that sigma_max does not fall below its neighbour."""
    s = sample.matrix
    sigma = sample.singular_values
    p = min(s.shape)
    step = share * min(0.5, float((sigma[0] - sigma[1]) / sigma[0]) / 2)
    moved = s - step * gradient_of(r_well, s)
    before, after = float(condition_number(s)), float(condition_number(moved))
    assert p >= 2
    assert after < before * (1 + 1e-12)


@every_function
@pytest.mark.parametrize("scale", [1e-150, 1e-70, 1e70, 1e150])
def test_values_in_the_range_of_float64(route, function, scale):
    """Down to where the result itself leaves it: S to 1e150, K of x to 1e75."""
    degree = DEGREE[function]
    if abs(degree * math.log10(scale)) > 300:
        pytest.skip("the result is out of range")
    found, unit = function(scale * gaussian(4, 3)), function(gaussian(4, 3))
    assert float(found / scale**degree) == pytest.approx(float(unit), rel=1e-11)


@pytest.mark.parametrize(
    ("function", "scale"), [(gram_r_well, 1e100), (gram_r_ill, 1e100), (gram_r_ill, 1e-100)]
)
def test_gram_regularizers_beyond_the_range(route, function, scale):
    """Infinite or zero, as |K|_F^2 is: never a NaN, and no error with a wrong name."""
    found = function(scale * gaussian(4, 3))
    assert found == (math.inf if DEGREE[function] * (scale - 1) > 0 else 0)


@pytest.mark.parametrize("function", [gram_r_well, gram_r_ill], ids=name_of)
@pytest.mark.parametrize(("n", "p"), [(64, 784), (784, 64)])
def test_sizes_of_the_papers(route, function, n, p):
    x = gaussian(n, p, dtype=torch.float32)
    truth, slope = float(value_of(function, x)), reference_gradient(function, x)
    assert float(function(x)) == pytest.approx(truth, rel=2 * EPS32)
    testing.assert_gradients_close(gradient_of(function, x), slope, rtol=1e-5)


# --- gradients ------------------------------------------------------------------------------------


@every_function
@half_examples
@given(sample=strategies.well_conditioned(min_side=2, max_side=6, max_kappa=30.0))
def test_gradient_equals_the_closed_form(route, function, sample):
    a = sample.matrix
    share, largest = spread(a, power_of(function))
    assume(function in WELL or share > 1e-3)
    found = gradient_of(function, a)
    truth = reference_gradient(function, a)
    # eps / gap from the singular pair; D is known to eps / share, and enters squared.
    loss = 1 / float(sample.gap) + (0 if function in WELL else 30**2 / share)
    norm = float(a.norm())
    size = largest**2 / norm if function in WELL else largest**2 / norm * float(function(a)) ** 2
    testing.assert_gradients_close(
        found, truth, rtol=200 * max(a.shape) * EPS * loss, cancellation_scale=size
    )


@every_function
@fewer_examples
@given(sample=strategies.well_conditioned(min_side=2, max_side=6, max_kappa=30.0))
def test_euler_identity(route, function, sample):
    share, _ = spread(sample.matrix, power_of(function))
    assume(function in WELL or share > 1e-3)
    testing.check_euler_identity(
        function, [sample.matrix], DEGREE[function], rtol=1e-9 if function in ILL else None
    )


@every_well
@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0**40, 2.0**-40])
def test_well_stands_still_at_its_minimum(route, function, scale):
    """Multiples of I: torch's own gradient of one arbitrary eigenvector walks away from there."""
    a = scale * torch.eye(3).double()
    assert not gradient_of(function, a).any()


@every_well
@pytest.mark.parametrize("n", [2, 5, 8, 16])
def test_well_stands_still_at_orthogonal_matrices(route, function, n):
    """Rotated, the equal values differ by rounding: 1e-9 joins them."""
    a = with_spectrum([3.0] * n, n, n, seed=1)
    grad = gradient_of(function, a, cluster_rtol=1e-9)
    assert float(grad.norm()) <= 1000 * EPS * 3.0 ** (DEGREE[function] - 1)


def test_rank_one_and_zero(route):
    """Five equal rows: sigma_max u v^T is S itself. Torch's full SVD gives NaN for the zero."""
    ones = torch.ones(5, 5).double()
    testing.assert_gradients_close(gradient_of(r_well, ones), 0.8 * ones, rtol=1e-14)
    for function in WELL:
        zero = torch.zeros(4, 3).double()
        assert function(zero) == 0
        assert not gradient_of(function, zero).any()


@every_function
@pytest.mark.parametrize("gap", [1e-2, 1e-6, 1e-10, 1e-13, 0.0])
def test_closing_gap_keeps_the_gradient_bounded(route, function, gap):
    """No spike where two extremes meet: the gradient stays within twice that of a wide gap."""

    def norm(gap: float) -> float:
        sigma = [3.0, 3.0 - gap, 2.0, 1.0 + gap, 1.0]
        return float(gradient_of(function, with_spectrum(sigma, 5, 5, seed=2)).norm())

    assert norm(gap) <= 2 * norm(0.1)


@every_function
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("normaliser", [None, 6.0])
def test_second_derivative_equals_the_closed_form(route, function, shape, normaliser):
    a = gaussian(*shape, seed=17).requires_grad_()
    direction = gaussian(*shape, seed=18)
    name = "p" if function in WELL else "k"
    options = {} if normaliser is None else {name: normaliser}
    (grad,) = torch.autograd.grad(function(a, **options), a, create_graph=True)
    (found,) = torch.autograd.grad((grad * direction).sum(), a)
    closed = getattr(reference, f"{function.__name__}_hvp")
    truth = closed(a.detach().numpy(), direction.numpy(), **options)
    testing.assert_gradients_close(found, torch.from_numpy(truth), rtol=1e-10)


@every_function
def test_bilevel_step(route, function):
    """A regularizer after one gradient step on itself, as an outer loss, by finite differences."""

    def outer(a: Tensor) -> Tensor:
        with torch.enable_grad():
            held = a if a.requires_grad else a.detach().requires_grad_()
            (grad,) = torch.autograd.grad(function(held), held, create_graph=True)
            return function(held - step * grad)

    a = gaussian(3, 4, seed=5)
    step = 0.01 / float(gradient_of(function, a).norm())
    testing.check_against_finite_differences(outer, [a])


# --- registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [gram_r_well, gram_r_ill], ids=name_of)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (2, 3, 4), (0, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_operator_equals_the_composition(function, shape, dtype):
    """A tensor as normaliser takes the composition of gram_extremes; a number the fused one."""
    x = gaussian(*shape, seed=3, dtype=dtype)
    name = "p" if function is gram_r_well else "k"
    fused, composed = {name: 3.0}, {name: torch.tensor(3.0).double()}
    torch.testing.assert_close(function(x, **fused), function(x, **composed))
    torch.testing.assert_close(
        gradient_of(function, x, **fused), gradient_of(function, x, **composed)
    )


# --- transforms -----------------------------------------------------------------------------------


@every_ill
def test_equal_values_inside_vmap_are_refused_by_index(function):
    a = torch.stack([gaussian(3, 3), torch.eye(3).double()])
    with pytest.raises(EqualSingularValuesError) as caught:
        torch.func.vmap(function)(a)
    assert caught.value.batch_index == (1,)


@pytest.mark.usefixtures("fresh_compiler")
@every_ill
def test_equal_values_inside_compile_are_held_at_a_floor(function):
    """Nothing can be read on the host there: documented, finite, with gradient 0."""
    a = torch.eye(3).double().requires_grad_()
    value = torch.compile(function, fullgraph=True, backend="aot_eager")(a)
    (grad,) = torch.autograd.grad(value, a)
    assert torch.isfinite(value)
    assert not grad.any()


# --- memory, determinism, independence, settings --------------------------------------------------


# --- equal singular values ------------------------------------------------------------------------


@every_ill
@pytest.mark.parametrize(
    "a",
    [
        pytest.param(torch.eye(3).double(), id="identity"),
        pytest.param(torch.zeros(3, 3).double(), id="zero"),
        pytest.param(torch.ones(4, 4).double(), id="rank one"),
        pytest.param(torch.tensor([[2.0]]).double(), id="one entry"),
        pytest.param(5 * torch.eye(3, 6).double(), id="wide"),
    ],
)
def test_ill_of_equal_values_is_refused(route, function, a):
    """It is infinite there, and its gradient would be NaN."""
    with pytest.raises(EqualSingularValuesError, match=function.__name__) as caught:
        function(a)
    assert caught.value.batch_index == ()
    assert isinstance(caught.value, ValueError)
    batch = torch.stack([gaussian(*a.shape) if a.numel() > 1 else a, a])
    with pytest.raises(EqualSingularValuesError) as caught:
        function(batch)
    assert caught.value.batch_index == ((1,) if a.numel() > 1 else (0,))


@every_ill
@pytest.mark.parametrize("seed", range(6))
def test_ill_of_rotated_equal_values_is_refused(route, function, seed):
    """Rounding of an orthogonal matrix must not pass for a difference: 1e15 would come out."""
    for n in (5, 12, 30):
        with pytest.raises(EqualSingularValuesError):
            function(with_spectrum([2.0] * n, n, n, seed=seed))


@every_ill
def test_normaliser_that_is_too_large_is_refused(route, function):
    """k = 100 of three values: D < 0, a R_ill that attracts instead of repels."""
    with pytest.raises(EqualSingularValuesError):
        function(diagonal(1.1, 1.05, 1), k=100.0)


@every_ill
@pytest.mark.parametrize("floor", [1e-12, 1e-6, 0.1])
def test_floor_caps_the_value_with_gradient_zero(route, function, floor):
    a = torch.eye(3).double()
    assert float(function(a, floor=floor)) == pytest.approx(1 / (0.5 * floor), rel=1e-12)
    assert not gradient_of(function, a, floor=floor).any()
    zero = torch.zeros(3, 3).double()
    assert function(zero, floor=floor) == math.inf
    assert not gradient_of(function, zero, floor=floor).any()
    wide = diagonal(3, 2, 1)
    assert torch.equal(function(wide, floor=floor), function(wide))
    assert torch.equal(gradient_of(function, wide, floor=floor), gradient_of(function, wide))


@every_ill
def test_near_equal_values_keep_their_digits(route, function):
    """D / |S|^2 = 1e-6: the cancellation costs six digits and not more."""
    a = with_spectrum([1.0, 1.0 - 1e-6, 1.0 - 3e-6], 3, 3, seed=1)
    found = float(function(a))
    assert found == pytest.approx(float(value_of(function, a)), rel=1e-8)


# --- refusals -------------------------------------------------------------------------------------


@every_function
@pytest.mark.parametrize("normaliser", [0, 0.0, -1.0, math.nan])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_bad_normaliser_is_refused(route, function, normaliser, as_tensor):
    name = "p" if function in WELL else "k"
    value = torch.tensor(float(normaliser)) if as_tensor else normaliser
    with pytest.raises(ValueError, match=f"{function.__name__}: {name} must be positive"):
        function(gaussian(3, 3), **{name: value})


@every_ill
@pytest.mark.parametrize("floor", [-1.0, 0.0, 1.0, 2.0, math.nan])
def test_bad_floor_is_refused(route, function, floor):
    """A share of |S|_F^2 / (2 k) that D can have: between 0 and 1, both excluded."""
    with pytest.raises(ValueError, match=f"{function.__name__}: floor must"):
        function(gaussian(3, 3), floor=floor)


@pytest.mark.parametrize("function", EVERY, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_regularizer_with_its_extremes_is_both_from_one_decomposition(function, dtype):
    s = gaussian(2, 7, 4).to(dtype).requires_grad_()
    ill = function in ILL
    settings = {"k": 3.0, "rank_rtol": 1e-3} if ill else {"p": 9.0, "rank_rtol": 1e-3}
    value, extremes = with_extremes(function.__name__, s, **settings)
    expected = function(s, **settings)
    of = gram_extremes if function in (gram_r_well, gram_r_ill) else extremal_singular_values
    assert type(extremes) is type(of(s))
    torch.testing.assert_close(value, expected)
    for one, other in zip(extremes, of(s, rank_rtol=1e-3), strict=True):
        torch.testing.assert_close(one, other)
    grads = [torch.autograd.grad(v.sum(), s, retain_graph=True)[0] for v in (value, expected)]
    torch.testing.assert_close(*grads)
    # What is logged beside the loss has its derivative too.
    (grad,) = torch.autograd.grad(extremes[0].sum(), s)
    assert grad.abs().sum() > 0


def test_extremes_of_what_is_not_there_are_refused():
    with pytest.raises(ValueError, match="regularizer must be one of"):
        with_extremes("r_wel", torch.eye(2))
    with pytest.raises(ValueError, match=r"settings of r_well must be among .*, got floor"):
        with_extremes("r_well", torch.eye(2), floor=0.1)
    with pytest.raises(EqualSingularValuesError):
        with_extremes("gram_r_ill", torch.eye(2))
    value, extremes = with_extremes("gram_r_ill", torch.eye(2), floor=0.5)
    assert value == 1 / (0.5 * 0.5)
    assert extremes.multiplicity_min == 2
