"""The relative immunization ratio (RIR), its two parts, and which singular values they count.

    RIR = (i) / (ii),   (i)  = kappa(H_H(theta)) / kappa(H_H(theta_0)),
                        (ii) = kappa(H_P(theta)) / kappa(H_P(theta_0))

(eq 15 and 17 of "Model Immunization from a Condition Number Perspective"). Everything is kept as
logarithms, so ratios neither overflow nor lose digits, and identical models give exactly 1.

A condition number needs to say which smallest eigenvalue it means. Three policies:

- ``"ridge"``: K + r lambda_max(K) I before theta. Comparable between runs; the default.
- ``"rank_aware"``: the smallest eigenvalue above the numerical rank tolerance (the pseudo-inverse
  definition of the paper). Jumps where the rank changes.
- ``"official"``: the smallest eigenvalue of H + 1e-6 I, after the published code. On rank-deficient
  data this is 1e-6 whatever theta is, and RIR becomes a ratio of largest eigenvalues. (That code
  counts eigenvalues above 1e-6. One of H that is 0 lies there or not by a rounding error: with many
  such directions one is sure to, with a single one it is a toss of a coin, and kappa is either
  lambda_max / 1e-6 or that of the rest. Here they always count.)

Numerical rank is that of the precision in which features were COMPUTED: float32 features of a
network carry errors of 1e-7 of their size in every direction, whatever dtype they are held in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from immunize_ext.errors import NumericalWarning
from immunize_ext.ops.spectrum import (
    extremal_singular_values,
    gram_extremes,
    gram_log_condition_number,
)
from immunize_ext.probing.data.scale import unit_scale
from immunize_ext.probing.metrics.hessian import check_ridge, with_ridge
from immunize_ext.probing.metrics.pencil import log_rir_ceiling

RirPolicy = Literal["ridge", "rank_aware", "official"]


# The floor of the published code: added to every eigenvalue, and what an eigenvalue has to exceed.
OFFICIAL_FLOOR = 1e-6


def _exp(value: float) -> float:
    """e^value; infinity where it overflows."""
    return math.inf if value > math.log(torch.finfo(torch.float64).max) else math.exp(value)


def _log_ratio(numerator: float, denominator: float) -> float:
    """Difference of two logarithms; 0 where they are equal, infinite ones included."""
    return 0.0 if numerator == denominator else numerator - denominator


@dataclass(frozen=True)
class RelativeImmunizationRatio:
    """RIR with its parts, as logarithms.

    Attributes:
        policy: Which smallest eigenvalue was meant.
        ridge: The relative ridge of policy ``"ridge"``; 0 under the other two.
        log_kappa_harmful: log kappa(H_H(theta)).
        log_kappa_harmful_base: log kappa(H_H(theta_0)).
        log_kappa_primary: log kappa(H_P(theta)).
        log_kappa_primary_base: log kappa(H_P(theta_0)).
        rank_harmful: Eigenvalues counted for the harmful task with theta.
        rank_harmful_base: The same with theta_0; a ratio between two ranks says little.
        rank_primary: Eigenvalues counted for the primary task with theta.
        rank_primary_base: The same with theta_0.

    Note:
        kappa of the zero matrix is infinite. Two equal condition numbers have ratio 1, also two
        infinite ones. A finite over an infinite one is 0, an infinite over a finite one infinite.
        Where (i) and (ii) are both infinite or both 0, RIR is NaN: it says nothing.
    """

    policy: RirPolicy
    ridge: float
    log_kappa_harmful: float
    log_kappa_harmful_base: float
    log_kappa_primary: float
    log_kappa_primary_base: float
    rank_harmful: int
    rank_harmful_base: int
    rank_primary: int
    rank_primary_base: int

    @property
    def log_i(self) -> float:
        """Log of (i), the harmful task's part; above 0: harder to learn."""
        return _log_ratio(self.log_kappa_harmful, self.log_kappa_harmful_base)

    @property
    def log_ii(self) -> float:
        """Log of (ii), the primary task's part; below 0: easier to learn."""
        return _log_ratio(self.log_kappa_primary, self.log_kappa_primary_base)

    @property
    def log_rir(self) -> float:
        """Log of RIR."""
        return self.log_i - self.log_ii

    @property
    def i(self) -> float:
        """(i) = kappa(H_H(theta)) / kappa(H_H(theta_0))."""
        return _exp(self.log_i)

    @property
    def ii(self) -> float:
        """(ii) = kappa(H_P(theta)) / kappa(H_P(theta_0))."""
        return _exp(self.log_ii)

    @property
    def rir(self) -> float:
        """RIR = (i) / (ii)."""
        return _exp(self.log_rir)


