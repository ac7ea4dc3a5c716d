r"""How much of a task a linear probe can reach at all.

With infinite data the best linear probe of features z explains the share

.. math:: R^2 = \frac{\Sigma_{yz} \Sigma_z^+ \Sigma_{zy}}{\mathrm{var}(y)}

of the targets' variance. No invertible theta changes it. A theta that takes the direction
Sigma_zy away makes it 0, and then, for every convex loss, the best linear probe is the constant:
at it the population gradient is zero, so no optimizer moves. If that direction was estimated from
n_d labelled samples, an attacker with others finds at most about p / n_d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.probing.data import Task
from immunize_ext.probing.data.classes import expanded, mean_residual, share_answered, through


class LinearInformation(NamedTuple):
    """What linear probes find in features of held-out data.

    Attributes:
        r2: Share of the variance that the probe fitted on the training part explains of the test
            part, at the best ridge; at least 0.
        accuracy: Its accuracy there, at the ridge that is best for it; ``None`` for regression.
    """

    r2: float
    accuracy: float | None


# Down to a ridge that no defender would think of: a direction of variance 1e-8 counts for it.
RIDGES = tuple(10.0**exponent for exponent in range(-8, 1))


def linear_information(task: Task, theta: Tensor | None = None) -> LinearInformation:
    """What the best ridge probe with an intercept learns of a task.

    Args:
        task: The task; the probe is fitted on its training part and judged on its test part, for
            every ridge, and the best one counts: an attacker with hindsight.
        theta: The extractor, shape ``(p, q)``; the inputs themselves when omitted.

    Returns:
        R^2 and accuracy.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(60, 3, dtype=torch.float64, generator=generator)
        >>> task = Task.of((x, x[:, 0]), "toy")
        >>> gone = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
        >>> linear_information(task).r2 > 0.999, linear_information(task, gone).r2 < 0.2
        (True, True)
    """
    z, z_test = task.x_train.to(torch.float64), task.x_test.to(torch.float64)
    if theta is not None:
        z, z_test = z @ theta.to(torch.float64), z_test @ theta.to(torch.float64)
    return probe(z, task.y_train, z_test, task.y_test, classify=task.is_classification)


def probe(
    z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor, *, classify: bool
) -> LinearInformation:
    """:func:`linear_information` of features."""
    y, y_test = y.to(torch.float64), y_test.to(torch.float64)
    middle, mean = z.mean(0), y.mean(0)
    # Where samples are many, the triangle of both has all that is needed of them.
    rows, targets = z - middle, y - mean
    if len(rows) > 2 * rows.shape[1]:
        columns = targets.reshape(len(targets), -1)
        triangle = torch.linalg.qr(torch.cat([rows, columns], dim=1), mode="r").R
        rows, targets = triangle[:, : z.shape[1]], triangle[:, z.shape[1] :]
        targets = targets if y.dim() > 1 else targets[:, 0]
    left, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    kept = sigma > max(z.shape) * torch.finfo(torch.float64).eps * sigma[0]
    left, sigma, right = left[:, kept], sigma[kept], right[kept]
    if not len(sigma):
        constant = mean.expand_as(y_test)[:, None]
        share = float(share_answered(constant, y_test)) if classify else None
        return LinearInformation(0.0, share)
    share = sigma[:, None] / sigma[0]  # whose squares stay in range whatever the scale is
    inverse = share / (share.square() + z.new_tensor(RIDGES)) / sigma[0]
    heads = through(right.mT, expanded(inverse, y) * (left.mT @ targets)[:, None])
    predicted = through(z_test - middle, heads) + mean
    residual = mean_residual(predicted, y_test)
    variance = float((y_test - y_test.mean(0)).square().mean())
    # Labels that do not vary hold nothing to explain.
    r2 = 1.0 - float(residual.min()) / variance if variance > 0.0 else 0.0
    accuracy = None
    if classify:
        accuracy = float(share_answered(predicted, y_test).max())
    return LinearInformation(max(r2, 0.0), accuracy)
