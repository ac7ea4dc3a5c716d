"""The derivative checks accept right operators and catch each planted bug."""

import numpy as np
import pytest
import torch
from hypothesis import given
from planted_operators import (
    ArbitraryVector,
    FlushedToZero,
    ForgottenFactor,
    RefusesSecondOrder,
    SecondOrder,
    Transposed,
    cube_sum,
    detached_output,
    gram_route,
    right_cube,
    spectral_extremes,
)

from immunize_ext import testing
from immunize_ext.testing import strategies

testing.register_profiles()


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spd(size, seed=0):
    a = randn(size, size, seed=seed)
    return a @ a.mT + torch.eye(size, dtype=torch.float64)


def diag(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


SMOOTH = randn(5, 4, seed=1)
RIGHT = [
    (torch.linalg.svdvals, [SMOOTH]),
    (torch.linalg.svdvals, [randn(2, 3, 4, seed=2)]),
    (torch.linalg.inv, [spd(4)]),
    (torch.linalg.solve, [spd(4), randn(4, 3)]),
    (lambda a: torch.linalg.eigvalsh(0.5 * (a + a.mT)), [spd(4)]),
    (lambda a: torch.linalg.cholesky(0.5 * (a + a.mT)), [spd(4)]),
    (torch.linalg.slogdet, [spd(3)]),
    (lambda a, r: a * torch.exp(r), [randn(3, 2), torch.tensor(0.3, dtype=torch.float64)]),
    (lambda a: (a.sum(), torch.arange(3), [a.prod(dim=0)]), [randn(3, 2)]),
]


class TestAgainstFiniteDifferences:
    @pytest.mark.parametrize(("fn", "inputs"), RIGHT)
    def test_accepts_right_operators(self, fn, inputs):
        testing.check_against_finite_differences(fn, inputs)

    @given(strategies.well_conditioned(min_gap=0.1, max_kappa=100.0, batch=None))
    def test_accepts_right_extremes_of_any_smooth_matrix(self, sample):
        radius = float(sample.gap.min()) if sample.gap.numel() else None
        testing.check_against_finite_differences(
            spectral_extremes, [sample.matrix], smooth_radius=radius, directions=1
        )

    @given(strategies.badly_scaled(max_kappa=20.0))
    def test_no_scale_is_too_far(self, sample):
        radius = float(sample.gap)
        testing.check_against_finite_differences(
            spectral_extremes, [sample.matrix], smooth_radius=radius, directions=1
        )

    def test_accepts_the_mean_at_a_double_extreme(self):
        testing.check_against_finite_differences(spectral_extremes, [diag(3, 3, 1, 1)])

    def test_message_of_a_failure(self):
        with pytest.raises(AssertionError) as caught:
            testing.check_against_finite_differences(
                lambda a: ForgottenFactor.apply(a)[0], [diag(3, 1)]
            )
        message = str(caught.value)
        for part in ("direction 0 of input 0", "seed 0", "must be", "got", "bound", "rounding"):
            assert part in message
        assert "worst entry (0, 0)" in message

    @pytest.mark.parametrize(
        ("operator", "matrix"),
        [
            (ArbitraryVector, diag(3, 3, 1)),
            (ForgottenFactor, SMOOTH),
            (Transposed, randn(4, 4)),
            (FlushedToZero, 1e-8 * SMOOTH),
        ],
    )
    def test_catches_planted_bugs(self, operator, matrix):
        with pytest.raises(AssertionError, match="the derivative of the outputs"):
            testing.check_against_finite_differences(lambda a: operator.apply(a)[0], [matrix])

    @given(strategies.near_multiple(which="max", multiplicities=(2,), exact=True))
    def test_catches_the_arbitrary_vector_at_any_double_extreme(self, sample):
        with pytest.raises(AssertionError, match="must be"):
            testing.check_against_finite_differences(
                lambda a: ArbitraryVector.apply(a)[0], [sample.matrix]
            )

    def test_catches_one_wrong_element_of_a_badly_scaled_batch(self):
        scales = torch.tensor([1.0, 1e-100, 1e100], dtype=torch.float64)[:, None, None]

        def wrong_in_the_tiny_one(a):
            norms = torch.linalg.matrix_norm(a)
            factor = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
            return norms.detach() + factor * (norms - norms.detach())

        batch = randn(3, 4, 2) * scales
        testing.check_against_finite_differences(torch.linalg.matrix_norm, [batch])
        with pytest.raises(AssertionError):
            testing.check_against_finite_differences(wrong_in_the_tiny_one, [batch])

    def test_catches_nan_gradients(self):
        def through_vectors(a):
            u, s, vh = torch.linalg.svd(a)
            return torch.linalg.matrix_norm(u @ torch.diag(s) @ vh)

        with pytest.raises(AssertionError):
            testing.check_against_finite_differences(through_vectors, [diag(1, 1, 2, 3)])

    def test_catches_a_lost_graph(self):
        with pytest.raises(AssertionError, match=r"output 1 .*must carry a graph"):
            testing.check_against_finite_differences(detached_output, [SMOOTH])
        testing.check_against_finite_differences(detached_output, [SMOOTH], outputs=[0])

    def test_catches_an_unused_input(self):
        with pytest.raises(AssertionError, match="input 1"):
            testing.check_against_finite_differences(
                lambda a, b: a.sum() * b.detach().sum(), [SMOOTH, SMOOTH]
            )
        testing.check_against_finite_differences(
            lambda a, b: a.sum() * b.detach().sum(), [SMOOTH, SMOOTH], wrt=[0]
        )

    def test_says_when_it_cannot_decide(self):
        # The gap is below every usable step: no difference quotient sees the simple extreme.
        near = diag(1, 1 - 1e-9, 0.3)
        with pytest.raises(testing.InconclusiveCheckError, match="smooth_radius"):
            testing.check_against_finite_differences(spectral_extremes, [near], smooth_radius=1e-9)

        def rough(a):  # a value with noise of 1e-3 has no derivative to speak of
            return (a.sum() * 1e3).sin() * 1e-3 + (a.sum() * 1e13).sin()

        with pytest.raises(AssertionError):
            testing.check_against_finite_differences(rough, [SMOOTH])

    def test_wrong_use_is_named(self):
        with pytest.raises(ValueError, match="inputs must be float64"):
            testing.check_against_finite_differences(torch.linalg.svdvals, [SMOOTH.float()])
        with pytest.raises(ValueError, match="must hold a floating point tensor"):
            testing.check_against_finite_differences(torch.sum, [torch.arange(3)])
        with pytest.raises(ValueError, match="wrt must name"):
            testing.check_against_finite_differences(torch.sum, [SMOOTH], wrt=[1])
        with pytest.raises(ValueError, match="outputs must lie in"):
            testing.check_against_finite_differences(torch.sum, [SMOOTH], outputs=[3])
        with pytest.raises(ValueError, match="must return a floating point tensor"):
            testing.check_against_finite_differences(lambda a: 3.0, [SMOOTH])


class TestAgainstClosedForm:
    @given(strategies.matrices())
    def test_accepts_the_mean_over_a_cluster(self, sample):
        # Where a gap is drawn the singular vectors carry rounding over the gap.
        gap = float(sample.gap) or 1.0
        rtol = 1e-13 / max(min(gap, 1.0), 1e-14)
        if rtol < 1e-3:
            for number, which in enumerate(("max", "min")):
                testing.check_against_closed_form(
                    spectral_extremes,
                    [sample.matrix],
                    [sample.gradient_of(which)],
                    outputs=[number],
                    rtol=rtol,
                )

    def test_expected_may_be_a_function_of_the_cotangents(self):
        weight = randn(5)
        testing.check_against_closed_form(
            lambda a: a.square().sum(1),
            [SMOOTH],
            lambda inputs, cotangents: [2 * inputs[0] * cotangents[0][:, None]],
            cotangents=[weight],
        )

    def test_catches_the_arbitrary_vector_at_a_triple_extreme(self):
        expected = diag(1 / 3, 1 / 3, 1 / 3, 0)
        testing.check_against_closed_form(
            spectral_extremes, [diag(2, 2, 2, 1)], [expected], outputs=[0]
        )
        with pytest.raises(AssertionError, match="worst entry"):
            testing.check_against_closed_form(
                lambda a: ArbitraryVector.apply(a)[0], [diag(2, 2, 2, 1)], [expected]
            )

    def test_catches_a_zeroed_tiny_gradient_in_one_element(self):
        batch = torch.stack([SMOOTH, 1e-9 * SMOOTH])
        with pytest.raises(AssertionError, match=r"is all zero at batch index \(1,\)"):
            testing.check_against_closed_form(
                lambda a: FlushedToZero.apply(a)[0], [batch], [2 * spectral_gradient(batch)]
            )

    def test_zero_gradient_needs_a_scale_for_what_cancels(self):
        # R_well(c I) has gradient 0, computed as c u v^T - c I / p: rounding of terms of size c.
        def r_well(a):
            top, _ = spectral_extremes(a)
            return top**2 / 2 - a.square().sum((-1, -2)) / 6

        turned = torch.linalg.qr(randn(3, 3))[0] * 7.0
        zero = torch.zeros(3, 3, dtype=torch.float64)
        testing.check_against_closed_form(r_well, [turned], [zero], cancellation_scale=[7.0])
        with pytest.raises(AssertionError):
            testing.check_against_closed_form(
                lambda a: ArbitraryVector.apply(a)[0] ** 2 / 2 - a.square().sum() / 6,
                [turned],
                [zero],
                cancellation_scale=[7.0],
            )

    def test_wrong_use_is_named(self):
        with pytest.raises(ValueError, match="one gradient per differentiated input"):
            testing.check_against_closed_form(torch.sum, [SMOOTH], [])

    def test_shapes_and_nan(self):
        with pytest.raises(AssertionError, match="must have shape"):
            testing.assert_gradients_close(SMOOTH, SMOOTH.mT)
        with pytest.raises(AssertionError, match="got nan"):
            testing.assert_gradients_close(SMOOTH * float("nan"), SMOOTH)
        testing.assert_gradients_close(SMOOTH[:0], SMOOTH[:0])
        tiny = 1e-200 * SMOOTH
        testing.assert_gradients_close(tiny * (1 + 1e-15), tiny)
        with pytest.raises(AssertionError, match="is all zero"):
            testing.assert_gradients_close(0 * tiny, tiny)


def spectral_gradient(batch):
    """d(sigma_max^2) / 2, per matrix."""
    u, s, vh = torch.linalg.svd(batch, full_matrices=False)
    return s[..., :1, None] * u[..., :1] @ vh[..., :1, :]


class TestFloat32AgainstFloat64:
    @pytest.mark.parametrize(("fn", "inputs"), RIGHT)
    def test_accepts_right_operators(self, fn, inputs):
        testing.check_float32_against_float64(fn, inputs, condition=100.0)

    @given(strategies.well_conditioned(dtype=torch.float32, min_gap=0.2, max_kappa=10.0))
    def test_accepts_right_extremes(self, sample):
        testing.check_float32_against_float64(
            lambda a: spectral_extremes(a, cluster_rtol=1e-6),
            [sample.matrix],
            condition=1 / float(sample.gap),
        )

    def test_catches_the_gram_route_in_float32(self):
        sample = testing.matrix_from_spectrum(np.random.default_rng(0), 20, 3, [1.0, 0.1, 1e-4])
        testing.check_float32_against_float64(
            lambda a: torch.linalg.svdvals(a)[-1], [sample.matrix], condition=1e4
        )
        with pytest.raises(AssertionError, match="output 0"):
            testing.check_float32_against_float64(gram_route, [sample.matrix], condition=1e4)

    def test_catches_another_dtype(self):
        with pytest.raises(AssertionError, match=r"must be torch\.float32"):
            testing.check_float32_against_float64(lambda a: a.double().sum(0), [SMOOTH])

    def test_half_precision(self):
        def computed_in_double(a):
            return torch.linalg.matrix_norm(a.double()).to(a.dtype)

        for dtype in (torch.float16, torch.bfloat16):
            testing.check_float32_against_float64(computed_in_double, [SMOOTH], dtype=dtype)


class TestDoubleBackward:
    @pytest.mark.parametrize(("fn", "inputs"), RIGHT)
    def test_accepts_right_operators(self, fn, inputs):
        assert testing.check_double_backward(fn, inputs) == "right"

    def test_accepts_a_backward_of_differentiable_operations(self):
        assert testing.check_double_backward(SecondOrder.apply, [SMOOTH]) == "right"

    def test_catches_a_silently_zero_second_derivative(self):
        with pytest.raises(AssertionError, match="must be"):
            testing.check_double_backward(lambda a: ArbitraryVector.apply(a)[0], [SMOOTH])

    def test_catches_a_detached_gradient(self):
        class Detached(SecondOrder):
            @staticmethod
            def backward(ctx, grad):
                with torch.no_grad():
                    return SecondOrder.backward(ctx, grad)

        with pytest.raises(AssertionError, match="silently without a graph"):
            testing.check_double_backward(Detached.apply, [SMOOTH])

    def test_refusal_is_accepted_where_it_is_expected(self):
        def fn(a):
            return RefusesSecondOrder.apply(a)[0]

        assert testing.check_double_backward(fn, [SMOOTH], expect="raises") == "raises"
        assert testing.check_double_backward(fn, [SMOOTH], expect="right_or_raises") == "raises"
        with pytest.raises(AssertionError, match="must be right, got RuntimeError"):
            testing.check_double_backward(fn, [SMOOTH])
        with pytest.raises(AssertionError, match="must raise"):
            testing.check_double_backward(SecondOrder.apply, [SMOOTH], expect="raises")

    def test_catches_garbage_at_a_near_multiple_extreme(self):
        # The second derivative through singular vectors is off by 1/gap^2 where torch divides.
        near = diag(1, 1 - 1e-13, 0.3) @ torch.linalg.qr(randn(3, 3))[0]
        with pytest.raises(AssertionError):
            testing.check_double_backward(lambda a: torch.linalg.svdvals(a)[0], [near])

    def test_linear_functions_have_second_derivative_zero(self):
        assert testing.check_double_backward(lambda a: a.sum(0) * 3, [SMOOTH]) == "right"


class TestForwardMode:
    @pytest.mark.parametrize(("fn", "inputs"), RIGHT)
    def test_accepts_right_operators(self, fn, inputs):
        assert testing.check_forward_mode(fn, inputs, required=True) == "supported"

    def test_accepts_a_refusal(self):
        assert testing.check_forward_mode(SecondOrder.apply, [SMOOTH]) == "refused"
        with pytest.raises(AssertionError, match="must be supported"):
            testing.check_forward_mode(SecondOrder.apply, [SMOOTH], required=True)

    def test_catches_a_silently_dropped_tangent(self):
        with pytest.raises(AssertionError, match="silently dropped the tangent"):
            testing.check_forward_mode(cube_sum, [SMOOTH])
        assert testing.check_forward_mode(right_cube, [SMOOTH], required=True) == "supported"

    def test_catches_a_wrong_tangent(self):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(a):
                return a**2

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.save_for_backward(inputs[0])
                ctx.save_for_forward(inputs[0])

            @staticmethod
            def backward(ctx, grad):
                return 2 * grad * ctx.saved_tensors[0]

            @staticmethod
            def jvp(ctx, tangent):
                return tangent * ctx.saved_tensors[0]

        with pytest.raises(AssertionError, match="is wrong"):
            testing.check_forward_mode(Wrong.apply, [SMOOTH])
