"""Second derivatives whose first pass is forward, and forward mode of raw and compiled code.

The right values are those of the closed forms at x = [[2, 1/2], [0, 1]] along v = [[1, 0], [1, 1]].
"""

from __future__ import annotations

import pytest
import torch
from sample_inputs import (
    POLICY,
    diagonal,
    gaussian,
    sample_inputs,
    symmetric,
    taking_route,
)
from torch.autograd import forward_ad

from immunize_ext import testing
from immunize_ext.ops import (
    Preconditioner,
    RegularizationFactor,
    condition_number,
    extremal_singular_values,
    gram_extremes,
    log_condition_number,
    merge_kv,
    precondition_gradient,
    symmetric_extremes,
)
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well

X = torch.tensor([[2.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
V = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def sigma_max(a):
    return extremal_singular_values(a).sigma_max


def lambda_max(a):
    return gram_extremes(a).lambda_max


def eigenvalue(a):
    # Dynamo knows no .mT of a dual number of dual numbers, and cannot divide one.
    return 0.5 * symmetric_extremes(a + a.transpose(-2, -1)).lambda_max


# Function, its second derivative along V twice.
SECOND = {
    "sigma_max": (sigma_max, 0.642137),
    "lambda_max": (lambda_max, 5.21478),
    "condition_number": (condition_number, 1.33916),
    "r_well": (r_well, 1.10739),
    "r_ill": (r_ill, 0.79493),
    "gram_r_well": (gram_r_well, 21.0603),
    "gram_r_ill": (gram_r_ill, 0.990035),
    # (h + h^T) / 2 = [[2, .25], [.25, 1]] along [[1, .5], [.5, 1]]: 2 (u^T D w)^2 / gap, with
    # tan(2 t) = 1/2 and u^T D w = cos(2 t) / 2.
    "symmetric_extremes": (eigenvalue, 0.4 / 1.25**0.5),
}

# First derivatives along V.
FIRST = {"r_well": 0.845497, "r_ill": -1.16998}

every_function = pytest.mark.parametrize("name", SECOND)


def along(function):
    """The derivative of a function along V, by forward mode."""
    return lambda a: torch.func.jvp(function, (a,), (V,))[1]


def forward_over_forward(f):
    return along(along(f))(X)


def reverse_over_forward(f):
    return (torch.func.grad(along(f))(X) * V).sum()


def forward_over_reverse(f):
    return along(lambda a: (torch.func.grad(f)(a) * V).sum())(X)


def quadratic(hessian):
    return V.flatten() @ hessian.reshape(4, 4) @ V.flatten()


def jacfwd_of_jacfwd(f):
    return quadratic(torch.func.jacfwd(torch.func.jacfwd(f))(X))


def jacrev_of_jacfwd(f):
    return quadratic(torch.func.jacrev(torch.func.jacfwd(f))(X))


def jacfwd_of_jacrev(f):
    return quadratic(torch.func.hessian(f)(X))


def jacrev_of_jacrev(f):
    return quadratic(torch.func.jacrev(torch.func.jacrev(f))(X))


def backward_through_a_tangent(f):
    x = X.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, V))).tangent
        (grad,) = torch.autograd.grad(tangent, x)
    return (grad * V).sum()


def dual_cotangent(f):
    """d/dt of the gradient for the cotangent 1 + t, plus nothing else: the gradient itself."""
    x = X.clone().requires_grad_()
    value = f(x)
    with forward_ad.dual_level():
        one = forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value))
        (grad,) = torch.autograd.grad(value, x, one)
        primal, tangent = forward_ad.unpack_dual(grad)
    return primal, tangent


ORDERS = [
    forward_over_forward,
    reverse_over_forward,
    forward_over_reverse,
    jacfwd_of_jacfwd,
    jacrev_of_jacfwd,
    jacfwd_of_jacrev,
    jacrev_of_jacrev,
    backward_through_a_tangent,
]


