"""Every raw operator ``torch.ops.immunize_ext.*``: its schema and all its rules, in one table.

Symbols: * leading batch dimensions; n x p a matrix (for features: n samples, p features);
t = min(n, p) its thin side; d input width, o output width of a projection; s concept rows (tokens)
over all concepts; L layers; N concepts.

Importing this module defines the operators whether or not the compiled part is loaded. PyTorch's
dispatcher then chooses: a kernel for the tensor's device (csrc, ``TORCH_LIBRARY_IMPL``) takes over
from the torch-only fallback, and no caller asks which one it gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from immunize_ext import _load
from immunize_ext.ops import (
    fallback,
    few_rows,
    khatri_rao_fallback,
    merge_fallback,
    moment_fallback,
    projector,
    resolvent_fallback,
)
from immunize_ext.ops.derivatives import (
    Family,
    Gradient,
    Linear,
    SecondDerivative,
    Values,
    carries_tangent,
    composed_where_differentiated,
    differentiable,
    fold_batch,
    khatri_rao,
    refusing,
    resolvents,
)
from immunize_ext.ops.merge_derivatives import ApplyBackwardRule, ApplyRule
from immunize_ext.ops.merge_saddle import RULES as SADDLE_RULES
from immunize_ext.ops.merge_saddle import SADDLE_SCHEMA
from immunize_ext.ops.moment_derivatives import RULES as MOMENT_RULES

_NAMESPACE = "immunize_ext"
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")


@dataclass(frozen=True)
class Operator:
    """One raw operator.

    Attributes:
        schema: Arguments and results, without the name.
        fallback: The operator in torch, for devices without a kernel.
        fake: Shapes, dtypes and (contiguous) strides of the outputs; None where they depend on the
            numbers.
        derivative: The ``autograd.Function`` and what its rules need to know; or what makes the
            ``Autograd`` kernel out of the operator; or, for an operator without rules, the text
            that refuses them; None where csrc has them.
        vmap: Which tensor arguments carry the batch that vmap folds into: all, also those in lists,
            or the first alone.
        autocast: Whether autocast hands over float32. Half precision gains nothing here: kernels
            compute in float64 or float32, and a parameter must not lose digits on the way in.
        composed: Whether the fallback is no loss worth a word where a device has no kernel.
    """

    schema: str
    fallback: Callable[..., Any]
    fake: Callable[..., Any] | None
    derivative: tuple[Any, ...] | Callable[[Any], Callable[..., Any]] | str | None
    vmap: Literal["all", "first"] | None = None
    autocast: bool = False
    composed: bool = False


SINGULAR = Family(
    "extremal_singular_values",
    values=2,
    saved=(3, 4, 5, 6, 7, 8),
    multiplicities=(3, 4),
    vectors=(5, 7),
)
GRAM = Family(
    "gram_extremes",
    values=3,
    saved=(0, 1, 4, 5, 6, 7, 8, 9, 10),
    multiplicities=(4, 5),
    vectors=(6, 8),
)
SYMMETRIC = Family(
    "symmetric_extremes", values=2, saved=(2, 3, 4, 5), multiplicities=(2, 3), vectors=(4, 5)
)


def _no_derivative(operator: str, public: str) -> str:
    return (
        f"torch.ops.immunize_ext.{operator} has no derivative; differentiate immunize_ext.ops."
        f"{public} instead"
    )


# --- fake kernels ---------------------------------------------------------------------------------


def _spectrum(a: Tensor, outputs: int) -> tuple[Tensor, ...]:
    batch, (n, p) = a.shape[:-2], a.shape[-2:]
    values = [a.new_empty(batch, dtype=torch.float64) for _ in range(outputs)]
    counts = [a.new_empty(batch, dtype=torch.int64) for _ in range(3)]
    vectors = [a.new_empty((*batch, side), dtype=torch.float64) for side in (n, p, n, p)]
    return (*values, *counts, *vectors)


def _singular(a: Tensor, *policy: Any) -> tuple[Tensor, ...]:
    return _spectrum(a, outputs=2)


def _gram(x: Tensor, *policy: Any) -> tuple[Tensor, ...]:
    side = x.shape[-2] if x.shape[-2] <= x.shape[-1] else x.shape[-1]
    thin = x.new_empty((*x.shape[:-2], side, side), dtype=torch.float64)
    return (*_spectrum(x, outputs=3), thin)


def _symmetric(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    batch, side = h.shape[:-2], h.shape[-1]
    return (
        *(h.new_empty(batch, dtype=torch.float64) for _ in range(2)),
        *(h.new_empty(batch, dtype=torch.int64) for _ in range(2)),
        *(h.new_empty((*batch, side), dtype=torch.float64) for _ in range(2)),
    )


def _gradient_of(position: int) -> Callable[..., Tensor]:
    """A gradient has shape and dtype of the argument at this position, and is contiguous."""

    def fake(*args: Any) -> Tensor:
        like: Tensor = args[position]
        return like.new_empty(like.shape)

    return fake


def _double_backward_of(values: int) -> Callable[..., tuple[Tensor, ...]]:
    def fake(cotangent: Tensor, *args: Any) -> tuple[Tensor, ...]:
        a: Tensor = args[values]
        batch = a.shape[:-2]
        along = [a.new_empty(batch, dtype=torch.float64) for _ in range(values)]
        return (*along, a.new_empty(a.shape))

    return fake


def _regularizer(x: Tensor, gram: bool, *rest: Any) -> tuple[Tensor, ...]:
    batch, side, longer = x.shape[:-2], min(x.shape[-2:]), max(x.shape[-2:])
    return (
        x.new_empty(batch),
        x.new_empty((*batch, 4), dtype=torch.float64),
        x.new_empty(batch, dtype=torch.int64),
        x.new_empty((*batch, side), dtype=torch.float64),
        x.new_empty((*batch, side, side) if gram else (*batch, longer), dtype=torch.float64),
    )


def _condition_number(a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, (n, p) = a.shape[:-2], a.shape[-2:]
    return (
        a.new_empty(batch),
        a.new_empty((*batch, 2), dtype=torch.float64),
        *(a.new_empty(batch, dtype=torch.int64) for _ in range(2)),
        *(a.new_empty((*batch, side), dtype=torch.float64) for side in (n, p, n, p)),
    )


def _symmetric_pair(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    batch = h.shape[:-2]
    return (h.new_empty(batch), h.new_empty(batch), *_symmetric(h, cluster_rtol)[2:])


def _symmetric_reference(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    p = h.shape[-1]
    width = fallback.padded_width(p)
    shapes = [(2, p), (p, p), (p, width), (3, width), (5,)]
    return (
        h.new_empty(2, dtype=torch.float64),
        h.new_empty(2, dtype=torch.int64),
        *(h.new_empty(shape, dtype=torch.float64) for shape in shapes),
    )


def _resolvents(a: Tensor, shifts: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
    p, s, m = a.shape[-1], shifts.shape[-1], vectors.shape[-1]
    return tuple(
        a.new_empty((*a.shape[:-2], *sides), dtype=torch.float64)
        for sides in ((s,), (s,), (s, m), (p,), (p,), (p, p))
    )


def _resolvents_backward(*args: Tensor) -> tuple[Tensor, ...]:
    return tuple(given.new_empty(given.shape) for given in args[3:6])


def _khatri_rao(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    n = a.shape[-3]
    return a.new_empty((*a.shape[:-3], n, n), dtype=torch.float64)


def _khatri_rao_backward(
    grad: Tensor, a: Tensor, g: Tensor, bias: bool, need_a: bool, need_g: bool
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if need_a else (0,)), g.new_empty(g.shape if need_g else (0,))


def _merge_gram(c_reg: Tensor, chunk: int = 512) -> Tensor:
    d = c_reg.shape[-1]
    return c_reg.new_empty((d, d), dtype=torch.float64)


def _merge_solve(chol: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, (s, d) = c.shape[:-2], c.shape[-2:]
    return (
        c.new_empty((*batch, s, d)),
        c.new_empty((*batch, s, s)),
        c.new_empty((*batch, d, s)),
        c.new_empty((*batch, s, s)),
        c.new_empty(batch, dtype=torch.int64),
    )


def _like_first(first: Tensor, *rest: Any) -> Tensor:
    return first.new_empty(first.shape)


def _merge_apply(
    base: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[int],
    targets_are_values: bool,
    c: Tensor,
    *rest: Any,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    accumulate = torch.float64 if base[0].dtype == torch.float64 else torch.float32
    merged = [w.new_empty(w.shape) for w in base]
    residual = [w.new_empty((*w.shape[:-1], c.shape[-2]), dtype=accumulate) for w in base]
    return merged, residual, c.new_empty((*c.shape[:-2], len(base)), dtype=torch.int32)


def _merge_apply_backward(
    grad: Sequence[Tensor],
    base: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[int],
    targets_are_values: bool,
    c: Tensor,
    b: Tensor,
    residual: Sequence[Tensor],
    need_base: bool,
    need_targets: bool,
    need_c: bool,
    need_b: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    return (
        [w.new_empty(w.shape) for w in base] if need_base else [],
        [t.new_empty(t.shape) for t in targets] if need_targets else [],
        c.new_empty(c.shape if need_c else (0,)),
        c.new_empty(c.shape if need_b else (0,)),
    )


def _few_rows_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[-2]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _leading_projector(h: Tensor, rank: int) -> tuple[Tensor, ...]:
    return h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape[:-1])


# --- the table ------------------------------------------------------------------------------------

# Policy arguments, the same in every spectrum operator:
#   rank_rtol     sigma_i counts iff sigma_i > rank_rtol * sigma_max
#   cluster_rtol  sigma_i belongs to an extreme iff it is within cluster_rtol * sigma_max of it
#   full_rank     sigma_min is the t-th singular value (0 if it does not count), not the rank-th
_POLICY = "float rank_rtol, float cluster_rtol, bool full_rank"

# [*] int64; [*, n], [*, p] float64, zero where the gradient is zero
_MULTIPLICITIES = "Tensor multiplicity_max, Tensor multiplicity_min"
_VECTORS = "Tensor u_max, Tensor v_max, Tensor u_min, Tensor v_min"

OPERATORS: dict[str, Operator] = {
    # Values [*] float64.
    "extremal_singular_values": Operator(
        f"(Tensor a, {_POLICY}) -> "
        f"(Tensor sigma_max, Tensor sigma_min, Tensor rank, {_MULTIPLICITIES}, {_VECTORS})",
        fallback.extremal_singular_values,
        _singular,
        (Values, SINGULAR),
        vmap="all",
        autocast=True,
    ),
    # Incoming gradients [*] float64; the result [*, n, p] in the dtype of a.
    "extremal_singular_values_backward": Operator(
        f"(Tensor grad_max, Tensor grad_min, Tensor a, {_MULTIPLICITIES}, {_VECTORS}, {_POLICY})"
        " -> Tensor",
        fallback.extremal_singular_values_backward,
        _gradient_of(2),
        (Gradient, SINGULAR),
        vmap="all",
    ),
    # The cotangent [*, n, p] is that of grad_a.
    "extremal_singular_values_double_backward": Operator(
        f"(Tensor cotangent, Tensor grad_max, Tensor grad_min, Tensor a, {_POLICY}) -> "
        "(Tensor grad_grad_max, Tensor grad_grad_min, Tensor grad_a)",
        fallback.extremal_singular_values_double_backward,
        _double_backward_of(2),
        (SecondDerivative, SINGULAR),
        vmap="all",
        composed=True,
    ),
    # Extremes of K = x^T x, in units of K, and |K|_F^2; tolerances stay in units of the singular
    # values of x. thin_gram [*, t, t] float64: x x^T or x^T x.
    "gram_extremes": Operator(
        f"(Tensor x, {_POLICY}) -> (Tensor lambda_max, Tensor lambda_min, "
        f"Tensor squared_frobenius, Tensor rank, {_MULTIPLICITIES}, {_VECTORS}, Tensor thin_gram)",
        fallback.gram_extremes,
        _gram,
        (Values, GRAM),
        vmap="all",
        autocast=True,
    ),
    "gram_extremes_backward": Operator(
        "(Tensor grad_max, Tensor grad_min, Tensor grad_squared_frobenius, Tensor x, "
        f"Tensor lambda_max, Tensor lambda_min, {_MULTIPLICITIES}, {_VECTORS}, Tensor thin_gram, "
        f"{_POLICY}) -> Tensor",
        fallback.gram_extremes_backward,
        _gradient_of(3),
        (Gradient, GRAM),
        vmap="all",
    ),
    "gram_extremes_double_backward": Operator(
        "(Tensor cotangent, Tensor grad_max, Tensor grad_min, Tensor grad_squared_frobenius, "
        f"Tensor x, {_POLICY}) -> (Tensor grad_grad_max, Tensor grad_grad_min, "
        "Tensor grad_grad_squared_frobenius, Tensor grad_x)",
        fallback.gram_extremes_double_backward,
        _double_backward_of(3),
        (SecondDerivative, GRAM),
        vmap="all",
        composed=True,
    ),
    # R_well (ill = false) or R_ill of S = x or, with gram, of S = K = x^T x. normaliser: p or k, by
    # default the side or the rank of S; floor: of the denominator of R_ill. value [*] in the dtype
    # of x; coefficients [*, 4] float64: of d largest, d smallest and d |S|_F^2, and a factor f, a
    # power of two, if not 1 they are those of f x; multiplicity [*] of the extreme that enters, 0
    # where the denominator of R_ill vanishes and no floor is given: the value is then held at a
    # floor of a few max(n, p) eps; thin_vector [*, t] its vector on the thin side, companion that
    # on the other one [*, max(n, p)], or with gram the thin Gram matrix of f x [*, t, t].
    "regularizer": Operator(
        f"(Tensor x, bool gram, bool ill, float? normaliser, float? floor, {_POLICY}) -> "
        "(Tensor value, Tensor coefficients, Tensor multiplicity, Tensor thin_vector, "
        "Tensor companion)",
        fallback.regularizer,
        _regularizer,
        None,
        autocast=True,
        composed=True,
    ),
    "regularizer_backward": Operator(
        "(Tensor grad, Tensor x, Tensor coefficients, Tensor multiplicity, Tensor thin_vector, "
        f"Tensor companion, bool gram, bool ill, float? normaliser, {_POLICY}) -> Tensor",
        fallback.regularizer_backward,
        _gradient_of(1),
        None,
        composed=True,
    ),
    # kappa or log kappa: value [*] in the dtype of a; coefficients [*, 2] float64 of d sigma_max
    # and d sigma_min, zero where kappa is infinite.
    "condition_number": Operator(
        f"(Tensor a, bool logarithm, {_POLICY}) -> "
        f"(Tensor value, Tensor coefficients, {_MULTIPLICITIES}, {_VECTORS})",
        fallback.condition_number,
        _condition_number,
        None,
        autocast=True,
        composed=True,
    ),
    "condition_number_backward": Operator(
        f"(Tensor grad, Tensor a, Tensor coefficients, {_MULTIPLICITIES}, {_VECTORS}, {_POLICY})"
        " -> Tensor",
        fallback.condition_number_backward,
        _gradient_of(1),
        _no_derivative("condition_number_backward", "condition_number"),
        composed=True,
    ),
    # Algebraic extremes of symmetric matrices h [*, p, p], possibly indefinite; vectors [*, p].
    "symmetric_extremes": Operator(
        "(Tensor h, float cluster_rtol) -> (Tensor lambda_max, Tensor lambda_min, "
        f"{_MULTIPLICITIES}, Tensor v_max, Tensor v_min)",
        fallback.symmetric_extremes,
        _symmetric,
        (Values, SYMMETRIC),
        vmap="all",
        autocast=True,
    ),
    "symmetric_extremes_backward": Operator(
        f"(Tensor grad_max, Tensor grad_min, Tensor h, {_MULTIPLICITIES}, Tensor v_max, "
        "Tensor v_min, float cluster_rtol) -> Tensor",
        fallback.symmetric_extremes_backward,
        _gradient_of(2),
        (Gradient, SYMMETRIC),
        vmap="all",
    ),
    "symmetric_extremes_double_backward": Operator(
        "(Tensor cotangent, Tensor grad_max, Tensor grad_min, Tensor h, float cluster_rtol) -> "
        "(Tensor grad_grad_max, Tensor grad_grad_min, Tensor grad_h)",
        fallback.symmetric_extremes_double_backward,
        _double_backward_of(2),
        (SecondDerivative, SYMMETRIC),
        vmap="all",
        composed=True,
    ),
    # symmetric_extremes with values in the dtype of h, differentiated without Python.
    "symmetric_pair": Operator(
        "(Tensor h, float cluster_rtol) -> (Tensor lambda_max, Tensor lambda_min, "
        f"{_MULTIPLICITIES}, Tensor v_max, Tensor v_min)",
        fallback.symmetric_pair,
        _symmetric_pair,
        None,
        autocast=True,
        composed=True,
    ),
    # A trajectory of symmetric matrices [p, p]: what a cold call leaves behind, all float64.
    # values [2]: lambda_max, lambda_min; multiplicity [2] int64; vectors [2, p]; matrix [p, p]
    # exactly symmetric; reflectors [p, ld]; tridiagonal [3, ld]: diagonal, off-diagonal, reflector
    # factors; ends [5]: top, the value beside it, bottom, the value beside it, scale.
    "symmetric_reference": Operator(
        "(Tensor h, float cluster_rtol) -> (Tensor values, Tensor multiplicity, Tensor vectors, "
        "Tensor matrix, Tensor reflectors, Tensor tridiagonal, Tensor ends)",
        fallback.symmetric_reference,
        _symmetric_reference,
        _no_derivative("symmetric_reference", "SpectrumTracker"),
        composed=True,
    ),
    # ... and a warm call. ok = false: not converged or not proven, take a cold call.
    "symmetric_track": Operator(
        "(Tensor h, float cluster_rtol, Tensor vectors, Tensor matrix, Tensor reflectors, "
        "Tensor tridiagonal, Tensor ends) -> (Tensor values, Tensor new_vectors, bool ok)",
        fallback.symmetric_track,
        None,
        _no_derivative("symmetric_track", "SpectrumTracker"),
        composed=True,
    ),
    # B = (a + shift I)^-1 for symmetric a [*, p, p], shifts [*, s], vectors b [*, p, m]: first
    # tr a B [*, s], second tr a^2 B^2 [*, s], energies b^T B^2 b [*, s, m]; a = basis^T T basis
    # with T tridiagonal: diagonal [*, p], offdiagonal [*, p] with a zero at the end, basis
    # [*, p, p]. All float64.
    "resolvent_traces": Operator(
        "(Tensor a, Tensor shifts, Tensor vectors) -> (Tensor first, Tensor second, "
        "Tensor energies, Tensor diagonal, Tensor offdiagonal, Tensor basis)",
        resolvent_fallback.resolvent_traces,
        _resolvents,
        functools.partial(resolvents, composed=resolvent_fallback.composed_values),
        vmap="all",
        autocast=True,
        composed=True,
    ),
    # Gradients in the dtypes of a, shifts and vectors.
    "resolvent_traces_backward": Operator(
        "(Tensor grad_first, Tensor grad_second, Tensor grad_energies, Tensor a, Tensor shifts, "
        "Tensor vectors, Tensor diagonal, Tensor offdiagonal, Tensor basis) -> "
        "(Tensor grad_a, Tensor grad_shifts, Tensor grad_vectors)",
        resolvent_fallback.resolvent_traces_backward,
        _resolvents_backward,
        functools.partial(
            composed_where_differentiated, composed=resolvent_fallback.composed_gradient
        ),
        vmap="all",
        composed=True,
    ),
    # Inner products K [*, n, n] float64 of the gradients sum_t g_it a_it^T of n samples in a linear
    # layer: activations a [*, n, t, d] and output gradients g [*, n, t, o] of t tokens.
    "khatri_rao_gram": Operator(
        "(Tensor a, Tensor g, bool bias) -> Tensor",
        khatri_rao_fallback.khatri_rao_gram,
        _khatri_rao,
        functools.partial(khatri_rao, composed=khatri_rao_fallback.composed_gram),
        vmap="all",
        autocast=True,
        composed=True,
    ),
    # grad [*, n, n] float64; gradients in the dtypes of a and g, of shape [0] where not needed.
    "khatri_rao_gram_backward": Operator(
        "(Tensor grad, Tensor a, Tensor g, bool bias, bool need_a, bool need_g) -> "
        "(Tensor grad_a, Tensor grad_g)",
        khatri_rao_fallback.khatri_rao_gram_backward,
        _khatri_rao_backward,
        functools.partial(
            composed_where_differentiated, composed=khatri_rao_fallback.composed_gradient
        ),
        vmap="all",
        composed=True,
    ),
    # Q without ridge: c_reg [m, d] to c_reg^T c_reg [d, d] float64, symmetric to the bit. chunk:
    # rows that are widened at a time where there is no kernel.
    "merge_gram": Operator(
        "(Tensor c_reg, int chunk=512) -> Tensor",
        merge_fallback.merge_gram,
        _merge_gram,
        _no_derivative("merge_gram", "RegularizationFactor.from_embeddings"),
        composed=True,
    ),
    # The part shared by all layers: T = c Q^-1 c^T + diag(inverse_hardness), E its (generalised)
    # inverse. chol [*, d, d] lower factor of Q, c [*, s, d], inverse_hardness [*, s] (0 = hard);
    # b [*, s, d] = E c Q^-1; root [*, s, s], E = root root^T, zero from column `rank` on; basis
    # [*, d, s] = chol^-1 c^T root; defect [*, s, s] = I - E T, zero where T has full rank; rank
    # [*] int64, -1 where an input or T is not finite. All else float64.
    "merge_solve": Operator(
        "(Tensor chol, Tensor c, Tensor inverse_hardness, float rank_rtol, bool average) -> "
        "(Tensor b, Tensor root, Tensor basis, Tensor defect, Tensor rank)",
        merge_fallback.merge_solve,
        _merge_solve,
        _no_derivative("merge_solve", "merge_kv"),
        vmap="all",
    ),
    # b, S f and E g for S = Q^-1 - Q^-1 c^T b, f [*, d, k] and g [*, s, k]: what the derivatives of
    # b are made of. source [*, m, d] = C_reg, ridge [*]; the rest as merge_solve has it.
    "merge_constraint_map": Operator(
        f"({SADDLE_SCHEMA}) -> Tensor",
        merge_fallback.merge_constraint_map,
        _like_first,
        (SADDLE_RULES["merge_constraint_map"],),
        vmap="all",
        composed=True,
    ),
    "merge_free_solve": Operator(
        f"(Tensor f, {SADDLE_SCHEMA}) -> Tensor",
        merge_fallback.merge_free_solve,
        _like_first,
        (SADDLE_RULES["merge_free_solve"],),
        vmap="all",
        composed=True,
    ),
    "merge_constraint_solve": Operator(
        f"(Tensor g, {SADDLE_SCHEMA}) -> Tensor",
        merge_fallback.merge_constraint_solve,
        _like_first,
        (SADDLE_RULES["merge_constraint_solve"],),
        vmap="all",
        composed=True,
    ),
    # The part per layer: W_l = W0_l + R_l b with R_l = V_l - W0_l c^T. base L x [*, o_l, d];
    # targets: concept weights, concept-major (N * L tensors [*, o_l, d]) with rows[n] tokens each,
    # or with targets_are_values one [*, o_l, s] tensor a layer; c, b [*, s, d] float64; merged
    # L x [*, o_l, d] in the dtype of base, residual L x [*, o_l, s] float32 or float64; status
    # [*, L] int32, see csrc/merge_status.h.
    "merge_apply": Operator(
        "(Tensor[] base, Tensor[] targets, int[] rows, bool targets_are_values, Tensor c, "
        "Tensor b) -> (Tensor[] merged, Tensor[] residual, Tensor status)",
        merge_fallback.merge_apply,
        _merge_apply,
        (ApplyRule,),
        vmap="all",
    ),
    # Empty lists, and tensors of shape [0], for gradients that are not needed.
    "merge_apply_backward": Operator(
        "(Tensor[] grad, Tensor[] base, Tensor[] targets, int[] rows, bool targets_are_values, "
        "Tensor c, Tensor b, Tensor[] residual, bool need_base, bool need_targets, bool need_c, "
        "bool need_b) -> (Tensor[] grad_base, Tensor[] grad_targets, Tensor grad_c, Tensor grad_b)",
        merge_fallback.merge_apply_backward,
        _merge_apply_backward,
        (ApplyBackwardRule,),
        vmap="all",
    ),
    # n s^-1 for n [*, o, d] and a symmetric positive definite s [*, d, d], from its lower Cholesky
    # factor chol [*, d, d]; float64. Derivatives in n and s; that of chol is the one of s.
    "moment_solve": Operator(
        "(Tensor n, Tensor s, Tensor chol) -> Tensor",
        moment_fallback.moment_solve,
        _like_first,
        (MOMENT_RULES["moment_solve"],),
        vmap="all",
        composed=True,
    ),
    # a [*, m, k] b [*, k, n], in their dtype under autocast too.
    "moment_product": Operator(
        "(Tensor a, Tensor b) -> Tensor",
        moment_fallback.moment_product,
        _product,
        (MOMENT_RULES["moment_product"],),
        vmap="all",
        composed=True,
    ),
    # The projector [*, p, p] onto the `rank` leading eigenvectors of a symmetric h [*, p, p], all
    # eigenvectors [*, p, p] and values [*, p] in descending order; float64. The projector alone has
    # derivatives, which are made of projector_solve: X with X h - h X = (I - P) f P.
    "leading_projector": Operator(
        "(Tensor h, int rank) -> (Tensor projector, Tensor vectors, Tensor values)",
        projector.leading_projector,
        _leading_projector,
        (projector.RULES["leading_projector"],),
        vmap="all",
        composed=True,
    ),
    "projector_solve": Operator(
        "(Tensor f, Tensor h, Tensor vectors, Tensor values, int rank) -> Tensor",
        projector.projector_solve,
        _like_first,
        (projector.RULES["projector_solve"],),
        vmap="all",
        composed=True,
    ),
    # grad [*, o, p] times K^-1 for K = x^T x + ridge I, from the lower Cholesky factor of K
    # [p, p] and a basis [0, p]; or, for n < p samples, from that of basis K basis^T [n, n] and an
    # orthonormal basis [n, p] of the rows of x. float64.
    "precondition": Operator(
        "(Tensor grad, Tensor factor, Tensor basis, float ridge) -> Tensor",
        fallback.precondition,
        _gradient_of(0),
        (Linear, "precondition", "precondition"),
        vmap="first",
        composed=True,
    ),
    # The weight; what reaches it as a derivative is multiplied by K^-1.
    "precondition_gradient": Operator(
        "(Tensor weight, Tensor factor, Tensor basis, float ridge) -> Tensor",
        fallback.precondition_gradient,
        _gradient_of(0),
        (Linear, "precondition_gradient", "precondition"),
        vmap="first",
        composed=True,
    ),
    # x [*, n, p] times weight [*, o, p]^T, plus bias [*, o], for n < p; derivatives by the weight
    # are multiplied by K^-1, K = x^T x + ridge I a constant. factor [*, n, n] float64: the lower
    # Cholesky factor of x x^T + ridge I.
    "few_rows_linear": Operator(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor factor, float ridge) -> Tensor",
        few_rows.few_rows_linear,
        _few_rows_linear,
        (few_rows.LINEAR_RULE,),
        vmap="all",
        composed=True,
    ),
    # grad [*, n, o]^T x K^-1 for x = samples.
    "few_rows_product": Operator(
        "(Tensor grad, Tensor x, Tensor factor, Tensor samples, float ridge) -> Tensor",
        few_rows.few_rows_product,
        lambda grad, x, *_: x.new_empty((*x.shape[:-2], grad.shape[-1], x.shape[-1])),
        (few_rows.PRODUCT_RULE,),
        vmap="all",
        composed=True,
    ),
    # x K^-1 in float64 for x = samples, the weight itself, and any grad [*, o, p] times K^-1, which
    # is the derivative of all three.
    "few_rows_solve": Operator(
        "(Tensor x, Tensor factor, Tensor samples, float ridge) -> Tensor",
        few_rows.few_rows_solve,
        lambda x, *_: x.new_empty(x.shape, dtype=torch.float64),
        (Linear, "few_rows_solve", "few_rows_precondition"),
        vmap="all",
        composed=True,
    ),
    "few_rows_weight": Operator(
        "(Tensor weight, Tensor samples, float ridge) -> Tensor",
        few_rows.few_rows_weight,
        _like_first,
        (Linear, "few_rows_weight", "few_rows_precondition"),
        vmap="all",
        composed=True,
    ),
    "few_rows_precondition": Operator(
        "(Tensor grad, Tensor samples, float ridge) -> Tensor",
        few_rows.few_rows_precondition,
        _like_first,
        (Linear, "few_rows_precondition", "few_rows_precondition"),
        vmap="all",
        composed=True,
    ),
}


# Operators whose derivatives are in csrc, and what to differentiate where that is not compiled.
_PUBLIC = {
    "regularizer": "regularizers.r_well",
    "regularizer_backward": "regularizers.r_well",
    "condition_number": "condition_number",
    "symmetric_pair": "symmetric_extremes",
}


# --- registration ---------------------------------------------------------------------------------


def _warning(name: str, operator: Operator) -> Callable[..., Any]:
    """The fallback, which says once in a process that it runs, and why."""

    def kernel(*args: Any) -> Any:
        if not _load.available():
            _load.warn_fallback()
        elif not operator.composed:
            device = next(
                leaf.device.type for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)
            )
            build = " in this build" if device == "cuda" else ""
            _load.warn_fallback(f"there are no kernels for tensors on {device}{build}")
        return operator.fallback(*args)

    return kernel


def _folding(op: Callable[..., Any]) -> Callable[..., Any]:
    """Fold the vmapped axis into the batch dimensions of all tensors."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        outputs = op(*fold_batch(info.batch_size, in_dims, args))
        # An output that was not asked for is empty, without a batch.
        return outputs, pytree.tree_map(lambda out: None if out.shape == (0,) else 0, outputs)

    return rule


