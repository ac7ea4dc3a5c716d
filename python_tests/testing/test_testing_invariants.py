"""The behaviour checks accept right operators and catch each planted bug."""

import pytest
import torch
from hypothesis import given
from planted_operators import (
    ArbitraryVector,
    CotangentStrideBlind,
    ForgottenFactor,
    NoVmap,
    SecondOrder,
    StrideBlind,
    WritesToArgument,
    WrongVmap,
    basis_dependent,
    cube_sum,
    depends_on_history,
    detached_output,
    jitter,
    not_contiguous,
    raises_for_a_zero_element,
    right_cube,
    scaled_by_the_whole_batch,
    spectral_extremes,
)

from immunize_ext import testing
from immunize_ext.testing import strategies

testing.register_profiles()


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


SMOOTH = randn(5, 4, seed=1)
BATCH = randn(3, 4, 5, seed=2)
SYMMETRIC = SMOOTH.mT @ SMOOTH


def diag(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


class TestTransforms:
    @pytest.mark.parametrize(
        ("fn", "inputs"),
        [
            (torch.linalg.svdvals, [SMOOTH]),
            (torch.linalg.solve, [SYMMETRIC, randn(4, 2)]),
            (lambda a, b: (a @ b, a.sum()), [SMOOTH, randn(4, 3)]),
            (right_cube, [BATCH]),
        ],
    )
    def test_accepts_right_operators(self, fn, inputs):
        testing.check_transforms(fn, inputs)

    def test_compile(self):
        testing.check_transforms(right_cube, [SMOOTH], compile="aot_eager")

        with pytest.raises(AssertionError, match=r"torch\.compile.*must work"):
            testing.check_transforms(breaks_the_graph, [SMOOTH], compile="aot_eager")

    def test_catches_a_missing_or_wrong_vmap_rule(self):
        with pytest.raises(AssertionError, match="vmap must work"):
            testing.check_transforms(NoVmap.apply, [SMOOTH])
        with pytest.raises(AssertionError, match="vmap, sample 1: output 0"):
            testing.check_transforms(WrongVmap.apply, [SMOOTH])

    def test_catches_an_operator_that_func_grad_cannot_take(self):
        with pytest.raises(AssertionError, match=r"torch\.func\.grad must work"):
            testing.check_transforms(cube_sum, [SMOOTH])

    def test_given_samples(self):
        testing.check_transforms(
            torch.linalg.inv, [SYMMETRIC], samples=[[SYMMETRIC], [SYMMETRIC.mT + diag(1, 2, 3, 4)]]
        )


def breaks_the_graph(a):
    """Bug: leaves the graph when it is traced."""
    torch._dynamo.graph_break()
    return right_cube(a)


class TestLayouts:
    @pytest.mark.parametrize(
        ("fn", "inputs"),
        [
            (torch.linalg.svdvals, [SMOOTH]),
            (torch.linalg.svdvals, [BATCH]),
            (lambda a, b: (a @ b, a.sum(-1)), [SMOOTH, randn(4, 3)]),
            (lambda a: a.sum(-1), [SMOOTH]),
            (lambda a: a * 3, [SMOOTH]),
        ],
    )
    def test_accepts_right_operators(self, fn, inputs):
        testing.check_layouts(fn, inputs)

    def test_catches_ignored_strides(self):
        with pytest.raises(AssertionError, match="transposed input 0"):
            testing.check_layouts(StrideBlind.apply, [SMOOTH], layouts=["transposed"])
        with pytest.raises(AssertionError, match="sliced input 0"):
            testing.check_layouts(StrideBlind.apply, [SMOOTH], layouts=["sliced"])
        with pytest.raises(AssertionError, match="offset input 0"):
            testing.check_layouts(StrideBlind.apply, [SMOOTH], layouts=["offset"])

    def test_catches_ignored_strides_of_the_incoming_gradient(self):
        with pytest.raises(AssertionError, match="stride 0"):
            testing.check_layouts(CotangentStrideBlind.apply, [SMOOTH])

    def test_catches_a_changed_argument(self):
        with pytest.raises(AssertionError, match="must leave its arguments alone, got 20"):
            testing.check_layouts(WritesToArgument.apply, [SMOOTH])

    def test_catches_an_output_that_is_not_contiguous(self):
        testing.check_layouts(not_contiguous, [SMOOTH])
        with pytest.raises(AssertionError, match="must be contiguous"):
            testing.check_layouts(not_contiguous, [SMOOTH], contiguous_outputs=True)


class TestBatchIndependence:
    @pytest.mark.parametrize(
        "fn", [torch.linalg.matrix_norm, right_cube, lambda a: (a * a).sum((-1, -2))]
    )
    def test_accepts_right_operators(self, fn):
        found = testing.check_batch_independence(fn, [BATCH])
        assert found["zero"] == "independent"

    def test_an_operator_may_refuse_nan(self):
        def refuses(a):
            if not bool(torch.isfinite(a).all()):
                raise ValueError("a must be finite")
            return right_cube(a)

        assert testing.check_batch_independence(refuses, [BATCH])["nan"] == "raised"
        with pytest.raises(AssertionError, match="add 'nan' to may_raise"):
            testing.check_batch_independence(refuses, [BATCH], may_raise=())

    def test_catches_a_scale_shared_by_the_batch(self):
        with pytest.raises(AssertionError, match="must be bitwise equal"):
            testing.check_batch_independence(scaled_by_the_whole_batch, [BATCH])

    def test_catches_a_degenerate_element_that_takes_the_batch_down(self):
        with pytest.raises(AssertionError, match="whose element 0 is zero"):
            testing.check_batch_independence(raises_for_a_zero_element, [BATCH])

    def test_catches_an_order_dependence(self):
        def depends_on_position(a):
            factors = torch.linspace(1, 2, a.shape[0], dtype=a.dtype)
            return right_cube(a) * factors

        with pytest.raises(AssertionError, match="reversed batch"):
            testing.check_batch_independence(depends_on_position, [BATCH])

    def test_catches_a_dependence_on_the_batch_size(self):
        def depends_on_size(a):
            return right_cube(a) * a.shape[0]

        with pytest.raises(AssertionError, match="element 0 alone"):
            testing.check_batch_independence(depends_on_size, [BATCH])
        testing.check_batch_independence(depends_on_size, [BATCH], singles="skip")

    def test_shared_inputs(self):
        # Not a @ b: BLAS picks its kernel by the number of rows, and with it the order of sums.
        found = testing.check_batch_independence(
            lambda a, b: a * b, [BATCH, randn(4, 5)], batched=[0], singles="bitwise"
        )
        assert set(found) == {"zero", "rank_one", "huge", "tiny", "nan"}

    def test_wrong_use_is_named(self):
        with pytest.raises(ValueError, match="leading dimension of at least 2"):
            testing.check_batch_independence(right_cube, [BATCH[:1]])
        with pytest.raises(AssertionError, match="must keep the leading dimension"):
            testing.check_batch_independence(torch.sum, [BATCH])


class TestDeterminism:
    def test_accepts_right_operators(self):
        testing.check_determinism(torch.linalg.svdvals, [BATCH])
        testing.check_determinism(SecondOrder.apply, [BATCH])

    def test_catches_a_last_bit(self):
        with pytest.raises(AssertionError, match="must be bitwise equal"):
            testing.check_determinism(depends_on_history, [SMOOTH])

    def test_nan_equals_itself(self):
        testing.check_determinism(lambda a: a.sum() * float("nan"), [SMOOTH])


class TestEulerIdentity:
    @given(strategies.mixed_batches())
    def test_accepts_right_extremes_of_any_kind(self, sample):
        testing.check_euler_identity(spectral_extremes, [sample.matrix], 1)

    @given(strategies.badly_scaled())
    def test_any_scale(self, sample):
        testing.check_euler_identity(spectral_extremes, [sample.matrix], 1)

    def test_other_degrees(self):
        testing.check_euler_identity(lambda a: a.square().sum((-1, -2)), [BATCH], 2)
        testing.check_euler_identity(lambda a: 1 / a.square().sum((-1, -2)), [BATCH], -2)
        testing.check_euler_identity(torch.linalg.cond, [SMOOTH], 0)
        testing.check_euler_identity(lambda b, a: (a * b).sum(), [SMOOTH, SMOOTH], 1, wrt=1)

    def test_catches_a_forgotten_factor(self):
        with pytest.raises(AssertionError, match="must be degree 2 x value"):
            testing.check_euler_identity(lambda a: ForgottenFactor.apply(a)[0], [BATCH], 2)

    def test_catches_jitter_that_no_derivative_sees(self):
        testing.check_against_finite_differences(jitter, [SMOOTH])
        with pytest.raises(AssertionError, match="must be degree 1 x value"):
            testing.check_euler_identity(jitter, [SMOOTH], 1)

    def test_catches_a_zeroed_gradient_in_one_element(self):
        def dead(a):
            norms = torch.linalg.matrix_norm(a)
            keep = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
            return norms.detach() + keep * (norms - norms.detach())

        with pytest.raises(AssertionError, match=r"batch index \(1,\)"):
            testing.check_euler_identity(dead, [BATCH], 1)

    def test_catches_a_lost_graph(self):
        with pytest.raises(AssertionError, match="output 1 must carry a graph"):
            testing.check_euler_identity(detached_output, [SMOOTH], 1)

    def test_wrong_use_is_named(self):
        with pytest.raises(ValueError, match="one entry per matrix"):
            testing.check_euler_identity(torch.linalg.svdvals, [SMOOTH], 1)


class TestOrthogonalInvariance:
    @given(strategies.near_multiple(exact=True))
    def test_accepts_the_mean_at_any_multiplicity(self, sample):
        testing.check_orthogonal_invariance(spectral_extremes, [sample.matrix], rtol=1e-11)

    @given(strategies.near_multiple(which="max", multiplicities=(3,), exact=True))
    def test_catches_an_arbitrary_vector_at_any_triple_extreme(self, sample):
        with pytest.raises(AssertionError, match="gradient at P A R"):
            testing.check_orthogonal_invariance(
                lambda a: ArbitraryVector.apply(a)[0], [sample.matrix], rtol=1e-11
            )

    def test_catches_a_function_of_the_basis(self):
        with pytest.raises(AssertionError, match="output 0 at P A R"):
            testing.check_orthogonal_invariance(basis_dependent, [SMOOTH])
