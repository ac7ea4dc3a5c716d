"""The 1797 images of handwritten digits, 8 x 8, that scikit-learn brings along.

Needs no network and no file: the data set of the demo and of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from immunize_ext._extras import require_extra
from immunize_ext.probing.data.task import Task

# Mean and standard deviation of all pixels of the 1797 images, on their scale of 0 to 16. One
# constant for every task, so that two tasks see the same feature space.
PIXEL_MEAN = 4.8842


PIXEL_STD = 6.0168


def load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Load all images, standardised by the constants of this module, and their digits.

    Returns:
        Images of shape ``(1797, 64)`` and labels of shape ``(1797,)``.

    Raises:
        MissingExtraError: If scikit-learn is not installed.

    Example:
        >>> images, labels = load_digits()
        >>> images.shape, labels[:3].tolist()
        ((1797, 64), [0, 1, 2])
    """
    datasets = require_extra("sklearn.datasets", extra="data", purpose="the digits data set")
    bunch = datasets.load_digits()
    images = np.asarray(bunch.data, dtype=np.float64)
    return (images - PIXEL_MEAN) / PIXEL_STD, np.asarray(bunch.target, dtype=np.int64)


def digits_task(
    positive: Sequence[int],
    negative: Sequence[int],
    *,
    seed: int = 0,
    train_fraction: float = 0.6,
    dtype: torch.dtype = torch.float64,
) -> Task:
    """Make the task of telling some digits from others.

    The inputs are the images of the named digits alone. A literal one-vs-rest reading would give
    every task the same inputs, hence K_P = K_H, and no theta could tell the two apart.

    Args:
        positive: Digits labelled +1, e.g. ``(4, 6)``.
        negative: Digits labelled -1, e.g. ``(2, 3, 7)``.
        seed: Seed of the split into training and test images.
        train_fraction: Share of the images to train on.
        dtype: dtype of the task's tensors.

    Returns:
        The task; inputs have shape ``(n, 64)``.

    Raises:
        ValueError: If the digits or the fraction are out of range.
        MissingExtraError: If scikit-learn is not installed.

    Note:
        Deterministic given ``seed``; torch's random state is neither read nor changed.

    Example:
        >>> task = digits_task((3,), (8,))
        >>> task.name, tuple(task.x_train.shape), tuple(task.x_test.shape)
        ('digit 3 against 8', (214, 64), (143, 64))
    """
    sides = tuple(positive), tuple(negative)
    check_digits("digits_task", *sides)
    check_seed("digits_task", seed)
    x, y = select_digits(*load_digits(), *sides, seed=seed)
    # Asked first, so that NaN is refused here and not by round.
    cut = round(train_fraction * len(y)) if 0.0 < train_fraction < 1.0 else 0
    if not 0 < cut < len(y):
        raise ValueError(
            f"digits_task: train_fraction must leave images to train and to test on, got "
            f"{train_fraction} of {len(y)} images"
        )
    inputs, targets = torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype)
    return Task(describe_digits(*sides), inputs[:cut], targets[:cut], inputs[cut:], targets[cut:])


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
