"""How well a task is still learnt from few samples: what immunization costs its owner.

An invertible theta changes no training optimum, but with few samples the optimum that a ridge picks
depends on theta, and so does the test error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.data.task import Task


class FewSampleError(NamedTuple):
    """Test error of the best ridge head on few samples, mean over random draws.

    Attributes:
        samples: Samples trained on.
        loss: Mean squared residual on the test part.
        loss_spread: Its standard deviation over draws.
        error_rate: Share of test samples with the wrong sign; ``None`` for a regression task.
        ridge: The ridge that was best, relative to the largest eigenvalue of each draw's Hessian.
    """

    samples: int
    loss: float
    loss_spread: float
    error_rate: float | None
    ridge: float


RIDGES = tuple(10.0 ** (exponent / 2.0) for exponent in range(-12, 5))


def few_sample_error(
    task: Task,
    theta: Tensor | None = None,
    *,
    samples: int = 50,
    draws: int = 20,
    ridges: Sequence[float] = RIDGES,
    seed: int = 0,
) -> FewSampleError:
    """Fit ridge heads on random draws of the training part and judge them on the test part.

    The ridge is the one with the lowest mean test loss: the owner tunes as well as anyone could,
    with theta and without. The same draws are used for every theta.

    Args:
        task: The task, usually the primary one.
        theta: The extractor, shape ``(p, q)``; the inputs themselves when omitted.
        samples: Samples in a draw, without replacement.
        draws: Number of draws.
        ridges: Ridges to try, each positive.
        seed: Seed of the draws.

    Returns:
        The error.

    Raises:
        ValueError: If a number is out of range or theta does not fit.

    Note:
        Deterministic given ``seed``; computed in float64; torch's global random state is neither
        read nor changed.

    Example:
        >>> x = torch.eye(3, dtype=torch.float64).repeat(4, 1)
        >>> y = x @ torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
        >>> error = few_sample_error(Task("toy", x, y, x, y), samples=12, draws=2)
        >>> error.error_rate, round(error.loss, 6)
        (0.0, 0.0)
    """
    count = task.x_train.shape[0]
    if not 1 <= samples <= count or draws < 1:
        raise ValueError(
            f"few_sample_error: samples must be between 1 and {count} and draws at least 1, got "
            f"{samples} and {draws}"
        )
    if not ridges or not all(math.isfinite(r) and r > 0.0 for r in ridges):
        raise ValueError(f"few_sample_error: ridges must be positive numbers, got {list(ridges)}")
    z, z_test = task.x_train.to(torch.float64), task.x_test.to(torch.float64)
    y, y_test = task.y_train.to(torch.float64), task.y_test.to(torch.float64)
    if theta is not None:
        if theta.dim() != 2 or theta.shape[0] != task.num_features:
            raise ValueError(
                f"few_sample_error: theta must have shape ({task.num_features}, q), got "
                f"{tuple(theta.shape)}"
            )
        extractor = theta.detach().to(torch.float64)
        z, z_test = z @ extractor, z_test @ extractor
    generator = torch.Generator().manual_seed(seed)
    relative = z.new_tensor(tuple(ridges))
    losses, errors = [], []
    for _ in range(draws):
        chosen = torch.randperm(count, generator=generator)[:samples].to(z.device)
        left, sigma, right = torch.linalg.svd(z[chosen], full_matrices=False)
        # One column of coefficients per ridge: sigma u^T y / (sigma^2 + r sigma_max^2).
        damped = sigma[:, None].square() + relative * sigma[0].square()
        inverse = torch.where(damped > 0, sigma[:, None] / damped, 0.0)
        heads = right.mT @ (inverse * (left.mT @ y[chosen])[:, None])
        predicted = z_test @ heads
        losses.append((predicted - y_test[:, None]).square().mean(0))
        errors.append((predicted * y_test[:, None] <= 0).to(torch.float64).mean(0))
    loss = torch.stack(losses)
    best = int(loss.mean(0).argmin())
    return FewSampleError(
        samples=samples,
        loss=float(loss[:, best].mean()),
        loss_spread=float(loss[:, best].std()) if draws > 1 else 0.0,
        error_rate=float(torch.stack(errors)[:, best].mean()) if task.is_classification else None,
        ridge=float(relative[best]),
    )
