"""A number over several seeds: its mean and how far it scatters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


class Slowdown(NamedTuple):
    """How many times more steps an attacker needs.

    Attributes:
        ratio: Steps with immunization divided by steps without; a lower bound if ``censored``.
        censored: Whether the budget ran out before the attacker got there.

    Example:
        >>> print(Slowdown(3.456, False), Slowdown(128.0, True))
        3.5x >128x
    """

    ratio: float
    censored: bool

    def __str__(self) -> str:
        if self.censored:
            return f">{self.ratio:.0f}x"
        digits = 2 if self.ratio < 0.995 else 1 if self.ratio < 9.95 else 0
        return f"{self.ratio:.{digits}f}x"


def binomial_interval(
    successes: int, trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Clopper-Pearson interval of a share of independent trials: it never covers too little.

    Args:
        successes: How many went well.
        trials: Of how many.
        confidence: Probability, at least, with which such intervals hold the true share.

    Returns:
        Its ends; 0 and 1 without a trial.

    Raises:
        ValueError: If the numbers are out of range.

    Source:
        Clopper and Pearson, Biometrika 26, 1934.

    Example:
        >>> low, high = binomial_interval(0, 48)
        >>> low, round(high, 3)
        (0.0, 0.074)
    """
    if not 0 <= successes <= trials or not 0.0 < confidence < 1.0:
        raise ValueError(
            "binomial_interval: successes must be 0 to trials and confidence between 0 and 1, got "
            f"{successes} of {trials} and {confidence}"
        )
    from scipy.special import betaincinv

    tail = (1.0 - confidence) / 2.0
    failures = trials - successes
    low = betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, failures, 1.0 - tail) if failures else 1.0
    return float(low), float(high)


def share_over_seeds(
    successes: Sequence[int], trials: int, *, confidence: float = 0.95, draws: int = 4000
) -> tuple[float, float]:
    """Interval of a share that scatters between seeds, and between the trials of a seed.

    A bootstrap in two stages: seeds are drawn with replacement, and the trials of each anew from
    its own share; the ends are percentiles of the mean. It is widened to the Clopper-Pearson
    interval of all trials together, since no bootstrap knows of what never happened. With few seeds
    it covers too little, whatever is drawn: below about ten, read it as the least that is unsure.

    Args:
        successes: How many went well, one number a seed.
        trials: Of how many, for each seed.
        confidence: Probability with which such intervals shall hold the true share.
        draws: Bootstrap samples.

    Returns:
        Its ends.

    Raises:
        ValueError: If the numbers are out of range.

    Note:
        Deterministic: the samples come from a generator of its own with a fixed seed.

    Source:
        Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.

    Example:
        >>> low, high = share_over_seeds([30, 30, 2, 2], trials=32)
        >>> low < 0.3, high > 0.7
        (True, True)
        >>> share_over_seeds([0, 0], trials=24) == binomial_interval(0, 48)
        True
    """
    if not successes or draws < 1 or not all(0 <= count <= trials for count in successes):
        raise ValueError(
            "share_over_seeds: successes must be 0 to trials for at least one seed and draws at "
            f"least 1, got {list(successes)} of {trials} and {draws}"
        )
    pooled = binomial_interval(sum(successes), trials * len(successes), confidence=confidence)
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor(successes, dtype=torch.float64) / trials
    chosen = torch.randint(len(shares), (draws, len(shares)), generator=generator)
    again = torch.binomial(
        torch.full(chosen.shape, float(trials), dtype=torch.float64),
        shares[chosen],
        generator=generator,
    )
    tail = (1.0 - confidence) / 2.0
    ends = (again / trials).mean(1).quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
    return min(pooled[0], float(ends[0])), max(pooled[1], float(ends[1]))


class CorrectedShare(NamedTuple):
    """A share corrected for the errors of the judge that counted it.

    Attributes:
        estimate: The share.
        low: Lower end of its interval.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float


def corrected_share(
    counted: tuple[int, int],
    recognised: tuple[int, int],
    mistaken: tuple[int, int],
    *,
    confidence: float = 0.95,
) -> CorrectedShare:
    r"""Share of images that show something, from the share that an erring judge says show it.

    A judge that recognises a share s of what shows it, and takes a share f of the rest for it,
    counts q = p s + (1 - p) f where the true share is p, so that p = (q - f) / (s - f), cut to
    [0, 1]. This rises with q and falls with s and f (for f <= q <= s; beyond, it is cut). With
    Clopper-Pearson intervals for all three at a third of the error each, p at their worst corners
    therefore holds the true share with the whole confidence.

    Args:
        counted: How many images the judge counted, of how many.
        recognised: How many of images that show it the judge recognised, of how many: its
            sensitivity, from a validation.
        mistaken: How many of images that do not show it the judge took for it, of how many.
        confidence: Probability, at least, with which such intervals hold the true share.

    Returns:
        Estimate and interval; [0, 1] where the validation does not tell the judge from a coin.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Rogan and Gladen, Am. J. Epidemiol. 107, 1978.

    Example:
        >>> found = corrected_share((60, 100), (95, 100), (2, 100))
        >>> round(found.estimate, 3), found.low < 0.5, found.high > 0.7
        (0.624, True, True)
    """
    third = 1.0 - (1.0 - confidence) / 3.0
    ends = [
        binomial_interval(hits, trials, confidence=third)
        for hits, trials in (counted, recognised, mistaken)
    ]
    (low_q, high_q), (low_s, high_s), (low_f, high_f) = ends
    q, s, f = (
        hits / trials if trials else math.nan for hits, trials in (counted, recognised, mistaken)
    )

    def corrected(count: float, sensitivity: float, errors: float) -> float:
        return min(max((count - errors) / (sensitivity - errors), 0.0), 1.0)

    if low_s <= high_f:
        return CorrectedShare(corrected(q, s, f) if s > f else math.nan, 0.0, 1.0)
    return CorrectedShare(
        corrected(q, s, f), corrected(low_q, high_s, high_f), corrected(high_q, low_s, low_f)
    )


def steps_to_threshold(losses: Tensor, threshold: float) -> int | None:
    """First step at which a loss is at most a threshold.

    Args:
        losses: Loss before the first step and after each, shape ``(steps + 1,)``.
        threshold: What has to be reached.

    Returns:
        The step, 0 if the start is good enough; ``None`` if no step reaches it.

    Example:
        >>> steps_to_threshold(torch.tensor([4.0, 2.0, 1.0]), 2.5)
        1
    """
    reached = torch.nonzero(losses <= threshold)
    return int(reached[0]) if len(reached) else None


def slowdown(steps: int | None, base_steps: int, budget: int) -> Slowdown:
    """Ratio of two numbers of steps, or a lower bound of it where the budget ran out.

    Args:
        steps: Steps with immunization; ``None`` if the attacker did not get there.
        base_steps: Steps without.
        budget: Steps that the attacker was given with immunization.

    Returns:
        The ratio. An attacker who needs no step at all counts as needing one.

    Example:
        >>> slowdown(None, 10, 1280)
        Slowdown(ratio=128.0, censored=True)
    """
    base = max(base_steps, 1)
    if steps is None:
        return Slowdown(budget / base, True)
    return Slowdown(max(steps, 1) / base, False)
