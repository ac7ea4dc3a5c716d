"""Second-moment merge: values, derivatives, transforms, refusals, and the merges it contains."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from operator_contract import OperatorContract, Refusal
from sample_inputs import EPS, EPS32, gaussian
from torch import Tensor, nn

from immunize_ext import reference, testing
from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops import (
    MomentFactor,
    RegularizationFactor,
    convolution_matrix,
    merge_kv,
    merge_moments,
)
from immunize_ext.ops.erasure import uce

D = 4
HARDNESS = (0.7, 1.5)
RIDGE = 0.3


def gram(rows: int, d: int = D, *, seed: int) -> Tensor:
    h = gaussian(rows, d, seed=seed)
    return h.mT @ h


def flat_problem(
    seed: int = 0, *, d: int = D, out: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Two layers fed by one input, two concepts: base, copies, G_1, G_2, G_reg, mu, rho."""
    base = [gaussian(o, d, seed=seed + k, dtype=dtype) for k, o in enumerate(out)]
    copies = [
        w + 0.3 * gaussian(*w.shape, seed=seed + 10 * n + k, dtype=dtype)
        for n in (1, 2)
        for k, w in enumerate(base)
    ]
    moments = [gram(rows, d, seed=seed + 40 + rows) for rows in (2, 6, 9)]
    scalars = [torch.tensor(HARDNESS).double(), torch.tensor(RIDGE).double()]
    return (*base, *copies, *moments, *scalars)


def unflatten(tensors: Any) -> tuple[Any, ...]:
    base, copies = list(tensors[:2]), [list(tensors[2:4]), list(tensors[4:6])]
    return (base, copies, *tensors[6:])


def call(**changes: Any) -> list[Tensor]:
    """A valid call with some arguments replaced."""
    base, copies, *moments = unflatten(flat_problem())
    factors = MomentFactor.from_moments(moments[:2], ridge=0.1)
    return merge_moments(**{"base": base, "copies": copies, "factors": factors, **changes})


FACTOR = MomentFactor.from_moments([gram(9, seed=1)] * 2)
WEIGHT = gaussian(3, D)

BAD_CALLS = [
    ({"base": []}, "base must not be empty"),
    ({"factors": [FACTOR]}, "factors must be one, or one a layer, 2, got 1"),
    ({"copies": [[WEIGHT], [WEIGHT]]}, r"copies\[0\] must hold one weight a layer, 2, got 1"),
    ({"copies": [[WEIGHT, WEIGHT]]}, "copies must be those of 2 concepts"),
    ({"base": [WEIGHT[:, :3], WEIGHT]}, r"base\[0\] must have shape \(o, 4\)"),
    ({"base": [WEIGHT[0], WEIGHT]}, r"base\[0\] must have shape"),
    ({"base": [WEIGHT.long(), WEIGHT]}, r"base\[0\] must have a real floating-point dtype"),
    (
        {"base": [WEIGHT, WEIGHT], "copies": [[WEIGHT, WEIGHT], [WEIGHT, WEIGHT.float()]]},
        r"copies\[1\]\[1\] must have the shape and dtype of base\[1\]",
    ),
    ({"base": [WEIGHT.to("meta"), WEIGHT]}, r"base\[0\] must be on the device of the factor"),
]


