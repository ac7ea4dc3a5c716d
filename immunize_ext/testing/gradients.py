"""Is the derivative right?  Five independent questions, since each check misses something.

* :func:`check_against_finite_differences`: does the gradient predict how the value moves?
* :func:`check_against_closed_form`: does it equal a formula, in relative norm?
* :func:`check_float32_against_float64`: does it survive single precision?
* :func:`check_double_backward`: is the gradient itself differentiable, or does it say it is not?
* :func:`check_forward_mode`: is the forward derivative right, or refused, but never silently zero?

A function under test takes tensors and returns a tensor or (nested) tuples or lists of tensors;
integer outputs are ignored.  Wrap lists of arguments in a lambda.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from immunize_ext.testing._calls import (
    Function,
    gradients,
    leaves,
    matrix_norm,
    positions,
    random_cotangents,
    require_float64,
    select,
    values_of,
)
from immunize_ext.testing._slopes import (
    InconclusiveCheckError,
    compare_slopes,
    random_directions,
    weighted_outputs,
)

__all__ = [
    "InconclusiveCheckError",
    "assert_gradients_close",
    "check_against_closed_form",
    "check_against_finite_differences",
    "check_double_backward",
    "check_float32_against_float64",
    "check_forward_mode",
]


def check_against_finite_differences(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    directions: int = 3,
    smooth_radius: float | None = None,
    safety: float = 10.0,
    gradient_rtol: float = 1e-8,
    seed: int = 0,
) -> None:
    """Compare <gradient, d> with central differences along random directions d.

    For every input, d is random with the norm of the input (per matrix), so that a step h is a
    relative change by h.  Outputs are summed with random weights over their own size, so that a
    tiny output counts as much as a large one.  The bound is

        safety (truncation + rounding) + gradient_rtol sum |g_ij d_ij|

    with truncation = change of the difference quotient when the step shrinks tenfold (about 100
    times its true curvature error where f is smooth), and rounding = noise / h, where noise is
    measured: the change of f when the inputs move by 4 eps.  The step with the least
    bound among 1e-2 .. 1e-8 is used.  Nothing in it is absolute, so a zeroed tiny gradient fails.

    At a kink the quotient is the mean of both one-sided slopes.  At a double extreme singular value
    that is the slope of the least-norm subgradient, at a triple one it is not.

    Args:
        fn: function of the inputs.
        inputs: float64 tensors of any shape (others pass through).
        wrt: which inputs to differentiate; default every floating point one.
        outputs: which returned tensors to look at; default every floating point one.
        directions: how many per input.
        smooth_radius: relative distance (Frobenius norm) from the inputs to where fn stops being
            smooth; only steps below a twentieth of it are used.  ``SpectrumSample.gap`` fits.
        safety: factor on the estimated errors.
        gradient_rtol: relative error that the gradient may have of its own.
        seed: of directions and weights.

    Raises:
        AssertionError: they differ; the message names input, direction, worst entry and bound.
        InconclusiveCheckError: the bound is as large as the derivative (an ``AssertionError``).
        ValueError: inputs are not float64, or nothing to differentiate.

    Note:
        Runs 2 x 7 evaluations per direction.  Deterministic for a given seed.

    Example:
        >>> a = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> check_against_finite_differences(lambda x: torch.linalg.svdvals(x), [a])
    """
    check = "check_against_finite_differences"
    where = positions(check, inputs, wrt)
    require_float64(check, inputs, where)
    weighted = weighted_outputs(check, fn, inputs, where, outputs, seed)
    _, grads = gradients(check, fn, inputs, where, outputs, weighted.weights)

    def values(args: Sequence[Tensor]) -> list[Tensor]:
        return values_of(check, fn, args, outputs)

    compare_slopes(
        check,
        "the outputs",
        values,
        weighted,
        inputs,
        where,
        grads,
        directions=directions,
        smooth_radius=smooth_radius,
        safety=safety,
        gradient_rtol=gradient_rtol,
        seed=seed,
    )


def check_double_backward(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    expect: Literal["right", "raises", "right_or_raises"] = "right",
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    directions: int = 2,
    smooth_radius: float | None = None,
    safety: float = 10.0,
    gradient_rtol: float = 1e-7,
    seed: int = 0,
) -> Literal["right", "raises"]:
    """Compare second derivatives with central differences of the first ones.

    The gradient is contracted with a random direction v and differentiated again, with respect to
    the inputs and to the incoming gradients.  A backward that detaches its result gives a second
    derivative of zero without a word; here it fails unless the truth is zero.

    Args:
        fn: function of the inputs.
        inputs: float64 tensors (others pass through).
        expect: "right"; "raises" where double backward must be refused (a cluster);
            "right_or_raises" where both are honest.
        wrt: which inputs to differentiate.
        outputs: which returned tensors to look at.
        directions: how many per input.
        smooth_radius: as in :func:`check_against_finite_differences`.
        safety: factor on the estimated errors.
        gradient_rtol: relative error that the second derivative may have of its own.
        seed: of directions and weights.

    Returns:
        What was found.

    Raises:
        AssertionError: a wrong second derivative, or the other of right and raises.
        InconclusiveCheckError: the bound is as large as the second derivative.
        ValueError: inputs are not float64.

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
        >>> check_double_backward(torch.linalg.inv, [a])
        'right'
    """
    check = "check_double_backward"
    where = positions(check, inputs, wrt)
    require_float64(check, inputs, where)
    first = weighted_outputs(check, fn, inputs, where, outputs, seed)
    probe = random_directions(inputs, where, seed + 1)
    count = len(inputs)

    def contracted(*args: Tensor) -> Tensor:
        """<gradient of sum <w, f>, v> as a function of inputs and cotangents w."""
        points, seeds = list(args[:count]), list(args[count:])
        with torch.enable_grad():
            held = [
                x if x.requires_grad or i not in where else x.detach().requires_grad_()
                for i, x in enumerate(points)
            ]
            found = torch.autograd.grad(
                select(check, fn(*held), outputs),
                [held[i] for i in where],
                seeds,
                allow_unused=True,
                create_graph=True,
            )
            total = held[where[0]].new_zeros(())
            for i, grad in zip(where, found, strict=True):
                if grad is not None:
                    total = total + (grad * probe[i]).sum()
        return total

    everything = [*inputs, *first.weights]
    active = [*where, *range(count, len(everything))]
    try:
        args = leaves(everything, active)
        total = contracted(*args)
        silent = not total.requires_grad
        if not silent:
            # Not torch.autograd.grad: it visits only nodes on a path to its inputs, and a node that
            # refuses double backward is a dead end that it would pass over in silence.
            total.backward()
    except (RuntimeError, NotImplementedError) as error:
        if expect == "right":
            raise AssertionError(
                f"{check}: double backward must be right, got {type(error).__name__}: {error}"
            ) from error
        return "raises"
    if expect == "raises":
        raise AssertionError(
            f"{check}: double backward must raise, got a result "
            f"{'without a graph (silently zero)' if silent else ''}; refuse it by name"
        )
    grads = []
    for i in active:
        grad = args[i].grad
        grads.append(torch.zeros_like(everything[i]) if grad is None else grad)
    weighted = weighted_outputs(check, contracted, everything, active, None, seed + 2, graph=False)
    scale = weighted.weights[0]

    def values(points: Sequence[Tensor]) -> list[Tensor]:
        return [contracted(*[x.detach() for x in points]).detach()]

    compare_slopes(
        check,
        "the gradient (silently without a graph)" if silent else "the gradient",
        values,
        weighted,
        everything,
        active,
        [grad * scale for grad in grads],
        directions=directions,
        smooth_radius=smooth_radius,
        safety=safety,
        gradient_rtol=gradient_rtol,
        seed=seed,
    )
    return "right"


def check_against_closed_form(
    fn: Function,
    inputs: Sequence[Tensor],
    expected: Callable[..., Sequence[Tensor]] | Sequence[Tensor],
    *,
    rtol: float | None = None,
    cancellation_scale: Sequence[Tensor | float] | None = None,
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    cotangents: Sequence[Tensor] | None = None,
) -> None:
    """Compare the gradient with a formula, in the relative norm of every matrix.

    Args:
        fn: function of the inputs.
        inputs: tensors.
        expected: gradients of sum <cotangent, output>, one per differentiated input, or a function
            ``(inputs, cotangents)`` that gives them.
        rtol: bound on |got - expected|_F / |expected|_F per matrix; default 100 max side eps of
            the input's dtype.
        cancellation_scale: per differentiated input, the norm of the terms that cancel in the
            gradient, where the expected one may be much smaller or zero; a number or ``(*,)``.
        wrt: which inputs to differentiate.
        outputs: which returned tensors to look at.
        cotangents: one per output; default ones.

    Raises:
        AssertionError: they differ; also where a tiny gradient came out as zero.
        ValueError: the numbers of gradients do not fit.

    Example:
        >>> a = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> check_against_closed_form(torch.linalg.norm, [a], [a / 5])
    """
    check = "check_against_closed_form"
    where = positions(check, inputs, wrt)
    values, grads = gradients(check, fn, inputs, where, outputs, cotangents)
    seeds = [torch.ones_like(v) for v in values] if cotangents is None else list(cotangents)
    truth = list(expected(list(inputs), seeds)) if callable(expected) else list(expected)
    if len(truth) != len(where):
        raise ValueError(
            f"{check}: expected must hold one gradient per differentiated input ({len(where)}), "
            f"got {len(truth)}; list them in the order of wrt"
        )
    scales = [None] * len(where) if cancellation_scale is None else list(cancellation_scale)
    for i, grad, right, scale in zip(where, grads, truth, scales, strict=True):
        assert_gradients_close(
            grad,
            right,
            rtol=rtol,
            cancellation_scale=scale,
            context=f"{check}: gradient of input {i}",
        )


def check_float32_against_float64(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    rtol: float | None = None,
    condition: float = 1.0,
    cancellation_scale: Sequence[Tensor | float] | None = None,
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Compare values and gradients in float32 with those in float64 at the same numbers.

    The inputs are rounded to float32 first, so both runs see equal numbers, and the only difference
    is how they compute.  Dtype and device of every result are asserted too.

    Args:
        fn: function of the inputs.
        inputs: tensors of any floating dtype; rounded to ``dtype``.
        rtol: bound on the relative norm per matrix (per entry for outputs below two dimensions);
            default 16 max side eps(dtype) ``condition``.
        condition: of the problem, for the default bound: sigma_max / gap for the gradient of a
            singular value, kappa for a solve.
        cancellation_scale: as in :func:`check_against_closed_form`.
        wrt: which inputs to differentiate.
        outputs: which returned tensors to look at.
        dtype: the lower precision; float16 and bfloat16 too.
        seed: of the cotangents.

    Raises:
        AssertionError: a result differs, or has another dtype or device than its input.

    Example:
        >>> a = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> check_float32_against_float64(torch.linalg.svdvals, [a], condition=3 / 2)
    """
    check = "check_float32_against_float64"
    where = positions(check, inputs, wrt)
    low = [x.detach().to(dtype) if x.dtype.is_floating_point else x for x in inputs]
    high = [x.to(torch.float64) if x.dtype.is_floating_point else x for x in low]
    exact = values_of(check, fn, high, outputs)
    cotangents = random_cotangents(exact, seed)
    cotangents = [weight.to(dtype) for weight in cotangents]
    values, grads = gradients(check, fn, low, where, outputs, cotangents)
    exact, right = gradients(
        check, fn, high, where, outputs, [weight.to(torch.float64) for weight in cotangents]
    )
    side = max((max(low[i].shape[-2:], default=1) for i in where), default=1)
    bound = 16 * max(side, 1) * torch.finfo(dtype).eps * condition if rtol is None else rtol
    why = (
        f"rtol as given ({rtol:.3g})"
        if rtol is not None
        else f"16 x largest side {side} x eps({dtype}) x condition {condition:.3g}"
    )
    device = low[where[0]].device
    for i, (value, truth) in enumerate(zip(values, exact, strict=True)):
        _require_kind(check, f"output {i}", value, dtype, device)
        scalars = value.dim() < 2
        assert_gradients_close(
            value[..., None, None] if scalars else value,
            truth[..., None, None] if scalars else truth,
            rtol=bound,
            context=f"{check}: output {i}",
            why=why,
        )
    scales = [None] * len(where) if cancellation_scale is None else list(cancellation_scale)
    for i, grad, truth, scale in zip(where, grads, right, scales, strict=True):
        _require_kind(check, f"gradient of input {i}", grad, dtype, low[i].device)
        assert_gradients_close(
            grad,
            truth,
            rtol=bound,
            cancellation_scale=scale,
            context=f"{check}: gradient of input {i}",
            why=why,
        )


