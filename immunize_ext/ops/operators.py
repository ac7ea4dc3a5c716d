"""Rules of the raw operators ``torch.ops.immunize_ext.*``: fake, autograd, vmap, autocast.

The public functions of this package go through the ``autograd.Function`` classes of the sibling
modules, which ``torch.func`` understands. What is registered here serves whoever calls the raw
operators: shapes under ``torch.compile``, first derivatives, ``vmap``, autocast; and every
derivative that the raw operators do not have raises instead of being silently wrong.

Importing this module registers the rules, once, and only where the compiled part is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from immunize_ext import _load
from immunize_ext.ops.derivatives import fold_batch

_NAMESPACE = "immunize_ext"


def _name(operator: str) -> str:
    return f"{_NAMESPACE}::{operator}"


# --- fake kernels: shapes, dtypes and (contiguous) strides of the outputs -------------------------


def _fake_spectrum(a: Tensor, outputs: int) -> tuple[Tensor, ...]:
    batch, (n, p) = a.shape[:-2], a.shape[-2:]
    values = [a.new_empty(batch, dtype=torch.float64) for _ in range(outputs)]
    counts = [a.new_empty(batch, dtype=torch.int64) for _ in range(3)]
    vectors = [a.new_empty((*batch, side), dtype=torch.float64) for side in (n, p, n, p)]
    return (*values, *counts, *vectors)


def _fake_extremal_singular_values(a: Tensor, *policy: Any) -> tuple[Tensor, ...]:
    return _fake_spectrum(a, outputs=2)


def _fake_extremal_singular_values_backward(
    grad_max: Tensor, grad_min: Tensor, a: Tensor, *rest: Any
) -> Tensor:
    return a.new_empty(a.shape)


def _fake_extremal_singular_values_double_backward(
    cotangent: Tensor, grad_max: Tensor, grad_min: Tensor, a: Tensor, *policy: Any
) -> tuple[Tensor, ...]:
    batch = a.shape[:-2]
    values = [a.new_empty(batch, dtype=torch.float64) for _ in range(2)]
    return (*values, a.new_empty(a.shape))


def _fake_gram_extremes(x: Tensor, *policy: Any) -> tuple[Tensor, ...]:
    side = x.shape[-2] if x.shape[-2] <= x.shape[-1] else x.shape[-1]
    thin = x.new_empty((*x.shape[:-2], side, side), dtype=torch.float64)
    return (*_fake_spectrum(x, outputs=3), thin)


def _fake_gram_extremes_backward(
    grad_max: Tensor, grad_min: Tensor, grad_frobenius: Tensor, x: Tensor, *rest: Any
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_gram_extremes_double_backward(
    cotangent: Tensor, grad_max: Tensor, grad_min: Tensor, grad_f: Tensor, x: Tensor, *policy: Any
) -> tuple[Tensor, ...]:
    values = [x.new_empty(x.shape[:-2], dtype=torch.float64) for _ in range(3)]
    return (*values, x.new_empty(x.shape))


def _fake_gram_regularizer(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, side = x.shape[:-2], min(x.shape[-2:])
    return (
        x.new_empty(batch),
        x.new_empty((*batch, 3), dtype=torch.float64),
        x.new_empty(batch, dtype=torch.int64),
        x.new_empty((*batch, side), dtype=torch.float64),
        x.new_empty((*batch, side, side), dtype=torch.float64),
    )


def _fake_gram_regularizer_backward(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_symmetric_extremes(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    batch, side = h.shape[:-2], h.shape[-1]
    return (
        *(h.new_empty(batch, dtype=torch.float64) for _ in range(2)),
        *(h.new_empty(batch, dtype=torch.int64) for _ in range(2)),
        *(h.new_empty((*batch, side), dtype=torch.float64) for _ in range(2)),
    )


def _fake_symmetric_reference(h: Tensor, cluster_rtol: float) -> tuple[Tensor, ...]:
    p = h.shape[-1]
    width = (p + 11) // 12 * 12  # rows padded to whole panels of twelve
    shapes = [(2, p), (p, p), (p, width), (3, width), (5,)]
    return (
        h.new_empty(2, dtype=torch.float64),
        h.new_empty(2, dtype=torch.int64),
        *(h.new_empty(shape, dtype=torch.float64) for shape in shapes),
    )


def _fake_merge_gram(c_reg: Tensor, chunk: int = 512) -> Tensor:
    d = c_reg.shape[-1]
    return c_reg.new_empty((d, d), dtype=torch.float64)


def _fake_merge_solve(
    chol: Tensor, c: Tensor, inverse_hardness: Tensor, rank_rtol: float, average: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, (s, d) = c.shape[:-2], c.shape[-2:]
    return (
        c.new_empty((*batch, s, d)),
        c.new_empty((*batch, s, s)),
        c.new_empty((*batch, d, s)),
        c.new_empty((*batch, s, s)),
        c.new_empty(batch, dtype=torch.int64),
    )


def _fake_merge_apply(
    base: Sequence[Tensor],
    targets: Sequence[Tensor],
    rows: Sequence[int],
    targets_are_values: bool,
    c: Tensor,
    b: Tensor,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    accumulate = torch.float64 if base[0].dtype == torch.float64 else torch.float32
    merged = [w.new_empty(w.shape) for w in base]
    residual = [w.new_empty((*w.shape[:-1], c.shape[-2]), dtype=accumulate) for w in base]
    return merged, residual, c.new_empty((*c.shape[:-2], len(base)), dtype=torch.int32)


def _fake_merge_apply_backward(
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


def _fake_precondition(
    grad: Tensor, factor: Tensor, x: Tensor, ridge: float, woodbury: bool
) -> Tensor:
    return grad.new_empty(grad.shape)


# --- autograd of the raw operators ----------------------------------------------------------------


def _spectrum_autograd(
    operator: str, values: int, saved_values: int, unsaved_counts: int = 1
) -> None:
    """First derivatives of a raw spectrum operator, through its registered backward.

    ``values``: how many outputs are differentiable; ``saved_values``: how many of them the backward
    takes besides the counts and vectors; ``unsaved_counts``: how many counts it does not take.
    """
    backward_op = getattr(torch.ops.immunize_ext, f"{operator}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        a, *ctx.policy = inputs
        ctx.save_for_backward(a, *output[:saved_values], *output[values + unsaved_counts :])
        ctx.mark_non_differentiable(*output[values:])

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = backward_op(*grads[:values], *ctx.saved_tensors, *ctx.policy)
        return grad, *(None,) * len(ctx.policy)

    torch.library.register_autograd(_name(operator), backward, setup_context=setup_context)


def _merge_apply_autograd() -> None:
    """First derivatives of the raw per-layer merge, for ``torch.compile``."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        base, targets, rows, targets_are_values, c, b = inputs
        ctx.layers, ctx.targets = len(base), len(targets)
        ctx.layout = (rows, targets_are_values)
        _, residual, status = output
        ctx.save_for_backward(c, b, *base, *targets, *residual)
        ctx.mark_non_differentiable(*residual, status)

    def backward(ctx: Any, grads: Sequence[Tensor], *_: Any) -> tuple[Any, ...]:
        c, b, *rest = ctx.saved_tensors
        base, rest = rest[: ctx.layers], rest[ctx.layers :]
        targets, residual = rest[: ctx.targets], rest[ctx.targets :]
        need_base, need_targets, _, _, need_c, need_b = ctx.needs_input_grad
        needs = (any(need_base), any(need_targets), need_c, need_b)
        grad_base, grad_targets, grad_c, grad_b = torch.ops.immunize_ext.merge_apply_backward(
            grads, base, targets, *ctx.layout, c, b, residual, *needs
        )
        return (
            grad_base if needs[0] else [None] * ctx.layers,
            grad_targets if needs[1] else [None] * ctx.targets,
            None,
            None,
            grad_c if need_c else None,
            grad_b if need_b else None,
        )

    torch.library.register_autograd(_name("merge_apply"), backward, setup_context=setup_context)


