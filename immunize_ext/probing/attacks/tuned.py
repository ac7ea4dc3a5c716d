"""Attackers with a learning rate, run for a whole grid of learning rates at once.

Each yields the weights of every learning rate side by side, ``(p, m)`` for m rates, ``(p, m, k)``
for targets with k outputs, after 0, 1, 2, ... steps; the harness keeps the best column. Momentum
takes rates in units of 1/L; Adam and Adagrad take them for features of root mean square 1, to which
they scale Z first. Either way no scale of the features helps or hurts. Gradients are those of the
mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from immunize_ext.probing.attacks.losses import ProbeLoss
from immunize_ext.probing.attacks.probes import safe_step
from immunize_ext.probing.data.classes import expanded, through

# Adam's usual constants, and the constant under Adagrad's root.
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


def _start(z: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    return torch.zeros(z.shape[1], len(rates), *y.shape[1:], dtype=z.dtype, device=z.device)


def momentum(
    z: Tensor, y: Tensor, loss: ProbeLoss, rates: Tensor, kept: float = 0.9
) -> Iterator[Tensor]:
    """Full-batch gradient descent with momentum; rates in units of 1/L, at 0.9 stable below 3.8."""
    steps = expanded(rates, y) * safe_step(z, loss)
    w, velocity = _start(z, y, rates), _start(z, y, rates)
    targets = y[:, None]
    while True:
        yield w
        velocity = kept * velocity + through(z.mT, loss.slope(through(z, w), targets))
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
    steps = expanded(rates, y) * safe_step(z, loss) * (count / batch)
    generator = torch.Generator().manual_seed(seed)
    w, velocity = _start(z, y, rates), _start(z, y, rates)
    targets = y[:, None]
    yield w
    while True:
        order = torch.randperm(count, generator=generator).to(z.device)
        # Samples left over by the last whole batch wait for the next epoch.
        for chosen in order[: count - count % batch].split(batch):
            rows = z[chosen]
            velocity = kept * velocity + through(
                rows.mT, loss.slope(through(rows, w), targets[chosen])
            )
            w = w - steps * velocity
            yield w


def _unit_scale(z: Tensor) -> Tensor:
    size = z.square().mean().sqrt()
    return torch.where(size > 0, 1.0 / size, 0.0)


def adam(
    z: Tensor, y: Tensor, loss: ProbeLoss, rates: Tensor, horizons: Tensor | None = None
) -> Iterator[Tensor]:
    """Adam with the usual constants on features scaled to root mean square 1.

    With horizons, one for each rate, the rate rises linearly over the first twentieth of its
    horizon, falls to 0 like a cosine, and stays there.
    """
    scale = _unit_scale(z)
    z = z * scale
    w, first, second = _start(z, y, rates), _start(z, y, rates), _start(z, y, rates)
    targets, count = y[:, None], 0
    while True:
        yield scale * w
        count += 1
        gradient = through(z.mT, loss.slope(through(z, w), targets)) / len(y)
        first = _BETA1 * first + (1.0 - _BETA1) * gradient
        second = _BETA2 * second + (1.0 - _BETA2) * gradient.square()
        root = (second / (1.0 - _BETA2**count)).sqrt() + _EPS
        now = rates if horizons is None else rates * _schedule(count, horizons)
        w = w - expanded(now, y) * (first / (1.0 - _BETA1**count)) / root


def _schedule(count: int, horizons: Tensor) -> Tensor:
    """The share of the rate at a step, the first being 1."""
    rising = (horizons / 20.0).ceil()
    passed = ((count - rising) / (horizons - rising).clamp(min=1.0)).clamp(0.0, 1.0)
    falling = (1.0 + torch.cos(math.pi * passed)) / 2.0
    return torch.where(count < rising, count / rising, falling)


# As implementations do: the roots are taken anew every so many steps.
_ROOTS_EVERY = 5


def shampoo(z: Tensor, y: Tensor, loss: ProbeLoss, rates: Tensor) -> Iterator[Tensor]:
    """Shampoo on features scaled to root mean square 1.

    The head is a p x k matrix with gradients G: W - rate L^(-1/4) G R^(-1/4), L the sum of G G^T,
    R that of G^T G, a number for one output.
    """
    scale = _unit_scale(z)
    z = z * scale
    w = _start(z, y, rates)
    targets, count = y[:, None], 0
    (p, outputs), m = (z.shape[1], 1 if y.dim() == 1 else y.shape[1]), len(rates)
    left, right = (z.new_zeros(m, side, side) for side in (p, outputs))
    while True:
        yield scale * w
        gradient = through(z.mT, loss.slope(through(z, w), targets)) / len(y)
        each = gradient.reshape(p, m, outputs).transpose(0, 1)  # (m, p, k)
        left, right = left + each @ each.mT, right + each.mT @ each
        if count < _ROOTS_EVERY or count % _ROOTS_EVERY == 0:
            root = _inverse_fourth_root(left)
        count += 1
        step = root @ each @ _inverse_fourth_root(right)
        w = w - expanded(rates, y) * step.transpose(0, 1).reshape(w.shape)


def _inverse_fourth_root(sums: Tensor) -> Tensor:
    """A^(-1/4); what no gradient has reached stays as it is: nothing is divided by rounding."""
    values, vectors = torch.linalg.eigh(sums)
    floor = _EPS * values[:, -1:].clamp(min=_EPS)
    return (vectors * values.clamp(min=floor).pow(-0.25).unsqueeze(-2)) @ vectors.mT


def adagrad(z: Tensor, y: Tensor, loss: ProbeLoss, rates: Tensor) -> Iterator[Tensor]:
    """Adagrad on features scaled to root mean square 1."""
    scale = _unit_scale(z)
    z = z * scale
    w, total = _start(z, y, rates), _start(z, y, rates)
    targets = y[:, None]
    while True:
        yield scale * w
        gradient = through(z.mT, loss.slope(through(z, w), targets)) / len(y)
        total = total + gradient.square()
        w = w - expanded(rates, y) * gradient / (total.sqrt() + _EPS)
