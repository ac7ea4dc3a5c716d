"""Does the operator behave?  Properties that hold whatever the formula is.

* :func:`check_transforms`: vmap, ``torch.func.grad`` and ``torch.compile`` agree with a plain loop.
* :func:`check_layouts`: strides, offsets and expanded tensors change nothing, arguments stay as
  they are.
* :func:`check_batch_independence`: a degenerate element leaves the others alone, bit for bit.
* :func:`check_determinism`: two runs are bitwise equal, whatever lies in freed memory.
* :func:`check_euler_identity`: sum A * gradient = degree * value for homogeneous functions.
* :func:`check_orthogonal_invariance`: f(P A R) = f(A), and the gradient turns along.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from immunize_ext.testing._calls import (
    Function,
    gradients,
    leaves,
    matrix_norm,
    positions,
    random_cotangents,
    salted_generator,
    select,
    values_of,
)
from immunize_ext.testing.gradients import assert_gradients_close
from immunize_ext.testing.layouts import FREE_LAYOUTS, GuardedTensor, Layout, bits, guarded

Poison: TypeAlias = Literal["zero", "rank_one", "huge", "tiny", "nan", "inf"]
# torch.linalg.LinAlgError, which torch does not export to type checkers.
_LINALG_ERROR: type[Exception] = vars(torch.linalg)["LinAlgError"]
FINITE_POISONS: tuple[Poison, ...] = ("zero", "rank_one", "huge", "tiny")


def check_transforms(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    samples: Sequence[Sequence[Tensor]] | None = None,
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    rtol: float | None = None,
    compile: bool | str = False,
    seed: int = 0,
) -> None:
    """``torch.func`` transforms agree with plain calls and plain backward.

    Asked: ``torch.func.grad`` against backward; ``vmap(fn)`` against a loop, over all floating
    inputs together and over each one alone; ``vmap(grad)`` against a loop; on request
    ``torch.compile(fullgraph=True)`` forward and backward.

    Args:
        fn: function of the inputs.
        inputs: tensors of one example, without the mapped dimension.
        samples: several such lists of the same shapes to map over; default the inputs times 1, 1/2
            and 2, which keeps ranks and multiplicities.
        wrt: which inputs to differentiate and to map over.
        outputs: which returned tensors to look at.
        rtol: bound on relative norms per matrix; default 1000 max side eps.
        compile: True for the default backend, or the name of one ("aot_eager" checks tracing
            without a compiler).
        seed: of the cotangents.

    Raises:
        AssertionError: a transform raises or disagrees.

    Example:
        >>> check_transforms(torch.linalg.svdvals, [torch.rand(3, 2, dtype=torch.float64)])
    """
    check = "check_transforms"
    where = positions(check, inputs, wrt)
    if samples is None:
        samples = [
            [x * factor if i in where else x for i, x in enumerate(inputs)]
            for factor in (1.0, 0.5, 2.0)
        ]
    cotangents = random_cotangents(values_of(check, fn, inputs, outputs), seed)
    plain = [gradients(check, fn, sample, where, outputs, cotangents) for sample in samples]

    def call(*args: Tensor) -> tuple[Tensor, ...]:
        return tuple(select(check, fn(*args), outputs))

    def total(*args: Tensor) -> Tensor:
        terms = [(w * y).sum() for w, y in zip(cotangents, call(*args), strict=True)]
        return torch.stack(terms).sum()

    slope = torch.func.grad(total, argnums=tuple(where))
    for number, (sample, (_, grads)) in enumerate(zip(samples, plain, strict=True)):
        found = _guarded_call(check, "torch.func.grad", slope, *_detached(sample))
        _compare(f"{check}: torch.func.grad, sample {number}", found, grads, where, rtol)
    stacked = [
        torch.stack([sample[i].detach() for sample in samples]) if i in where else x
        for i, x in enumerate(inputs)
    ]
    together = tuple(0 if i in where else None for i in range(len(inputs)))
    mapped = _guarded_call(check, "vmap", torch.func.vmap(call, in_dims=together), *stacked)
    mapped_slope = _guarded_call(
        check, "vmap of grad", torch.func.vmap(slope, in_dims=together), *stacked
    )
    for number, (values, grads) in enumerate(plain):
        _compare(f"{check}: vmap, sample {number}", [y[number] for y in mapped], values, None, rtol)
        parts = [g[number] for g in mapped_slope]
        _compare(f"{check}: vmap of grad, sample {number}", parts, grads, where, rtol)
    if len(where) > 1:
        for i in where:
            alone = tuple(0 if j == i else None for j in range(len(inputs)))
            args = [stacked[j] if j == i else x.detach() for j, x in enumerate(inputs)]
            name = f"vmap over input {i} alone"
            mapped = _guarded_call(check, name, torch.func.vmap(call, in_dims=alone), *args)
            for number, sample in enumerate(samples):
                single = [sample[j] if j == i else x for j, x in enumerate(inputs)]
                values = values_of(check, fn, single, outputs)
                parts = [y[number] for y in mapped]
                _compare(f"{check}: {name}, sample {number}", parts, values, None, rtol)
    if compile is not False:
        backend = "inductor" if compile is True else compile
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        values, grads = _guarded_call(
            check,
            f"torch.compile(fullgraph=True, backend={backend!r})",
            lambda *args: gradients(check, compiled, args, where, None, cotangents),
            *_detached(inputs),
        )
        right_values, right_grads = gradients(check, fn, inputs, where, outputs, cotangents)
        _compare(f"{check}: torch.compile", values, right_values, None, rtol)
        _compare(f"{check}: backward of torch.compile", grads, right_grads, where, rtol)


def check_layouts(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    layouts: Sequence[Layout] = FREE_LAYOUTS,
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    batched: bool = True,
    contiguous_outputs: bool = False,
    rtol: float | None = None,
    seed: int = 0,
) -> None:
    """Values and gradients do not depend on strides, and no argument is changed.

    Every input in turn, and all of them together, lie as column-major, sliced, offset and expanded
    views inside a buffer of NaN (see ``layouts``).  After each forward and backward the whole
    buffer is compared bit for bit.  Incoming gradients get the same treatment: stride 0 as from
    ``sum()``, column-major as from ``.mT.sum()``.

    Args:
        fn: function of the inputs.
        inputs: tensors.
        layouts: which ones to try; those that need more dimensions are skipped.
        wrt: which inputs to differentiate and to lay out.
        outputs: which returned tensors to look at.
        batched: fn accepts one more leading batch dimension on all floating inputs at once; then
            expanded inputs (stride 0 over the batch) are tried too.
        contiguous_outputs: whether every output must be contiguous.
        rtol: bound on relative norms per matrix; default 1000 max side eps.
        seed: of the cotangents.

    Raises:
        AssertionError: a result differs, an argument or its surroundings were written to, or an
            output is not contiguous although it must be.

    Example:
        >>> check_layouts(torch.linalg.svdvals, [torch.rand(2, 3, 4, dtype=torch.float64)])
    """
    check = "check_layouts"
    where = positions(check, inputs, wrt)
    base = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
    cotangents = random_cotangents(values_of(check, fn, base, outputs), seed)
    right = gradients(check, fn, base, where, outputs, cotangents)
    for layout in [name for name in layouts if name != "expanded"]:
        usable = [i for i in where if layout != "transposed" or base[i].dim() >= 2]
        groups = [[i] for i in usable] + ([usable] if len(usable) > 1 else [])
        for group in groups:
            held = {i: guarded(base[i], layout) for i in group}
            _laid_out(
                f"{check}: {layout} input {', '.join(map(str, group))}",
                fn,
                base,
                held,
                where,
                outputs,
                cotangents,
                right,
                contiguous_outputs,
                rtol,
            )
    if batched:
        lifted = [
            x[None].expand(2, *x.shape).contiguous() if i in where else x
            for i, x in enumerate(base)
        ]
        seeds = random_cotangents(values_of(check, fn, lifted, outputs), seed)
        truth = gradients(check, fn, lifted, where, outputs, seeds)
        held = {i: guarded(lifted[i], "expanded") for i in where}
        name = f"{check}: expanded inputs"
        _laid_out(name, fn, lifted, held, where, outputs, seeds, truth, contiguous_outputs, rtol)
    _check_cotangent_layouts(check, fn, base, where, outputs, rtol, seed)


def check_batch_independence(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    batched: Sequence[int] | None = None,
    poisons: Sequence[Poison] = (*FINITE_POISONS, "nan"),
    may_raise: Sequence[Poison] = ("nan", "inf"),
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    singles: Literal["bitwise", "close", "skip"] = "close",
    rtol: float | None = None,
    seed: int = 0,
) -> dict[Poison, Literal["independent", "raised"]]:
    """One bad element of a batch leaves values and gradients of the others unchanged, bitwise.

    The first and the last element are replaced in turn.  The batch in reverse order gives the
    results in reverse order, bitwise, and every element alone gives its part of the batch.

    Args:
        fn: function of the inputs; every output has the same leading dimension as the inputs.
        inputs: tensors with leading dimension b >= 2.
        batched: which inputs have the leading dimension; default all of ``wrt``.
        poisons: what an element is replaced with: zeros, a matrix of rank one, itself times 2^200
            (2^40 in float32), times 2^-200, NaN, infinity.
        may_raise: poisons for which the function may refuse the whole batch with ``ValueError`` or
            ``torch.linalg.LinAlgError``.
        wrt: which inputs to differentiate.
        outputs: which returned tensors to look at.
        singles: how elements alone are compared with the batch.
        rtol: bound for "close"; default 1000 max side eps.
        seed: of the cotangents.

    Returns:
        Per poison what happened.

    Raises:
        AssertionError: another element changed, or the function raised where it must not.
        ValueError: less than two elements.

    Example:
        >>> a = torch.rand(3, 4, 2, dtype=torch.float64)
        >>> check_batch_independence(lambda x: (x * x).sum((-1, -2)), [a])["nan"]
        'independent'
    """
    check = "check_batch_independence"
    where = positions(check, inputs, wrt)
    members = where if batched is None else list(batched)
    sizes = {inputs[i].shape[0] for i in members if inputs[i].dim()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            f"{check}: inputs {members} must share a leading dimension of at least 2, got "
            f"{[tuple(inputs[i].shape) for i in members]}; stack some examples"
        )
    size = sizes.pop()
    values = values_of(check, fn, inputs, outputs)
    for number, value in enumerate(values):
        if value.dim() == 0 or value.shape[0] != size:
            raise AssertionError(
                f"{check}: output {number} must keep the leading dimension {size}, got shape "
                f"{tuple(value.shape)}"
            )
    cotangents = random_cotangents(values, seed)
    right_values, right_grads = gradients(check, fn, inputs, where, outputs, cotangents)
    outcome: dict[Poison, Literal["independent", "raised"]] = {}
    per_element = [k for k, i in enumerate(where) if i in members]
    for poison, spoiled in itertools.product(poisons, (0, size - 1)):
        changed = [
            _poisoned(x, spoiled, poison) if i in members else x.detach()
            for i, x in enumerate(inputs)
        ]
        try:
            found_values, found_grads = gradients(check, fn, changed, where, outputs, cotangents)
        except (ValueError, RuntimeError) as error:
            refusal = isinstance(error, (ValueError, _LINALG_ERROR))
            if poison in may_raise and refusal:
                outcome[poison] = "raised"
                continue
            raise AssertionError(
                f"{check}: a batch whose element {spoiled} is {poison} must give the other "
                f"elements, got {type(error).__name__}: {error}; add {poison!r} to may_raise if "
                "refusing is meant"
            ) from error
        outcome.setdefault(poison, "independent")
        others = [k for k in range(size) if k != spoiled]
        name = f"{check}: element {spoiled} is {poison}"
        for number, (got, truth) in enumerate(zip(found_values, right_values, strict=True)):
            _bitwise(f"{name}: output {number}", got[others], truth[others], others)
        for k in per_element:
            got, truth = found_grads[k][others], right_grads[k][others]
            _bitwise(f"{name}: gradient of input {where[k]}", got, truth, others)
    order = list(range(size))[::-1]
    turned = [x.detach()[order] if i in members else x for i, x in enumerate(inputs)]
    turned_values, turned_grads = gradients(
        check, fn, turned, where, outputs, [weight[order] for weight in cotangents]
    )
    for number, (got, truth) in enumerate(zip(turned_values, right_values, strict=True)):
        _bitwise(f"{check}: reversed batch: output {number}", got[order], truth, order)
    for k in per_element:
        name = f"{check}: reversed batch: gradient of input {where[k]}"
        _bitwise(name, turned_grads[k][order], right_grads[k], order)
    if singles != "skip":
        for element in range(size):
            alone = [
                x.detach()[element : element + 1] if i in members else x
                for i, x in enumerate(inputs)
            ]
            seeds = [weight[element : element + 1] for weight in cotangents]
            one_values, one_grads = gradients(check, fn, alone, where, outputs, seeds)
            name = f"{check}: element {element} alone"
            pairs = [
                (f"{name}: output {number}", got, truth[element : element + 1])
                for number, (got, truth) in enumerate(zip(one_values, right_values, strict=True))
            ] + [
                (
                    f"{name}: gradient of input {where[k]}",
                    one_grads[k],
                    right_grads[k][element : element + 1],
                )
                for k in per_element
            ]
            for context, got, truth in pairs:
                if singles == "bitwise":
                    _bitwise(context, got, truth, [element])
                else:
                    _close(context, got, truth, rtol)
    return outcome


def check_determinism(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    repeats: int = 3,
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Repeated calls give bitwise equal values and gradients.

    Between the calls, memory of several sizes is filled with NaN and freed, so that a workspace
    that is read before it is written shows.

    Args:
        fn: function of the inputs.
        inputs: tensors.
        repeats: how many calls are compared with the first one.
        wrt: which inputs to differentiate.
        outputs: which returned tensors to look at.
        seed: of the cotangents.

    Raises:
        AssertionError: a result differs in at least one bit.

    Example:
        >>> check_determinism(torch.linalg.svdvals, [torch.rand(4, 3, dtype=torch.float64)])
    """
    check = "check_determinism"
    where = positions(check, inputs, wrt)
    cotangents = random_cotangents(values_of(check, fn, inputs, outputs), seed)
    right_values, right_grads = gradients(check, fn, inputs, where, outputs, cotangents)
    for repeat in range(repeats):
        _foul_memory(inputs, where)
        values, grads = gradients(check, fn, inputs, where, outputs, cotangents)
        name = f"{check}: repeat {repeat + 1}"
        for number, (got, truth) in enumerate(zip(values, right_values, strict=True)):
            _bitwise(f"{name}: output {number}", got, truth, None)
        for i, got, truth in zip(where, grads, right_grads, strict=True):
            _bitwise(f"{name}: gradient of input {i}", got, truth, None)


