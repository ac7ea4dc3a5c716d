"""The objectives for deep extractors, as terms of the features of two batches.

    condition_number    lambda_P R_well(H_P) + lambda_H R_ill(H_H)
    r_ill, r_well       one of them alone
    kappa_difference    kappa(H_P) - kappa(H_H)
    kappa_log_ratio     log kappa(H_P) - log kappa(H_H)
    imma                minus the harmful loss of a linear probe after a few steps, relative to the
                        loss of the best constant

H = F^T F of a batch's features F. Each is added to the loss of the primary task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from immunize_ext.immunizers.imma import probe_after_steps
from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.regularizers import gram_r_ill, gram_r_well

DeepObjective = Literal[
    "condition_number", "r_ill", "r_well", "kappa_difference", "kappa_log_ratio", "imma"
]
Role = Literal["primary", "harmful"]


@dataclass(frozen=True)
class Features:
    """Features of the two batches, and the harmful labels."""

    primary: Tensor
    harmful: Tensor
    harmful_labels: Tensor


@dataclass(frozen=True)
class Term:
    """One term of an objective.

    Attributes:
        name: What its lambda is called: ``"well"``, ``"ill"`` or ``"weight"``.
        value: Its value.
        role: The task whose features alone it depends on; ``None`` where it needs both.
    """

    name: str
    value: Callable[[Features], Tensor]
    role: Role | None = None


def log_kappa_of(features: Tensor) -> Tensor:
    """Log of the condition number of F^T F, differentiable."""
    extremes = gram_extremes(features)
    return extremes.lambda_max.log() - extremes.lambda_min.log()


def probe_targets(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Centred targets of a squared-loss probe: one column per class, or the real labels."""
    if labels.dtype.is_floating_point:
        targets = labels.to(dtype)[:, None]
    else:
        targets = functional.one_hot(labels.to(torch.int64), classes).to(dtype)
    return targets - targets.mean(0)


def _imma(features: Features, classes: int, steps: int) -> Tensor:
    targets = probe_targets(features.harmful_labels, classes, features.harmful.dtype)
    centred = features.harmful - features.harmful.mean(0)
    probe = probe_after_steps(centred, targets, steps)
    residual = (centred @ probe - targets).square().mean()
    # A batch of one class has nothing to learn: the ratio is 0 there, and so is its gradient.
    return -residual / targets.square().mean().clamp_min(torch.finfo(targets.dtype).tiny)


def terms_of(objective: DeepObjective, *, classes: int, inner_steps: int) -> list[Term]:
    """The terms of an objective.

    Args:
        objective: Which (module docstring).
        classes: Number of harmful classes, for IMMA.
        inner_steps: Steps of the probe, for IMMA.

    Returns:
        One term, or two for ``"condition_number"``.
    """
    well = Term("well", lambda f: gram_r_well(f.primary), "primary")
    ill = Term("ill", lambda f: gram_r_ill(f.harmful), "harmful")
    if objective == "condition_number":
        return [well, ill]
    if objective in ("r_ill", "r_well"):
        return [ill if objective == "r_ill" else well]
    if objective == "imma":
        return [Term("weight", lambda f: _imma(f, classes, inner_steps), "harmful")]
    if objective == "kappa_log_ratio":
        return [Term("weight", lambda f: log_kappa_of(f.primary) - log_kappa_of(f.harmful))]
    return [Term("weight", lambda f: log_kappa_of(f.primary).exp() - log_kappa_of(f.harmful).exp())]