class TestMergeMoments(OperatorContract):
    """Of base, copies, moments, hardness and ridge, all at once."""

    name = "merge_moments"
    argument = r"base\[0\]"
    node = "_Solve"
    function = staticmethod(call)
    smooth = {"two layers": flat_problem(seed=3), "one row": flat_problem(seed=4, d=3, out=(1, 2))}
    large = flat_problem(seed=5, d=24, out=(50, 30))
    moved = 6  # the first moment: in weights the merge is linear
    gradient_rtol = second_rtol = 1e-10
    batched = False  # one factor and one list of layers
    batched_gradients = False
    layout_rtol = 1e-10
    refusals = [Refusal((), message, changes) for changes, message in BAD_CALLS]
    # No leading dimensions; vmap: below.
    test_batches_and_dtypes = test_batch_independence = None
    test_vmap_over_any_axis_and_nested = test_jacobian_and_hessian = None
    test_column_major_input_is_no_other_matrix = None
    test_second_derivative_equals_the_reference = test_third_derivative_is_refused = None
    test_second_derivative_is_refused_at_kinks = None  # there are none
    test_something_that_is_no_tensor_is_refused = None
    test_non_finite_input_is_named = None  # of lists: below
    autocast_inputs = (torch.float32, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.float32])
    def test_low_precision_equals_float64(self, route, case, dtype):
        testing.check_float32_against_float64(self.outputs, case, dtype=dtype, condition=1e3)

    def sample(self, *batch, seed=1, dtype=torch.float64):
        return flat_problem(seed=seed, dtype=dtype)

    def call(self, *tensors):
        base, copies, first, second, held, mu, rho = unflatten(tensors)
        factor = MomentFactor.from_moments(
            [first, second], regularization=held, hardness=mu, ridge=rho, relative=False
        )
        return merge_moments(base, copies, factor)

    def of_layers(self, tensors, function, *first):
        base, copies, one, two, held, mu, rho = unflatten([t.numpy() for t in tensors])
        for layer in range(2):
            yield function(
                *(part[layer] for part in first),
                base[layer],
                [copy[layer] for copy in copies],
                [one, two],
                regularization=held,
                hardness=mu,
                ridge=float(rho),
            )

    def truth(self, *tensors):
        return list(self.of_layers(tensors, reference.merge_moments))

    def true_gradients(self, inputs, cotangents):
        found = list(
            self.of_layers(
                inputs, reference.merge_moments_gradient, [z.numpy() for z in cotangents]
            )
        )
        return [
            *(layer.base for layer in found),
            *(layer.copies[n] for n in range(2) for layer in found),
            *(sum(layer.moments[n] for layer in found) for n in range(2)),
            sum(layer.regularization for layer in found),
            sum(layer.hardness for layer in found),
            np.asarray(sum(layer.ridge for layer in found)),
        ]

    def composition(self, *tensors):
        base, copies, *moments, held, mu, rho = unflatten(tensors)
        first, second, held = ((g + g.mT) / 2 for g in (*moments, held))
        s = held + rho * torch.eye(len(held)).double() + mu[0] * first + mu[1] * second
        return [
            w0
            + torch.linalg.solve(
                s,
                mu[0] * (one - w0) @ first + mu[1] * (two - w0) @ second,
                left=False,
            )
            for w0, one, two in zip(base, *copies, strict=True)
        ]


# --- what it contains -----------------------------------------------------------------------------


def tokens_and_weights() -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """W0, two copies, token rows of each, captions."""
    w0 = gaussian(5, 7, seed=1)
    copies = [w0 + 0.2 * gaussian(5, 7, seed=2 + n) for n in range(2)]
    return w0, copies, [gaussian(2, 7, seed=5), gaussian(3, 7, seed=6)], gaussian(20, 7, seed=7)


def moment_merge_of_tokens(mu: float | Tensor) -> Tensor:
    w0, copies, tokens, captions = tokens_and_weights()
    factor = MomentFactor.from_moments(
        [c.mT @ c for c in tokens],
        regularization=captions.mT @ captions,
        hardness=mu,
        ridge=0.5,
        relative=False,
    )
    return merge_moments([w0], [[w] for w in copies], factor)[0]


def kv_merge(mu: float | Tensor) -> Tensor:
    w0, copies, tokens, captions = tokens_and_weights()
    factor = RegularizationFactor.from_embeddings(captions, ridge=0.5, relative=False)
    return merge_kv([w0], [[w] for w in copies], tokens, factor, hardness=mu)[0]


@pytest.mark.parametrize("mu", [1e-3, 1.0, 1e3])
def test_token_moments_are_the_soft_key_value_merge(mu: float) -> None:
    found, truth = moment_merge_of_tokens(mu), kv_merge(mu)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_hardness_of_each_concept() -> None:
    found = moment_merge_of_tokens(torch.tensor([2.0, 0.1]))
    truth = kv_merge(torch.tensor([2.0] * 2 + [0.1] * 3))
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_the_limit_of_hardness_is_the_hard_key_value_merge() -> None:
    """W(mu) = W + a / mu + b / mu^2 + ...: Richardson's scheme leaves the limit, to rounding."""
    mu, hard = 1e5, kv_merge(torch.inf)
    found = [moment_merge_of_tokens(mu * 2**k) for k in range(4)]
    assert (found[0] - hard).norm() > 1e-6 * hard.norm()
    for order in (2, 4, 8):
        found = [
            (order * better - worse) / (order - 1) for worse, better in itertools.pairwise(found)
        ]
    assert (found[0] - hard).norm() <= 100 * mu * EPS * hard.norm()