def check_euler_identity(
    fn: Function,
    inputs: Sequence[Tensor],
    degree: float,
    *,
    wrt: int = 0,
    outputs: Sequence[int] | None = None,
    rtol: float | None = None,
) -> None:
    """Sum A * gradient = degree * value, for functions with f(c A) = c^degree f(A), c > 0.

    Sees a forgotten factor and a gradient that was set to zero without knowing the formula.  Holds
    at kinks too, for every element of the subdifferential.

    Args:
        fn: function whose outputs have the leading dimensions of the input as their shape.
        inputs: tensors.
        degree: 1 for a singular value, 2 for R_well, -2 for R_ill, 0 for a condition number.
        wrt: the input in which fn is homogeneous, ``(*, n, p)``.
        outputs: which returned tensors to look at, each ``(*,)``.
        rtol: bound relative to max(|degree value|, |A|_F |gradient|_F); default 1000 max side eps.

    Raises:
        AssertionError: the identity fails; with batch index, expected, got and bound.

    Example:
        >>> check_euler_identity(torch.linalg.svdvals, [torch.eye(1, dtype=torch.float64)[None]], 1)
    """
    check = "check_euler_identity"
    positions(check, inputs, [wrt])
    a = inputs[wrt].detach()
    if rtol is None:
        rtol = 1000 * max(a.shape[-2:], default=1) * torch.finfo(a.dtype).eps
    args = leaves(inputs, [wrt])
    with torch.enable_grad():
        values = select(check, fn(*args), outputs)
    for number, value in enumerate(values):
        if not value.requires_grad:
            raise AssertionError(f"{check}: output {number} must carry a graph, got a detached one")
        (grad,) = torch.autograd.grad(
            value, args[wrt], torch.ones_like(value), retain_graph=True, allow_unused=True
        )
        grad = torch.zeros_like(a) if grad is None else grad
        x, g, y = a.double(), grad.double(), value.detach().double()
        lead = x.shape[: x.dim() - 2]
        if y.shape != lead and y.numel() != x[..., 0, 0].numel():
            raise ValueError(
                f"{check}: output {number} must have one entry per matrix {tuple(lead)}, got "
                f"{tuple(y.shape)}; sum it over other dimensions"
            )
        # Products of numbers near 1: the norms are divided out before they can overflow.
        size_x, size_g = matrix_norm(x), matrix_norm(g)
        unit_x = x / torch.where(size_x > 0, size_x, torch.ones_like(size_x))
        unit_g = g / torch.where(size_g > 0, size_g, torch.ones_like(size_g))
        size = (size_x * size_g)[..., 0, 0]
        got = (unit_x * unit_g).sum((-1, -2)) * size
        expected = degree * y.reshape(lead)
        bound = rtol * torch.maximum(expected.abs(), size)
        wrong = ~((got - expected).abs() <= bound)
        if bool(wrong.any()):
            index = tuple(int(i) for i in torch.nonzero(wrong)[0]) if wrong.dim() else ()
            raise AssertionError(
                f"{check}: sum of input x gradient of output {number} must be degree {degree:g} x "
                f"value = {float(expected[index]):.10g}, got {float(got[index]):.10g}"
                f"{f' at batch index {index}' if index else ''}; bound {float(bound[index]):.3g} = "
                f"rtol {rtol:.3g} x max(|degree x value|, |input| |gradient|)"
            )


