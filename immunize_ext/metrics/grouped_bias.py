"""RIR of a linear extractor from random groups of samples, and how far that is from the truth.

The papers estimate RIR from 20 groups of 100 samples. For a linear extractor the full data is at
hand, so the error of such an estimate can be measured instead of guessed: it is a bias that more
groups do not remove, and far larger than the spread between groups suggests.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from immunize_ext.errors import NumericalWarning
from immunize_ext.metrics.rir import (
    GroupedRatio,
    RelativeImmunizationRatio,
    RirPolicy,
    relative_immunization_ratio,
)


@dataclass(frozen=True)
class GroupedEstimate:
    """RIR per group beside RIR in full data.

    Attributes:
        policy: Which smallest eigenvalue was meant, in both.
        ridge: The relative ridge of policy ``"ridge"``; 0 under the other two.
        group_size: Samples in a group.
        groups: Parts of RIR in each group.
        full: RIR in full data.
    """

    policy: RirPolicy
    ridge: float
    group_size: int
    groups: GroupedRatio
    full: RelativeImmunizationRatio

    @property
    def mean_rir(self) -> float:
        """Mean of the ratios of the groups, as the papers report it."""
        return float(self.groups.rir.mean())

    @property
    def log_spread(self) -> float:
        """Standard deviation of log RIR over groups; 0 for one group."""
        logs = self.groups.log_i - self.groups.log_ii
        return float(logs.std()) if len(logs) > 1 else 0.0

    @property
    def log_bias(self) -> float:
        """Log of ``mean_rir`` minus log RIR of full data; below 0: the groups say too little."""
        return math.log(self.mean_rir) - self.full.log_rir


def grouped_linear_rir(
    x_primary: Tensor,
    x_harmful: Tensor,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    groups: int = 20,
    group_size: int = 100,
    policy: RirPolicy = "ridge",
    ridge: float = 1e-3,
    seed: int = 0,
) -> GroupedEstimate:
    """Estimate RIR from random groups of samples and compare with full data.

    Unlike for a deep extractor, a ridge can be added before theta, relative to the largest
    eigenvalue of each group's K.

    Args:
        x_primary: Inputs of the primary task, shape ``(n, p)``.
        x_harmful: Inputs of the harmful task, shape ``(m, p)``.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: What it is compared with; the identity when omitted.
        groups: Number of groups.
        group_size: Samples in a group, drawn without replacement.
        policy: Which smallest eigenvalue a condition number means (module
            ``immunize_ext.metrics.rir``).
        ridge: Relative ridge of policy ``"ridge"``.
        seed: Seed of the draw.

    Returns:
        Ratios per group, and the ratio in full data under the same policy.

    Raises:
        ValueError: If there are fewer samples than ``group_size``, a number is out of range or
            shapes do not fit.

    Warns:
        NumericalWarning: If groups have fewer samples than features and the policy is
            ``"rank_aware"``: its log then varies by 1 to 3 between groups.

    Note:
        Deterministic given ``seed``; torch's global random state is neither read nor changed.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(300, 3, dtype=torch.float64, generator=generator)
        >>> theta = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        >>> estimate = grouped_linear_rir(x, x @ theta, theta, groups=5)
        >>> estimate.policy, len(estimate.groups.rir), abs(estimate.log_bias) < 0.5
        ('ridge', 5, True)
    """
    if policy not in get_args(RirPolicy):
        raise ValueError(
            f"grouped_linear_rir: policy must be 'ridge', 'rank_aware' or 'official', got "
            f"{policy!r}"
        )
    smallest = min(x_primary.shape[0], x_harmful.shape[0])
    if groups < 1 or not 1 <= group_size <= smallest:
        raise ValueError(
            f"grouped_linear_rir: groups must be at least 1 and group_size between 1 and the "
            f"{smallest} samples of the smaller task, got {groups} and {group_size}"
        )
    if policy == "rank_aware" and group_size < x_primary.shape[1]:
        warnings.warn(
            f"grouped_linear_rir: groups of {group_size} samples with {x_primary.shape[1]} "
            "features are rank-deficient, where rank-aware ratios are unusable; use larger groups "
            'or policy="ridge"',
            NumericalWarning,
            stacklevel=2,
        )
    full = relative_immunization_ratio(
        x_primary, x_harmful, theta, theta0, policy=policy, ridge=ridge
    )
    generator = torch.Generator().manual_seed(seed)
    log_i, log_ii = [], []
    for _ in range(groups):
        rows = [
            x[torch.randperm(x.shape[0], generator=generator)[:group_size].to(x.device)]
            for x in (x_primary, x_harmful)
        ]
        ratio = relative_immunization_ratio(
            rows[0], rows[1], theta, theta0, policy=policy, ridge=ridge
        )
        log_i.append(ratio.log_i)
        log_ii.append(ratio.log_ii)
    return GroupedEstimate(
        policy=policy,
        ridge=full.ridge,
        group_size=group_size,
        groups=GroupedRatio(
            torch.tensor(log_i, dtype=torch.float64), torch.tensor(log_ii, dtype=torch.float64)
        ),
        full=full,
    )