def test_unified_concept_editing() -> None:
    """Values instead of copies: any copy that maps the tokens there will do."""
    w0 = gaussian(5, 7, seed=1)
    erase, replace, preserve = gaussian(2, 7, seed=2), gaussian(2, 7, seed=3), gaussian(3, 7)
    truth = uce([w0], erase, replace, preserve=preserve, ridge=0.4, preserve_scale=0.2)[0]
    copy = w0 + w0 @ (replace - erase).mT @ torch.linalg.pinv(erase).mT
    factor = MomentFactor.from_moments(
        [erase.mT @ erase, preserve.mT @ preserve],
        hardness=torch.tensor([1.0, 0.2], dtype=torch.float64),
        ridge=0.4,
        relative=False,
    )
    (found,) = merge_moments([w0], [[copy], [w0]], factor)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_regmean() -> None:
    """(sum W_n G_n) (sum G_n)^-1, which W0 has no part in."""
    moments = [gram(9, seed=1), gram(7, seed=2)]
    copies = [gaussian(3, D, seed=3), gaussian(3, D, seed=4)]
    truth = sum(w @ g for w, g in zip(copies, moments, strict=True)) @ torch.linalg.inv(
        moments[0] + moments[1]
    )
    factor = MomentFactor.from_moments(moments, ridge=0.0)
    for base in (gaussian(3, D, seed=5), torch.zeros(3, D).double()):
        (found,) = merge_moments([base], [[w] for w in copies], factor)
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_equal_moments_give_the_mean_of_the_copies() -> None:
    copies = [gaussian(3, D, seed=k) for k in range(3)]
    factor = MomentFactor.from_moments([torch.eye(D)] * 3, ridge=0.0)
    (found,) = merge_moments([gaussian(3, D, seed=9)], [[w] for w in copies], factor)
    torch.testing.assert_close(found, sum(copies) / 3, rtol=1e-14, atol=1e-14)


def test_equal_moments_with_hardness_and_ridge_give_the_weighted_mean() -> None:
    """Weights mu_n / (rho + sum mu) of the copies, the rest of W0."""
    w0, *copies = (gaussian(3, D, seed=k) for k in range(3))
    factor = MomentFactor.from_moments(
        [torch.eye(D)] * 2, hardness=torch.tensor([1.0, 3.0]), ridge=0.5, relative=False
    )
    (found,) = merge_moments([w0], [[w] for w in copies], factor)
    truth = (0.5 * w0 + copies[0] + 3 * copies[1]) / 4.5
    torch.testing.assert_close(found, truth, rtol=1e-14, atol=1e-14)


def test_one_concept_rules_its_inputs_and_w0_the_rest() -> None:
    h = gaussian(2, D, seed=1)
    w0, w1 = gaussian(3, D, seed=2), gaussian(3, D, seed=3)
    factor = MomentFactor.from_moments([h.mT @ h], ridge=1e-8)
    (found,) = merge_moments([w0], [[w1]], factor)
    inside = torch.linalg.pinv(h) @ h
    torch.testing.assert_close(found, w1 @ inside + w0 @ (torch.eye(D) - inside), atol=1e-6, rtol=0)


def test_order_of_concepts_does_not_matter() -> None:
    base, copies, *moments = unflatten(flat_problem(seed=2))
    one = merge_moments(base, copies, MomentFactor.from_moments(moments[:2]))
    two = merge_moments(base, copies[::-1], MomentFactor.from_moments(moments[1::-1]))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_copies_that_equal_base_give_base_bit_for_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        w = gaussian(3, D, seed=1, dtype=dtype)
        assert torch.equal(merge_moments([w], [[w], [w]], FACTOR)[0], w)


def test_a_convolution_is_merged_as_its_matrix() -> None:
    """What it does to patches is what a linear layer does to rows."""
    convolutions = [nn.Conv2d(2, 3, 3).double() for _ in range(3)]
    weights = [c.weight.detach() for c in convolutions]
    factor = MomentFactor.from_moments([gram(30, 18, seed=1), gram(40, 18, seed=2)])
    (found,) = merge_moments(weights[:1], [[w] for w in weights[1:]], factor)
    matrices = [convolution_matrix(w) for w in weights]
    (truth,) = merge_moments(matrices[:1], [[w] for w in matrices[1:]], factor)
    assert found.shape == weights[0].shape
    assert torch.equal(convolution_matrix(found), truth)