@every_function
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_second_derivatives_in_every_order(route, name, order):
    function, truth = SECOND[name]
    with taking_route(route):
        assert float(order(function)) == pytest.approx(truth, rel=1e-5)


@every_function
def test_dual_cotangents(route, name):
    """The gradient is linear in the cotangent, the fused regularizers' too."""
    function, _ = SECOND[name]
    with taking_route(route):
        primal, tangent = dual_cotangent(function)
        truth = torch.func.grad(function)(X)
    torch.testing.assert_close(primal, truth, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(tangent, truth, rtol=1e-11, atol=1e-12)


@every_function
def test_vmap_of_forward_mode(name):
    function, _ = SECOND[name]
    batch = torch.stack([X, X.mT + V])
    for transform in (along(function), torch.func.jacfwd(function), torch.func.hessian(function)):
        found = torch.func.vmap(transform)(batch)
        truth = torch.stack([transform(one) for one in batch])
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)


def test_forward_mode_of_float32_is_that_of_float64():
    a, t = gaussian(5, 4), gaussian(5, 4, seed=1)
    for function in (log_condition_number, gram_r_ill, r_well):
        exact = torch.func.jvp(function, (a,), (t,))[1]
        found = torch.func.jvp(function, (a.float(),), (t.float(),))[1]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


# --- clusters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [sigma_max, lambda_max, eigenvalue])
def test_forward_mode_is_refused_at_clusters_also_under_vmap(function):
    """Whatever the position in the batch; reverse mode has the least-norm subgradient there."""
    a = torch.stack([diagonal(3.0, 1.0), diagonal(2.0, 2.0)])
    push = lambda one: torch.func.jvp(function, (one,), (V,))[1]  # noqa: E731
    with pytest.raises(NotImplementedError, match="repeated"):
        push(a[1])
    with pytest.raises(NotImplementedError, match="repeated"):
        torch.func.vmap(push)(a)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_forward_mode_at_a_cluster_is_no_number():
    """A graph cannot raise for the numbers it is given."""
    compiled = torch.compile(along(sigma_max), fullgraph=True, backend="aot_eager")
    assert torch.isnan(compiled(diagonal(2.0, 2.0)))
    assert float(compiled(X)) == pytest.approx(float(along(sigma_max)(X)), rel=1e-12)


# --- compiled code --------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@every_function
@pytest.mark.parametrize(
    "transform",
    [along, torch.func.jacfwd, torch.func.grad, torch.func.hessian, lambda f: along(along(f))],
    ids=["jvp", "jacfwd", "grad", "hessian", "jvp of jvp"],
)
def test_compiled_transforms(name, transform):
    """Right as in eager code, and never the zero tangent of an operator without a rule."""
    function, _ = SECOND[name]
    compiled = torch.compile(transform(function), fullgraph=True, backend="aot_eager")
    found, truth = compiled(X), transform(function)(X)
    if name in FIRST and transform is along:
        assert float(truth) == pytest.approx(FIRST[name], rel=1e-5)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("fresh_compiler")
@every_function
def test_dual_numbers_through_compiled_code(name):
    function, _ = SECOND[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(X, V))).tangent
    truth = along(function)(X)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)


def merged_weight(weight):
    """Of one layer and one concept, as a function of the pretrained weight."""
    token = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    return merge_kv([weight], [[2.0 * V]], [token], FACTOR)[0]


FACTOR = RegularizationFactor.from_embeddings(X)
PRECONDITIONER = Preconditioner.from_features(X)

