"""Numbers in words, and the interval of a share."""

from __future__ import annotations

import math

import numpy as np
import pytest

from immunize_ext.quantities import (
    Slowdown,
    binomial_interval,
    corrected_share,
    share_over_seeds,
)
from immunize_ext.report.words import (
    count,
    in_words,
    number,
    percent,
    plain,
    share,
    slowed,
    times,
    unchanged,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Clopper and Pearson's own case, and tables of the interval.
        (0, 48, 0.0, 0.0740),
        (48, 48, 0.9260, 1.0),
        (0, 10, 0.0, 0.3085),
        (1, 10, 0.0025, 0.4450),
        (5, 10, 0.1871, 0.8129),
        (81, 263, 0.2527, 0.3676),
        (0, 0, 0.0, 1.0),
    ],
)
def test_clopper_pearson(successes: int, trials: int, low: float, high: float) -> None:
    assert binomial_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_clopper_pearson_covers() -> None:
    """Whatever the true share, at least 95 % of the intervals hold it."""
    trials = 20
    intervals = [binomial_interval(k, trials) for k in range(trials + 1)]
    for true in (0.01, 0.1, 0.3, 0.5, 0.9):
        covered = sum(
            math.comb(trials, k) * true**k * (1.0 - true) ** (trials - k)
            for k, (low, high) in enumerate(intervals)
            if low <= true <= high
        )
        assert covered >= 0.95


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3)])
def test_clopper_pearson_refuses(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes must be 0 to trials"):
        binomial_interval(successes, trials)


def test_seeds_that_scatter_widen_the_interval_of_a_share() -> None:
    """Ten seeds of 32: alike, and all or nothing; order changes little."""
    pooled = binomial_interval(160, 320)
    alike = share_over_seeds([16] * 10, 32)
    apart = share_over_seeds([32, 0] * 5, 32)
    assert alike == pytest.approx(pooled, abs=0.01)
    # The spread of a mean of ten coins: 1.96 * 0.5 / sqrt(10).
    assert apart == pytest.approx((0.5 - 0.31, 0.5 + 0.31), abs=0.04)
    assert share_over_seeds([0, 32] * 5, 32) == pytest.approx(apart, abs=0.03)
    assert share_over_seeds([16] * 10, 32) == alike
    assert share_over_seeds([32, 32], 32) == binomial_interval(64, 64)


def test_intervals_over_seeds_cover() -> None:
    """Shares of twelve seeds from a beta distribution of mean 0.3: nine in ten hold it."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        counts = draw.binomial(32, draw.beta(3.0, 7.0, size=12)).tolist()
        low, high = share_over_seeds(counts, 32, draws=400)
        hits += low <= 0.3 <= high
    assert hits >= 180
    with pytest.raises(ValueError, match="at least one seed"):
        share_over_seeds([], 32)
    with pytest.raises(ValueError, match="0 to trials"):
        share_over_seeds([33], 32)


def test_a_share_is_corrected_for_the_errors_of_its_judge() -> None:
    # 0.4 of 1000 show it; the judge recognises 0.9 of these and takes 0.1 of the rest for it.
    found = corrected_share((420, 1000), (900, 1000), (100, 1000))
    assert found.estimate == pytest.approx(0.4)
    assert found.low < 0.4 < found.high
    # A judge that never errs, validated without end, changes nothing but the confidence asked for.
    exact = corrected_share((3, 10), (10**9, 10**9), (0, 10**9))
    assert exact.estimate == pytest.approx(0.3)
    third = binomial_interval(3, 10, confidence=1.0 - 0.05 / 3.0)
    assert exact[1:] == pytest.approx(third, abs=1e-7)
    # More false positives than are counted is none; a judge like a coin says nothing.
    assert corrected_share((1, 100), (95, 100), (10, 100))[:2] == (0.0, 0.0)
    assert corrected_share((50, 100), (5, 10), (5, 10))[1:] == (0.0, 1.0)
    assert math.isnan(corrected_share((50, 100), (5, 10), (6, 10)).estimate)


@pytest.mark.parametrize("true", [0.0, 0.05, 0.5, 0.97])
def test_corrected_intervals_cover(true: float) -> None:
    """Over draws of images and of the judge's validation, at least 95 % hold the true share."""
    draw = np.random.default_rng(0)
    trials, validation, others, draws = 60, 40, 90, 300
    sensitivity, mistaken = 0.93, 0.03
    counted = draw.binomial(trials, true * sensitivity + (1 - true) * mistaken, draws)
    hits, misses = (
        draw.binomial(validation, sensitivity, draws),
        draw.binomial(others, mistaken, draws),
    )
    held = 0
    for a, s, f in zip(counted.tolist(), hits.tolist(), misses.tolist(), strict=True):
        found = corrected_share((a, trials), (s, validation), (f, others))
        held += found.low <= true <= found.high
    assert held >= 0.95 * draws


def test_grammar() -> None:
    assert count(1, "run") == "1 run"
    assert count(0, "run") == "0 runs"
    assert count(1280, "step") == "1,280 steps"


def test_numbers() -> None:
    assert [number(v) for v in (0.001234, 12.345, 1234.5, 1.234e6, 1e-5)] == [
        *("0.00123", "12.3", "1,234", "1.23·10⁶", "1·10⁻⁵"),
    ]
    assert [number(v) for v in (math.inf, "-inf", None)] == ["∞", "-∞", "not defined"]
    assert percent(None) == "not measured"
    assert share(0.0, 48) == "0.0% (0.0% to 7.4% at 95%, n = 48)"
    assert plain({"a": [1, True, None], "b": ()}) == "a 1, yes, none, b none"


def test_slow_downs() -> None:
    assert times(Slowdown(128.0, True)) == ">128×"
    assert in_words(Slowdown(3.5, False)) == "3.5× slower"
    assert in_words(Slowdown(0.5, False)) == "2.0× faster"
    assert in_words(Slowdown(1.0, False)) == "as fast as before"
    # A budget that ends just behind the base: more than once, never "more than 1 times".
    assert times(Slowdown(1.4, True)) == ">1.4×"
    assert unchanged(Slowdown(1.0, False))
    assert not unchanged(Slowdown(1.0, True))
    assert slowed(Slowdown(1.0, True))
    assert not slowed(Slowdown(1.04, False))
