"""Every raw operator of ``torch.ops.immunize_ext``: schema, fake, autograd, strides, refusals."""

from __future__ import annotations

import pytest
import torch
from sample_inputs import (
    DIFFERENTIABLE,
    POLICY,
    RAW_OPERATORS,
    WITHOUT_DERIVATIVE,
    WITHOUT_FAKE,
    cholesky_of_gram,
    gaussian,
    map_tensors,
    sample_inputs,
    tensors_in,
)
from torch import Tensor

from immunize_ext import testing
from immunize_ext.ops.operators import OPERATORS

TRACED = {
    *("wide", "tall", "square", "batch", "empty", "clusters", "column major", "bfloat16"),
    *("well, wide", "well, batch", "ill, tall", "ill, k given", "hard", "repeated", "concepts"),
    *("values", "matrix", "matrix, few samples"),
}

every_operator = pytest.mark.parametrize("operator", RAW_OPERATORS)
every_sample = pytest.mark.parametrize(
    ("operator", "index"),
    [(operator, k) for operator in RAW_OPERATORS for k in range(len(sample_inputs(operator)))],
    ids=[f"{op}-{s.name}" for op in RAW_OPERATORS for s in sample_inputs(op)],
)


def operator_of(name: str):
    return getattr(torch.ops.immunize_ext, name).default


def floating_leaves(arguments):
    return map_tensors(
        lambda t: t.clone().requires_grad_() if t.dtype.is_floating_point else t, arguments
    )


# --- schema ---------------------------------------------------------------------------------------


def test_every_registered_operator_has_samples():
    """A new operator fails here until sample_inputs.py knows it."""
    assert set(OPERATORS) == set(RAW_OPERATORS)


@every_operator
def test_schema_has_names_and_no_aliases(operator):
    """Arguments by name, and no output that is, or writes to, an input."""
    schema = operator_of(operator)._schema
    assert all(argument.name for argument in schema.arguments)
    assert all(argument.alias_info is None for argument in schema.arguments)
    assert all(result.alias_info is None for result in schema.returns)
    assert not schema.is_mutable


# --- opcheck --------------------------------------------------------------------------------------


@every_sample
def test_opcheck(operator, index):
    """Schema, autograd registration, fake against real, and tracing with dynamic shapes."""
    arguments = sample_inputs(operator)[index].arguments
    if operator in DIFFERENTIABLE:
        arguments = floating_leaves(arguments)
    checks = ["test_schema", "test_autograd_registration"]
    if operator not in WITHOUT_FAKE:
        checks.append("test_faketensor")
        # Tracing is the slow one, and does not see what numbers or dtypes there are.
        if sample_inputs(operator)[index].name in TRACED:
            checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator_of(operator), arguments, test_utils=checks)


@every_sample
def test_meta_tensors_tell_shapes_dtypes_and_strides(operator, index):
    """By hand, since opcheck has skipped strides on the CPU in some versions of torch."""
    if operator in WITHOUT_FAKE:
        pytest.skip("what it returns depends on the numbers")
    arguments = sample_inputs(operator)[index].arguments
    real = tensors_in(operator_of(operator)(*arguments))
    fake = tensors_in(operator_of(operator)(*map_tensors(lambda t: t.to("meta"), arguments)))
    assert len(real) == len(fake)
    for found, told in zip(real, fake, strict=True):
        assert told.device.type == "meta"
        assert found.shape == told.shape
        assert found.dtype == told.dtype
        assert found.is_contiguous()
        assert told.is_contiguous()
        if found.numel():
            assert found.stride() == told.stride()


