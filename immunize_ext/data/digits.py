"""The 1797 images of handwritten digits, 8 x 8, that scikit-learn brings along.

Needs no network and no file: the data set of the demo and of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from immunize_ext._extras import require_extra
from immunize_ext.data._labels import check_digits, check_seed, describe_digits, select_digits
from immunize_ext.data.task import Task

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
