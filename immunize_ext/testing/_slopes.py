"""Difference quotients against gradients: weights, steps, error estimates, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from immunize_ext.testing._calls import (
    Function,
    matrix_norm,
    random_cotangents,
    salted_generator,
    select,
    values_of,
)

_EPS = torch.finfo(torch.float64).eps
# Relative steps from coarse to fine.  Where f is smooth the best one is near 1e-5; near a kink at
# distance r only steps below r say anything.
STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
# A probe of the noise of f: inputs moved by this much of their norm, as a backward stable
# algorithm may do.
_PROBE = 4 * _EPS
# Below this share of the slopes that random directions have, a bound decides nothing.
_RESOLUTION = 0.2
_MAX_LOCATED = 64


class InconclusiveCheckError(AssertionError):
    """The error bound is as large as the derivative: the check cannot decide either way."""


@dataclass(frozen=True)
class Slope:
    """A difference quotient, its relative step and the two estimated errors."""

    value: float
    step: float
    truncation: float
    rounding: float


@dataclass(frozen=True)
class Weighted:
    """sum_i w_i f_i with weights that give every output the same say, and the noise of the sum."""

    weights: list[Tensor]
    noise: float
    size: float


def weighted_outputs(
    check: str,
    fn: Function,
    inputs: Sequence[Tensor],
    where: Sequence[int],
    outputs: Sequence[int] | None,
    seed: int,
    *,
    graph: bool = True,
) -> Weighted:
    """Random weights over the size of each output, from its value and from its sensitivity."""

    def call(args: Sequence[Tensor]) -> list[Tensor]:
        if graph:
            return values_of(check, fn, args, outputs)
        result = fn(*[x.detach() for x in args])
        return [tensor.detach() for tensor in select(check, result, outputs)]

    values = call(inputs)
    noise = [4 * _EPS * value.abs().double() for value in values]
    for number in range(3):
        moved = list(inputs)
        for i, direction in random_directions(inputs, where, seed + 100 + number).items():
            moved[i] = inputs[i] + _PROBE * direction
        for j, (value, other) in enumerate(zip(values, call(moved), strict=True)):
            if other.shape != value.shape:
                raise AssertionError(
                    f"{check}: output {j} must keep its shape {tuple(value.shape)} for inputs "
                    f"that differ by rounding, got {tuple(other.shape)}"
                )
            noise[j] = torch.maximum(noise[j], (other - value).abs().double())
    scales = []
    for value, part in zip(values, noise, strict=True):
        # part / _PROBE is how much the output moves under a relative change of order one.
        size = torch.maximum(value.abs().double(), part / _PROBE)
        usable = torch.isfinite(size) & (size > 0)
        scales.append(torch.where(usable, size, torch.ones_like(size)))
    weights = random_cotangents(values, seed, scales)
    total = 0.0
    extent = 0.0
    for weight, value, part in zip(weights, values, noise, strict=True):
        total += float((weight.abs().double() * part).sum())
        extent += float((weight * value).abs().sum())
    return Weighted(weights, total, extent)


def random_directions(
    inputs: Sequence[Tensor], where: Sequence[int], seed: int
) -> dict[int, Tensor]:
    """Gaussian directions with the norm of their input, per matrix; norm 1 where that is zero."""
    generator = salted_generator(seed)
    found = {}
    for i in where:
        x = inputs[i].detach()
        raw = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        length = matrix_norm(raw)
        size = matrix_norm(x.double())
        size = torch.where(size > 0, size, torch.ones_like(size))
        length = torch.where(length > 0, length, torch.ones_like(length))
        found[i] = (raw / length * size).to(x.dtype)
    return found


def compare_slopes(
    check: str,
    subject: str,
    values: Callable[[Sequence[Tensor]], list[Tensor]],
    weighted: Weighted,
    inputs: Sequence[Tensor],
    where: Sequence[int],
    grads: Sequence[Tensor],
    *,
    directions: int,
    smooth_radius: float | None,
    safety: float,
    gradient_rtol: float,
    seed: int,
) -> None:
    """Raise where <gradient, d> and the difference quotient differ by more than the bound."""
    steps = _steps(check, smooth_radius)
    for i, grad in zip(where, grads, strict=True):
        if inputs[i].numel() == 0:
            continue
        for number in range(directions):
            direction = random_directions(inputs, [i], seed + 7919 * (number + 1) + i)[i]
            parts = (grad * direction).double()
            got = float(parts.sum())
            slope = _best_slope(values, weighted, inputs, i, direction, steps)
            bound = safety * (slope.truncation + slope.rounding) + gradient_rtol * float(
                parts.abs().sum()
            )
            # Not >, so that NaN in either counts as wrong.
            if not abs(got - slope.value) <= bound:
                entry = _worst_entry(values, weighted, inputs, i, grad, slope.step)
                raise AssertionError(
                    f"{check}: the derivative of {subject} along direction {number} of input {i} "
                    f"(shape {tuple(inputs[i].shape)}, seed {seed}) must be {slope.value:.10g} by "
                    f"central differences with relative step {slope.step:.0e}, got {got:.10g} from "
                    f"the gradient; |difference| {abs(got - slope.value):.3g} > bound {bound:.3g} "
                    f"= {safety:g} x (curvature {slope.truncation:.2g}, the change of the quotient "
                    f"since the step was ten times larger, + rounding {slope.rounding:.2g}, the "
                    f"change of the outputs when inputs move by 4 eps, over the step) + "
                    f"{gradient_rtol:g} x sum |gradient x direction|{entry}"
                )
            typical = max(float(parts.square().sum().sqrt()), abs(slope.value))
            if bound > max(_RESOLUTION * typical, 1e-4 * weighted.size):
                raise InconclusiveCheckError(
                    f"{check}: cannot decide along direction {number} of input {i}: bound "
                    f"{bound:.3g} against a derivative of about {typical:.3g} (curvature "
                    f"{slope.truncation:.2g}, rounding {slope.rounding:.2g}, step "
                    f"{slope.step:.0e}); the function is not smooth there, or too ill-conditioned "
                    "for finite differences: compare with a closed form instead"
                )


def _steps(check: str, smooth_radius: float | None) -> list[float]:
    if smooth_radius is None:
        return list(STEPS)
    usable = [step for step in STEPS if step <= smooth_radius / 20]
    if len(usable) < 2:
        raise InconclusiveCheckError(
            f"{check}: smooth_radius must leave two steps, got {smooth_radius:.3g} against steps "
            f"down to {STEPS[-1]:g}; compare with a closed form instead"
        )
    return usable


def _best_slope(
    values: Callable[[Sequence[Tensor]], list[Tensor]],
    weighted: Weighted,
    inputs: Sequence[Tensor],
    position: int,
    direction: Tensor,
    steps: Sequence[float],
) -> Slope:
    quotients = [_quotient(values, weighted, inputs, position, direction, step) for step in steps]
    best: Slope | None = None
    for k in range(1, len(steps)):
        change = abs(quotients[k] - quotients[k - 1])
        if k > 1:
            # For a smooth function the earlier change is 100 times larger; two small changes by
            # chance at once are unlikely.
            change = max(change, abs(quotients[k - 1] - quotients[k - 2]) / 100)
        slope = Slope(quotients[k], steps[k], change, weighted.noise / steps[k])
        error = slope.truncation + slope.rounding
        # A coarse step may leave the domain and give NaN: any later finite one is better.
        if best is None or best.value != best.value or error < best.truncation + best.rounding:
            best = slope
    assert best is not None
    return best


def _quotient(
    values: Callable[[Sequence[Tensor]], list[Tensor]],
    weighted: Weighted,
    inputs: Sequence[Tensor],
    position: int,
    direction: Tensor,
    step: float,
) -> float:
    forward, backward = list(inputs), list(inputs)
    forward[position] = inputs[position] + step * direction
    backward[position] = inputs[position] - step * direction
    total = 0.0
    for weight, up, down in zip(weighted.weights, values(forward), values(backward), strict=True):
        total += float((weight * (up - down)).double().sum())
    return total / (2.0 * step)


def _worst_entry(
    values: Callable[[Sequence[Tensor]], list[Tensor]],
    weighted: Weighted,
    inputs: Sequence[Tensor],
    position: int,
    grad: Tensor,
    step: float,
) -> str:
    """The entry whose difference quotient is furthest off, among the first few, in words."""
    x = inputs[position]
    flat_grad = grad.reshape(-1)
    size = matrix_norm(x.double()).expand(x.shape).reshape(-1)
    worst = (-1.0, 0, 0.0)
    for k in range(min(x.numel(), _MAX_LOCATED)):
        unit = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
        length = float(size[k]) or 1.0
        unit[k] = length
        quotient = (
            _quotient(values, weighted, inputs, position, unit.reshape(x.shape), step) / length
        )
        error = abs(float(flat_grad[k]) - quotient) * length
        if error != error or error > worst[0]:
            worst = (error, k, quotient)
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst[1]), x.shape))
    among = "" if x.numel() <= _MAX_LOCATED else f" among the first {_MAX_LOCATED}"
    return (
        f"; worst entry{among} {index}: expected about {worst[2]:.6g}, "
        f"got {float(flat_grad[worst[1]]):.6g}"
    )
