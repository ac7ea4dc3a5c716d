"""Derivatives of the raw operators, of every order and direction, registered with the dispatcher.

An operator whose differentiable outputs are functions of one matrix comes as a family of three:
``op`` gives values and vectors, ``op_backward`` their gradient G for given weights, and
``op_double_backward`` its second derivative H. With t a tangent and z a cotangent, everything else
follows from these three for any such family:

    values:    backward g -> G(g),      jvp t -> <G(e_i), t>
    gradient:  backward z -> H(z, g),   jvp (tg, ta) -> G(tg) + H(ta, g), as H is symmetric

The rules stand at the dispatch key ``Autograd``, where ``torch.func``, dual numbers, ``vmap`` of
either and ``torch.compile`` all arrive with plain operator calls. So there is one rule for eager
and compiled code, and nothing for Dynamo to trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as pytree

Kernel = Callable[..., Any]

# --- looking at tensors that transforms wrap ------------------------------------------------------


_PLAIN = (Tensor, torch.nn.Parameter)

_unpack_dual = torch._VF._unpack_dual  # each look-up in _VF costs as much as the call


def carries_tangent(tensor: Tensor) -> bool:
    """True if forward mode differentiates with respect to ``tensor``, in whatever disguise.

    Only the tensor knows: a graph that Dynamo traced enters the level without a word to
    ``forward_ad``, and runs on plain tensors.
    """
    return _unpack_dual(tensor, level=0)[1] is not None


def carries_derivative(tensor: Tensor) -> bool:
    """True if reverse or forward mode shall differentiate with respect to ``tensor``."""
    return tensor.requires_grad or carries_tangent(tensor)


def payload(tensor: Tensor) -> Tensor | None:
    """The numbers beneath the wrappers of ``torch.func``, the whole vmapped batch at once.

    None where there are no numbers to read: meta tensors, and tracing for ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    plain = type(tensor) in _PLAIN and tensor.device.type != "meta"
    return tensor.detach() if plain else None


# --- vmap -----------------------------------------------------------------------------------------


def fold_batch(batch_size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Move the vmapped axis of each tensor in ``args`` to the front; expand the others along it.

    Args:
        batch_size: Length of the vmapped axis.
        in_dims: For each argument the position of that axis, or None.
        args: Positional arguments of an operator, tensors or lists of tensors; whatever else
            passes unchanged.

    Returns:
        The arguments with the axis in front of their own batch dimensions.
    """
    return [_fold(batch_size, dim, arg) for dim, arg in zip(in_dims, args, strict=True)]


def _fold(batch_size: int, dim: Any, arg: Any) -> Any:
    if isinstance(arg, Sequence) and not isinstance(arg, str):
        dims = [None] * len(arg) if dim is None else dim
        return [_fold(batch_size, one, part) for one, part in zip(dims, arg, strict=True)]
    if not isinstance(arg, Tensor):
        return arg
    if dim is None:
        return arg.unsqueeze(0).expand(batch_size, *arg.shape)
    return arg.movedim(dim, 0)


class BatchedFunction(torch.autograd.Function):
    """An ``autograd.Function`` whose forward takes leading batch dimensions on every tensor."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the vmapped axis into the batch and apply the function once."""
        outputs = cls.apply(*fold_batch(info.batch_size, in_dims, args))
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)


# --- the dispatch key Autograd --------------------------------------------------------------------