@every_sample
def test_arguments_are_not_changed_and_not_returned(operator, index):
    arguments = sample_inputs(operator)[index].arguments
    before = [t.clone() for t in tensors_in(arguments)]
    outputs = tensors_in(operator_of(operator)(*arguments))
    again = tensors_in(operator_of(operator)(*arguments))
    for argument, copy in zip(tensors_in(arguments), before, strict=True):
        assert torch.equal(argument, copy)
    memory = {t.data_ptr() for t in tensors_in(arguments) if t.numel()}
    assert not any(t.data_ptr() in memory for t in outputs if t.numel())
    for found, same in zip(outputs, again, strict=True):
        torch.testing.assert_close(found, same, rtol=0, atol=0, equal_nan=True)


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", WITHOUT_DERIVATIVE)
def test_operators_without_a_derivative_refuse_to_be_differentiated(operator):
    """Without a rule the derivative would be silently wrong, or silently zero."""
    arguments = floating_leaves(sample_inputs(operator)[0].arguments)
    outputs = tensors_in(operator_of(operator)(*arguments))
    attached = [t for t in outputs if t.requires_grad]
    assert attached, "the result carries the refusal"
    with pytest.raises(NotImplementedError, match="immunize_ext"):
        attached[0].sum().backward()


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_raw_operators_with_a_derivative(operator):
    """First derivatives of the raw operator, for whoever calls it: same as finite differences."""
    arguments = list(sample_inputs(operator)[0].arguments)
    places = [
        k
        for k, a in enumerate(arguments)
        if (isinstance(a, Tensor) and a.dtype.is_floating_point) or isinstance(a, list)
    ]
    tensors = tensors_in([arguments[k] for k in places])
    keep = [t for t in tensors if t.dtype == torch.float64]

    def function(*leaves: Tensor):
        if operator in ("symmetric_extremes", "symmetric_pair", "resolvent_traces"):
            first, *others = leaves
            leaves = ((first + first.mT) / 2, *others)
        rest = iter(leaves)
        swapped = [
            map_tensors(lambda t: next(rest), a) if k in places else a
            for k, a in enumerate(arguments)
        ]
        outputs = tensors_in(operator_of(operator)(*swapped))
        return [t for t in outputs if t.requires_grad or not leaves[0].requires_grad][:2]

    testing.check_against_finite_differences(function, keep, outputs=[0])


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_auxiliary_outputs_carry_no_graph(operator):
    """Vectors, counts and residuals: a gradient of them would be dropped without a word."""
    outputs = operator_of(operator)(*floating_leaves(sample_inputs(operator)[0].arguments))
    values = {
        "extremal_singular_values": 2,
        "gram_extremes": 3,
        "regularizer": 1,
        "condition_number": 1,
        "symmetric_extremes": 2,
        "symmetric_pair": 2,
        "moment_product": 1,
        "resolvent_traces": 3,
        "khatri_rao_gram": 1,
    }
    if operator == "merge_apply":
        merged, residual, status = outputs
        assert all(w.requires_grad for w in merged)
        assert not any(r.requires_grad for r in (*residual, status))
    else:
        first, found = values[operator], tensors_in(outputs)
        assert all(t.requires_grad for t in found[:first])
        assert not any(t.requires_grad for t in found[first:])


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator",
    [
        "extremal_singular_values",
        "extremal_singular_values_backward",
        "extremal_singular_values_double_backward",
        "gram_extremes",
        "gram_extremes_backward",
        "gram_extremes_double_backward",
        "symmetric_extremes",
        "symmetric_extremes_backward",
        "symmetric_extremes_double_backward",
        "resolvent_traces",
        "resolvent_traces_backward",
        "merge_solve",
        "moment_solve",
        "moment_product",
        "leading_projector",
        "projector_solve",
    ],
)
def test_vmap_folds_into_the_batch(operator):
    arguments = sample_inputs(operator)[0].arguments
    doubled = map_tensors(lambda t: torch.stack([t, t]), arguments)
    dims = tuple(0 if isinstance(a, Tensor) else None for a in arguments)
    found = torch.func.vmap(operator_of(operator), in_dims=dims)(*doubled)
    truth = tensors_in(operator_of(operator)(*arguments))
    for mapped, single in zip(tensors_in(found), truth, strict=True):
        torch.testing.assert_close(mapped[0], single, rtol=1e-12, atol=1e-13)
        assert torch.equal(mapped[0], mapped[1])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["extremal_singular_values", "gram_extremes"])
