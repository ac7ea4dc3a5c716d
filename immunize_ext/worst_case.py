r"""One number for several harms or concepts: what the least protected of them gets.

The larger a value phi_h, the better that harm is protected. The mean hides the least; the minimum
looks at one harm alone, and an ascent on it jumps between harms. Between them are the conditional
value at risk and the minimum that exponentiated weights q_h ~ exp(-eta phi_h) belong to,

.. math:: \mathrm{CVaR}_s(\phi) = \max_t\ t - \frac{1}{s H} \sum_h (t - \phi_h)_+, \qquad
          -\frac{1}{\eta} \log \frac{1}{H} \sum_h e^{-\eta \phi_h} .

A loop that sees phi through batches weighs its harms by :func:`harm_weights`: CVaR by the values of
the step, exponentiated weights by the sum of all steps before it, which is Hedge: over T steps the
weighted mean is within log H / (eta T) + eta / 8 of that of the least harm (values in [0, 1]).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Weighting = Literal["mean", "exponentiated", "cvar"]
"""How several harms count: all alike, by exponentiated weights, or the least share of them."""


def value_at_risk_weights(values: Tensor, share: float) -> Tensor:
    """Weights of the least share of values; of the one that the share cuts, its part counts.

    Args:
        values: phi, shape ``(h,)``, floating point.
        share: s, above 0 and at most 1; 1 weighs all alike, and at most 1/h the least alone.

    Returns:
        Shape ``(h,)``, not negative, of sum 1; a gradient of CVaR at ``values``. Of equal values
        the earlier ones are taken first.

    Raises:
        ValueError: If there is no value, or the share is out of range.

    Example:
        >>> value_at_risk_weights(torch.tensor([4.0, 1.0, 2.0, 9.0]), 0.5).tolist()
        [0.0, 0.5, 0.5, 0.0]
    """
    _check("value_at_risk_weights", values)
    _check_share("value_at_risk_weights", share)
    count = max(share * len(values), 1.0)
    ranks = torch.arange(len(values), dtype=values.dtype, device=values.device)
    by_rank = (count - ranks).clamp(0.0, 1.0) / count
    order = values.detach().argsort(stable=True)
    return torch.empty_like(by_rank).scatter(0, order, by_rank)


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
    _check_share("conditional_value_at_risk", share)
    return (value_at_risk_weights(values, share) * values).sum()


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
    _check_rate("soft_minimum", "eta", eta)
    if eta == 0.0:
        return values.mean()
    return (math.log(len(values)) - torch.logsumexp(-eta * values, 0)) / eta


def harm_weights(
    kind: Weighting, values: Tensor, before: Tensor, *, rate: float, share: float
) -> Tensor:
    """What each harm counts in one step of a loop.

    Args:
        kind: ``"mean"``, ``"exponentiated"`` or ``"cvar"``.
        values: phi in this step, shape ``(h,)``, floating point.
        before: The sum of phi over the steps before, shape ``(h,)``.
        rate: eta of ``"exponentiated"``; 0 weighs all alike.
        share: s of ``"cvar"``.

    Returns:
        Shape ``(h,)``, not negative, of sum 1, without a gradient.

    Raises:
        ValueError: As :func:`check_weighting`, or if there is no value.

    Source:
        Freund and Schapire, Journal of Computer and System Sciences 55 (1997); Sagawa et al., ICLR
        2020, for weights of groups in a training loop.

    Example:
        >>> now, before = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0])
        >>> harm_weights("cvar", now, before, rate=1.0, share=0.5).tolist()
        [0.0, 1.0]
        >>> hedge = harm_weights("exponentiated", now, before, rate=1.0, share=0.5)
        >>> [round(weight, 3) for weight in hedge.tolist()]
        [0.953, 0.047]
    """
    check_weighting("harm_weights", kind, rate, share)
    _check("harm_weights", values)
    if kind == "cvar":
        return value_at_risk_weights(values.detach(), share)
    if kind == "exponentiated":
        return (-rate * before.detach()).softmax(0).to(values)
    return torch.full_like(values, 1.0 / len(values)).detach()


def check_weighting(
    function: str, kind: str, rate: float, share: float, *, rate_name: str = "rate"
) -> None:
    """Refuse a weighting that is unknown or out of range.

    Args:
        function: Who was given it; stands in errors.
        kind: The weighting.
        rate: eta.
        share: s.
        rate_name: What eta is called there.

    Raises:
        ValueError: If the kind is unknown, the rate negative or not finite, or the share not above
            0 and at most 1.

    Example:
        >>> check_weighting("toy", "worst", 1.0, 0.5)
        Traceback (most recent call last):
        ValueError: toy: weighting must be one of mean, exponentiated, cvar, got 'worst'
    """
    if kind not in get_args(Weighting):
        raise ValueError(
            f"{function}: weighting must be one of {', '.join(get_args(Weighting))}, got {kind!r}"
        )
    _check_rate(function, rate_name, rate)
    _check_share(function, share)


def _check(function: str, values: Tensor) -> None:
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(
            f"{function}: values must have shape (h,) with at least one harm, got "
            f"{tuple(values.shape)}"
        )


def _check_rate(function: str, name: str, rate: float) -> None:
    if not (math.isfinite(rate) and rate >= 0.0):
        raise ValueError(f"{function}: {name} must be finite and not negative, got {rate}")


def _check_share(function: str, share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{function}: share must be above 0 and at most 1, got {share}")