def _refuse_derivative(operator: str, public: str) -> None:
    """Make differentiating a raw operator raise: without a rule it would be silently wrong."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"torch.ops.immunize_ext.{operator} has no derivative; differentiate immunize_ext.ops."
            f"{public} instead"
        )

    torch.library.register_autograd(_name(operator), backward)


# --- vmap -----------------------------------------------------------------------------------------


def _register_folding_vmap(operator: str) -> None:
    """Fold the vmapped axis into the batch dimensions of a tensors-only operator."""
    op = getattr(torch.ops.immunize_ext, operator)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        outputs = op(*fold_batch(info.batch_size, in_dims, args))
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)

    torch.library.register_vmap(_name(operator), rule)


_FAKES: dict[str, Callable[..., Any]] = {
    "extremal_singular_values": _fake_extremal_singular_values,
    "extremal_singular_values_backward": _fake_extremal_singular_values_backward,
    "extremal_singular_values_double_backward": _fake_extremal_singular_values_double_backward,
    "gram_extremes": _fake_gram_extremes,
    "gram_extremes_backward": _fake_gram_extremes_backward,
    "gram_extremes_double_backward": _fake_gram_extremes_double_backward,
    "gram_regularizer": _fake_gram_regularizer,
    "gram_regularizer_backward": _fake_gram_regularizer_backward,
    "symmetric_extremes": _fake_symmetric_extremes,
    "symmetric_extremes_backward": _fake_extremal_singular_values_backward,
    "symmetric_extremes_double_backward": _fake_extremal_singular_values_double_backward,
    "symmetric_reference": _fake_symmetric_reference,
    "merge_gram": _fake_merge_gram,
    "merge_solve": _fake_merge_solve,
    "merge_apply": _fake_merge_apply,
    "merge_apply_backward": _fake_merge_apply_backward,
    "precondition": _fake_precondition,
}


_WITHOUT_DERIVATIVE = {
    "extremal_singular_values_backward": "extremal_singular_values",
    "extremal_singular_values_double_backward": "extremal_singular_values",
    "gram_extremes_backward": "gram_extremes",
    "gram_extremes_double_backward": "gram_extremes",
    "symmetric_extremes_backward": "symmetric_extremes",
    "symmetric_extremes_double_backward": "symmetric_extremes",
    "symmetric_reference": "SpectrumTracker",
    "symmetric_track": "SpectrumTracker",
    "merge_gram": "RegularizationFactor.from_embeddings",
    "merge_solve": "merge_kv",
    "merge_apply_backward": "merge_kv",
    "precondition": "precondition_gradient",
}


# Operators whose every tensor argument carries the batch. precondition shares its factor, and
# merge_apply takes lists: their vmap rules are those of the autograd.Function classes.
_FOLDING = [
    "extremal_singular_values",
    "extremal_singular_values_backward",
    "extremal_singular_values_double_backward",
    "gram_extremes",
    "gram_extremes_backward",
    "gram_extremes_double_backward",
    "symmetric_extremes",
    "symmetric_extremes_backward",
    "symmetric_extremes_double_backward",
    "merge_solve",
]


# Half precision gains nothing here: the kernels compute in float64 or float32 whatever they are
# given, and a float32 parameter must not lose digits on the way in.
_AUTOCAST = ["extremal_singular_values", "gram_extremes", "gram_regularizer", "symmetric_extremes"]


def _register() -> None:
    for operator, fake in _FAKES.items():
        torch.library.register_fake(_name(operator))(fake)
    _spectrum_autograd("extremal_singular_values", values=2, saved_values=0)
    _spectrum_autograd("gram_extremes", values=3, saved_values=2)
    _spectrum_autograd("symmetric_extremes", values=2, saved_values=0, unsaved_counts=0)
    _merge_apply_autograd()
    for operator, public in _WITHOUT_DERIVATIVE.items():
        _refuse_derivative(operator, public)
    for operator in _FOLDING:
        _register_folding_vmap(operator)
    for operator in _AUTOCAST:
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(_name(operator), device, torch.float32)


if _load.available():
    _register()