def _leading(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """The first argument takes leading dimensions; the others are the same for all of them."""

    def rule(info: Any, in_dims: tuple[Any, ...], first: Tensor, *rest: Any) -> tuple[Any, int]:
        if any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError(
                f"immunize_ext: {name} under vmap takes one factor for all; loop over the factors"
            )
        return op(first.movedim(in_dims[0], 0), *rest), 0

    return rule


def _register() -> None:
    for name, operator in OPERATORS.items():
        _LIBRARY.define(name + operator.schema)
        _LIBRARY.impl(name, _warning(name, operator), "CompositeExplicitAutograd")
    _load.available()  # its kernels are registered as it is loaded
    for name, operator in OPERATORS.items():
        op = getattr(torch.ops.immunize_ext, name).default
        full_name = f"{_NAMESPACE}::{name}"
        if operator.fake is not None:
            torch.library.register_fake(full_name, operator.fake, lib=_LIBRARY)
        if isinstance(operator.derivative, str):
            _LIBRARY.impl(name, refusing(op, operator.derivative), "Autograd")
        elif callable(operator.derivative):
            _LIBRARY.impl(name, operator.derivative(op), "Autograd")
        elif operator.derivative is not None:
            _LIBRARY.impl(name, differentiable(op, *operator.derivative), "Autograd")
        elif not _load.available():
            text = _no_derivative(name, _PUBLIC[name])
            _LIBRARY.impl(name, refusing(op, text), "Autograd")
        if operator.vmap is not None:
            rule = _folding(op) if operator.vmap == "all" else _leading(name, op)
            torch.library.register_vmap(full_name, rule, lib=_LIBRARY)
        if operator.autocast:
            for device in ("cpu", "cuda"):
                torch.library.register_autocast(full_name, device, torch.float32, lib=_LIBRARY)
    if _load.available():
        _ask_before_rules()


def _ask_before_rules() -> None:
    """Let the compiled part serve, without Python, what differentiates nothing on CPU and CUDA."""
    from immunize_ext import _C

    for name, operator in OPERATORS.items():
        recorded = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"{_NAMESPACE}::{name}", "AutogradCPU"
        )
        if operator.derivative is not None and not recorded:  # in csrc, which asks itself
            _C.ask_before_rules(name)


