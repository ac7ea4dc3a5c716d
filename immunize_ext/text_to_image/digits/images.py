"""The bundled digits as images for text-to-image work: four parts that share no image.

A model is trained on one part, immunized with another, attacked with a third, and judged by a
classifier that has seen only the fourth. Whatever is measured is therefore measured on images that
nobody trained on.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from immunize_ext._extras import require_extra

Split = Literal["train", "attack", "immunize", "judge"]


SPLITS: tuple[Split, ...] = get_args(Split)


# Images of each digit in the parts of fixed size; "train" has the rest, 86 to 95 of each digit.
IMAGES_PER_DIGIT: dict[str, int] = {"attack": 24, "immunize": 24, "judge": 40}


DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# Shuffles which image is in which part; one seed for ever, so that the shipped pipeline and
# everybody's measurements agree on it.
_SPLIT_SEED = 20250610


@cache
def _images() -> tuple[Tensor, dict[str, Tensor]]:
    datasets = require_extra("sklearn.datasets", extra="data", purpose="the digits data set")
    bunch = datasets.load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))
    images = (images / 8.0 - 1.0).unsqueeze(1)
    labels = np.asarray(bunch.target, dtype=np.int64)
    generator = np.random.default_rng(_SPLIT_SEED)
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for digit in range(10):
        order = generator.permutation(np.flatnonzero(labels == digit))
        for split, count in IMAGES_PER_DIGIT.items():
            parts[split].append(order[:count])
            order = order[count:]
        parts["train"].append(order)
    indices = {split: torch.from_numpy(np.concatenate(found)) for split, found in parts.items()}
    indices["labels"] = torch.from_numpy(labels)
    return images, indices


def digit_images(split: Split, digit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images of one part and the digits they show.

    Args:
        split: ``"train"``, ``"attack"``, ``"immunize"`` or ``"judge"``; no image is in two.
        digit: Only images of this digit; all of them when omitted.

    Returns:
        Images, float32 in [-1, 1], shape ``(n, 1, 8, 8)``, and labels, int64, shape ``(n,)``. The
        order is fixed.

    Raises:
        ValueError: If the split or the digit is unknown.
        MissingExtraError: If scikit-learn is not installed.

    Example:
        >>> images, labels = digit_images("attack", 3)
        >>> tuple(images.shape), labels.unique().tolist()
        ((24, 1, 8, 8), [3])
    """
    if split not in SPLITS:
        raise ValueError(f"digit_images: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if digit is not None and digit not in range(10):
        raise ValueError(f"digit_images: digit must be 0 to 9, got {digit!r}")
    images, parts = _images()
    index = parts[split]
    labels = parts["labels"][index]
    if digit is not None:
        index, labels = index[labels == digit], labels[labels == digit]
    return images[index], labels.clone()
