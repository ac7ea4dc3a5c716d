"""The relative immunization ratio (RIR), its two parts, and which singular values they count.

    RIR = (i) / (ii),   (i)  = kappa(H_H(theta)) / kappa(H_H(theta_0)),
                        (ii) = kappa(H_P(theta)) / kappa(H_P(theta_0))

(eq 15 and 17 of "Model Immunization from a Condition Number Perspective"). Everything is kept as
logarithms, so ratios neither overflow nor lose digits, and identical models give exactly 1.

A condition number needs to say which smallest eigenvalue it means. Three policies:

- ``"ridge"``: K + r lambda_max(K) I before theta. Comparable between runs; the default.
- ``"rank_aware"``: the smallest eigenvalue above the numerical rank tolerance (the pseudo-inverse
  definition of the paper). Jumps where the rank changes.
- ``"official"``: the smallest eigenvalue of H + 1e-6 I above 1e-6, as the published code has it.
  On rank-deficient data this is 1e-6 whatever theta is, and RIR becomes a ratio of largest
  eigenvalues.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from immunize_ext.errors import NumericalWarning
from immunize_ext.metrics.hessian import check_ridge, with_ridge
from immunize_ext.ops.spectrum import gram_extremes

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
    features: Tensor, *, policy: Literal["rank_aware", "official"] = "rank_aware"
) -> tuple[Tensor, Tensor]:
    """Log of the condition number of H = features^T features, and how many eigenvalues counted.

    Args:
        features: Features of a probe, shape ``(*, n, p)``.
        policy: Which smallest eigenvalue is meant; a ridge is added to ``features`` beforehand
            (:func:`immunize_ext.metrics.with_ridge`), where the policy ``"rank_aware"`` sees it.

    Returns:
        log kappa, float64 of shape ``(*,)``, and the counts, int64 of shape ``(*,)``.
    """
    features = features.detach().to(torch.float64)
    if policy == "official":
        gram = features.mT @ features
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        eigenvalues = torch.linalg.eigvalsh(gram + OFFICIAL_FLOOR * eye)
        counted = eigenvalues > OFFICIAL_FLOOR
        smallest = eigenvalues.where(counted, math.inf).amin(-1)
        value = eigenvalues[..., -1].log() - smallest.log()
        # Nothing above the floor: the zero matrix.
        return value.where(counted.any(-1), math.inf), counted.sum(-1)
    extremes = gram_extremes(features)
    value = extremes.lambda_max.log() - extremes.lambda_min.log()
    return value.where(extremes.rank > 0, math.inf), extremes.rank


def relative_immunization_ratio(
    x_primary: Tensor,
    x_harmful: Tensor,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    policy: RirPolicy = "ridge",
    ridge: float = 1e-4,
) -> RelativeImmunizationRatio:
    """RIR of a linear extractor theta against theta_0 (eq 15).

    Args:
        x_primary: Inputs of the primary task, shape ``(n, p)``.
        x_harmful: Inputs of the harmful task, shape ``(m, p)``.
        theta: The immunized extractor, shape ``(p, q)``; features are ``x @ theta``.
        theta0: What it is compared with, shape ``(p, q')``; the identity when omitted.
        policy: Which smallest eigenvalue a condition number means (module docstring).
        ridge: Relative ridge of policy ``"ridge"``.

    Returns:
        RIR with its parts.

    Raises:
        ValueError: If shapes do not fit, the policy is unknown or the ridge is out of range.

    Note:
        Deterministic; computed in float64; not differentiable (use
        :func:`immunize_ext.regularizers.gram_r_ill` and its siblings to train).

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
        if policy == "ridge":
            rows = with_ridge(rows, ridge)
        count: Literal["official", "rank_aware"]
        count = "official" if policy == "official" else "rank_aware"
        for suffix, extractor in (("", theta), ("_base", theta0)):
            features = rows
            if extractor is not None:
                features = rows @ extractor.detach().to(torch.float64)
            kappa, rank = log_kappa(features, policy=count)
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


def feature_log_ratio(features: Tensor, base: Tensor, *, policy: RirPolicy, ridge: float) -> Tensor:
    """Log of kappa under one model over kappa under another, from features alone.

    Args:
        features: Features under the immunized model, shape ``(*, n, p)``.
        base: Features of the same samples under the original model, shape ``(*, n, q)``.
        policy: Which smallest eigenvalue a condition number means.
        ridge: Ridge of policy ``"ridge"``, relative to the largest eigenvalue of ``base``, for both
            models.

    Returns:
        The logarithm, float64 of shape ``(*,)``; 0 where both are equal.
    """
    pair = [features.detach().to(torch.float64), base.detach().to(torch.float64)]
    # The model may not change the ruler it is measured with: one absolute ridge for both.
    absolute = ridge * gram_extremes(pair[1]).lambda_max if policy == "ridge" else None
    kappa, kappa_base = (_feature_log_kappa(x, policy, absolute) for x in pair)
    return torch.where(kappa == kappa_base, 0.0, kappa - kappa_base)


def _feature_log_kappa(x: Tensor, policy: RirPolicy, absolute: Tensor | None) -> Tensor:
    if absolute is not None:
        # Eigenvalues of H + a I are those of H plus a; below full rank the smallest one is a.
        extremes = gram_extremes(x)
        smallest = extremes.lambda_min.where(extremes.rank == x.shape[-1], 0.0) + absolute
        value = (extremes.lambda_max + absolute).log() - smallest.log()
        return value.where(extremes.rank > 0, math.inf)
    if policy == "official" and x.shape[-2] < x.shape[-1]:
        # H is singular, so the smallest eigenvalue above the floor is the floor plus a rounding
        # error (relative 4e-10 where it was measured): no p x p eigenvalue problem is needed.
        largest = gram_extremes(x).lambda_max
        value = (largest + OFFICIAL_FLOOR).log() - math.log(OFFICIAL_FLOOR)
        return value.where(largest > 0.0, math.inf)
    return log_kappa(x, policy="official" if policy == "official" else "rank_aware")[0]


@dataclass(frozen=True)
class GroupedRatio:
    """RIR of a deep extractor over random groups of samples, each of shape ``(groups,)``.

    Attributes:
        log_i: Log of (i) in each group.
        log_ii: Log of (ii) in each group.
    """

    log_i: Tensor
    log_ii: Tensor

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
        seed: Seed of the draw.

    Returns:
        Parts and ratio per group.

    Raises:
        ValueError: If shapes do not fit, a number is out of range, the policy is unknown, or there
            are fewer samples than ``group_size``.

    Warns:
        NumericalWarning: If a group has fewer samples than features. Groups are then biased, not
            just noisy, and with ``policy="rank_aware"`` unusable; enlarge ``group_size``.
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
    logs = []
    for immunized, base in ((harmful, harmful_base), (primary, primary_base)):
        chosen = torch.stack(
            [
                torch.randperm(immunized.shape[0], generator=generator)[:group_size]
                for _ in range(groups)
            ]
        ).to(immunized.device)
        logs.append(feature_log_ratio(immunized[chosen], base[chosen], policy=policy, ridge=ridge))
    return GroupedRatio(log_i=logs[0], log_ii=logs[1])
