r"""Class labels as targets of a linear head: one column a class, the sign alone for two.

A label c of k > 2 classes becomes the row with 1 at c and -1/(k - 1) elsewhere. Rows sum to 0, so
that balanced classes have the mean 0, as -1 and +1 have, and a head without an intercept has no
constant to learn; the squared loss from 0 then starts along the gradient of the softmax
cross-entropy, up to its size:

.. math:: \tfrac1k \mathbf{1} - e_c = -\tfrac{k-1}{k} y_c .

With k = 2 the row is (1, -1): both columns are the binary task, and so are all losses and steps.
A sample is answered rightly if the score of its class is above all others; a tie is no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def class_targets(ids: Tensor, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Targets of class ids.

    Args:
        ids: Ids from 0 to ``count - 1``, int64, shape ``(n,)``.
        count: Number k of classes, at least 2.
        dtype: dtype of the targets.

    Returns:
        For two classes -1 for id 0 and +1 for id 1, shape ``(n,)``; else shape ``(n, k)``.

    Example:
        >>> class_targets(torch.tensor([0, 2]), 3).tolist()
        [[1.0, -0.5, -0.5], [-0.5, -0.5, 1.0]]
    """
    if count == 2:
        return 2.0 * ids.to(dtype) - 1.0
    targets = torch.full((len(ids), count), -1.0 / (count - 1), dtype=dtype, device=ids.device)
    return targets.scatter_(1, ids[:, None], 1.0)


def are_classes(targets: Tensor) -> bool:
    """Whether targets are those of classes: -1 and +1, or rows of :func:`class_targets`."""
    if targets.dim() == 1:
        return bool((targets.abs() == 1).all())
    rows = class_rows(targets.argmax(1), targets.shape[1], targets.dtype)
    rounding = 8.0 * torch.finfo(targets.dtype).eps
    return bool(((targets - rows).abs() <= rounding).all())


def class_rows(ids: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """:func:`class_targets` with a column for each class, also for two."""
    if count > 2:
        return class_targets(ids, count, dtype)
    second = class_targets(ids, 2, dtype)
    return torch.stack([-second, second], dim=1)


def answered(scores: Tensor, targets: Tensor) -> Tensor:
    """Which samples are answered rightly.

    Args:
        scores: Of m heads, shape ``(n, m)``, or ``(n, m, k)`` for targets with columns.
        targets: Targets of classes, shape ``(n,)`` or ``(n, k)``.

    Returns:
        Truth values, shape ``(n, m)``.

    Example:
        >>> y = class_targets(torch.tensor([0, 1]), 3)
        >>> answered(torch.tensor([[[0.3, 0.1, 0.2]], [[0.5, 0.5, 0.0]]]), y).tolist()
        [[True], [False]]
    """
    if targets.dim() == 1:
        return scores * targets[:, None] > 0
    own = (targets > 0)[:, None, :].expand_as(scores)
    others = scores.masked_fill(own, -torch.inf).amax(-1)
    return scores.masked_fill(~own, -torch.inf).amax(-1) > others


def share_answered(scores: Tensor, targets: Tensor) -> Tensor:
    """Accuracy of each of m heads, shape ``(m,)``; arguments as for :func:`answered`."""
    return answered(scores, targets).to(torch.float64).mean(0)


def through(z: Tensor, heads: Tensor) -> Tensor:
    """Z times heads of shape ``(p, ...)``."""
    return z @ heads if heads.dim() <= 2 else (z @ heads.flatten(1)).unflatten(1, heads.shape[1:])


def expanded(numbers: Tensor, targets: Tensor) -> Tensor:
    """Numbers ``(..., m)``, one a head, for all outputs of each: ``(..., m, 1)`` if any."""
    return numbers if targets.dim() == 1 else numbers.unsqueeze(-1)


def mean_residual(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean squared residual of each of m heads over samples and outputs, shape ``(m,)``."""
    squared = (scores - targets[:, None]).square()
    return squared.mean(0) if targets.dim() == 1 else squared.mean((0, 2))


class Labels(NamedTuple):
    """Labels of classes.

    Attributes:
        ids: Class ids of each part, from 0, int64.
        names: Names of the classes, in the order of the ids.
        values: The numbers that the labels were, float64; ``None`` for texts and truth values.
    """

    ids: list[Tensor]
    names: tuple[str, ...]
    values: Tensor | None


def read_labels(parts: Sequence[Any]) -> Labels | None:
    """Labels that are texts, truth values or whole numbers, in their sorted order.

    Args:
        parts: The labels of one part or of several, each of shape ``(n,)``.

    Returns:
        The labels; ``None`` for those of another kind: floating-point numbers, or -1 and +1, which
        are targets already.
    """
    if any(isinstance(part, Tensor) and not _is_whole(part) for part in parts):
        return None
    arrays = [label_array(part) for part in parts]
    if any(a.ndim != 1 or a.dtype.kind not in "USbiu" for a in arrays):
        return None
    together = np.concatenate(arrays)
    names, ids = np.unique(together, return_inverse=True)
    if len(names) < 2 or set(names.tolist()) == {-1, 1}:
        return None
    bounds = np.cumsum([len(a) for a in arrays])[:-1]
    found = [torch.from_numpy(part.astype(np.int64)) for part in np.split(ids, bounds)]
    values = torch.from_numpy(names.astype(np.float64)) if names.dtype.kind in "iu" else None
    return Labels(found, tuple(map(str, names.tolist())), values)


def _is_whole(part: Tensor) -> bool:
    return not (part.is_floating_point() or part.is_complex())


def label_array(part: Any) -> NDArray[Any]:
    """Labels as an array of texts or of numbers."""
    array = part.cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
    texts = array.dtype.kind == "O" and all(isinstance(label, str) for label in array.flat)
    return array.astype(str) if texts else array
