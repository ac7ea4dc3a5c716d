"""Fewer rows for the same linear algebra: features replaced by their singular values and vectors.

With X = U S V^T over the numerical rank, the Gram matrices of X and of the rows S V^T are equal,
and for every linear head, of one output or of several,

    |X w - y|^2 = |S V^T w - U^T y|^2 + |y - U U^T y|^2,

where the last term is the squared residual of one more row, of zeros. A full-batch attacker on the
squared loss therefore takes the same steps on rank + 1 rows as on n, with the same training losses,
and is judged on the same test part. Only who draws samples (SGD, folds, few-sample errors) or
counts them (cross-validation) needs the rows themselves.

A triangular factor would do for regular X. On rank-deficient X its rounding errors lie at the rank
tolerance, and an attacker who whitens would take them for features; as many rows as the rank cannot
have more singular values than that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from immunize_ext.probing.data.classes import are_classes
from immunize_ext.probing.data.task import Task


def _factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """U and S V^T over the numerical rank, float64."""
    x = x.detach().to(torch.float64)
    q, r = torch.linalg.qr(x)
    left, sigma, right = torch.linalg.svd(r)
    counted = sigma > max(x.shape) * torch.finfo(torch.float64).eps * sigma[0]
    return q @ left[:, counted], sigma[counted, None] * right[counted]


def gram_rows(x: Tensor) -> Tensor:
    """Rows with the Gram matrix of ``x``: as many as its rank, where those are far fewer.

    Args:
        x: Inputs, shape ``(n, p)``.

    Returns:
        ``x`` itself, or at most p rows in float64.

    Example:
        >>> x = torch.ones(8, 2, dtype=torch.float64)
        >>> gram_rows(x).shape, torch.allclose(gram_rows(x).mT @ gram_rows(x), x.mT @ x)
        (torch.Size([1, 2]), True)
    """
    if x.shape[0] <= 2 * x.shape[1]:
        return x
    return _factors(x)[1]


class _FewerRows(Task):
    """A task whose training rows are no samples any more; the test part tells its kind."""

    @property
    def is_classification(self) -> bool:
        """Whether the targets of the test part are those of classes."""
        return are_classes(self.y_test)


def gram_equivalent(task: Task) -> Task:
    """A task with rank + 1 training rows, the same K up to its scale, and the same losses.

    Args:
        task: Any task.

    Returns:
        The task itself where it has at most twice as many training samples as features.

    Example:
        >>> x = torch.randn(8, 2, dtype=torch.float64)
        >>> short = gram_equivalent(Task("toy", x, x[:, 0], x, x[:, 0]))
        >>> tuple(short.x_train.shape), tuple(short.x_test.shape)
        ((3, 2), (8, 2))
    """
    n, p = task.x_train.shape
    if n <= 2 * p:
        return task
    left, right = _factors(task.x_train)
    y = task.y_train.to(torch.float64)
    explained = left.mT @ y
    rest = (y - left @ explained).norm(dim=0)
    rows = torch.cat([right, torch.zeros_like(right[:1])])
    targets = torch.cat([explained, rest[None]])
    # The mean over these rows is then the mean over all samples.
    scale = math.sqrt(len(rows) / n)
    test = task.x_test.to(torch.float64), task.y_test.to(torch.float64)
    return _FewerRows(task.name, scale * rows, scale * targets, *test, task.classes)
