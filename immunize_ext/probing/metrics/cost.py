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

from immunize_ext.probing.data.classes import (
    expanded,
    mean_residual,
    share_answered,
    through,
)
from immunize_ext.probing.data.task import Task


class FewSampleError(NamedTuple):
    """Test error of the best ridge head on few samples, mean over random draws.

    Attributes:
        samples: Samples trained on.
        loss: Mean squared residual on the test part, over outputs as well.
        loss_spread: Its standard deviation over draws.
        error_rate: Share of test samples answered wrongly; ``None`` for a regression task.
        ridge: The ridge that was best, relative to the largest eigenvalue of each draw's scatter.
        constant_loss: Loss of the best constant on the test part: what shows no skill.
        constant_error_rate: Share of all but its most common class; ``None`` for regression.
    """

    samples: int
    loss: float
    loss_spread: float
    error_rate: float | None
    ridge: float
    constant_loss: float
    constant_error_rate: float | None


class Constant(NamedTuple):
    """What a head without any skill gets on the test part of a task.

    Attributes:
        loss: Mean squared residual of the mean.
        error_rate: Share of all but the most common class; ``None`` for a regression task.
    """

    loss: float
    error_rate: float | None


def best_constant(task: Task) -> Constant:
    """The best answer that does not look at the input, judged on the test part.

    Args:
        task: The task.

    Returns:
        Its loss, and its error rate: that of always naming the most common class.

    Example:
        >>> y = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
        >>> best_constant(Task("four", y[:, None], y, y[:, None], y))
        Constant(loss=0.75, error_rate=0.25)
    """
    y = task.y_test.to(torch.float64)
    positive = (y > 0).to(torch.float64).mean(0)
    common = float(torch.maximum(positive, 1.0 - positive) if y.dim() == 1 else positive.max())
    return Constant(
        float((y - y.mean(0)).square().mean()),
        1.0 - common if task.is_classification else None,
    )


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

    Heads have an intercept, which no ridge holds back. The ridge is the one with the lowest mean
    test loss: the owner tunes as well as anyone could, with theta and without. The same draws are
    used for every theta.

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
    x, x_test = task.x_train, task.x_test.to(torch.float64)
    y, y_test = task.y_train.to(torch.float64), task.y_test.to(torch.float64)
    extractor = None
    if theta is not None:
        if theta.dim() != 2 or theta.shape[0] != task.num_features:
            raise ValueError(
                f"few_sample_error: theta must have shape ({task.num_features}, q), got "
                f"{tuple(theta.shape)}"
            )
        extractor = theta.detach().to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    relative = x_test.new_tensor(tuple(ridges))
    losses, errors = [], []
    for _ in range(draws):
        chosen = torch.randperm(count, generator=generator)[:samples].to(x.device)
        # An intercept without a ridge: means of the draw are taken off, and put back.
        drawn = x[chosen].to(torch.float64)
        middle, mean = drawn.mean(0), y[chosen].mean(0)
        z = drawn - middle
        # The extractor goes to the heads, not to the test part: there are fewer of them.
        z = z if extractor is None else z @ extractor
        left, sigma, right = torch.linalg.svd(z, full_matrices=False)
        # One column of coefficients per ridge: sigma u^T y / (sigma^2 + r sigma_max^2).
        top = torch.where(sigma[0] > 0, sigma[0], 1.0)
        share = sigma[:, None] / top  # whose squares stay in range whatever the scale is
        inverse = share / (share.square() + relative) / top
        coefficients = (left.mT @ (y[chosen] - mean))[:, None]
        heads = through(right.mT, expanded(inverse, y) * coefficients)
        heads = heads if extractor is None else through(extractor, heads)
        predicted = through(x_test - middle, heads) + mean
        losses.append(mean_residual(predicted, y_test))
        errors.append(1.0 - share_answered(predicted, y_test))
    loss = torch.stack(losses)
    best = int(loss.mean(0).argmin())
    constant = best_constant(task)
    return FewSampleError(
        samples=samples,
        loss=float(loss[:, best].mean()),
        loss_spread=float(loss[:, best].std()) if draws > 1 else 0.0,
        error_rate=float(torch.stack(errors)[:, best].mean()) if task.is_classification else None,
        ridge=float(relative[best]),
        constant_loss=constant.loss,
        constant_error_rate=constant.error_rate,
    )


class RelativeDegradation(NamedTuple):
    """RFD in per cent.

    Attributes:
        signed: Mean of (base - immunized) / base; negative where immunization helped the attacker.
        absolute: Mean of its size, as published. It counts help to the attacker as protection.
    """

    signed: float
    absolute: float


def relative_degradation(
    base: Tensor, immunized: Tensor, *, higher_is_better: bool = True
) -> RelativeDegradation:
    """RFD = 100 mean_t |M_base(t) - M_immunized(t)| / M_base(t), and the same with its sign.

    Args:
        base: A measure of success at each step without immunization, shape ``(steps,)``, positive.
            Leave out step 0 of an accuracy curve: the head 0 has accuracy 0.
        immunized: The same with immunization, shape ``(steps,)``.
        higher_is_better: Whether success is a large value (accuracy) or a small one (loss).

    Returns:
        Both means, in per cent.

    Raises:
        ValueError: If shapes differ, there is no step, or a value of ``base`` is not positive.

    Source:
        Sarker et al., Lock-LLM workshop at NeurIPS 2025 (the absolute form).

    Example:
        >>> base = torch.tensor([0.5, 1.0], dtype=torch.float64)
        >>> relative_degradation(base, torch.tensor([0.75, 0.5], dtype=torch.float64))
        RelativeDegradation(signed=0.0, absolute=50.0)
    """
    if base.dim() != 1 or base.shape != immunized.shape or len(base) == 0:
        raise ValueError(
            f"relative_degradation: immunized must have the shape (steps,) of base, got "
            f"{tuple(immunized.shape)} and {tuple(base.shape)}; cut both curves to equal length"
        )
    base, immunized = base.to(torch.float64), immunized.to(torch.float64)
    if not bool((base > 0).all()):
        raise ValueError(
            "relative_degradation: base must be positive at every step, got "
            f"{float(base.min())}; leave out steps without success"
        )
    change = (base - immunized) / base
    signed = change if higher_is_better else -change
    return RelativeDegradation(100.0 * float(signed.mean()), 100.0 * float(change.abs().mean()))