def below_autograd(operator: Kernel, *args: Any) -> Any:
    """Call the operator past its rule: its kernel, or the next transform of ``torch.func``.

    That transform must find both modes as they were outside, and ``autograd.Function`` switches
    them off around its forward.
    """
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    with (
        torch.enable_grad(),
        _set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return operator(*args)


def primals_of(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The saved tensors without the tangents of the level that is being differentiated.

    What is computed from them then belongs to the levels outside: that is what makes forward mode
    over forward mode right.
    """
    return [_unpack_dual(tensor, level=0)[0] for tensor in tensors]


class Family(NamedTuple):
    """What the derivatives of one family have to know.

    Attributes:
        name: The operator ``op``: (a, *policy) -> outputs.
        values: How many of its outputs are differentiable; they lead, and are float64.
        saved: The outputs that ``op_backward`` takes: (*grads, a, *saved, *policy) -> grad_a.
        multiplicities: Which outputs say how often an extreme occurs, one for each extreme.
        vectors: Which outputs are zero where the gradient of that extreme is.
    """

    name: str
    values: int
    saved: tuple[int, ...]
    multiplicities: tuple[int, ...]
    vectors: tuple[int, ...]

    @property
    def third(self) -> str:
        """What refuses a third derivative."""
        return f"immunize_ext: {self.name}: third derivatives are not implemented"

    def call(self, suffix: str, *args: Any) -> Any:
        """Call ``op``, ``op_backward`` or ``op_double_backward``."""
        return getattr(torch.ops.immunize_ext, self.name + suffix)(*args)

    def below(self, suffix: str, *args: Any) -> Any:
        """The same below autograd."""
        return below_autograd(getattr(torch.ops.immunize_ext, self.name + suffix), *args)


def _undefined(family: Family, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """For each extreme, where it has no derivative; raises if that can be read and is anywhere."""
    found = []
    for count, vector in zip(family.multiplicities, family.vectors, strict=True):
        # A zero vector marks a derivative that is zero, however many values coincide there.
        repeated = (outputs[count] > 1) & (outputs[vector] != 0).any(-1)
        readable = payload(repeated)
        if readable is not None and bool(readable.any()):
            raise NotImplementedError(
                f"{family.name}: forward-mode derivatives of an extreme do not exist where it is "
                "repeated (multiplicity > 1); reverse mode returns the least-norm subgradient"
            )
        found.append(repeated)
    return found


class Values(_SingleLevelFunction):
    """``op``: the differentiable values of one matrix, and what belongs to them."""

    @staticmethod
    def forward(family: Family, *args: Any) -> Any:
        return family.below("", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # of vectors and counts: a launch for each on a device
        ctx.family, a, *ctx.policy = inputs
        ctx.save_for_backward(a, *output)
        ctx.save_for_forward(a, *output)
        ctx.mark_non_differentiable(*output[ctx.family.values :])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        a, *outputs = ctx.saved_tensors
        family: Family = ctx.family
        grads = [
            torch.zeros_like(value) if grad is None else grad
            for grad, value in zip(incoming, outputs[: family.values], strict=False)
        ]
        # The differentiable outputs are saved as numbers: their derivative is the whole formula's.
        saved = [outputs[k].detach() if k < family.values else outputs[k] for k in family.saved]
        grad = family.call("_backward", *grads, a, *saved, *ctx.policy)
        return None, grad, *(None,) * len(ctx.policy)

    @staticmethod
    def jvp(ctx: Any, _: Any, tangent: Tensor, *__: Any) -> tuple[Any, ...]:
        family: Family = ctx.family
        with _set_fwd_grad_enabled(True):
            a, *outputs = primals_of(ctx.saved_tensors)
            undefined = _undefined(family, tuple(outputs))
            wide, moving = a.to(torch.float64), tangent.to(torch.float64)
            saved = [outputs[k].detach() for k in family.saved]
            zero = torch.zeros_like(outputs[0])
            tangents = []
            for k in range(family.values):
                grads = [zero] * family.values
                grads[k] = torch.ones_like(zero)
                gradient = family.call("_backward", *grads, wide, *saved, *ctx.policy)
                moved = (gradient * moving).sum(dim=(-2, -1))
                if k < len(undefined) and payload(undefined[k]) is None:
                    moved = torch.where(undefined[k], torch.nan, moved)
                tangents.append(moved)
        return (*tangents, *(None,) * (len(outputs) - family.values))


class Gradient(_SingleLevelFunction):
    """``op_backward``: linear in the incoming gradients, and with a symmetric derivative in a."""

    @staticmethod
    def forward(family: Family, *args: Any) -> Any:
        return family.below("_backward", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # a zero tangent would ask for a second derivative
        family, *rest = inputs
        count = family.values + 1 + len(family.saved)
        ctx.family, ctx.policy = family, rest[count:]
        ctx.save_for_backward(*rest[: family.values + 1])
        ctx.save_for_forward(*rest[:count])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
        family: Family = ctx.family
        grads: tuple[Any, ...] = (None,) * (family.values + 1)
        if cotangent is not None:
            saved = ctx.saved_tensors[: family.values + 1]
            grads = family.call("_double_backward", cotangent, *saved, *ctx.policy)
        return None, *grads, *(None,) * (len(family.saved) + len(ctx.policy))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Tensor:
        family: Family = ctx.family
        with _set_fwd_grad_enabled(True):
            primals = primals_of(ctx.saved_tensors)
            grads, a, rest = (
                primals[: family.values],
                primals[family.values],
                primals[family.values :],
            )
            total = torch.zeros_like(a)
            moving = tangents[: family.values]
            if any(tangent is not None for tangent in moving):
                filled = [
                    torch.zeros_like(grad) if tangent is None else tangent
                    for grad, tangent in zip(grads, moving, strict=True)
                ]
                total = total + family.call("_backward", *filled, *rest, *ctx.policy)
            if tangents[family.values] is not None:
                second = family.call(
                    "_double_backward", tangents[family.values], *grads, a, *ctx.policy
                )
                total = total + second[-1]
        return total


class SecondDerivative(_SingleLevelFunction):
    """``op_double_backward``: linear in the cotangent and in the gradients; no third derivative."""

    @staticmethod
    def forward(family: Family, *args: Any) -> Any:
        return family.below("_double_backward", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # a zero tangent would ask for a third derivative
        ctx.family, *rest = inputs
        count = ctx.family.values + 2
        ctx.policy = rest[count:]
        ctx.save_for_forward(*rest[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(ctx.family.third)

    @staticmethod
    def jvp(ctx: Any, _: Any, moving: Any, *tangents: Any) -> tuple[Tensor, ...]:
        family: Family = ctx.family
        *moving_grads, moving_a = tangents[: family.values + 1]
        if moving_a is not None:
            raise NotImplementedError(family.third)
        with _set_fwd_grad_enabled(True):
            cotangent, *grads, a = primals_of(ctx.saved_tensors)
            still = torch.zeros_like(cotangent) if moving is None else moving
            *along, total = family.call("_double_backward", still, *grads, a, *ctx.policy)
            if any(tangent is not None for tangent in moving_grads):
                filled = [
                    torch.zeros_like(grad) if tangent is None else tangent
                    for grad, tangent in zip(grads, moving_grads, strict=True)
                ]
                second = family.call("_double_backward", cotangent, *filled, a, *ctx.policy)
                total = total + second[-1]
        return (*along, total)


class Linear(_SingleLevelFunction):
    """An operator that is linear in its first argument and self-adjoint: its own derivative.

    Or another one, ``derivative``, on purpose: what comes out is then no gradient of a function. Of
    the constants, tensors and in the end a ridge, that one takes the last ones.
    """

    @staticmethod
    def forward(name: str, derivative: str, *args: Any) -> Any:
        return below_autograd(getattr(torch.ops.immunize_ext, name), *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, derivative, _, *tensors, ctx.ridge = inputs
        ctx.derivative = getattr(torch.ops.immunize_ext, derivative)
        ctx.constants = len(tensors) + 1
        used = tensors[ctx.constants + 1 - len(ctx.derivative.default._schema.arguments) :]
        ctx.save_for_backward(*used)
        ctx.save_for_forward(*used)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        moved = ctx.derivative(grad, *ctx.saved_tensors, ctx.ridge)
        return None, None, moved, *(None,) * ctx.constants

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, tangent: Tensor, *___: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            moved: Tensor = ctx.derivative(tangent, *ctx.saved_tensors, ctx.ridge)
        return moved


class Saved(_SingleLevelFunction):
    """An operator whose rule keeps its inputs and its one output, which belong to the graph."""

    operator: str

    @classmethod
    def forward(cls, *args: Tensor) -> Any:
        return below_autograd(getattr(torch.ops.immunize_ext, cls.operator), *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)


class _Resolvents(_SingleLevelFunction):
    """``resolvent_traces``; its gradient is ``resolvent_traces_backward``."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd(torch.ops.immunize_ext.resolvent_traces, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[3:])
        ctx.mark_non_differentiable(*output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.ops.immunize_ext.resolvent_traces_backward(*grads[:3], *ctx.saved_tensors)


def composed_in_forward_mode(
    operator: Kernel, function: type[_SingleLevelFunction], composed: Kernel
) -> Kernel:
    """The ``Autograd`` kernel of an operator with a rule for reverse mode alone."""
    rule = differentiable(operator, function)

    def kernel(*args: Any) -> Any:
        if any(isinstance(arg, Tensor) and carries_tangent(arg) for arg in args):
            return composed(*args)
        return rule(*args)

    return kernel


def composed_where_differentiated(operator: Kernel, composed: Kernel) -> Kernel:
    """That of a gradient: where it is differentiated itself, the composition."""

    def kernel(*args: Any) -> Any:
        if _differentiated(args) is not None:
            return composed(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return kernel


def resolvents(operator: Kernel, composed: Kernel) -> Kernel:
    """The ``Autograd`` kernel of ``resolvent_traces``."""

    def whole(*args: Tensor) -> Any:
        return (*composed(*args), *below_autograd(operator, *primals_of(args))[3:])

    return composed_in_forward_mode(operator, _Resolvents, whole)


class _KhatriRao(_SingleLevelFunction):
    """``khatri_rao_gram``; its gradient is ``khatri_rao_gram_backward``."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd(torch.ops.immunize_ext.khatri_rao_gram, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.bias = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[:2]
        found = torch.ops.immunize_ext.khatri_rao_gram_backward(
            grad, *ctx.saved_tensors, ctx.bias, *needed
        )
        return *(part if need else None for part, need in zip(found, needed, strict=True)), None


def khatri_rao(operator: Kernel, composed: Kernel) -> Kernel:
    """The ``Autograd`` kernel of ``khatri_rao_gram``."""
    return composed_in_forward_mode(operator, _KhatriRao, composed)


class _Refusal(_SingleLevelFunction):
    """A result whose derivative is an error with a given text."""

    @staticmethod
    def forward(text: str, value: Tensor, cause: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.text = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(ctx.text)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(ctx.text)


def _differentiated(args: tuple[Any, ...]) -> Tensor | None:
    """The first tensor among the arguments that a derivative is asked for."""
    recording = torch.is_grad_enabled()
    for arg in args:
        if isinstance(arg, Tensor):
            if (recording and arg.requires_grad) or carries_tangent(arg):
                return arg
        elif isinstance(arg, (list, tuple)):
            found = _differentiated(tuple(arg))
            if found is not None:
                return found
    return None


def apply_here(function: type[_SingleLevelFunction], *args: Any) -> Any:
    """Apply a function at the transform that is being served, and no other."""
    if not torch._C._are_functorch_transforms_active():
        return cast(Any, function).apply(*args)
    with enable_single_level_autograd_function():
        return cast(Any, function).apply(*args)


def differentiable(operator: Kernel, function: type[_SingleLevelFunction], *given: Any) -> Kernel:
    """The ``Autograd`` kernel of an operator with a rule: ``function.apply(*given, *args)``.

    On CPU and CUDA the compiled part asks first (csrc/rules.h): what arrives is differentiated.
    """

    def kernel(*args: Any) -> Any:
        if _differentiated(args) is None:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)
        return apply_here(function, *given, *args)

    return kernel


def refuse_derivative(text: str, value: Tensor, cause: Tensor) -> Tensor:
    """The value, whose derivative by ``cause`` raises the text."""
    return cast(Tensor, apply_here(_Refusal, text, value, cause))


def refusing(operator: Kernel, text: str) -> Kernel:
    """The ``Autograd`` kernel of an operator without one: differentiating it raises the text."""

    def kernel(*args: Any) -> Any:
        cause = _differentiated(args)
        if cause is None:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)
        if carries_tangent(cause):
            raise NotImplementedError(text)
        outputs = below_autograd(operator, *args)
        return pytree.tree_map_only(
            Tensor,
            lambda out: refuse_derivative(text, out, cause) if out.is_floating_point() else out,
            outputs,
        )

    return kernel
