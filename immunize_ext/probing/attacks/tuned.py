"""Attackers with a learning rate, run for a whole grid of learning rates at once.

Each yields the weights of every learning rate side by side, ``(p, k)`` for k rates, after 0, 1, 2,
... steps; the harness keeps the best column. Momentum takes rates in units of 1/L; Adam and Adagrad
take them for features of root mean square 1, to which they scale Z first. Either way no scale of
the features helps or hurts. Gradients are those of the mean loss.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from immunize_ext.probing.attacks.losses import ProbeLoss
from immunize_ext.probing.attacks.probes import safe_step

# Adam's usual constants, and the constant under Adagrad's root.
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


def _start(z: Tensor, rates: Tensor) -> Tensor:
    return torch.zeros(z.shape[1], rates.shape[0], dtype=z.dtype, device=z.device)


def momentum(
    z: Tensor, y: Tensor, loss: ProbeLoss, rates: Tensor, kept: float = 0.9
) -> Iterator[Tensor]:
    """Full-batch gradient descent with momentum; rates in units of 1/L, at 0.9 stable below 3.8."""
    steps = rates * safe_step(z, loss)
    w, velocity = _start(z, rates), _start(z, rates)
    targets = y[:, None]
    while True:
        yield w
        velocity = kept * velocity + z.mT @ loss.slope(z @ w, targets)
        w = w - steps * velocity


def sgd_momentum(
    z: Tensor,
    y: Tensor,
    loss: ProbeLoss,
    rates: Tensor,
    kept: float = 0.9,
    batch_size: int = 64,
    seed: int = 0,
) -> Iterator[Tensor]:
    """SGD with momentum on batches; rates in units of 1/L. One batch is one step.

    Samples are reshuffled each epoch by a generator of its own, so runs with and without
    immunization see the same batches.
    """
    count = z.shape[0]
    batch = min(batch_size, count)
    steps = rates * safe_step(z, loss) * (count / batch)
    generator = torch.Generator().manual_seed(seed)
    w, velocity = _start(z, rates), _start(z, rates)
    targets = y[:, None]
    yield w
    while True:
        order = torch.randperm(count, generator=generator).to(z.device)
        # Samples left over by the last whole batch wait for the next epoch.
        for chosen in order[: count - count % batch].split(batch):
            rows = z[chosen]
            velocity = kept * velocity + rows.mT @ loss.slope(rows @ w, targets[chosen])
            w = w - steps * velocity
            yield w


def _unit_scale(z: Tensor) -> Tensor:
    size = z.square().mean().sqrt()
    return torch.where(size > 0, 1.0 / size, 0.0)


def adam(z: Tensor, y: Tensor, loss: ProbeLoss, rates: Tensor) -> Iterator[Tensor]:
    """Adam with the usual constants on features scaled to root mean square 1."""
    scale = _unit_scale(z)
    z = z * scale
    w, first, second = _start(z, rates), _start(z, rates), _start(z, rates)
    targets, count = y[:, None], 0
    while True:
        yield scale * w
        count += 1
        gradient = z.mT @ loss.slope(z @ w, targets) / len(y)
        first = _BETA1 * first + (1.0 - _BETA1) * gradient
        second = _BETA2 * second + (1.0 - _BETA2) * gradient.square()
        root = (second / (1.0 - _BETA2**count)).sqrt() + _EPS
        w = w - rates * (first / (1.0 - _BETA1**count)) / root


def adagrad(z: Tensor, y: Tensor, loss: ProbeLoss, rates: Tensor) -> Iterator[Tensor]:
    """Adagrad on features scaled to root mean square 1."""
    scale = _unit_scale(z)
    z = z * scale
    w, total = _start(z, rates), _start(z, rates)
    targets = y[:, None]
    while True:
        yield scale * w
        gradient = z.mT @ loss.slope(z @ w, targets) / len(y)
        total = total + gradient.square()
        w = w - rates * gradient / (total.sqrt() + _EPS)