# --- factors --------------------------------------------------------------------------------------


def test_layers_with_inputs_of_their_own() -> None:
    base = [gaussian(3, 4, seed=1), gaussian(2, 5, seed=2)]
    copies = [[gaussian(3, 4, seed=3), gaussian(2, 5, seed=4)]]
    factors = [MomentFactor.from_moments([gram(9, d, seed=d)]) for d in (4, 5)]
    together = merge_moments(base, copies, factors)
    for layer, factor in enumerate(factors):
        (alone,) = merge_moments([base[layer]], [[copies[0][layer]]], factor)
        assert torch.equal(alone, together[layer])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_weights_come_back_as_they_were(dtype: torch.dtype) -> None:
    base, copies, *moments = unflatten(flat_problem(seed=6, dtype=dtype))
    factor = MomentFactor.from_moments(moments[:2])
    exact = merge_moments(
        [w.double() for w in base], [[w.double() for w in copy] for copy in copies], factor
    )
    for found, truth in zip(merge_moments(base, copies, factor), exact, strict=True):
        assert found.dtype == dtype
        bound = torch.finfo(dtype).eps * truth.abs() + 100 * EPS32
        assert ((found.double() - truth).abs() <= bound).all()


def test_a_relative_ridge_does_not_know_the_scale() -> None:
    base, copies, *moments = unflatten(flat_problem(seed=6))
    one = merge_moments(base, copies, MomentFactor.from_moments(moments[:2], ridge=0.1))
    scaled = [1024.0 * g for g in moments[:2]]
    for a, b in zip(
        one, merge_moments(base, copies, MomentFactor.from_moments(scaled, ridge=0.1)), strict=True
    ):
        assert torch.equal(a, b)


def test_merges_that_share_a_factor_share_no_graph() -> None:
    base, copies, *moments = unflatten(flat_problem(seed=6))
    first = moments[0].clone().requires_grad_()
    factor = MomentFactor.from_moments([first, moments[1]], ridge=0.1)
    grads = [
        torch.autograd.grad(merge_moments(base, copies, factor)[0].sum(), first)[0]
        for _ in range(2)
    ]
    assert torch.equal(*grads)


def test_a_factor_of_moments_that_changed_since_is_refused() -> None:
    base, copies, *moments = unflatten(flat_problem(seed=6))
    hardness = torch.ones(2, dtype=torch.float64, requires_grad=True)
    factor = MomentFactor.from_moments(moments[:2], hardness=hardness)
    with torch.no_grad():
        hardness.mul_(2)
    with pytest.raises(ValueError, match="MomentFactor: moments must be those that were factored"):
        merge_moments(base, copies, factor)


def test_a_factor_without_gradients_keeps_its_numbers() -> None:
    base, copies, *moments = unflatten(flat_problem(seed=6))
    hardness = torch.ones(2, dtype=torch.float64)
    factors = [MomentFactor.from_moments(moments[:2], hardness=hardness) for _ in range(2)]
    before = merge_moments(base, copies, factors[0])
    for tensor in (*moments[:2], hardness):
        tensor.mul_(3)
    for found, truth in zip(merge_moments(base, copies, factors[1]), before, strict=True):
        assert torch.equal(found, truth)


def test_maps_are_kept_where_nothing_is_differentiated_in_them() -> None:
    factor = MomentFactor.from_moments([gram(9, seed=1)])
    assert factor.stacked_maps(torch.float32) is factor.stacked_maps(torch.float32)
    moving = MomentFactor.from_moments([gram(9, seed=1).requires_grad_()])
    assert moving.stacked_maps(torch.float32) is not moving.stacked_maps(torch.float32)


def test_vmap_over_copies_with_one_factor() -> None:
    base, copies, *moments = unflatten(flat_problem(seed=6))
    factor = MomentFactor.from_moments(moments[:2])
    stacks = [torch.stack([w, 2 * w, 3 * w]) for w in copies[0]]

    def merge(*weights: Tensor) -> list[Tensor]:
        return merge_moments(base, [list(weights), copies[1]], factor)

    for k in range(3):
        found = [w[k] for w in torch.func.vmap(merge)(*stacks)]
        for one, truth in zip(found, merge(*(w[k] for w in stacks)), strict=True):
            torch.testing.assert_close(one, truth, rtol=1e-13, atol=1e-13)