def check_forward_mode(
    fn: Function,
    inputs: Sequence[Tensor],
    *,
    required: bool = False,
    wrt: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    directions: int = 2,
    rtol: float | None = None,
    seed: int = 0,
) -> Literal["supported", "refused"]:
    """Forward-mode derivatives are right, or refused; never silently zero.

    Asked three ways, since an operator can drop the tangent in one of them only:
    ``torch.func.jvp``, dual numbers on plain tensors, dual numbers on tensors that require a
    gradient.  The truth is the backward: <w, J d> = <J^T w, d> for random w and d.

    Args:
        fn: function of the inputs.
        inputs: tensors.
        required: refusing is a failure too.
        wrt: which inputs get a tangent.
        outputs: which returned tensors to look at.
        directions: how many tangents.
        rtol: bound relative to sum |gradient_ij d_ij|; default 1e6 eps of the dtype.
        seed: of directions and weights.

    Returns:
        "supported" where all three ways are right, "refused" where one or all raise.

    Raises:
        AssertionError: a wrong or silently dropped tangent, or refused although required.

    Example:
        >>> a = torch.eye(2, dtype=torch.float64)
        >>> check_forward_mode(torch.linalg.inv, [a])
        'supported'
    """
    check = "check_forward_mode"
    where = positions(check, inputs, wrt)
    values = values_of(check, fn, inputs, outputs)
    cotangents = random_cotangents(values, seed)
    _, grads = gradients(check, fn, inputs, where, outputs, cotangents)
    if rtol is None:
        rtol = 1e6 * torch.finfo(inputs[where[0]].dtype).eps
    refused = False
    for number in range(directions):
        tangents = random_directions(inputs, where, seed + 1 + number)
        parts = [(grad * tangents[i]).double() for i, grad in zip(where, grads, strict=True)]
        expected = sum(float(part.sum()) for part in parts)
        bound = rtol * sum(float(part.abs().sum()) for part in parts)
        for name, route in _FORWARD_ROUTES.items():
            try:
                found = route(check, fn, inputs, where, outputs, tangents)
            except (NotImplementedError, RuntimeError) as error:
                if required:
                    raise AssertionError(
                        f"{check}: forward mode ({name}) must be supported, got "
                        f"{type(error).__name__}: {error}"
                    ) from error
                refused = True
                continue
            dropped = all(tangent is None for tangent in found)
            got = sum(
                float((weight.double() * tangent.double()).sum())
                for weight, tangent in zip(cotangents, found, strict=True)
                if tangent is not None
            )
            if abs(got - expected) > bound:
                what = "silently dropped the tangent" if dropped or got == 0 else "is wrong"
                raise AssertionError(
                    f"{check}: forward mode ({name}) {what} along direction {number} (seed "
                    f"{seed}): expected {expected:.10g} from the backward, got {got:.10g}; bound "
                    f"{bound:.3g} = rtol {rtol:.3g} x sum |gradient x direction|"
                )
    return "refused" if refused else "supported"


