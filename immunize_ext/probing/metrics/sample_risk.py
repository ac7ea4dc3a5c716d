r"""The risk of whoever learns from n samples and tunes a ridge, differentiable in the extractor.

A learner that stays in the row span of features x theta predicts with the kernel x^T M x',
M = theta theta^T. Let Sigma = R^T R be the covariance of the inputs (R from a QR factorisation of
the centred samples, no square root is formed), b the coordinates of the targets in the columns of
that Q, and sigma^2 what they leave. With A = R M R^T, B = (A + k I)^-1 and a ridge delta,

.. math:: n = \operatorname{tr} A B + \frac{\delta}{k}, \qquad
          E = \frac{n}{n - \operatorname{tr} A^2 B^2} \big(k^2\, b^\top B^2 b + \sigma^2\big).

b and sigma do not depend on theta. Whoever tunes delta >= 0 tunes k over all k with tr A B <= n: so
the best ridge needs no equation solved. At the best k the derivative in k vanishes, and that of E
in A at a fixed k is the derivative of the minimum. On a grid of k that moves with the trace of A,
what is returned is the derivative of the very number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.resolvent import resolvent_traces
from immunize_ext.probing.data.task import Task

# Values of k that are tried, relative to the mean eigenvalue of A: ten a factor of 10.
_SHIFTS = tuple(10.0 ** (exponent / 10.0) for exponent in range(-60, 31))


class Moments(NamedTuple):
    """What a learning curve needs of a task.

    Attributes:
        root: R, shape ``(r, p)``, r = min(n, p): the covariance of the inputs is R^T R.
        target: b, shape ``(r,)``; ``(r, k)`` for k outputs, over which risks are means.
        rest: sigma^2, the mean square that no linear function of the inputs explains.
    """

    root: Tensor
    target: Tensor
    rest: Tensor

    @classmethod
    def of(cls, task: Task, theta: Tensor | None = None) -> Moments:
        """Those of the training part, on the features of an extractor, float64.

        Args:
            task: The task.
            theta: The extractor, shape ``(p, q)``; the inputs themselves when omitted.
        """
        x, y = task.x_train.to(torch.float64), task.y_train.to(torch.float64)
        z = x if theta is None else x @ theta.to(torch.float64)
        z, y = z - z.mean(0), y - y.mean(0)
        q, r = torch.linalg.qr(z)
        target = q.mT @ y / y.numel() ** 0.5
        rest = (y.square().mean() - target.square().sum()).clamp(min=0.0)
        return cls(r / len(y) ** 0.5, target, rest)


def tuned_risk(moments: Moments, metric: Tensor, samples: Sequence[int]) -> Tensor:
    r"""Mean squared error, on fresh inputs, of the best ridge from n Gaussian samples, by n.

    Args:
        moments: Of the task.
        metric: M = theta theta^T, shape ``(p, p)``, float64.
        samples: Values of n, each at least 1.

    Returns:
        The risks, shape ``(len(samples),)``; at most that of predicting the mean. Differentiable in
        ``metric``; of ridges between those tried the better one counts.

    Raises:
        ValueError: If a number of samples is below 1.

    Source:
        Hastie, Montanari, Rosset, Tibshirani (2022); Simon, Dickens, Karkada, DeWeese (2023).

    Example:
        >>> x = torch.eye(4, dtype=torch.float64).repeat(2, 1)
        >>> y = x[:, 0] - x[:, 1]
        >>> moments = Moments.of(Task("toy", x, y, x, y))
        >>> m = torch.eye(4, dtype=torch.float64)
        >>> [round(v, 3) for v in tuned_risk(moments, m, [1, 8]).tolist()]
        [0.336, 0.0]
    """
    if min(samples, default=0) < 1:
        raise ValueError(f"tuned_risk: samples must be numbers of at least 1, got {list(samples)}")
    root, target, rest = moments
    a = root @ metric @ root.mT
    a = (a + a.mT) / 2.0
    shifts = a.diagonal().mean() * torch.tensor(_SHIFTS, dtype=a.dtype, device=a.device)
    found = resolvent_traces(a, shifts, target.reshape(len(target), -1))
    error = shifts.square() * found.energies.sum(-1) + rest
    n = torch.tensor(list(samples), dtype=a.dtype, device=a.device)[:, None]
    allowed = (found.first <= n) & (found.second < n)
    risk = n / torch.where(allowed, n - found.second, 1.0) * error
    nothing = target.square().sum() + rest
    return torch.where(allowed, risk, torch.inf).amin(-1).clamp(max=nothing)
