"""Features whose Gram matrix is the Hessian of a linear probe, with or without a ridge.

The squared loss |X theta w - y|^2 of a probe w has the Hessian H(theta) = theta^T K theta,
K = X^T X (up to a factor that no condition number sees), so every question about H is a question
about the singular values of X theta, and H is never formed.

A ridge on K, relative to its largest eigenvalue, is added BEFORE theta:

    theta^T (K + r lambda_max(K) I) theta = (A theta)^T (A theta),
    A = [ X ; sqrt(r lambda_max(K)) I ].

It stands for the directions that the data does not support. Added after theta instead, it would cap
both condition numbers at 1/r and make every ratio of them 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.data.scale import unit_scale


def check_ridge(function: str, ridge: float) -> None:
    """Refuse a ridge that is negative or not finite."""
    if not (math.isfinite(ridge) and ridge >= 0.0):
        raise ValueError(
            f"{function}: ridge must be finite and not negative, got {ridge}; "
            "it is relative to the largest eigenvalue of K, 1e-4 for instance"
        )


def with_ridge(x: Tensor, ridge: float) -> Tensor:
    """Append rows to x so that its Gram matrix becomes K + ridge * lambda_max(K) * I.

    Args:
        x: Features, shape ``(*, n, p)``, float32 or float64.
        ridge: Ridge relative to the largest eigenvalue of K = x^T x; 0 returns ``x`` itself.

    Returns:
        Features of shape ``(*, n + p, p)``.

    Raises:
        ValueError: If ``ridge`` is negative or not finite.

    Note:
        Not differentiated through the size of the ridge: lambda_max(K) counts as a constant.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)[:1]
        >>> with_ridge(x, 0.25).mT @ with_ridge(x, 0.25)
        tensor([[1.2500, 0.0000],
                [0.0000, 0.2500]], dtype=torch.float64)
    """
    check_ridge("with_ridge", ridge)
    if ridge == 0.0:
        return x
    unit = unit_scale(x)
    largest = gram_extremes(x.detach() * unit).lambda_max
    scale = (ridge * largest).sqrt()[..., None, None] / unit
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.cat([x, scale * identity], dim=-2)