@contextmanager
def fallbacks_only() -> Iterator[None]:
    """Serve CPU and CUDA tensors by the torch-only fallbacks, for comparisons.

    For the whole process, as the dispatcher is; not while another thread calls operators.
    """
    library = torch.library.Library(_NAMESPACE, "IMPL")
    try:
        for name, operator in OPERATORS.items():
            for key in ("CPU", "CUDA"):
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"{_NAMESPACE}::{name}", key):
                    library.impl(name, operator.fallback, key, allow_override=True)
        yield
    finally:
        library._destroy()


@functools.cache  # asked in every call of a regularizer, and settled once this module is imported
def has_kernel(name: str, device: str) -> bool:
    """True if the compiled part serves an operator on a type of device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{_NAMESPACE}::{name}", device.upper())


_register()

_FUSED = frozenset(name for name in _PUBLIC if has_kernel(name, "cpu"))


def is_fused(name: str, matrix: Tensor) -> bool:
    """Whether an operator that is differentiated in C++ can serve in place of a composition.

    It is differentiated in reverse mode alone, by no transform, and needs a kernel for the device;
    a graph that is traced here may later be run under any transform.
    """
    device = matrix.device.type
    return (
        name in _FUSED
        and not torch.compiler.is_compiling()
        and (device == "cpu" or (device == "cuda" and has_kernel(name, device)))
        and not torch._C._are_functorch_transforms_active()
        and not carries_tangent(matrix)
    )