def check_orthogonal_invariance(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    wrt: int = 0,
    outputs: Sequence[int] | None = None,
    rtol: float | None = None,
    cancellation_scale: Tensor | float | None = None,
    seed: int = 0,
) -> None:
    """f(P A R) = f(A) and gradient(P A R) = P gradient(A) R for orthogonal P and R.

    Holds for every function of the singular values.  A gradient at a multiple extreme that depends
    on the basis a solver returned fails here, at any multiplicity.

    Args:
        fn: function of the inputs.
        inputs: tensors.
        wrt: the input to turn, ``(*, n, p)``.
        outputs: which returned tensors to look at.
        rtol: bound on relative norms; default 1000 max side eps.  The gradient of an extreme
            singular value needs sigma_max / gap times that.
        cancellation_scale: as in ``check_against_closed_form``, for the gradient.
        seed: of P, R and the cotangents.

    Raises:
        AssertionError: value or gradient does not turn along.

    Example:
        >>> a = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> check_orthogonal_invariance(torch.linalg.svdvals, [a])
    """
    check = "check_orthogonal_invariance"
    positions(check, inputs, [wrt])
    a = inputs[wrt].detach()
    generator = salted_generator(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64))[0].to(a)
        for side in a.shape[-2:]
    )
    turned = [left @ a @ right if i == wrt else x for i, x in enumerate(inputs)]
    cotangents = random_cotangents(values_of(check, fn, inputs, outputs), seed)
    values, grads = gradients(check, fn, inputs, [wrt], outputs, cotangents)
    turned_values, turned_grads = gradients(check, fn, turned, [wrt], outputs, cotangents)
    for number, (got, truth) in enumerate(zip(turned_values, values, strict=True)):
        _close(f"{check}: output {number} at P A R", got, truth, rtol)
    if rtol is None:
        rtol = 1000 * max(a.shape[-2:]) * torch.finfo(a.dtype).eps
    assert_gradients_close(
        turned_grads[0],
        left @ grads[0] @ right,
        rtol=rtol,
        cancellation_scale=cancellation_scale,
        context=f"{check}: gradient at P A R against P gradient R",
        why="a function of singular values turns along; at a multiple value only the mean over "
        "the cluster does",
    )


