"""Numbers in words: one way to write a ratio, a count, a share with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from immunize_ext.quantities import Slowdown, binomial_interval

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# Between these two ratios of steps, an attacker is as fast as before.
SAME = 0.95, 1.05


def real(value: Any) -> float:
    """A number as results.json holds it: strict JSON writes ``"inf"``, and NaN as null.

    Example:
        >>> real("-inf"), real(None), real(2)
        (-inf, nan, 2.0)
    """
    return math.nan if value is None else float(value)


def number(value: Any) -> str:
    """Three digits, without an exponent from 0.001 to a million.

    Example:
        >>> number(1234.5), number(1234567.0), number("inf"), number(None)
        ('1,234', '1.23·10⁶', '∞', 'not defined')
    """
    found = real(value)
    if not math.isfinite(found):
        return "not defined" if math.isnan(found) else "∞" if found > 0 else "-∞"
    if 1e3 <= found < 1e6:
        return f"{found:,.0f}"
    mantissa, exponent, power = f"{found:.3g}".partition("e")
    return f"{mantissa}·10{str(int(power)).translate(_SUPERSCRIPT)}" if exponent else mantissa


def count(value: int, noun: str) -> str:
    """A number of things, in the singular where it is one.

    Example:
        >>> count(1, "run"), count(1280, "step")
        ('1 run', '1,280 steps')
    """
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def percent(value: Any, digits: int = 0) -> str:
    """A share in percent.

    Example:
        >>> percent(0.734), percent(float("nan"))
        ('73%', 'not measured')
    """
    found = real(value)
    return "not measured" if math.isnan(found) else f"{found:.{digits}%}"


def share(value: float, trials: int, *, digits: int = 1) -> str:
    """A share of trials with its 95 % Clopper-Pearson interval.

    Example:
        >>> share(0.0, 48), share(0.9832, 358)
        ('0.0% (0.0% to 7.4% at 95%, n = 48)', '98.3% (96.4% to 99.4% at 95%, n = 358)')
    """
    low, high = binomial_interval(round(value * trials), trials)
    return f"{value:.{digits}%} ({low:.{digits}%} to {high:.{digits}%} at 95%, n = {trials:,})"


def unchanged(slowdown: Slowdown) -> bool:
    """Whether an attacker is as fast as before, to within 5 %."""
    return not slowdown.censored and SAME[0] <= slowdown.ratio <= SAME[1]


def slowed(slowdown: Slowdown) -> bool:
    """Whether an attacker is more than 5 % slower than before."""
    return slowdown.ratio > SAME[1] or (slowdown.censored and slowdown.ratio >= 1.0)


def times(slowdown: Slowdown) -> str:
    """``3.5×`` or ``>128×``.

    Example:
        >>> times(Slowdown(3.456, False)), times(Slowdown(128.0, True)), times(Slowdown(1.4, True))
        ('3.5×', '>128×', '>1.4×')
    """
    bare = str(Slowdown(slowdown.ratio, False)).replace("x", "×")
    return f">{bare}" if slowdown.censored else bare


def in_words(slowdown: Slowdown) -> str:
    """``3.5× slower``, ``as fast as before``, ``2.0× faster``."""
    if unchanged(slowdown):
        return "as fast as before"
    if slowdown.censored or slowdown.ratio > 1.0:
        return f"{times(slowdown)} slower"
    return f"{1.0 / slowdown.ratio:.1f}× faster"


def plain(value: Any) -> str:
    """A setting or a fact, as a table shows it.

    Example:
        >>> plain({"steps": 60, "rates": [0.1, None]})
        'steps 60, rates 0.1, none'
    """
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
