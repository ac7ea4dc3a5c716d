"""A number over several seeds: its mean and how far it scatters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, one a seed, with what a report says about them.

    Attributes:
        values: The values, in the order of the seeds. NaN marks a seed without a value.

    Example:
        >>> spread = Spread.of([0.8, 0.9, 1.0])
        >>> print(spread)
        0.90 +- 0.10 (0.80 to 1.00, 3 seeds)
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Take the values as they come."""
        return cls(tuple(float(value) for value in values))

    @property
    def known(self) -> tuple[float, ...]:
        """The values that are numbers."""
        return tuple(value for value in self.values if not math.isnan(value))

    @property
    def mean(self) -> float:
        """Mean of the known values; NaN if there is none."""
        return math.fsum(self.known) / len(self.known) if self.known else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation with n - 1 in the denominator; NaN for fewer than two finite values.

        One seed has no spread: 0 would claim that it is known to be small.
        """
        if len(self.known) < 2 or not all(map(math.isfinite, self.known)):
            return math.nan
        return statistics.stdev(self.known)

    @property
    def minimum(self) -> float:
        """Least known value; NaN if there is none."""
        return min(self.known, default=math.nan)

    @property
    def maximum(self) -> float:
        """Largest known value; NaN if there is none."""
        return max(self.known, default=math.nan)

    def __str__(self) -> str:
        if not self.known:
            return "no value"
        count = len(self.known)
        seeds = "seed" if count == 1 else "seeds"
        scatter = "" if math.isnan(self.sd) else f" +- {self.sd:.2f}"
        extent = f"{self.minimum:.2f} to {self.maximum:.2f}, "
        return f"{self.mean:.2f}{scatter} ({extent if count > 1 else ''}{count} {seeds})"

    def to_dict(self) -> dict[str, Any]:
        """Values and summary, for JSON."""
        return {
            "values": list(self.values),
            "mean": self.mean,
            "sd": self.sd,
            "min": self.minimum,
            "max": self.maximum,
        }
