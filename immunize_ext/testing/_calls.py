"""Calling a function under test: its outputs, random cotangents, its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

# A function of tensors that returns a tensor or (nested) sequences of tensors.
Function: TypeAlias = Callable[..., object]


def positions(check: str, inputs: Sequence[Tensor], wrt: Sequence[int] | None) -> list[int]:
    """Which inputs to differentiate: as given, or every floating point one."""
    floating = [i for i, x in enumerate(inputs) if x.dtype.is_floating_point]
    if wrt is None:
        if not floating:
            raise ValueError(
                f"{check}: inputs must hold a floating point tensor, got "
                f"{[str(x.dtype) for x in inputs]}; pass the arguments to differentiate"
            )
        return floating
    wrong = [i for i in wrt if i not in floating]
    if wrong:
        raise ValueError(
            f"{check}: wrt must name floating point inputs {floating}, got {wrong}; "
            "count from 0 in the order of inputs"
        )
    return list(wrt)


def require_float64(check: str, inputs: Sequence[Tensor], wrt: Sequence[int]) -> None:
    """Refuse differentiated inputs of lower precision, whose rounding would hide every error."""
    for i in wrt:
        if inputs[i].dtype != torch.float64:
            raise ValueError(
                f"{check}: inputs must be float64, got {inputs[i].dtype} for input {i}; convert "
                "them, and use check_float32_against_float64 for lower precision"
            )


def flatten(result: object) -> list[Tensor]:
    """All tensors of a result, depth first."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in flatten(part)]
    return []


def select(check: str, result: object, outputs: Sequence[int] | None) -> list[Tensor]:
    """The outputs to look at: as given, or every floating point one."""
    tensors = flatten(result)
    if outputs is None:
        chosen = [tensor for tensor in tensors if tensor.dtype.is_floating_point]
    else:
        if any(not 0 <= i < len(tensors) for i in outputs):
            raise ValueError(
                f"{check}: outputs must lie in 0..{len(tensors) - 1}, got {list(outputs)}; "
                "they count the tensors that the function returns"
            )
        chosen = [tensors[i] for i in outputs]
    if not chosen:
        raise ValueError(
            f"{check}: the function must return a floating point tensor, got {result!r}; "
            "wrap it so that it does"
        )
    return chosen


def leaves(inputs: Sequence[Tensor], wrt: Sequence[int]) -> list[Tensor]:
    """Fresh copies of the inputs; those in ``wrt`` require a gradient."""
    return [x.detach().clone().requires_grad_(i in wrt) for i, x in enumerate(inputs)]


def values_of(
    check: str, fn: Function, inputs: Sequence[Tensor], outputs: Sequence[int] | None
) -> list[Tensor]:
    """Outputs without a graph, detached."""
    with torch.no_grad():
        result = fn(*[x.detach().clone() for x in inputs])
    return [tensor.detach() for tensor in select(check, result, outputs)]


def salted_generator(seed: int) -> torch.Generator:
    """A generator that shares no stream with ``manual_seed(seed)``.

    A direction drawn from the same stream as the input would be parallel to it, and along the input
    itself the derivatives of homogeneous functions are trivial.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D) % 2**63)


def random_cotangents(
    values: Sequence[Tensor], seed: int, scales: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Random signs times sizes in [0.5, 1.5], divided by ``scales`` where given."""
    generator = salted_generator(seed)
    cotangents = []
    for i, value in enumerate(values):
        size = 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
        weight = (size * sign).to(value.device)
        if scales is not None:
            weight = weight / scales[i].to(torch.float64)
        cotangents.append(weight.to(value.dtype))
    return cotangents


def gradients(
    check: str,
    fn: Function,
    inputs: Sequence[Tensor],
    wrt: Sequence[int],
    outputs: Sequence[int] | None,
    cotangents: Sequence[Tensor] | None,
    *,
    prepared: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the gradients of sum <cotangent, output>; zeros for an unused input.

    Raises ``AssertionError`` where an output carries no graph at all.
    """
    args = list(inputs) if prepared else leaves(inputs, wrt)
    with torch.enable_grad():
        values = select(check, fn(*args), outputs)
        for i, value in enumerate(values):
            if not value.requires_grad:
                raise AssertionError(
                    f"{check}: output {i} ({value.dtype}, shape {tuple(value.shape)}) must carry "
                    "a graph, got requires_grad = False although the inputs require a gradient; "
                    "it was detached, or name the differentiable ones in outputs"
                )
        seeds = [torch.ones_like(v) for v in values] if cotangents is None else list(cotangents)
        found = torch.autograd.grad(values, [args[i] for i in wrt], seeds, allow_unused=True)
    grads = [
        torch.zeros_like(args[i]) if grad is None else grad
        for i, grad in zip(wrt, found, strict=True)
    ]
    return [value.detach() for value in values], grads


def matrix_norm(tensor: Tensor) -> Tensor:
    """Frobenius norm of every matrix (last two dimensions), of everything below two dimensions.

    Scaled by the largest entry, so that 1e-200 does not vanish; the dimensions are kept.
    """
    dims = tuple(range(-min(tensor.dim(), 2), 0))
    if tensor.numel() == 0:
        shape = [1 if i >= tensor.dim() - 2 else n for i, n in enumerate(tensor.shape)]
        return tensor.new_zeros(shape)
    largest = tensor.abs().amax(dim=dims, keepdim=True) if dims else tensor.abs()
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = tensor / unit
    total = (scaled * scaled).sum(dim=dims, keepdim=True) if dims else scaled * scaled
    return total.sqrt() * largest