def _detached(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach() for x in inputs]


def _guarded_call(check: str, name: str, function: Callable[..., object], *args: Tensor):  # type: ignore[no-untyped-def]
    """Call, and turn any exception into a failure of the named transform."""
    try:
        return function(*args)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"{check}: {name} must work, got {type(error).__name__}: {error}"
        ) from error


def _compare(
    context: str,
    found: Sequence[Tensor],
    truth: Sequence[Tensor],
    where: Sequence[int] | None,
    rtol: float | None,
) -> None:
    kind = "output" if where is None else "gradient of input"
    labels = range(len(truth)) if where is None else where
    for label, got, right in zip(labels, found, truth, strict=True):
        _close(f"{context}: {kind} {label}", got, right, rtol)


def _close(context: str, got: Tensor, truth: Tensor, rtol: float | None) -> None:
    if rtol is None:
        rtol = 1000 * max(got.shape[-2:], default=1) * torch.finfo(got.dtype).eps
    assert_gradients_close(got, truth, rtol=rtol, context=context)


def _bitwise(context: str, got: Tensor, truth: Tensor, elements: Sequence[int] | None) -> None:
    if got.shape != truth.shape or got.dtype != truth.dtype:
        raise AssertionError(
            f"{context}: must have shape {tuple(truth.shape)} and {truth.dtype}, got "
            f"{tuple(got.shape)} and {got.dtype}"
        )
    wrong = torch.nonzero(bits(got) != bits(truth))
    if len(wrong):
        entry = tuple(int(i) for i in wrong[0])
        element = f" (batch element {elements[entry[0]]})" if elements and entry else ""
        raise AssertionError(
            f"{context}: must be bitwise equal, got {len(wrong)} different entries; entry {entry}"
            f"{element}: expected {float(truth[entry])!r}, got {float(got[entry])!r}"
        )


