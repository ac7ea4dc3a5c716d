"""Binary tasks out of images of digits: which digits against which."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def parse_digits(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read a task as the command line writes it: ``"4,6:2,3,7"`` is 4 or 6 against 2, 3 or 7.

    Args:
        text: Two comma-separated lists of digits with a colon between them.

    Returns:
        The positive and the negative digits.

    Raises:
        ValueError: If the text has another form.

    Example:
        >>> parse_digits("4,6:2,3,7")
        ((4, 6), (2, 3, 7))
    """
    try:
        positive, negative = (
            tuple(int(digit) for digit in side.split(",")) for side in text.split(":")
        )
    except ValueError:
        raise ValueError(
            f"parse_digits: a task must look like '4,6:2,3,7' (digits against digits), got {text!r}"
        ) from None
    check_digits("parse_digits", positive, negative)
    return positive, negative


def check_seed(function: str, seed: int) -> None:
    """Refuse a negative seed, which numpy does not take."""
    if seed < 0:
        raise ValueError(f"{function}: seed must not be negative, got {seed}")


def check_digits(function: str, positive: tuple[int, ...], negative: tuple[int, ...]) -> None:
    """Refuse sides that are empty, hold anything but digits or share one."""
    for name, digits in (("positive", positive), ("negative", negative)):
        if not digits or any(digit not in range(10) for digit in digits):
            raise ValueError(
                f"{function}: {name} must hold digits from 0 to 9, got {digits}; "
                "give at least one digit for each side"
            )
    both = sorted(set(positive) & set(negative))
    if both:
        raise ValueError(
            f"{function}: positive and negative must not share a digit, got {both} on both sides; "
            "remove it from one"
        )


def describe_digits(positive: tuple[int, ...], negative: tuple[int, ...]) -> str:
    """Name a task: ``"digits 4 or 6 against 2, 3 or 7"``."""

    def listed(digits: tuple[int, ...]) -> str:
        head = ", ".join(map(str, digits[:-1]))
        return f"{head} or {digits[-1]}" if head else str(digits[-1])

    plural = "digits" if len(positive) + len(negative) > 2 else "digit"
    return f"{plural} {listed(positive)} against {listed(negative)}"


def select_digits(
    images: NDArray[Any],
    labels: NDArray[np.int64],
    positive: tuple[int, ...],
    negative: tuple[int, ...],
    *,
    seed: int,
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Keep the images of the named digits, label them +1 and -1, and shuffle them.

    Args:
        images: Inputs, shape ``(n, ...)``.
        labels: Their digits, shape ``(n,)``.
        positive: Digits labelled +1.
        negative: Digits labelled -1.
        seed: Seed of the shuffle.

    Returns:
        The images and their labels of +1 and -1.
    """
    kept = np.flatnonzero(np.isin(labels, positive + negative))
    kept = kept[np.random.default_rng(seed).permutation(len(kept))]
    return images[kept], np.where(np.isin(labels[kept], positive), 1.0, -1.0)
