"""The ceiling of RIR over ridges: a ceiling without its ridge means nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from immunize_ext.metrics.pencil import log_rir_ceiling
from immunize_ext.metrics.rir import relative_immunization_ratio

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
