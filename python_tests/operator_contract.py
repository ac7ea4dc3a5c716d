"""What every public operator promises, asked once.

A test file names its operator, samples, references and refusals in a subclass of
:class:`OperatorContract` and gets the tests below; the file itself holds what only that operator
promises.  A test that has no meaning for an operator is set to None there, with the reason.

    class TestRWell(SpectralContract):
        function = staticmethod(r_well)
        ...

Tests that take ``route`` run on the compiled kernels and on the torch-only route (ops/conftest.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from sample_inputs import (
    ROUTES,
    column_major,
    gaussian,
    symmetric_clusters,
    taking_route,
    tensors_in,
)
from torch import Tensor

from immunize_ext import _load, reference, testing

Inputs = tuple[Tensor, ...]
HALF_TYPES = (torch.float16, torch.bfloat16)

# Matrices (*, n, p) with simple extremes.
SIMPLE_MATRICES: dict[str, Inputs] = {
    "wide": (gaussian(3, 5, seed=11),),
    "tall": (gaussian(5, 3, seed=12),),
    "square": (gaussian(4, 4, seed=13),),
    "batch": (gaussian(2, 3, 2, seed=16),),
}
ONE_VALUE: dict[str, Inputs] = {
    "one": (gaussian(1, 1, seed=14),),
    "row": (gaussian(1, 4, seed=15),),
}


class Refusal(NamedTuple):
    """Arguments of one call that must be refused, and what the message says."""

    arguments: tuple[Any, ...]
    message: str
    options: Mapping[str, Any] = {}


def bad_matrices(argument: str, *more: Refusal) -> list[Refusal]:
    """What is no matrix to any operator that takes ``argument`` (*, n, p)."""
    return [
        Refusal((torch.zeros(3),), f"{argument} must have shape"),
        Refusal((torch.tensor(1.0),), f"{argument} must have shape"),
        Refusal((torch.zeros(0, 3),), "n >= 1"),
        Refusal((torch.zeros(2, 3, 0),), "n >= 1"),
        *(
            Refusal((torch.zeros(2, 2, dtype=dtype),), f"{argument} must .*floating-point dtype")
            for dtype in (torch.int64, torch.bool, torch.complex64)
        ),
        *more,
    ]


def bad_policies(matrix: Tensor) -> list[Refusal]:
    """Tolerances and rank policies that no spectral operator takes."""
    choice, tolerance = "must be 'numerical' or 'full', got", r"must be in \[0, 1\)"
    return [
        Refusal((matrix,), f"rank {choice} 'half'", {"rank": "half"}),
        Refusal((matrix,), f"rank {choice} 3", {"rank": 3}),
        *(
            Refusal((matrix,), f"{name} {tolerance}", {name: value})
            for name in ("rank_rtol", "cluster_rtol")
            for value in (-1e-9, 1.0, float("nan"), float("inf"))
        ),
    ]


class OperatorContract:
    """Values, derivatives, transforms, memory and refusals of one public operator.

    Attributes:
        function: the operator as users call it.
        name: of the operator in its messages; default the name of ``function``.
        argument: the argument that messages about non-finite entries name.
        smooth: inputs where every output is twice differentiable.
        kinks: inputs where the first derivative is a subgradient and a second one must be refused.
        degenerate: more inputs for values and first derivatives: zero, rank one.
        node: part of the name of the autograd node that the derivative comes from.
        large: inputs of more than one block of rows, for determinism.
        value_rtol: of values against the reference, on ``smooth``.
        gradient_rtol: of gradients against reference and composition, on ``smooth``.
        second_rtol: of second derivatives against the reference, on ``smooth``.
        routes_rtol: between kernels and torch-only route, of values and gradients of order 1.
        vmap_rtol: of values under vmap; 0 where it is the same kernel on a batch.
        forward_mode: "supported" or "refused".
        poisons: what a degenerate element of a batch does: leave the others alone, or raise.
        independent_routes: the routes on which the rest of a batch changes no bit of an element.
        moved: position of the input that second derivatives of mixed modes are taken of.
        batched: takes one more leading dimension on all inputs at once.
        batched_gradients: a Jacobian may be taken for all rows at once, by vmap over backward.
        contiguous_outputs: no output has the strides of a column-major argument.
        layout_rtol: of results for other strides; default 1000 max side eps.
        finite_message: what is said of a non-finite entry; default names operator and argument.
        autocast_inputs: dtypes of inputs that autocast must not touch.
        refusals: calls that must raise ``ValueError``, starting with the name of the operator.
    """

    function: ClassVar[Callable[..., Any]]
    name: ClassVar[str] = ""
    argument: ClassVar[str] = "a"
    smooth: ClassVar[Mapping[str, Inputs]]
    kinks: ClassVar[Mapping[str, Inputs]] = {}
    degenerate: ClassVar[Mapping[str, Inputs]] = {}
    node: ClassVar[str]
    large: ClassVar[Inputs]
    value_rtol: ClassVar[float] = 1e-11
    gradient_rtol: ClassVar[float] = 1e-11
    second_rtol: ClassVar[float] = 1e-10
    routes_rtol: ClassVar[float] = 1e-11
    vmap_rtol: ClassVar[float] = 0.0
    forward_mode: ClassVar[str] = "supported"
    poisons: ClassVar[Mapping[Any, str]] = {
        "zero": "independent",
        "rank_one": "independent",
        "nan": "raised",
    }
    independent_routes: ClassVar[Sequence[str]] = ROUTES
    moved: ClassVar[int] = 0
    batched: ClassVar[bool] = True
    batched_gradients: ClassVar[bool] = True
    contiguous_outputs: ClassVar[bool] = True
    layout_rtol: ClassVar[float | None] = None
    finite_message: ClassVar[str] = ""
    autocast_inputs: ClassVar[Sequence[torch.dtype]] = (
        torch.float32,
        torch.float64,
        torch.bfloat16,
    )
    refusals: ClassVar[Sequence[Refusal]] = ()

    # --- what a subclass may say in code ----------------------------------------------------------

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The differentiable outputs as a function of tensors alone."""
        return tuple(y for y in tensors_in(self.call(*inputs)) if y.dtype.is_floating_point)

    def call(self, *inputs: Tensor) -> Any:
        """All outputs; an operator that takes more than tensors has its own."""
        return type(self).function(*inputs)

    def sample(self, *batch: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Inputs:
        """Random inputs with these leading dimensions."""
        return (gaussian(*batch, 4, 3, seed=seed, dtype=dtype),)

    def batches(self) -> Sequence[Inputs]:
        """Inputs of four elements, one list for every kind of shape that takes another path."""
        return [self.sample(4, seed=11)]

    def truth(self, *inputs: Tensor) -> Sequence[np.ndarray]:
        """Every output by the reference."""
        raise NotImplementedError

    def true_gradients(self, inputs: Inputs, cotangents: Sequence[Tensor]) -> Sequence[np.ndarray]:
        """Gradients of sum <cotangent, output> by the reference, one per input."""
        raise NotImplementedError

    def true_hessian_product(self, a: Tensor, direction: Tensor) -> Sequence[np.ndarray]:
        """Second derivative of every output of one matrix along a direction, by the reference."""
        raise NotImplementedError

    def composition(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The outputs as a plain composition that torch differentiates itself."""
        raise NotImplementedError

    # --- parameters -------------------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Samples, kinks and refusals of the subclass as parameters."""
        refusals = {f"{k}: {r.message}": r for k, r in enumerate(self.refusals)}
        for argument, cases in (
            ("case", self.smooth),
            ("kink", self.kinks),
            ("anywhere", {**self.smooth, **self.kinks, **self.degenerate}),
            ("refusal", refusals),
        ):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, list(cases.values()), ids=list(cases))

    @pytest.fixture(params=[1, 2])
    def threads(self, request: pytest.FixtureRequest) -> Iterator[int]:
        """Run with this many threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(request.param)
        yield request.param
        torch.set_num_threads(before)

    # --- values -----------------------------------------------------------------------------------

    def test_value_equals_the_reference(self, route, anywhere):
        for found, truth in zip(self.outputs(*anywhere), self.truth(*anywhere), strict=True):
            np.testing.assert_allclose(found.numpy(), truth, rtol=self.value_rtol)

    @pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,), (2, 0), (0, 2)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF_TYPES])
    def test_batches_and_dtypes(self, route, batch, dtype):
        inputs = self.sample(*batch, dtype=dtype)
        for found in tensors_in(self.call(*inputs)):
            assert found.shape[: len(batch)] == batch
            assert found.device == inputs[0].device
            assert found.dtype == (dtype if found.dtype.is_floating_point else torch.int64)
        if inputs[0].numel():
            found, truth = self.outputs(*inputs), self.truth(*(x.double() for x in inputs))
            rtol = torch.finfo(dtype).eps + 1e-9
            for value, right in zip(found, truth, strict=True):
                np.testing.assert_allclose(value.double().numpy(), right, rtol=rtol)

    def test_routes_agree(self, anywhere):
        found = []
        for route in ROUTES:
            with taking_route(route):
                leaves = [x.clone().requires_grad_() for x in anywhere]
                values = self.outputs(*leaves)
                grads = torch.autograd.grad(values, leaves, [torch.ones_like(y) for y in values])
                found.append((*tensors_in(self.call(*anywhere)), *grads))
        for kernel, composite in zip(*found, strict=True):
            assert kernel.dtype == composite.dtype
            rtol = self.routes_rtol
            torch.testing.assert_close(kernel, composite, rtol=rtol, atol=rtol)

    # --- derivatives ------------------------------------------------------------------------------

    def test_gradcheck(self, route, case):
        """Also for a batch of cotangents, as ``torch.autograd`` takes Jacobians."""
        leaves = [x.clone().requires_grad_() for x in case]
        assert torch.autograd.gradcheck(
            self.outputs, leaves, rtol=1e-4, check_batched_grad=self.batched_gradients
        )

    def test_gradgradcheck(self, route, case):
        leaves = [x.clone().requires_grad_() for x in case]
        # Entry by entry is long for several inputs and their cotangents: one direction each.
        fast = len(leaves) > 1
        assert torch.autograd.gradgradcheck(self.outputs, leaves, rtol=1e-4, fast_mode=fast)

    def test_gradient_equals_the_reference(self, route, anywhere):
        values = self.outputs(*anywhere)
        weights = [gaussian(*y.shape, seed=30 + k) for k, y in enumerate(values)]
        found = self._gradients(self.outputs, anywhere, weights)
        for got, right in zip(found, self.true_gradients(anywhere, weights), strict=True):
            truth = torch.from_numpy(np.asarray(right))
            testing.assert_gradients_close(got, truth, rtol=self.gradient_rtol)

    def test_gradient_equals_the_one_through_the_composition(self, route, case):
        """Torch's own derivative of the plain formula; at smooth points both must agree."""
        weights = [gaussian(*y.shape, seed=30 + k) for k, y in enumerate(self.outputs(*case))]
        found = self._gradients(self.outputs, case, weights)
        truth = self._gradients(self.composition, case, weights)
        for got, right in zip(found, truth, strict=True):
            testing.assert_gradients_close(got, right, rtol=self.gradient_rtol)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
    def test_low_precision_equals_float64(self, route, case, dtype):
        testing.check_float32_against_float64(self.outputs, case, dtype=dtype)

    def test_second_derivative_equals_the_reference(self, route, case):
        (a,) = case
        direction = gaussian(*a.shape, seed=18)
        truth = self.true_hessian_product(a, direction)
        for which, right in enumerate(truth):
            leaf = a.clone().requires_grad_()
            value = self.outputs(leaf)[which]
            (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            (found,) = torch.autograd.grad((grad * direction).sum(), leaf)
            testing.assert_gradients_close(found, torch.from_numpy(right), rtol=self.second_rtol)

    def test_second_derivative_is_refused_at_kinks(self, route, kink):
        for which in self.kinked_outputs():
            testing.check_double_backward(self.outputs, kink, outputs=[which], expect="raises")

    def kinked_outputs(self) -> Sequence[int]:
        """Which outputs are clusters at ``kinks``."""
        return range(len(self.outputs(*next(iter(self.smooth.values())))))

    def test_third_derivative_is_refused(self):
        def third() -> None:
            leaves = [x.clone().requires_grad_() for x in next(iter(self.smooth.values()))]
            grad = torch.autograd.grad(self.outputs(*leaves)[0].sum(), leaves, create_graph=True)[0]
            total = grad.square().sum() + grad.sum()
            second = torch.autograd.grad(total, leaves, create_graph=True)[0]
            torch.autograd.grad(second.sum(), leaves)

        with pytest.raises(NotImplementedError, match="third derivatives"):
            third()

    def test_forward_mode(self, case):
        required = self.forward_mode == "supported"
        found = testing.check_forward_mode(self.outputs, case, required=required)
        assert found == self.forward_mode

    def test_outputs_that_are_not_used_contribute_nothing(self, route, case):
        values = self.outputs(*case)
        for which in range(len(values)):
            alone = self._gradients(lambda *x, w=which: self.outputs(*x)[w], case, values[which])
            weights = [y * float(k == which) for k, y in enumerate(values)]
            for one, all_of in zip(
                alone, self._gradients(self.outputs, case, weights), strict=True
            ):
                torch.testing.assert_close(one, all_of, rtol=1e-12, atol=1e-12)

    def test_graph_can_be_used_twice(self, route, case):
        leaves = [x.clone().requires_grad_() for x in case]
        first, second = self.outputs(*leaves), self.outputs(*(2 * x for x in leaves))
        total = sum(y.square().sum() for y in (*first, *second))
        once = torch.autograd.grad(total, leaves, retain_graph=True)
        for a, b in zip(once, torch.autograd.grad(total, leaves), strict=True):
            assert torch.equal(a, b)

    def test_own_derivative_is_used(self):
        """The node that we wrote; no decomposition that torch differentiates on its own."""
        leaves = [x.clone().requires_grad_() for x in next(iter(self.smooth.values()))]
        names, nodes = set(), [y.grad_fn for y in self.outputs(*leaves)]
        while nodes:
            node = nodes.pop()
            names.add(node.name())
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        # Without the compiled part the operators that are differentiated in C++ are compositions.
        ours = (self.node,) if _load.available() else (self.node, "Values")
        assert any(node in name for node in ours for name in names), names
        assert not any(part in name for name in names for part in ("Svd", "Eigh", "Qr")), names

    # --- transforms -------------------------------------------------------------------------------

    def test_meta_tensors_tell_shapes_and_dtypes(self, anywhere):
        """As models are planned without memory. Raw operators and strides: test_registration.py."""
        real = tensors_in(self.call(*anywhere))
        told = tensors_in(self.call(*(x.to("meta") for x in anywhere)))
        for found, planned in zip(real, told, strict=True):
            assert planned.device.type == "meta"
            assert (found.shape, found.dtype) == (planned.shape, planned.dtype)

    def test_second_derivatives_by_every_order_of_modes(self, case):
        """Reverse over reverse is the truth; every other order gives the same or refuses."""
        a = case[self.moved]
        direction = gaussian(*a.shape, seed=18)
        for which, value in enumerate(self.outputs(*case)):
            weight = gaussian(*value.shape, seed=19)

            def f(x: Tensor, which: int = which, weight: Tensor = weight) -> Tensor:
                inputs = list(case)
                inputs[self.moved] = x
                return (self.outputs(*inputs)[which] * weight).sum()

            def slope(x: Tensor) -> Tensor:
                return (torch.func.grad(f)(x) * direction).sum()

            def tangent(x: Tensor) -> Tensor:
                return torch.func.jvp(f, (x,), (direction,))[1]

            truth = torch.func.grad(slope)(a)
            orders = {
                "forward over reverse": lambda: torch.func.jvp(
                    torch.func.grad(f), (a,), (direction,)
                )[1],
                "reverse over forward": lambda: torch.func.grad(tangent)(a),
                "forward over forward": lambda: torch.func.jvp(tangent, (a,), (direction,))[1],
            }
            for name, order in orders.items():
                try:
                    found = order()
                except NotImplementedError:
                    continue
                right = truth if found.shape == a.shape else (truth * direction).sum()
                size = truth.norm() * direction.norm() if found.dim() == 0 else None
                testing.assert_gradients_close(
                    found, right, rtol=1e-9, cancellation_scale=size, context=name
                )

    @pytest.mark.usefixtures("fresh_compiler")
    def test_transforms(self, case):
        """vmap, ``torch.func.grad``, vmap of it, and compile with one graph, forward and back."""
        testing.check_transforms(self.outputs, case, compile="aot_eager")

    def test_vmap_over_any_axis_and_nested(self):
        inputs = self.sample(2, 2)
        truth = self.outputs(*(x.flatten(0, 1) for x in inputs))
        nested = torch.func.vmap(torch.func.vmap(self.outputs))(*inputs)
        last = torch.func.vmap(self.outputs, in_dims=-1)(
            *(x.flatten(0, 1).movedim(0, -1) for x in inputs)
        )
        for a, b, right in zip(nested, last, truth, strict=True):
            torch.testing.assert_close(a.flatten(0, 1), right, rtol=self.vmap_rtol, atol=0)
            torch.testing.assert_close(b, right, rtol=self.vmap_rtol, atol=0)

    def test_jacobian_and_hessian(self):
        """Row by row what backward and the reference say."""
        (a,) = self.sample()
        values = self.outputs(a)
        jacobians = torch.func.jacrev(self.outputs)(a)
        hessians = torch.func.hessian(self.outputs)(a)
        for which, value in enumerate(values):
            (grad,) = self._gradients(
                lambda x, w=which: self.outputs(x)[w], (a,), value.new_ones(())
            )
            testing.assert_gradients_close(jacobians[which], grad, rtol=1e-11)
        for entry in range(a.numel()):
            direction = torch.zeros_like(a)
            direction.view(-1)[entry] = 1.0
            for hessian, right in zip(
                hessians, self.true_hessian_product(a, direction), strict=True
            ):
                found = hessian.reshape(a.numel(), -1)[:, entry].reshape(a.shape)
                testing.assert_gradients_close(found, torch.from_numpy(right), rtol=1e-9)

    @pytest.mark.parametrize("dtype", HALF_TYPES)
    def test_autocast_changes_nothing(self, route, dtype):
        """Neither values nor first and second gradients, computed inside the region or outside."""
        for of in self.autocast_inputs:
            inputs = self.sample(dtype=of)
            truth = self._run(inputs, None, None)
            if of in HALF_TYPES:
                truth = truth[: -len(inputs)]  # the gradient in between is rounded or is not
            for forward, backward in ((dtype, None), (dtype, dtype), (None, dtype)):
                found = self._run(inputs, forward, backward)
                for got, right in zip(found, truth, strict=of not in HALF_TYPES):
                    assert got.dtype == right.dtype
                    assert torch.equal(got, right)

    # --- memory, determinism, settings ------------------------------------------------------------

    def test_layouts(self, route, case):
        """Column-major, sliced, offset and expanded views, of gradients too; nothing is written."""
        for inputs in (case, tuple(x.float() for x in case)):
            wide = inputs[0].dtype == torch.float64
            testing.check_layouts(
                self.outputs,
                inputs,
                batched=self.batched,
                contiguous_outputs=self.contiguous_outputs,
                rtol=self.layout_rtol if wide else None,
            )

    def test_column_major_input_is_no_other_matrix(self, route):
        inputs = self.sample(2)
        for a, b in zip(
            self.outputs(*inputs), self.outputs(*map(column_major, inputs)), strict=True
        ):
            assert torch.equal(a, b)

    def test_determinism(self, route, threads):
        testing.check_determinism(self.outputs, self.large)
        for kink in self.kinks.values():
            testing.check_determinism(self.outputs, kink)

    def skip_where_batches_change_bits(self):
        """Without the compiled part its route is that of the composites."""
        if not _load.available() and "composite" not in self.independent_routes:
            pytest.skip("a composite decides for a whole batch; the compiled part promises bits")

    def test_batch_independence(self):
        """A degenerate element leaves the others alone bit for bit, whatever the shape."""
        raising = tuple(p for p, what in self.poisons.items() if what == "raised")
        self.skip_where_batches_change_bits()
        for route, inputs in itertools.product(self.independent_routes, self.batches()):
            with taking_route(route):
                outcome = testing.check_batch_independence(
                    self.outputs, inputs, poisons=tuple(self.poisons), may_raise=raising
                )
            assert outcome == self.poisons

    def test_arguments_and_random_state_stay_as_they_are(self, route, case):
        """The other settings of torch: ops/conftest.py."""
        copies, state = [x.clone() for x in case], torch.get_rng_state()
        self._run(case, None, None)
        assert torch.equal(state, torch.get_rng_state())
        for found, before in zip(case, copies, strict=True):
            assert torch.equal(found, before)

    def test_matmul_precision_of_the_user_does_not_matter(self, route):
        inputs = self.sample(dtype=torch.float32)
        truth, before = self._run(inputs, None, None), torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            loose = self._run(inputs, None, None)
        finally:
            torch.set_float32_matmul_precision(before)
        for a, b in zip(loose, truth, strict=True):
            assert torch.equal(a, b)

    def test_parameters_and_calls_without_gradients(self, route, case):
        truth = self.outputs(*case)
        parameters = [torch.nn.Parameter(x) for x in case]
        with torch.no_grad():
            plain = self.outputs(*parameters)
        with torch.inference_mode():
            inference = self.outputs(*case)
        for with_graph, a, b, right in zip(
            self.outputs(*parameters), plain, inference, truth, strict=True
        ):
            assert with_graph.requires_grad
            assert not a.requires_grad
            torch.testing.assert_close(with_graph.detach(), right)
            torch.testing.assert_close(a, right)
            assert torch.equal(b, right)

    # --- refusals ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_non_finite_input_is_named(self, route, bad, dtype):
        for place in (0, 16, -1):
            inputs = self.sample(3, dtype=dtype)
            inputs[0].view(-1)[place] = bad
            with pytest.raises(ValueError, match=self.finite_message or self._finite()):
                self.call(*inputs)

    def test_bad_arguments_are_named(self, route, refusal):
        pattern = f"^{self._name()}: .*{refusal.message}"
        with pytest.raises(ValueError, match=pattern):
            type(self).function(*refusal.arguments, **refusal.options)

    def test_something_that_is_no_tensor_is_refused(self):
        with pytest.raises(TypeError, match=rf"{self.argument} must be a torch\.Tensor, got ndarr"):
            type(self).function(np.eye(2))

    # --- helpers ----------------------------------------------------------------------------------

    def _finite(self) -> str:
        return f"^{self._name()}: {self.argument} must be finite"

    def _name(self) -> str:
        return self.name or type(self).function.__name__

    @staticmethod
    def _gradients(
        function: Callable[..., Any], inputs: Inputs, weights: Sequence[Tensor] | Tensor
    ) -> list[Tensor]:
        """Gradients of sum <weight, output>; zeros for an input that does not matter."""
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        found = torch.autograd.grad(function(*leaves), leaves, weights, allow_unused=True)
        return [
            torch.zeros_like(x) if grad is None else grad
            for x, grad in zip(leaves, found, strict=True)
        ]

    def _run(
        self, inputs: Inputs, forward: torch.dtype | None, backward: torch.dtype | None
    ) -> list[Tensor]:
        """Values, gradients and second gradients, each part under autocast to a dtype or not."""
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", dtype=forward or torch.bfloat16, enabled=forward is not None):
            values = self.outputs(*leaves)
        total = torch.stack([y.float().square().sum() for y in values]).sum()
        with torch.autocast("cpu", dtype=backward or torch.bfloat16, enabled=backward is not None):
            grads = torch.autograd.grad(total, leaves, create_graph=True)
            squares = torch.stack([g.float().square().sum() for g in grads]).sum()
            second = torch.autograd.grad(squares, leaves)
        return [y.detach() for y in (*values, *grads, *second)]


class SpectralContract(OperatorContract):
    """Functions of one matrix whose references go by the same name.

    Attributes:
        which: names of the outputs where the reference has several.
        degree: every output is homogeneous of this degree, or a degree per output.
    """

    smooth = SIMPLE_MATRICES
    kinks: ClassVar[Mapping[str, Inputs]] = {
        "clusters": (symmetric_clusters(),),
        "rows in another order": (symmetric_clusters().flip(0),),
    }
    large = (gaussian(5, 20, 30),)
    which: ClassVar[Sequence[str]] = ()
    degree: ClassVar[int | Sequence[int]]

    def truth(self, *inputs: Tensor) -> Sequence[np.ndarray]:
        """Values by the reference of the same name."""
        found = getattr(reference, self._name())(inputs[0].numpy())
        return found[: len(self.which)] if self.which else (found,)

    def true_gradients(self, inputs: Inputs, cotangents: Sequence[Tensor]) -> Sequence[np.ndarray]:
        """Sum of the gradients by the reference, weighted."""
        found = getattr(reference, f"{self._name()}_gradient")(inputs[0].numpy())
        parts = found if self.which else (found,)
        return [sum(w.numpy()[..., None, None] * g for w, g in zip(cotangents, parts, strict=True))]

    def batches(self) -> Sequence[Inputs]:
        """Tall, wide and square matrices."""
        return [(gaussian(4, *shape, seed=11),) for shape in ((5, 3), (3, 5), (4, 4))]

    def true_hessian_product(self, a: Tensor, direction: Tensor) -> Sequence[np.ndarray]:
        """Products by the reference, one per output."""
        product = getattr(reference, f"{self._name()}_hvp")
        options = [{"which": which} for which in self.which] or [{}]
        return [product(a.numpy(), direction.numpy(), **option) for option in options]

    @pytest.mark.parametrize("exponent", [-100, -30, 30, 100])
    def test_powers_of_two_scale_exactly(self, route, exponent):
        """Nothing inside over- or underflows before the result does, and no bit is lost."""
        (a,) = self.sample()
        scaled_a = a * 2.0**exponent
        unit, scaled = self.outputs(a), self.outputs(scaled_a)
        degrees = [self.degree] * len(unit) if isinstance(self.degree, int) else self.degree
        for which, degree in enumerate(degrees):
            assert torch.equal(scaled[which], unit[which] * 2.0 ** (degree * exponent))

            def one(x: Tensor, which: int = which) -> Tensor:
                return self.outputs(x)[which]

            (grad,) = self._gradients(one, (a,), torch.ones_like(unit[which]))
            (found,) = self._gradients(one, (scaled_a,), torch.ones_like(unit[which]))
            truth = grad * 2.0 ** ((degree - 1) * exponent)
            testing.assert_gradients_close(found, truth, rtol=1e-13)
