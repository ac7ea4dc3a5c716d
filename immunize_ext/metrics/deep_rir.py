"""RIR of a deep extractor under every rule for the smallest eigenvalue, beside full data.

The paper's number is the mean over 20 groups of 100 training samples under the official floor (eq
17 and 18). With fewer samples than features a group's H is singular, and that number becomes a
ratio of largest eigenvalues. More groups do not help, since each has the same bias; the ratio of
all features at once tells how large it is.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from immunize_ext.errors import NumericalWarning
from immunize_ext.metrics.rir import GroupedRatio, RirPolicy, feature_log_ratio, grouped_rir


@dataclass(frozen=True)
class DeepRatio:
    """RIR of a deep extractor against the original one.

    Attributes:
        groups: Parts of RIR in each group, by policy.
        full: Log of (i) and of (ii) in all samples at once, by policy.
        group_size: Samples in a group.
        num_features: Number of features p.
        ridge: Ridge of policy ``"ridge"``, relative to the original model's largest eigenvalue.
    """

    groups: dict[RirPolicy, GroupedRatio]
    full: dict[RirPolicy, tuple[float, float]]
    group_size: int
    num_features: int
    ridge: float

    def mean_rir(self, policy: RirPolicy = "official") -> float:
        """Mean of the ratios of the groups, as the paper reports it."""
        return float(self.groups[policy].rir.mean())

    def log_spread(self, policy: RirPolicy = "official") -> float:
        """Standard deviation of log RIR over groups; 0 for one group."""
        logs = self.groups[policy].log_i - self.groups[policy].log_ii
        return float(logs.std()) if len(logs) > 1 else 0.0

    def log_bias(self, policy: RirPolicy = "official") -> float:
        """Log of :meth:`mean_rir` minus log RIR of full data; below 0: the groups say too little.

        0 where full data says nothing either (two infinite condition numbers).
        """
        log_i, log_ii = self.full[policy]
        return math.log(self.mean_rir(policy)) - (log_i - log_ii)


def deep_rir(
    primary: Tensor,
    primary_base: Tensor,
    harmful: Tensor,
    harmful_base: Tensor,
    *,
    groups: int = 20,
    group_size: int = 100,
    ridge: float = 1e-4,
    seed: int = 0,
) -> DeepRatio:
    """RIR of a deep extractor from features under both models, under all three policies.

    Args:
        primary: Features of the primary task under the immunized model, shape ``(n, p)``.
        primary_base: Features of the same samples under the original model.
        harmful: Features of the harmful task under the immunized model, shape ``(m, p)``.
        harmful_base: Features of the same samples under the original model.
        groups: Number of groups.
        group_size: Samples in a group, drawn without replacement.
        ridge: Ridge of policy ``"ridge"`` (:func:`immunize_ext.metrics.grouped_rir`).
        seed: Seed of the draw; all policies see the same groups.

    Returns:
        Ratios per group and in full data.

    Raises:
        ValueError: If shapes do not fit, a number is out of range or there are fewer samples than
            ``group_size``.

    Warns:
        NumericalWarning: If a group has fewer samples than features: RIR is then biased.

    Note:
        Deterministic given ``seed``; computed in float64. Identical models give exactly 1.

    Example:
        >>> import torch
        >>> x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
        >>> ratio = deep_rir(x, x, x, x)
        >>> ratio.mean_rir(), ratio.log_bias()
        (1.0, 0.0)
    """
    found: dict[RirPolicy, GroupedRatio] = {}
    full: dict[RirPolicy, tuple[float, float]] = {}
    p = int(primary.shape[1])
    if group_size < p:
        warnings.warn(
            f"deep_rir: groups of {group_size} samples with {p} features are rank-deficient, which "
            "biases RIR and makes it a ratio of largest eigenvalues under the official floor; "
            "compare with the ratio in full data, or enlarge group_size",
            NumericalWarning,
            stacklevel=2,
        )
    for policy in get_args(RirPolicy):
        with warnings.catch_warnings():
            # Said above, once instead of once for each policy.
            warnings.simplefilter("ignore", NumericalWarning)
            found[policy] = grouped_rir(
                primary,
                primary_base,
                harmful,
                harmful_base,
                groups=groups,
                group_size=group_size,
                policy=policy,
                ridge=ridge,
                seed=seed,
            )
        parts = [
            float(feature_log_ratio(new, old, policy=policy, ridge=ridge))
            for new, old in ((harmful, harmful_base), (primary, primary_base))
        ]
        full[policy] = parts[0], parts[1]
    return DeepRatio(found, full, group_size, p, ridge)
