r"""Probes that are not linear: what takes a direction away from linear ones leaves it to these.

Each is given a draw of the training samples and judged on the test part at its best setting: an
attacker with hindsight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from immunize_ext.probing.data import Task
from immunize_ext.probing.data.classes import share_answered

# Steps of Adam of the perceptron, and how often it is judged.
STEPS, EVERY = 100, 10
WIDTH, RATE = 64, 1e-2

# Relative to the mean variance: few samples do not tell the smallest ones.
_WHITENING_RIDGE = 1e-2


def kernel_probe(
    task: Task, theta: Tensor | None = None, *, samples: int = 1000, seed: int = 0
) -> float:
    """Ridge regression with a Gaussian kernel.

    Args:
        task: The task.
        theta: The extractor, shape ``(p, q)``; the inputs themselves when omitted.
        samples: Training samples drawn; all where there are fewer.
        seed: Seed of the draw.

    Returns:
        Share of right signs on the test part, or R^2 of a regression, at the best of three ridges;
        the width is the median distance.

    Note:
        Deterministic given ``seed``; computed in float64.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> kernel_probe(digits_task((4,), (9,))) > 0.95
        True
    """
    z, y, z_test = _drawn(task, theta, samples, seed)
    squared = torch.cdist(z, z).square()
    positive = squared[squared > 0]
    width = float(positive.median()) if len(positive) else 1.0
    kernel, across = (
        torch.exp(-2.0 * d / width) for d in (squared, torch.cdist(z_test, z).square())
    )
    identity = torch.eye(len(z), dtype=torch.float64, device=z.device)
    found = [
        _score(task, across @ torch.linalg.solve(kernel + ridge * identity, y))
        for ridge in (1e-3, 1e-2, 1e-1)
    ]
    return max(found)


def perceptron_probe(
    task: Task, theta: Tensor | None = None, *, samples: int = 1000, seed: int = 0
) -> float:
    """A perceptron with one hidden layer of 64 rectified units, trained by Adam.

    Args:
        task: The task.
        theta: The extractor, shape ``(p, q)``; the inputs themselves when omitted.
        samples: Training samples drawn; all where there are fewer.
        seed: Seed of the draw and of the first weights.

    Returns:
        Share of right signs on the test part, or R^2 of a regression, at the best step, on
        standardised or on whitened features, whichever are better.

    Note:
        Deterministic given ``seed``; computed in float32, torch's global random state is neither
        read nor changed.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> perceptron_probe(digits_task((4,), (9,))) > 0.95
        True
    """
    z, y, z_test = _drawn(task, theta, samples, seed)
    middle = z.mean(0)
    z, z_test = z - middle, z_test - middle
    spread = z.square().mean(0).sqrt()
    standard = torch.diag(torch.where(spread > 0, 1.0 / spread, 0.0))
    _, sigma, right = torch.linalg.svd(z, full_matrices=False)
    variance = sigma.square()
    damped = (variance + _WHITENING_RIDGE * variance.mean()) / len(z)
    white = right.mT * torch.where(damped > 0, damped.rsqrt(), 0.0)
    return max(
        _trained(task, (z @ scale).float(), y.float(), (z_test @ scale).float(), seed)
        for scale in (standard, white)
    )


def _drawn(
    task: Task, theta: Tensor | None, samples: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and targets of a draw, and features of the test part."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.x_train), generator=generator)[:samples]
    chosen = chosen.to(task.x_train.device)
    z, z_test = (x.to(torch.float64) for x in (task.x_train[chosen], task.x_test))
    if theta is not None:
        z, z_test = (x @ theta.to(torch.float64) for x in (z, z_test))
    return z, task.y_train[chosen].to(torch.float64), z_test


def _score(task: Task, predicted: Tensor) -> float:
    """Share of right signs, or R^2 of a regression."""
    y = task.y_test.to(torch.float64)
    if task.is_classification:
        return float(share_answered(predicted[:, None], y))
    residual, variance = (predicted - y).square().mean(), (y - y.mean()).square().mean()
    return max(0.0, 1.0 - float(residual / variance)) if float(variance) > 0.0 else 0.0


def _trained(task: Task, z: Tensor, y: Tensor, z_test: Tensor, seed: int) -> float:
    """The best score of a perceptron along its training."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = z.shape[1], 1 if y.dim() == 1 else y.shape[1]
    drawn = torch.randn(inputs + outputs, WIDTH, generator=generator).to(z.device)
    # One matrix: rows of the first layer, its biases, the second layer with its own in the corner.
    weights = torch.zeros(inputs + 1 + outputs, WIDTH + 1, device=z.device)
    weights[:inputs, :WIDTH] = drawn[:inputs] / inputs**0.5
    weights[inputs + 1 :, :WIDTH] = drawn[inputs:] / WIDTH**0.5
    weights.requires_grad_()

    def scores(x: Tensor) -> Tensor:
        hidden = torch.relu(x @ weights[:inputs, :WIDTH] + weights[inputs, :WIDTH])
        found = hidden @ weights[inputs + 1 :, :WIDTH].mT + weights[inputs + 1 :, WIDTH]
        return found if y.dim() > 1 else found[:, 0]

    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    best = 0.0
    for step in range(1, STEPS + 1):
        (gradient,) = torch.autograd.grad((scores(z) - y).square().mean(), weights)
        with torch.no_grad():
            mean.lerp_(gradient, 1.0 - 0.9)
            square.lerp_(gradient.square(), 1.0 - 0.999)
            sharp = (square / (1.0 - 0.999**step)).sqrt_().add_(1e-8)
            weights.addcdiv_(mean, sharp, value=-RATE / (1.0 - 0.9**step))
            if step % EVERY == 0:
                best = max(best, _score(task, scores(z_test).to(torch.float64)))
    return best
