r"""One number for several harms: what the least protected of them gets.

The larger a value, the better that harm is protected. The mean hides the least; the minimum looks
at one harm alone, and an ascent on it jumps between harms. Between them are the conditional value
at risk and the minimum that exponentiated weights q_h ~ exp(-eta phi_h) belong to,

.. math:: \mathrm{CVaR}_s(\phi) = \max_t\ t - \frac{1}{s H} \sum_h (t - \phi_h)_+, \qquad
          -\frac{1}{\eta} \log \frac{1}{H} \sum_h e^{-\eta \phi_h} .
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def conditional_value_at_risk(values: Tensor, share: float) -> Tensor:
    """Mean of the least share of values; of the one that the share cuts, its part counts.

    Args:
        values: phi, shape ``(h,)``, floating point.
        share: s, above 0 and at most 1; 1 is the mean, and at most 1/h the minimum.

    Returns:
        A scalar, differentiable.

    Raises:
        ValueError: If there is no value, or the share is out of range.

    Source:
        Rockafellar and Uryasev, Journal of Risk 2 (2000).

    Example:
        >>> v = torch.tensor([4.0, 1.0, 2.0, 9.0])
        >>> [float(conditional_value_at_risk(v, share)) for share in (0.25, 0.5, 1.0)]
        [1.0, 1.5, 4.0]
    """
    _check("conditional_value_at_risk", values)
    if not 0.0 < share <= 1.0:
        raise ValueError(
            f"conditional_value_at_risk: share must be above 0 and at most 1, got {share}"
        )
    count = share * len(values)
    weights = torch.arange(len(values), dtype=values.dtype, device=values.device)
    weights = (max(count, 1.0) - weights).clamp(0.0, 1.0)
    return (values.sort().values * weights).sum() / weights.sum()


def soft_minimum(values: Tensor, eta: float) -> Tensor:
    """The minimum of exponentiated weights: the mean at eta 0, the least value at infinity.

    Args:
        values: phi, shape ``(h,)``, floating point.
        eta: Not negative.

    Returns:
        A scalar, differentiable; its gradient is the weights exp(-eta phi), normalised.

    Raises:
        ValueError: If there is no value, or ``eta`` is negative or not finite.

    Example:
        >>> v = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> [round(float(soft_minimum(v, eta)), 3) for eta in (0.0, 1.0, 100.0)]
        [1.5, 1.38, 1.007]
    """
    _check("soft_minimum", values)
    if not (math.isfinite(eta) and eta >= 0.0):
        raise ValueError(f"soft_minimum: eta must be finite and not negative, got {eta}")
    if eta == 0.0:
        return values.mean()
    return (math.log(len(values)) - torch.logsumexp(-eta * values, 0)) / eta


def _check(function: str, values: Tensor) -> None:
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(
            f"{function}: values must have shape (h,) with at least one harm, got "
            f"{tuple(values.shape)}"
        )
