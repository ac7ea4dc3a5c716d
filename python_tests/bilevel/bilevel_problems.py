"""Problems with known hypergradients: quadratics, and a small network as autograd records it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from immunize_ext.bilevel import Composed, Loss, Parameters

F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spread_matrix(eigenvalues: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis."""
    basis, _ = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))
    return basis @ torch.tensor(eigenvalues, dtype=F64).diag() @ basis.mT


def quadratic(h: Tensor, b: Tensor) -> Loss:
    """(x - b)^T H (x - b) / 2."""

    def loss(p: Mapping[str, Tensor]) -> Tensor:
        away = p["x"] - b
        return away @ h @ away / 2

    return loss


class Network:
    """A regression of two layers, its losses on K batches, and what comes after."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        self.losses = [self._loss(100 + 2 * step) for step in range(steps)]
        self.after = self._loss(99)

    def theta(self) -> Parameters:
        return {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters()}

    def _loss(self, seed: int) -> Composed:
        inputs, targets = normal(6, 5, seed=seed), normal(6, 3, seed=seed + 1)

        def outputs(p: Mapping[str, Tensor]) -> Tensor:
            own = {name: p[name] for name, _ in self.model.named_parameters()}
            found: Tensor = functional_call(self.model, own, (inputs,))
            return found * p["gain"] if "gain" in p else found

        return Composed(outputs, lambda y: (y - targets).square().mean())


def recorded(
    start: Parameters,
    losses: Sequence[Loss],
    step: Callable[[Parameters, Parameters, Any, int], tuple[Parameters, Any]],
    held: Parameters | None = None,
) -> Parameters:
    """Steps that autograd records, gradients included: the reference."""
    current, state = start, None
    for count, loss in enumerate(losses, 1):
        value = loss({**(held or {}), **current})
        parts = torch.autograd.grad(value, list(current.values()), create_graph=True)
        current, state = step(current, dict(zip(current, parts, strict=True)), state, count)
    return current


def plain_step(rate: float, momentum: float) -> Any:
    """Momentum in its textbook form."""

    def step(x: Parameters, g: Parameters, u: Any, count: int) -> tuple[Parameters, Any]:
        u = g if u is None else {n: momentum * u[n] + g[n] for n in g}
        return {n: x[n] - rate * u[n] for n in x}, u

    return step


def adam_step(rate: float, decay: float) -> Any:
    """Algorithm 1 of Adam in its textbook form, with decoupled weight decay."""

    def step(x: Parameters, g: Parameters, state: Any, t: int) -> tuple[Parameters, Any]:
        m, v = state or (dict.fromkeys(g, 0.0), dict.fromkeys(g, 0.0))
        m = {n: 0.9 * m[n] + 0.1 * g[n] for n in g}
        v = {n: 0.999 * v[n] + 0.001 * g[n] ** 2 for n in g}
        moved = {}
        for n in x:
            hat = (v[n] / (1 - 0.999**t)).sqrt() + 1e-8
            moved[n] = (1 - rate * decay) * x[n] - rate * m[n] / (1 - 0.9**t) / hat
        return moved, (m, v)

    return step