def log_kappa(
    features: Tensor,
    *,
    policy: Literal["rank_aware", "official"] = "rank_aware",
    rank_rtol: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log of the condition number of H = features^T features, and how many eigenvalues counted.

    Args:
        features: Features of a probe, shape ``(*, n, p)``.
        policy: Which smallest eigenvalue is meant; a ridge is added to ``features`` beforehand
            (:func:`immunize_ext.probing.metrics.with_ridge`), where the policy ``"rank_aware"``
            sees it.
        rank_rtol: Singular values of the features up to this share of the largest count as 0 under
            ``"rank_aware"``; the usual tolerance of float64 when omitted.

    Returns:
        log kappa, float64 of shape ``(*,)``, and the counts, int64 of shape ``(*,)``.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 0.5, 1e-8], dtype=torch.float64))
        >>> [(round(float(v.exp()), 6), int(r)) for v, r in (log_kappa(x, rank_rtol=1e-6),)]
        [(4.0, 2)]
    """
    features = features.detach().to(torch.float64)
    # By singular values: eigenvalues of H leave the range of float64 long before features do.
    if policy == "official":
        value = gram_log_condition_number(features, floor=OFFICIAL_FLOOR)
        there = (features != 0).any(-1).any(-1)
        counted = there * features.shape[-1]
        return value.where(there, math.inf), counted
    extremes = extremal_singular_values(features, rank_rtol=rank_rtol)
    # The log of the ratio: a difference of logs would see the size of the features by its rounding.
    value = 2 * (extremes.sigma_max / extremes.sigma_min).log()
    return value.where(extremes.rank > 0, math.inf), extremes.rank


def computed_rank_rtol(features: Tensor, computed: torch.dtype | None = None) -> float:
    """The rank tolerance of features by the precision that they were computed in.

    Rounding errors of a network are errors of each row, a share of the row's own size: their
    singular values grow with the number of rows as those of the features do, so that the tolerance
    depends on the number p of features alone, and groups are cut as full data is.

    Args:
        features: Features, shape ``(*, n, p)``.
        computed: That precision; the dtype of ``features`` when omitted.

    Returns:
        p times its epsilon, at most one half.

    Example:
        >>> x = torch.zeros(100, 8, dtype=torch.float64)
        >>> f"{computed_rank_rtol(x):.3g}, {computed_rank_rtol(x, torch.float32):.3g}"
        '1.78e-15, 9.54e-07'
    """
    eps = torch.finfo(computed or features.dtype).eps
    return min(features.shape[-1] * eps, 0.5)


def relative_immunization_ratio(
    x_primary: Tensor,
    x_harmful: Tensor,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    policy: RirPolicy = "ridge",
    ridge: float = 1e-4,
    rank_rtol: float | None = None,
) -> RelativeImmunizationRatio:
    """RIR of a linear extractor theta against theta_0 (eq 15).

    Args:
        x_primary: Inputs of the primary task, shape ``(n, p)``.
        x_harmful: Inputs of the harmful task, shape ``(m, p)``.
        theta: The immunized extractor, shape ``(p, q)``; features are ``x @ theta``.
        theta0: What it is compared with, shape ``(p, q')``; the identity when omitted.
        policy: Which smallest eigenvalue a condition number means (module docstring).
        ridge: Relative ridge of policy ``"ridge"``.
        rank_rtol: Rank tolerance of policy ``"rank_aware"`` (:func:`log_kappa`), for inputs that
            are themselves features computed in less than float64.

    Returns:
        RIR with its parts.

    Raises:
        ValueError: If shapes do not fit, the policy is unknown or the ridge is out of range.

    Note:
        Deterministic; computed in float64; not differentiable (use
        :func:`immunize_ext.ops.regularizers.gram_r_ill` and its siblings to train).

    Example:
        >>> x_primary = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
        >>> x_harmful = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> theta = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> ratio = relative_immunization_ratio(x_primary, x_harmful, theta, policy="rank_aware")
        >>> round(ratio.i, 9), round(ratio.ii, 9), round(ratio.rir, 9)
        (4.0, 0.25, 16.0)
    """
    if policy not in get_args(RirPolicy):
        raise ValueError(
            f"relative_immunization_ratio: policy must be 'ridge', 'rank_aware' or 'official', "
            f"got {policy!r}"
        )
    check_ridge("relative_immunization_ratio", ridge)
    for name, matrix in (("x_harmful", x_harmful), ("x_primary", x_primary)):
        if matrix.dim() != 2 or matrix.shape[1] != theta.shape[0]:
            raise ValueError(
                f"relative_immunization_ratio: {name} must have shape (n, {theta.shape[0]}) to be "
                f"multiplied by theta, got {tuple(matrix.shape)}; give inputs, not features"
            )
    values: dict[str, tuple[float, int]] = {}
    for name, x in (("harmful", x_harmful), ("primary", x_primary)):
        rows = x.detach().to(torch.float64)
        count: Literal["official", "rank_aware"]
        count = "official" if policy == "official" else "rank_aware"
        if count == "rank_aware":
            rows = rows * unit_scale(rows)  # the floor of "official" alone sees the scale
        if policy == "ridge":
            rows = with_ridge(rows, ridge)
        for suffix, extractor in (("", theta), ("_base", theta0)):
            features = rows
            if extractor is not None:
                wide = extractor.detach().to(torch.float64)
                features = rows @ (wide * unit_scale(wide) if count == "rank_aware" else wide)
            tolerance = rank_rtol if policy == "rank_aware" else None
            kappa, rank = log_kappa(features, policy=count, rank_rtol=tolerance)
            values[name + suffix] = float(kappa), int(rank)
    return RelativeImmunizationRatio(
        policy=policy,
        ridge=ridge if policy == "ridge" else 0.0,
        log_kappa_harmful=values["harmful"][0],
        log_kappa_harmful_base=values["harmful_base"][0],
        log_kappa_primary=values["primary"][0],
        log_kappa_primary_base=values["primary_base"][0],
        rank_harmful=values["harmful"][1],
        rank_harmful_base=values["harmful_base"][1],
        rank_primary=values["primary"][1],
        rank_primary_base=values["primary_base"][1],
    )


class FeatureRatio(NamedTuple):
    """kappa under one model over kappa under another.

    Attributes:
        log: The logarithm, float64 of shape ``(*,)``; 0 where both are equal.
        rank: Eigenvalues counted under the first model, int64.
        rank_base: The same under the other; a ratio between two ranks says little.
        log_kappa: Log of kappa under the first model, float64 of shape ``(*,)``.
    """

    log: Tensor
    rank: Tensor
    rank_base: Tensor
    log_kappa: Tensor


def feature_ratio(
    features: Tensor, base: Tensor, *, policy: RirPolicy, ridge: float, rank_rtol: float | None
) -> FeatureRatio:
    """Log of kappa under one model over kappa under another, from features alone.

    Args:
        features: Features under the immunized model, shape ``(*, n, p)``.
        base: Features of the same samples under the original model, shape ``(*, n, q)``.
        policy: Which smallest eigenvalue a condition number means.
        ridge: Ridge of policy ``"ridge"``, relative to the largest eigenvalue of ``base``, for both
            models.
        rank_rtol: Rank tolerance (:func:`log_kappa`); that of the dtype of the features when
            omitted (:func:`computed_rank_rtol`).

    Returns:
        The ratio, both ranks, and kappa under the first model.
    """
    pair = [x.detach().to(torch.float64) for x in (features, base)]
    tolerances = [
        computed_rank_rtol(x) if rank_rtol is None else rank_rtol for x in (features, base)
    ]
    if policy == "ridge":
        unit = unit_scale(*pair)
        pair = [x * unit for x in pair]
    # The model may not change the ruler it is measured with: one absolute ridge for both.
    absolute = ridge * gram_extremes(pair[1]).lambda_max if policy == "ridge" else None
    found = [
        _feature_log_kappa(x, policy, absolute, rtol)
        for x, rtol in zip(pair, tolerances, strict=True)
    ]
    (kappa, rank), (kappa_base, rank_base) = found
    log = torch.where(kappa == kappa_base, 0.0, kappa - kappa_base)
    return FeatureRatio(log, rank, rank_base, kappa)


def _feature_log_kappa(
    x: Tensor, policy: RirPolicy, absolute: Tensor | None, rank_rtol: float
) -> tuple[Tensor, Tensor]:
    if absolute is None:
        count: Literal["official", "rank_aware"]
        count = "official" if policy == "official" else "rank_aware"
        return log_kappa(x, policy=count, rank_rtol=rank_rtol)
    # Eigenvalues of H + a I are those of H plus a; below full rank the smallest one is a.
    extremes = gram_extremes(x, rank="full")
    value = (extremes.lambda_max + absolute).log() - (extremes.lambda_min + absolute).log()
    return value.where(extremes.lambda_max > 0.0, math.inf), extremes.rank


@dataclass(frozen=True)
class GroupedRatio:
    """RIR of a deep extractor over random groups of samples, each of shape ``(groups,)``.

    Attributes:
        log_i: Log of (i) in each group.
        log_ii: Log of (ii) in each group.
        rank_harmful: Eigenvalues counted for the harmful task under the immunized model.
        rank_harmful_base: The same under the original one.
        rank_primary: Eigenvalues counted for the primary task under the immunized model.
        rank_primary_base: The same under the original one.
    """

    log_i: Tensor
    log_ii: Tensor
    rank_harmful: Tensor
    rank_harmful_base: Tensor
    rank_primary: Tensor
    rank_primary_base: Tensor

    @property
    def rir(self) -> Tensor:
        """RIR in each group, shape ``(groups,)``; report its mean and its spread."""
        return (self.log_i - self.log_ii).exp()

    @property
    def i(self) -> Tensor:
        """(i) in each group, shape ``(groups,)``."""
        return self.log_i.exp()

    @property
    def ii(self) -> Tensor:
        """(ii) in each group, shape ``(groups,)``."""
        return self.log_ii.exp()


def grouped_rir(
    primary: Tensor,
    primary_base: Tensor,
    harmful: Tensor,
    harmful_base: Tensor,
    *,
    groups: int = 20,
    group_size: int = 100,
    policy: RirPolicy = "official",
    ridge: float = 1e-4,
    rank_rtol: float | None = None,
    seed: int = 0,
) -> GroupedRatio:
    """RIR of a deep extractor from random groups of samples (eq 17 and 18).

    Ratios are taken per group. Averaging K over groups first would shrink RIR by 30 to 100 times.
    A ridge relative to the features at hand would make every ratio 1, since it stands after theta;
    here it is that of the original model's features, in each group, for both models.

    Args:
        primary: Features of the primary task under the immunized model, shape ``(n, p)``.
        primary_base: Features of the same samples under the original model, shape ``(n, p)``.
        harmful: Features of the harmful task under the immunized model, shape ``(m, p)``.
        harmful_base: Features of the same samples under the original model, shape ``(m, p)``.
        groups: Number of groups.
        group_size: Samples in a group, drawn without replacement.
        policy: Which smallest eigenvalue a condition number means.
        ridge: Ridge of policy ``"ridge"``, relative to the original model's largest eigenvalue.
        rank_rtol: Rank tolerance of policy ``"rank_aware"``; by the dtype of the features when
            omitted (:func:`computed_rank_rtol`).
        seed: Seed of the draw.

    Returns:
        Parts and ratio per group, with the ranks.

    Raises:
        ValueError: If shapes do not fit, a number is out of range, the policy is unknown, or there
            are fewer samples than ``group_size``.

    Warns:
        NumericalWarning: If a group has fewer samples than features. Groups are then biased, not
            just noisy, and with ``policy="rank_aware"`` unusable; enlarge ``group_size``.

    Example:
        >>> x = torch.randn(50, 4, dtype=torch.float64)
        >>> same = grouped_rir(x, x, x, x, groups=3, group_size=20)
        >>> same.log_i.tolist(), same.log_ii.tolist()
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    """
    if policy not in get_args(RirPolicy):
        raise ValueError(
            f"grouped_rir: policy must be 'ridge', 'rank_aware' or 'official', got {policy!r}"
        )
    check_ridge("grouped_rir", ridge)
    if groups < 1 or group_size < 1:
        raise ValueError(
            f"grouped_rir: groups and group_size must be at least 1, got {groups} and {group_size}"
        )
    for name, first, second in (
        ("primary", primary, primary_base),
        ("harmful", harmful, harmful_base),
    ):
        if first.shape[0] != second.shape[0]:
            raise ValueError(
                f"grouped_rir: {name}_base must have the {first.shape[0]} samples of {name}, got "
                f"{second.shape[0]}; run both models on the same samples in the same order"
            )
        if first.shape[0] < group_size:
            raise ValueError(
                f"grouped_rir: {name} must have at least group_size={group_size} samples, got "
                f"{first.shape[0]}; lower group_size"
            )
    if group_size < primary.shape[1]:
        warnings.warn(
            f"grouped_rir: groups of {group_size} samples with {primary.shape[1]} features are "
            "rank-deficient, which biases RIR; use groups larger than the number of features",
            NumericalWarning,
            stacklevel=2,
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for immunized, base in ((harmful, harmful_base), (primary, primary_base)):
        chosen = torch.stack(
            [
                torch.randperm(immunized.shape[0], generator=generator)[:group_size]
                for _ in range(groups)
            ]
        ).to(immunized.device)
        pair = immunized[chosen], base[chosen]
        found.append(feature_ratio(*pair, policy=policy, ridge=ridge, rank_rtol=rank_rtol))
    return GroupedRatio(found[0].log, found[1].log, *found[0][1:3], *found[1][1:3])


@dataclass(frozen=True)
class DeepRatio:
    """RIR of a deep extractor against the original one.

    Attributes:
        groups: Parts of RIR in each group, by policy.
        full: Log of (i) and of (ii) in all samples at once, by policy.
        ranks: Eigenvalues counted there, by policy: harmful task under the immunized and under the
            original model, primary task likewise.
        group_size: Samples in a group.
        num_features: Number of features p.
        ridge: Ridge of policy ``"ridge"``, relative to the original model's largest eigenvalue.
    """

    groups: dict[RirPolicy, GroupedRatio]
    full: dict[RirPolicy, tuple[float, float]]
    ranks: dict[RirPolicy, tuple[int, int, int, int]]
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
    rank_rtol: float | None = None,
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
        ridge: Ridge of policy ``"ridge"`` (:func:`immunize_ext.probing.metrics.grouped_rir`).
        rank_rtol: Rank tolerance of policy ``"rank_aware"``; by the dtype of the features when
            omitted (:func:`computed_rank_rtol`). Give that of float32 for features that a float32
            network computed and that are held in float64.
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
    ranks: dict[RirPolicy, tuple[int, int, int, int]] = {}
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
                rank_rtol=rank_rtol,
                seed=seed,
            )
        i, ii = (
            feature_ratio(new, old, policy=policy, ridge=ridge, rank_rtol=rank_rtol)
            for new, old in ((harmful, harmful_base), (primary, primary_base))
        )
        full[policy] = float(i.log), float(ii.log)
        ranks[policy] = int(i.rank), int(i.rank_base), int(ii.rank), int(ii.rank_base)
    return DeepRatio(found, full, ranks, group_size, p, ridge)


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
    rank_rtol: float | None = None,
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
            ``immunize_ext.probing.metrics.rir``).
        ridge: Relative ridge of policy ``"ridge"``.
        rank_rtol: As for :func:`relative_immunization_ratio`.
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
        x_primary, x_harmful, theta, theta0, policy=policy, ridge=ridge, rank_rtol=rank_rtol
    )
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for _ in range(groups):
        rows = [
            x[torch.randperm(x.shape[0], generator=generator)[:group_size].to(x.device)]
            for x in (x_primary, x_harmful)
        ]
        ratios.append(
            relative_immunization_ratio(
                rows[0], rows[1], theta, theta0, policy=policy, ridge=ridge, rank_rtol=rank_rtol
            )
        )
    logs = [[getattr(r, name) for r in ratios] for name in ("log_i", "log_ii")]
    roles = ("harmful", "harmful_base", "primary", "primary_base")
    counts = [[getattr(r, f"rank_{role}") for r in ratios] for role in roles]
    return GroupedEstimate(
        policy=policy,
        ridge=full.ridge,
        group_size=group_size,
        groups=GroupedRatio(
            *(torch.tensor(values, dtype=torch.float64) for values in logs),
            *(torch.tensor(values) for values in counts),
        ),
        full=full,
    )


RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


class CeilingRow(NamedTuple):
    """The ceiling at one ridge.

    Attributes:
        ridge: Ridge on each K, relative to its largest eigenvalue.
        log_ceiling: Log of the largest RIR that any invertible theta can reach.
        growth_per_decade: Factor by which the ceiling grew since the ridge above, per tenfold
            fall of the ridge; ``None`` in the first row. Above 10 the ceiling says more about the
            ridge than about the data.
        log_rir: Log RIR of the given theta at this ridge; ``None`` without one.
        share: RIR of that theta divided by the ceiling; ``None`` without one.
    """

    ridge: float
    log_ceiling: float
    growth_per_decade: float | None
    log_rir: float | None
    share: float | None


def ceiling_table(
    x_primary: Tensor,
    x_harmful: Tensor,
    theta: Tensor | None = None,
    theta0: Tensor | None = None,
    *,
    ridges: Sequence[float] = RIDGES,
) -> list[CeilingRow]:
    """Tabulate the exact ceiling of RIR over ridges, with the share that a theta has of it.

    Args:
        x_primary: Inputs of the primary task, shape ``(n, p)``.
        x_harmful: Inputs of the harmful task, shape ``(m, p)``.
        theta: An extractor to judge, shape ``(p, q)``.
        theta0: What RIR compares with, shape ``(p, p)``; the identity when omitted.
        ridges: Ridges, each positive.

    Returns:
        One row per ridge, the largest ridge first.

    Raises:
        ValueError: If a ridge is not positive, none is given, or shapes do not fit.
        NotPositiveDefiniteError: If K_P is numerically singular at a ridge.

    Note:
        Deterministic; computed in float64.

    Example:
        >>> import torch
        >>> primary = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
        >>> harmful = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> theta = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> for row in ceiling_table(primary, harmful, theta, ridges=(1e-1, 1e-9)):
        ...     print(f"{row.ridge:g}  {math.exp(row.log_ceiling):.4g}  {row.share:.4f}")
        0.1  9.878  1.0000
        1e-09  16  1.0000
    """
    if not ridges or not all(math.isfinite(ridge) and ridge > 0.0 for ridge in ridges):
        raise ValueError(f"ceiling_table: ridges must be positive numbers, got {list(ridges)}")
    rows: list[CeilingRow] = []
    for ridge in sorted(set(ridges), reverse=True):
        ceiling = log_rir_ceiling(x_primary, x_harmful, theta0, ridge=ridge)
        growth = log_rir = share = None
        if rows:
            decades = math.log10(rows[-1].ridge / ridge)
            growth = math.exp((ceiling - rows[-1].log_ceiling) / decades)
        if theta is not None:
            ratio = relative_immunization_ratio(x_primary, x_harmful, theta, theta0, ridge=ridge)
            log_rir = ratio.log_rir
            share = math.exp(min(log_rir - ceiling, 0.0))
        rows.append(CeilingRow(ridge, ceiling, growth, log_rir, share))
    return rows