@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(0, 3), "n >= 1|at least one row"),
        (torch.ones(2, 2, dtype=torch.int64), "floating-point dtype"),
        (torch.full((2, 2), float("nan")), "finite"),
    ],
)
def test_raw_spectrum_operators_refuse(operator, a, message):
    with pytest.raises(ValueError, match=message):
        operator_of(operator)(a, *POLICY)


C = gaussian(3, 5)
HARD = torch.zeros(3).double()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((cholesky_of_gram(4), C, HARD), "chol must have shape"),
        ((cholesky_of_gram(5).float(), C, HARD), "chol must have dtype"),
        ((cholesky_of_gram(5), C.float(), HARD), "c must have dtype"),
        ((cholesky_of_gram(5), C, HARD.float()), "inverse_hardness must have dtype"),
        ((cholesky_of_gram(5), C[0], HARD), "c must have shape"),
        ((cholesky_of_gram(5, 2), C, HARD), "leading dimensions"),
        ((cholesky_of_gram(5), C, HARD[:2]), "inverse_hardness must have shape"),
    ],
)
def test_merge_solve_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"merge_solve: .*{message}"):
        torch.ops.immunize_ext.merge_solve(*arguments, 1e-12, False)


N, S = gaussian(3, 4), torch.eye(4).double()


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("moment_solve", (N.float(), S, S), "n must be float64"),
        ("moment_solve", (N, S.float(), S), "s must be float64"),
        ("moment_solve", (N, S[:3], S), r"s must have shape \[4, 4\]"),
        ("moment_solve", (N, S, S[None]), r"chol must have shape \[4, 4\]"),
        ("moment_product", (N, N), r"b must have shape \[\*, 4, n\]"),
        ("moment_product", (N, S[None]), "leading dimensions"),
        ("moment_product", (N, S.float()), "dtype of a"),
    ],
)
def test_moment_operators_refuse(operator, arguments, message):
    with pytest.raises(ValueError, match=f"{operator}: .*{message}"):
        operator_of(operator)(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: []}, "base must hold at least one layer"),
        ({1: [gaussian(3, 5)]}, "targets must hold 4 tensors, got 1"),
        ({2: [2, 2]}, "rows must add up to the rows of c, 3"),
        ({4: gaussian(3, 5).float()}, "c must have dtype"),
        ({4: gaussian(3, 4)}, "must have shape"),
        ({5: gaussian(2, 5)}, "b must have shape"),
        ({0: [gaussian(3, 5), gaussian(2, 4)]}, "base must have shape"),
        ({0: [gaussian(3, 5), gaussian(2, 5).float()]}, "base must have dtype"),
        ({0: [gaussian(2, 3, 5), gaussian(2, 2, 5)]}, "leading dimensions"),
    ],
)
def test_merge_apply_refuses(changes, message):
    arguments = list(sample_inputs("merge_apply")[0].arguments)
    for position, value in changes.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=f"merge_apply: .*{message}"):
        torch.ops.immunize_ext.merge_apply(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: gaussian(4)}, "grad must have shape"),
        ({0: torch.ones(3, 4, dtype=torch.int64)}, "floating-point dtype"),
        ({1: cholesky_of_gram(3)}, "factor must have shape"),
        ({1: cholesky_of_gram(4).float()}, "factor must have dtype"),
    ],
)
def test_precondition_refuses(changes, message):
    arguments = list(sample_inputs("precondition")[0].arguments)
    for position, value in changes.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=f"precondition: .*{message}"):
        torch.ops.immunize_ext.precondition(*arguments)


def test_gradients_of_another_shape_are_refused():
    """A backward operator called by hand: no silent reshape of what does not fit."""
    for operator in RAW_OPERATORS:
        if not operator.endswith("_backward"):
            continue
        arguments = list(sample_inputs(operator)[0].arguments)
        first = arguments[0]
        arguments[0] = (
            [gaussian(7, 7) for _ in first] if isinstance(first, list) else gaussian(7, 7, 7)
        )
        with pytest.raises((ValueError, RuntimeError)):
            operator_of(operator)(*arguments)
