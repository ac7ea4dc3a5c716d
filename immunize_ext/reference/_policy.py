"""Which values count and which are equal: the one policy of all references.

Conventions: ``spectrum``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import EPS, FloatArray, eps_of

RankPolicy: TypeAlias = Literal["numerical", "full"]


class Tolerances(TypedDict, total=False):
    """The keyword arguments of a policy, to be passed on together.

    Attributes:
        rank: "numerical" leaves out values at or below the tolerance, "full" reports them as 0.
        rank_rtol: a value counts iff it is larger than rank_rtol times the largest.
        cluster_rtol: values closer to an extreme than this times the largest belong to it.
    """

    rank: RankPolicy
    rank_rtol: float | None
    cluster_rtol: float | None


@dataclass(frozen=True)
class Policy:
    """Rank policy and both tolerances, relative to the largest value.

    Attributes:
        rank: "numerical" or "full".
        rank_rtol: below it a value is zero.
        cluster_rtol: within it two values are one.
        default: max(n, p) eps, what rounding in a backward stable decomposition cannot tell apart.
    """

    rank: RankPolicy
    rank_rtol: float
    cluster_rtol: float
    default: float

    @classmethod
    def of(
        cls,
        function: str,
        array: npt.ArrayLike,
        *,
        rank: RankPolicy = "numerical",
        rank_rtol: float | None = None,
        cluster_rtol: float | None = None,
    ) -> Policy:
        """The policy for matrices ``(*, n, p)``, checked, with defaults by shape and dtype."""
        if rank not in ("numerical", "full"):
            raise ValueError(
                f"{function}: rank must be 'numerical' or 'full', got {rank!r}; "
                "choose one of the two"
            )
        for name, value in (("rank_rtol", rank_rtol), ("cluster_rtol", cluster_rtol)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(
                    f"{function}: {name} must lie in [0, 1), got {value}; "
                    "it is relative to the largest value"
                )
        default = max(np.shape(array)[-2:]) * eps_of(array)
        return cls(
            rank,
            default if rank_rtol is None else rank_rtol,
            default if cluster_rtol is None else cluster_rtol,
            default,
        )

    def cluster(self, values: FloatArray, extreme: float, largest: float) -> int:
        """How many of the values belong to an extreme."""
        return int(np.count_nonzero(np.abs(values - extreme) <= self.cluster_rtol * largest))


def count_above(values: FloatArray, rtol: float) -> int:
    """How many values count: larger than rtol times the largest.

    Not >=, or every value of a zero matrix would count.
    """
    return int(np.count_nonzero(values > rtol * np.max(values, initial=0.0)))


def numerical_rank(values: FloatArray, shape: tuple[int, ...]) -> int:
    """Rank of a float64 matrix of this shape with these singular values, in any order."""
    return count_above(values, max(shape) * EPS)