# Every public function of one matrix, and its derivative along V.
PUBLIC = {
    "sigma_max": sigma_max,
    "condition_number": condition_number,
    "log_condition_number": log_condition_number,
    "lambda_max": lambda_max,
    "symmetric_extremes": lambda a: symmetric_extremes(a.transpose(-2, -1) @ a).lambda_max,
    "r_well": r_well,
    "r_ill": r_ill,
    "gram_r_well": gram_r_well,
    "gram_r_ill": gram_r_ill,
    "precondition_gradient": lambda a: precondition_gradient(a, PRECONDITIONER),
    "Preconditioner.apply": PRECONDITIONER.apply,
    "merge_kv": merged_weight,
}
BY_HAND = {
    "r_well": 0.845497,
    "r_ill": -1.16998,
    "condition_number": -0.3577,
    "gram_r_well": 9.539,
    "symmetric_extremes": 4.691,
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", PUBLIC)
def test_dual_numbers_made_inside_compiled_code(route, name, backend):
    """The graph enters the level itself and runs on plain tensors: never a wrong number or none."""

    def dual(a, t):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(PUBLIC[name](forward_ad.make_dual(a, t))).tangent

    found = torch.compile(dual, backend=backend)(X, V)
    truth = along(PUBLIC[name])(X)
    if name in BY_HAND:
        assert float(truth) == pytest.approx(BY_HAND[name], rel=2e-4)
    assert found is not None
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)


# --- raw operators --------------------------------------------------------------------------------


@pytest.mark.parametrize("required", [False, True])
def test_raw_operators_carry_tangents_or_refuse(required):
    raw = torch.ops.immunize_ext
    x = X.clone().requires_grad_(required)
    vectors = raw.extremal_singular_values(X, *POLICY)[3:]
    truth = along(sigma_max)(X)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, V)
        found = raw.extremal_singular_values(dual, *POLICY)[0]
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, truth)
        one = torch.tensor(1.0, dtype=torch.float64)
        grad = raw.extremal_singular_values_backward(one, 0 * one, dual, *vectors, *POLICY)
        torch.testing.assert_close(
            (forward_ad.unpack_dual(grad).tangent * V).sum(),
            torch.tensor(SECOND["sigma_max"][1], dtype=torch.float64),
            rtol=1e-5,
            atol=0,
        )
        with pytest.raises(NotImplementedError, match="third derivatives"):
            raw.extremal_singular_values_double_backward(V, one, one, dual, *POLICY)
        with pytest.raises(NotImplementedError, match="SpectrumTracker"):
            raw.symmetric_reference(dual, 1e-15)
        with pytest.raises(NotImplementedError, match="merge_kv"):
            raw.merge_solve(torch.eye(2).double(), dual, torch.zeros(2).double(), 1e-12, False)


def test_raw_merge_carries_tangents():
    """It is affine in the base weights, so the tangent is a difference."""
    base, targets, *rest = sample_inputs("merge_apply")[0].arguments
    merge_apply = torch.ops.immunize_ext.merge_apply
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(w, torch.ones_like(w)) for w in base]
        found = [forward_ad.unpack_dual(w).tangent for w in merge_apply(dual, targets, *rest)[0]]
    moved = merge_apply([w + 1.0 for w in base], targets, *rest)[0]
    truth = [
        after - w for after, w in zip(moved, merge_apply(base, targets, *rest)[0], strict=True)
    ]
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


# --- the preconditioner ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "ridge"), [(9, 0.1), (2, 0.1)])
def test_preconditioner_multiplies_tangents_as_it_does_gradients(route, n, ridge):
    preconditioner = Preconditioner.from_features(gaussian(n, 4), ridge=ridge)
    weight, tangent = gaussian(3, 4, seed=1), gaussian(3, 4, seed=2)
    truth = preconditioner.apply(tangent)
    for call in (
        preconditioner.apply,
        lambda weight: precondition_gradient(weight, preconditioner),
    ):
        with taking_route(route):
            _, found = torch.func.jvp(call, (weight,), (tangent,))
            assert testing.check_forward_mode(preconditioner.apply, [weight]) != "refused"
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


def test_forward_mode_of_a_symmetric_matrix_and_its_reverse_agree():
    h, t = symmetric(5), symmetric(5, seed=1)
    _, found = torch.func.jvp(lambda a: symmetric_extremes(a).lambda_min, (h,), (t,))
    grad = torch.func.grad(lambda a: symmetric_extremes(a).lambda_min)(h)
    torch.testing.assert_close(found, (grad * t).sum(), rtol=1e-11, atol=1e-12)