def test_vmap_over_moments() -> None:
    base, copies, *moments = unflatten(flat_problem(seed=6))
    stack = torch.stack([moments[0], moments[2]])

    def merge(g: Tensor) -> Tensor:
        return merge_moments(base, copies, MomentFactor.from_moments([g, moments[1]]))[0]

    for found, g in zip(torch.func.vmap(merge)(stack), stack, strict=True):
        torch.testing.assert_close(found, merge(g), rtol=1e-12, atol=1e-12)
    gradients = torch.func.vmap(torch.func.grad(lambda g: merge(g).square().sum()))(stack)
    for found, g in zip(gradients, stack, strict=True):
        truth = torch.func.grad(lambda g: merge(g).square().sum())(g)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moments": []}, "moments must hold one matrix a concept, got none"),
        ({"moments": [torch.eye(3), torch.eye(4)]}, r"moments\[1\] must have shape \(d, d\)"),
        ({"moments": [torch.ones(3)]}, r"moments\[0\] must have shape"),
        ({"moments": [torch.ones(0, 0)]}, r"moments\[0\] must have shape"),
        ({"moments": [torch.eye(3).long()]}, "floating-point dtype"),
        ({"moments": [torch.eye(3) * torch.nan]}, r"moments\[0\] must be finite"),
        ({"moments": [torch.eye(3).triu() + torch.ones(3, 3).triu()]}, "must be symmetric"),
        ({"regularization": torch.eye(4)}, r"regularization must have shape"),
        ({"hardness": 0.0}, "hardness must be positive"),
        ({"hardness": torch.ones(2)}, r"hardness must be a number or have shape \(1,\)"),
        ({"hardness": torch.inf}, "hardness must be finite, got infinity; .*merge_kv"),
        ({"ridge": -1.0}, "ridge must be finite and not negative"),
        ({"ridge": torch.nan}, "ridge must be finite"),
    ],
)
def test_bad_moments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^MomentFactor\.from_moments: .*{message}"):
        MomentFactor.from_moments(**{"moments": [torch.eye(3)], **changes})


def test_singular_moments_say_which_ridge_would_do() -> None:
    h = gaussian(2, 5, seed=1)
    with pytest.raises(NotPositiveDefiniteError, match="rank 2 of 5; raise the ridge") as caught:
        MomentFactor.from_moments([h.mT @ h], ridge=0.0)
    assert caught.value.rank == 2
    MomentFactor.from_moments([h.mT @ h], ridge=caught.value.needed_ridge, relative=False)
    with pytest.raises(NotPositiveDefiniteError, match="all moments are zero"):
        MomentFactor.from_moments([torch.zeros(2, 2)], ridge=1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    base, copies, *_ = unflatten(flat_problem())
    copies[1][1][0, 0] = bad
    with pytest.raises(ValueError, match=r"^merge_moments: copies\[1\]\[1\] must be finite"):
        merge_moments(base, copies, FACTOR)
    base[0][0, 0] = bad
    with pytest.raises(ValueError, match=r"^merge_moments: base\[0\] must be finite"):
        merge_moments(base, copies, FACTOR)


def test_an_overflow_is_told() -> None:
    """The second column is held, and the first has to make up for it."""
    moment = torch.tensor([[1.0, -0.9], [-0.9, 1.0]])
    held = torch.diag(torch.tensor([0.0, 1e6]))
    factor = MomentFactor.from_moments([moment], regularization=held, ridge=0.0)
    base = torch.full((1, 2), 6e4, dtype=torch.float16)
    copy = torch.tensor([[6e4, -6e4]], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"merged weights of layer 0 overflow torch\.float16"):
        merge_moments([base], [[copy]], factor)
    assert merge_moments([base.float()], [[copy.float()]], factor)[0][0, 0] > 1e5


def test_a_factor_of_inference_mode_serves_training() -> None:
    base, copies, *moments = unflatten(flat_problem())
    with torch.inference_mode():
        factors = [
            MomentFactor.from_moments(moments[:2]),
            MomentFactor.from_moments([g.clone() for g in moments[:2]]),
        ]
    leaf = base[0].clone().requires_grad_()
    for factor in factors:
        merged = merge_moments([leaf], [copy[:1] for copy in copies], factor)[0]
        (grad,) = torch.autograd.grad(merged.sum(), leaf)
        assert bool(grad.isfinite().all())
