"""The norm ratio of a linear probe under exact line search, as convergence plots show it."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from immunize_ext.attacks.probes import line_search_descent
from immunize_ext.metrics.convergence import norm_ratio


def line_search_norm_ratio(x: Tensor, y: Tensor, *, steps: int = 100) -> Tensor:
    """|w_t - w*|^2 / |w_0 - w*|^2 of gradient descent with exact line search (eq 16).

    Exact line search leaves no step size to hide behind. w* is the optimum that descent from 0
    converges to: the least-squares solution of least norm, over the numerical rank.

    Args:
        x: Features of the probe, ``inputs @ theta``, shape ``(n, p)``.
        y: Targets, shape ``(n,)``.
        steps: Number of steps, at least 1.

    Returns:
        Ratios, shape ``(steps + 1,)``, float64; the first is 1, or all are 0 if 0 is the optimum.

    Raises:
        ValueError: If ``steps`` is below 1 or shapes do not fit.

    Note:
        Deterministic; computed in float64. A change of basis of the features that is not
        orthogonal changes the norm, so compare the decay and not the value of single ratios.

    Source:
        Zheng et al., ICML 2025, eq. 16.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> ratios = line_search_norm_ratio(x, torch.tensor([1.0, 1.0]), steps=2)
        >>> [round(ratio, 4) for ratio in ratios.tolist()]
        [1.0, 0.4048, 0.0701]
    """
    if steps < 1:
        raise ValueError(f"line_search_norm_ratio: steps must be at least 1, got {steps}")
    if x.dim() != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"line_search_norm_ratio: y must have shape (n,) for features of shape (n, p), got "
            f"{tuple(y.shape)} and {tuple(x.shape)}"
        )
    x, y = x.detach().to(torch.float64), y.detach().to(torch.float64)
    weights = torch.stack(list(islice(line_search_descent(x, y), steps + 1)))
    left, sigma, right = torch.linalg.svd(x, full_matrices=False)
    counted = sigma > max(x.shape) * torch.finfo(torch.float64).eps * sigma[0]
    optimum = right[counted].mT @ ((left[:, counted].mT @ y) / sigma[counted])
    return norm_ratio(weights, optimum)