def _laid_out(
    context: str,
    fn: Function,
    base: Sequence[Tensor],
    held: dict[int, GuardedTensor],
    where: Sequence[int],
    outputs: Sequence[int] | None,
    cotangents: Sequence[Tensor],
    right: tuple[list[Tensor], list[Tensor]],
    contiguous_outputs: bool,
    rtol: float | None,
) -> None:
    """One forward and backward on guarded inputs, compared with the contiguous result."""
    args = [
        held[i].tensor.detach() if i in held else x.detach().clone() for i, x in enumerate(base)
    ]
    for i in where:
        args[i].requires_grad_()
    values, grads = gradients(context, fn, args, where, outputs, cotangents, prepared=True)
    _compare(context, values, right[0], None, rtol)
    _compare(context, grads, right[1], where, rtol)
    for i, guard in held.items():
        changed = guard.changed_entries()
        if changed:
            raise AssertionError(
                f"{context}: must leave its arguments alone, got {changed} changed entries in the "
                f"buffer of input {i} (the tensor or its surroundings)"
            )
    if contiguous_outputs:
        for number, value in enumerate(values):
            if not value.is_contiguous():
                raise AssertionError(
                    f"{context}: output {number} must be contiguous, got strides {value.stride()} "
                    f"for shape {tuple(value.shape)}"
                )