def assert_gradients_close(
    actual: Tensor,
    expected: Tensor,
    *,
    rtol: float | None = None,
    cancellation_scale: Tensor | float | None = None,
    context: str = "gradient",
    why: str | None = None,
) -> None:
    """|actual - expected|_F <= rtol max(|expected|_F, cancellation_scale), per matrix.

    There is no absolute tolerance: zeros in place of a gradient of 1e-30 fail, and so does anything
    but zeros in place of zeros.

    Args:
        actual: ``(*, n, p)``, or below two dimensions taken as a whole.
        expected: the same shape; another dtype is converted to float64.
        rtol: default 100 max side eps of the dtype of ``actual``.
        cancellation_scale: a number or ``(*,)``: the norm of terms that cancel.
        context: start of the message.
        why: reason of the bound, for the message.

    Raises:
        AssertionError: with batch index, worst entry, expected, got and bound.

    Example:
        >>> assert_gradients_close(torch.tensor([1.0]), torch.tensor([1.0]))
    """
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{context}: must have shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    if actual.numel() == 0:
        return
    side = max(actual.shape[-2:], default=1)
    if rtol is None:
        eps = torch.finfo(actual.dtype).eps
        rtol, why = 100 * side * eps, f"100 x largest side {side} x eps({actual.dtype})"
    got = actual.detach().to(torch.float64).cpu()
    truth = expected.detach().to(torch.float64).cpu()
    scale = matrix_norm(truth)
    if cancellation_scale is not None:
        extra = torch.as_tensor(cancellation_scale, dtype=torch.float64).detach().cpu()
        if extra.dim():
            extra = extra.reshape(*extra.shape, *[1] * (scale.dim() - extra.dim()))
        scale = torch.maximum(scale, extra.expand_as(scale))
    bound = rtol * scale
    error = matrix_norm(got - truth)
    # Not <=, so that NaN in either counts as wrong.
    wrong = ~(error <= bound)
    if not bool(wrong.any()):
        return
    index = tuple(int(i) for i in torch.nonzero(wrong.reshape(wrong.shape))[0])
    lead = index[: max(actual.dim() - 2, 0)]
    difference = (got - truth)[lead].abs()
    difference = torch.where(
        torch.isnan(difference), torch.full_like(difference, torch.inf), difference
    )
    entry = lead + tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    zeroed = bool((got[lead] == 0).all()) and bool((truth[lead] != 0).any())
    raise AssertionError(
        f"{context}: {'is all zero' if zeroed else 'is wrong'}"
        f"{f' at batch index {lead}' if lead else ''}; worst entry {entry}: expected "
        f"{float(truth[entry]):.10g}, got {float(got[entry]):.10g}; error norm "
        f"{float(error[index]):.3g} > bound {float(bound[index]):.3g} = rtol {rtol:.3g} x norm "
        f"{float(scale[index]):.3g} ({why or 'rtol as given'})"
    )


