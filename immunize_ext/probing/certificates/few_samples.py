"""How many labelled samples an attacker needs, with theta and without, re-whitened and as given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from immunize_ext.probing.data import Task
from immunize_ext.probing.metrics import best_constant, few_sample_error

COUNTS = (10, 20, 40, 80, 160, 320, 640)
"""Numbers of labelled samples."""

REFERENCE = 40
"""The number whose error without immunization has to be reached; fewer where there are no more."""

LEARNT = 0.95
"""Of the error of the best constant: who is not below this share has learnt nothing."""

Curve = dict[int, float]


def sample_curve(
    task: Task,
    theta: Tensor | None = None,
    *,
    counts: Sequence[int] = COUNTS,
    draws: int = 8,
    seed: int = 0,
    until: float = -math.inf,
) -> Curve:
    """Error of the best ridge head by number of samples, mean over draws.

    Args:
        task: The task; features are centred by the mean of its training inputs.
        theta: The extractor; the inputs themselves when omitted.
        counts: Numbers of samples; those beyond the training part are left out, and where all
            are, the whole of it is the one number.
        draws: Draws of the samples, the same for every extractor.
        seed: Their seed.
        until: The error at which more samples need not be tried.

    Returns:
        By number of samples the share of wrong signs, or the mean squared error of a regression.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> curve = sample_curve(Task.of((x, x.sum(-1)), "toy"), counts=(3, 100))
        >>> sorted(curve), curve[100] < curve[3]
        ([3, 100], True)
    """
    available = len(task.x_train)
    found = {}
    for count in [c for c in counts if c <= available] or [available]:
        error = few_sample_error(task, theta, samples=count, draws=draws, seed=seed)
        found[count] = error.loss if error.error_rate is None else error.error_rate
        if found[count] <= until:
            break
    return found


def error_of_constant(task: Task) -> float:
    """What :func:`sample_curve` is for a head without skill: the best constant answer.

    Args:
        task: The task.
    """
    constant = best_constant(task)
    return constant.loss if constant.error_rate is None else constant.error_rate


def samples_to(curve: Mapping[int, float], target: float) -> float:
    """Samples after which an error is reached, between counts linear in their logarithm.

    Args:
        curve: Error by number of samples.
        target: The error.

    Returns:
        The number; the smallest count where it is reached at once, infinity where it never is.

    Example:
        >>> round(samples_to({10: 0.4, 40: 0.2, 160: 0.1}, 0.15))
        80
    """
    points = sorted(curve.items())
    if points and points[0][1] <= target:
        return float(points[0][0])
    for (low, above), (high, below) in pairwise(points):
        if below <= target < above:
            share = (above - target) / (above - below)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return math.inf


def best_of(*curves: Mapping[int, float]) -> Curve:
    """What the best attacker has at each number of samples that any of them tried."""
    counts = sorted({count for curve in curves for count in curve})
    return {count: min(curve[count] for curve in curves if count in curve) for count in counts}
