r"""How well a task can be learnt from n samples: the quantity that no optimizer changes.

Every learner that stays in the row span of its features and interpolates, stops early or takes a
ridge predicts with the kernel x^T M x', M = theta theta^T. With few samples its risk depends on
theta through M, whatever the optimizer. Let a_i be the eigenvalues of the covariance of the
features and v_i^2 the share of the targets that the i-th principal direction explains; for Gaussian
inputs and n samples, ridge delta >= 0 and noise sigma^2,

.. math::
    n &= \sum_i \frac{a_i}{a_i + k} + \frac{\delta}{k}, \\
    E &= \frac{n}{n - \sum_i (a_i / (a_i + k))^2}
         \Big(\sum_i \Big(\frac{k}{a_i + k}\Big)^2 v_i^2 + \sigma^2\Big).

The first line is decreasing in k and is solved by bisection in log k; two Newton steps in front of
its derivative make E differentiable in a, v^2, delta and sigma^2 to third order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.probing.data import Task

RIDGES = tuple(10.0 ** (exponent / 2.0) for exponent in range(-16, 7))
"""Ridges tried, relative to the trace of the covariance."""


class Spectrum(NamedTuple):
    """What a learning curve is made of.

    Attributes:
        variances: a, eigenvalues of the covariance of the features, shape ``(q,)``.
        energies: v^2, what each direction explains of the targets' variance, shape ``(q,)``.
        noise: sigma^2, the rest.
    """

    variances: Tensor
    energies: Tensor
    noise: Tensor

    @classmethod
    def of(cls, task: Task, theta: Tensor | None = None) -> Spectrum:
        """That of a task's training part as seen through an extractor.

        Energies are estimated from n samples: each is too large by about noise / n. Directions
        that rounding alone fills are left out.

        Args:
            task: The task.
            theta: The extractor, shape ``(p, q)``; the inputs themselves when omitted.
        """
        x, y = task.x_train.to(torch.float64), task.y_train.to(torch.float64)
        z = x if theta is None else x @ theta.to(torch.float64)
        z, y = z - z.mean(0), y - y.mean(0)
        # The singular value decomposition, not that of the covariance: directions that a theta of
        # condition 1e10 makes small keep their energy.
        left, sigma, _ = torch.linalg.svd(z, full_matrices=False)
        kept = sigma > max(z.shape) * torch.finfo(torch.float64).eps * sigma[0]
        # With several outputs a mean over them, as every loss is.
        energies = (left[:, kept].mT @ y).square().reshape(int(kept.sum()), -1).sum(1) / y.numel()
        noise = (y.square().mean() - energies.sum()).clamp(min=0.0)
        return cls(sigma[kept].square() / len(y), energies, noise)


def effective_ridge(variances: Tensor, samples: int, ridge: Tensor | float = 0.0) -> Tensor:
    """The k that solves the first line of the module's formulas.

    Args:
        variances: a, shape ``(q,)``, positive.
        samples: n; below q where ``ridge`` is 0.
        ridge: delta, on the sum over samples, not negative.

    Returns:
        k, a scalar; differentiable in ``variances`` and ``ridge``.

    Raises:
        ValueError: If there is no k: as many samples as directions and no ridge.

    Example:
        >>> a = torch.ones(4, dtype=torch.float64)
        >>> round(float(effective_ridge(a, 2)), 6)  # 4 / (1 + k) = 2
        1.0
    """
    a = variances
    delta = torch.as_tensor(ridge, dtype=a.dtype, device=a.device)
    if samples < 1 or (samples >= len(a) and not float(delta.detach()) > 0.0):
        raise ValueError(
            f"effective_ridge: samples must be at least 1 and below {len(a)} without a ridge, got "
            f"{samples}"
        )
    fixed, d = a.detach(), float(delta.detach())
    # Bounds: k >= the value of the ridge alone, over n; k <= (sum a + delta) / n.
    high = (float(fixed.sum()) + d) / samples
    low = max(d / samples, high * 1e-30)
    for _ in range(200):
        middle = (low * high) ** 0.5
        if float((fixed / (fixed + middle)).sum()) + d / middle > samples:
            low = middle
        else:
            high = middle
        if high <= low * (1.0 + 1e-15):
            break
    k = torch.as_tensor((low * high) ** 0.5, dtype=a.dtype, device=a.device)
    for _ in range(2):
        value = (a / (a + k)).sum() + delta / k - samples
        slope = -(a / (a + k).square()).sum() - delta / k.square()
        k = k - value / slope
    return k


def expected_risk(spectrum: Spectrum, samples: int, ridge: Tensor | float = 0.0) -> Tensor:
    r"""Mean squared error, on fresh inputs, of the ridge solution from n Gaussian samples.

    Args:
        spectrum: Variances, energies and noise.
        samples: n.
        ridge: delta, on the sum over samples: the learner solves (Z^T Z + delta I) w = Z^T y.

    Returns:
        E, a scalar; differentiable in all parts of ``spectrum`` and in ``ridge``.

    Raises:
        ValueError: As :func:`effective_ridge`.

    Source:
        Hastie, Montanari, Rosset, Tibshirani (2022); Simon, Dickens, Karkada, DeWeese (2023).

    Example:
        >>> a = torch.ones(4, dtype=torch.float64)
        >>> round(float(expected_risk(Spectrum(a, a / 4, torch.tensor(0.0)), 2)), 6)
        0.5
    """
    a, energies, noise = spectrum
    k = effective_ridge(a, samples, ridge)
    learnt = a / (a + k)
    inflation = samples / (samples - learnt.square().sum())
    return inflation * (((1.0 - learnt).square() * energies).sum() + noise)


def best_risk(spectrum: Spectrum, samples: int, ridges: Sequence[float] = RIDGES) -> float:
    """The risk at the best ridge: a learner who tunes as well as anyone could.

    Args:
        spectrum: Variances, energies and noise.
        samples: n.
        ridges: Ridges tried, each positive, relative to the trace of the covariance.

    Returns:
        The smallest :func:`expected_risk`, and never more than predicting the mean.

    Example:
        >>> variances, energies = torch.tensor([1.0, 0.1]), torch.tensor([1.0, 0.0])
        >>> spectrum = Spectrum(variances, energies, noise=torch.tensor(0.1))
        >>> few, many = best_risk(spectrum, 5), best_risk(spectrum, 500)
        >>> 0.1 < many < few < 1.1  # between the noise and predicting the mean
        True
    """
    trace = float(spectrum.variances.sum())
    nothing = float(spectrum.energies.sum() + spectrum.noise)
    found = [float(expected_risk(spectrum, samples, ridge * trace)) for ridge in ridges]
    return min([nothing, *found])