def _require_kind(
    check: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.dtype != dtype or tensor.device != device:
        raise AssertionError(
            f"{check}: {name} must be {dtype} on {device} like its input, got {tensor.dtype} on "
            f"{tensor.device}"
        )


def _jvp_route(
    check: str,
    fn: Function,
    inputs: Sequence[Tensor],
    where: Sequence[int],
    outputs: Sequence[int] | None,
    tangents: dict[int, Tensor],
) -> list[Tensor | None]:
    def call(*moving: Tensor) -> tuple[Tensor, ...]:
        args = [x.detach() for x in inputs]
        for i, x in zip(where, moving, strict=True):
            args[i] = x
        return tuple(select(check, fn(*args), outputs))

    primals = tuple(inputs[i].detach().clone() for i in where)
    result = torch.func.jvp(call, primals, tuple(tangents[i] for i in where))
    return list(result[1])


def _dual_route(requires_grad: bool) -> Callable[..., list[Tensor | None]]:
    def route(
        check: str,
        fn: Function,
        inputs: Sequence[Tensor],
        where: Sequence[int],
        outputs: Sequence[int] | None,
        tangents: dict[int, Tensor],
    ) -> list[Tensor | None]:
        args = leaves(inputs, where if requires_grad else [])
        with forward_ad.dual_level():
            for i in where:
                args[i] = forward_ad.make_dual(args[i], tangents[i])
            results = select(check, fn(*args), outputs)
            found = [forward_ad.unpack_dual(result).tangent for result in results]
            return [None if part is None else part.detach().clone() for part in found]

    return route


_FORWARD_ROUTES: dict[str, Callable[..., list[Tensor | None]]] = {
    "torch.func.jvp": _jvp_route,
    "dual numbers": _dual_route(False),
    "dual numbers that require a gradient": _dual_route(True),
}