def _check_cotangent_layouts(
    check: str,
    fn: Function,
    base: Sequence[Tensor],
    where: Sequence[int],
    outputs: Sequence[int] | None,
    rtol: float | None,
    seed: int,
) -> None:
    values = values_of(check, fn, base, outputs)
    ones = [torch.ones_like(value).contiguous() for value in values]
    _, right = gradients(check, fn, base, where, outputs, ones)
    expanded = [value.new_ones(()).expand(value.shape) for value in values]
    _, found = gradients(check, fn, base, where, outputs, expanded)
    _compare(f"{check}: incoming gradient of stride 0", found, right, where, rtol)
    if any(value.dim() >= 2 for value in values):
        weights = [w.contiguous() for w in random_cotangents(values, seed + 1)]
        _, right = gradients(check, fn, base, where, outputs, weights)
        turned = [w.mT.contiguous().mT if w.dim() >= 2 else w for w in weights]
        _, found = gradients(check, fn, base, where, outputs, turned)
        _compare(f"{check}: column-major incoming gradient", found, right, where, rtol)


def _poisoned(x: Tensor, element: int, poison: Poison) -> Tensor:
    changed = x.detach().clone()
    exponent = 200 if x.dtype == torch.float64 else 40 if x.dtype == torch.float32 else 6
    part = changed[element]
    if poison == "zero":
        part.zero_()
    elif poison == "rank_one":
        part.fill_(1.0)
    elif poison == "huge":
        part.mul_(2.0**exponent)
    elif poison == "tiny":
        part.mul_(2.0**-exponent)
    else:
        part.fill_(float(poison))
    return changed


def _foul_memory(inputs: Sequence[Tensor], where: Sequence[int]) -> None:
    """Fill and free blocks of the sizes that an operator on these inputs may ask for."""
    count = max((inputs[i].numel() for i in where), default=1)
    like = inputs[where[0]]
    blocks = [
        torch.full((max(size, 1),), float("nan"), dtype=like.dtype, device=like.device)
        for factor in (1, 2, 4, 16)
        for size in (count * factor, count // factor)
    ]
    del blocks
