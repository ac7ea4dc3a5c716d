"""Relative fine-tuning degradation (RFD): how much worse an attack goes, over its steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
