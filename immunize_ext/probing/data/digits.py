"""The 1797 images of handwritten digits, 8 x 8, that scikit-learn brings along.

Needs no network and no file: the data set of the demo and of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext.probing.data.classes import class_targets
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
    *others: Sequence[int],
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
        others: Further groups of digits: each group is a class of its own then, in this order.
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
        >>> digits_task((0,), (1,), (2,))
        Task('digits 0, 1 and 2', 3 classes, 322 and 215 samples of 64 features, torch.float64)
    """
    sides = tuple(map(tuple, (positive, negative, *others)))
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
    parts = inputs[:cut], targets[:cut], inputs[cut:], targets[cut:]
    return Task(describe_digits(*sides), *parts, classes=class_names(*sides))


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


def check_digits(function: str, *sides: tuple[int, ...]) -> None:
    """Refuse sides that are empty, hold anything but digits or share one."""
    for index, digits in enumerate(sides):
        name = ("positive", "negative")[index] if index < 2 else f"others[{index - 2}]"
        if not digits or any(digit not in range(10) for digit in digits):
            raise ValueError(
                f"{function}: {name} must hold digits from 0 to 9, got {digits}; "
                "give at least one digit for each side"
            )
    every = [digit for digits in sides for digit in set(digits)]
    both = sorted({digit for digit in every if every.count(digit) > 1})
    if both:
        where = "positive and negative" if len(sides) == 2 else "classes"
        raise ValueError(
            f"{function}: {where} must not share a digit, got {both} on both sides; "
            "remove it from one"
        )


def describe_digits(*sides: tuple[int, ...]) -> str:
    """Name a task: ``"digits 4 or 6 against 2, 3 or 7"``, or ``"digits 0, 1 and 2"``."""

    def listed(words: Sequence[object], last: str) -> str:
        head = ", ".join(map(str, words[:-1]))
        return f"{head} {last} {words[-1]}" if head else str(words[-1])

    groups = [listed(side, "or") for side in sides]
    if len(sides) == 2:
        plural = "digits" if len(sides[0]) + len(sides[1]) > 2 else "digit"
        return f"{plural} {groups[0]} against {groups[1]}"
    if all(len(side) == 1 for side in sides):
        return f"digits {listed(groups, 'and')}"
    return f"digits {' against '.join(groups)}"


def class_names(*sides: Sequence[int | str]) -> tuple[str, ...]:
    """Names of the classes in the order of the targets: of two sides the negative one first."""
    if len(sides) == 1:
        return ()
    order = sides[::-1] if len(sides) == 2 else sides
    return tuple(" or ".join(map(str, side)) for side in order)


def select_digits(
    images: NDArray[Any],
    labels: NDArray[np.int64],
    *sides: tuple[int, ...],
    seed: int,
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Keep the images of the named digits, label them by their sides, and shuffle them.

    Args:
        images: Inputs, shape ``(n, ...)``.
        labels: Their digits, shape ``(n,)``.
        sides: Digits labelled +1 and digits labelled -1; or those of each of more classes.
        seed: Seed of the shuffle.

    Returns:
        The images and their targets: +1 and -1, or a column for each class
        (:func:`~immunize_ext.probing.data.classes.class_targets`).
    """
    kept = np.flatnonzero(np.isin(labels, sum(sides, ())))
    kept = kept[np.random.default_rng(seed).permutation(len(kept))]
    return images[kept], side_targets(torch.from_numpy(labels[kept]), *sides).numpy()


def side_targets(labels: Tensor, *sides: tuple[int, ...]) -> Tensor:
    """Float64 targets of labels of which each is on one side; of two, the first is +1.

    One side alone is +1 throughout.
    """
    if len(sides) == 1:
        return torch.ones(len(labels), dtype=torch.float64, device=labels.device)
    order = sides[::-1] if len(sides) == 2 else sides
    on = torch.stack([torch.isin(labels, labels.new_tensor(side)) for side in order])
    return class_targets(on.to(torch.int64).argmax(0), len(sides))
