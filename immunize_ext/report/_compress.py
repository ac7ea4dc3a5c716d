"""Fewer rows for the same linear algebra: features replaced by their triangular factor.

With X = Q R, the Gram matrices are equal, X^T X = R^T R, and so are the losses of a linear head up
to a constant: |X w - y|^2 = |R w - Q^T y|^2 + |y - Q Q^T y|^2. A full-batch attacker on the squared
loss therefore takes the same steps on p rows as on n, and is judged on the same test part. Only
who draws samples (SGD, folds, few-sample errors) needs the rows themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from immunize_ext.data.task import Task


def gram_rows(x: Tensor) -> Tensor:
    """Rows with the Gram matrix of ``x``: its triangular factor where that is much shorter.

    Args:
        x: Inputs, shape ``(n, p)``.

    Returns:
        ``x`` itself, or p rows in float64.

    Example:
        >>> x = torch.ones(8, 2, dtype=torch.float64)
        >>> gram_rows(x).shape, torch.allclose(gram_rows(x).mT @ gram_rows(x), x.mT @ x)
        (torch.Size([2, 2]), True)
    """
    if x.shape[0] <= 2 * x.shape[1]:
        return x
    return torch.linalg.qr(x.detach().to(torch.float64), mode="r").R


class CompressedTask(Task):
    """A task whose training rows are no samples any more; the test part tells its kind."""

    @property
    def is_classification(self) -> bool:
        """Whether every target of the test part is -1 or +1."""
        return bool((self.y_test.abs() == 1).all())


def compressed(task: Task) -> Task:
    """A task whose training part has p rows and the same K (up to its scale).

    Mean training losses differ from the original's by a constant; the test part is the same.

    Args:
        task: Any task.

    Returns:
        The task itself where it has at most twice as many training samples as features.

    Example:
        >>> x = torch.randn(8, 2, dtype=torch.float64)
        >>> short = compressed(Task("toy", x, x[:, 0], x, x[:, 0]))
        >>> tuple(short.x_train.shape), tuple(short.x_test.shape)
        ((2, 2), (8, 2))
    """
    n, p = task.x_train.shape
    if n <= 2 * p:
        return task
    q, r = torch.linalg.qr(task.x_train.to(torch.float64))
    # The mean over p rows is then the mean over n.
    scale = math.sqrt(p / n)
    y = q.mT @ task.y_train.to(torch.float64)
    test = task.x_test.to(torch.float64), task.y_test.to(torch.float64)
    return CompressedTask(task.name, scale * r, scale * y, *test)
