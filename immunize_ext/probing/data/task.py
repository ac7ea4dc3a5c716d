"""A supervised task: what every immunizer, attacker and metric is handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Of samples that are not divided into a training and a test part, one in so many is to test on:
# also data that is sorted by its labels has all of them in both.
_EVERY = 5

TaskLike: TypeAlias = "Task | Sequence[Tensor | NDArray[Any]]"
"""A task, or what :meth:`Task.of` makes one of."""


@dataclass(frozen=True)
class Task:
    """One supervised task with a training and a test part that share no sample.

    Attributes:
        name: What the task is, in a few words; reports print it.
        x_train: Inputs to train on, shape ``(n, p)``, floating point.
        y_train: Their targets, shape ``(n,)``, same dtype: -1 and +1 for a classification task,
            any real number for a regression task.
        x_test: Inputs to judge by, shape ``(m, p)``.
        y_test: Their targets, shape ``(m,)``.

    Raises:
        ValueError: On construction, if shapes, dtypes or devices do not fit together, a part is
            empty or a value is not finite.

    Example:
        >>> import torch
        >>> x = torch.eye(4, dtype=torch.float64)
        >>> y = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        >>> task = Task("toy", x[:2], y[:2], x[2:], y[2:])
        >>> task.num_features, task.is_classification
        (4, True)
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x: Tensor = getattr(self, f"x_{part}")
            y: Tensor = getattr(self, f"y_{part}")
            if x.dim() != 2 or 0 in x.shape or not x.dtype.is_floating_point:
                raise ValueError(
                    f"Task: x_{part} must be a floating-point matrix (n, p) with n, p >= 1, got "
                    f"{tuple(x.shape)} of {x.dtype}; give one row per sample"
                )
            if y.shape != x.shape[:1] or y.dtype != x.dtype or y.device != x.device:
                raise ValueError(
                    f"Task: y_{part} must be a vector of {x.shape[0]} values of {x.dtype} on "
                    f"{x.device}, got {tuple(y.shape)} of {y.dtype} on {y.device}; "
                    "convert it to the dtype and device of the inputs"
                )
            if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
                raise ValueError(
                    f"Task: x_{part} and y_{part} must be finite, got NaN or infinity; "
                    "fill missing values before building the task"
                )
        if self.x_train.shape[1] != self.x_test.shape[1]:
            raise ValueError(
                f"Task: x_test must have {self.x_train.shape[1]} features as x_train has, got "
                f"{self.x_test.shape[1]}; preprocess both parts alike"
            )

        values = set(torch.cat([self.y_train, self.y_test]).unique().tolist())
        if values == {0.0, 1.0}:
            raise ValueError(
                "Task: y must be -1 and +1 for a classification task, got 0 and 1, which would be "
                "taken for the targets of a regression; give 2 * y - 1"
            )

    @classmethod
    def of(cls, data: TaskLike, name: str = "task") -> Task:
        """A task as it is, or made of arrays or tensors.

        Args:
            data: A task; inputs and targets of both parts, ``(x_train, y_train, x_test, y_test)``;
                or ``(x, y)``, of which every fifth sample is kept to test on. Whole numbers become
                float64, targets get the dtype and the device of their inputs.
            name: Name of a task that is made here.

        Returns:
            The task.

        Raises:
            ValueError: If it is none of these, or as on construction.

        Example:
            >>> import numpy as np
            >>> Task.of((np.eye(10), np.arange(10.0)), "count up")
            Task('count up', regression, 8 and 2 samples of 10 features, torch.float64)
        """
        if isinstance(data, Task):
            return data
        if not isinstance(data, (tuple, list)) or len(data) not in (2, 4):
            raise ValueError(
                "Task.of: data must be a Task, (x, y) or (x_train, y_train, x_test, y_test), got "
                f"{type(data).__name__}"
                + (f" of {len(data)}" if isinstance(data, (tuple, list)) else "")
            )
        parts = [torch.as_tensor(part) for part in data]
        like = parts[0] if parts[0].dtype.is_floating_point else parts[0].to(torch.float64)
        parts = [part.to(like) for part in parts]
        if len(parts) == 2:
            x, y = parts
            tests = torch.arange(len(y), device=y.device) % _EVERY == _EVERY - 1
            if x.dim() != 2 or len(x) != len(y) or not bool(tests.any()):
                raise ValueError(
                    f"Task.of: (x, y) must be a matrix and a target for each of at least {_EVERY} "
                    f"rows, got {tuple(x.shape)} and {tuple(y.shape)}"
                )
            parts = [x[~tests], y[~tests], x[tests], y[tests]]
        return cls(name, *parts)

    def __repr__(self) -> str:
        counts = f"{len(self.x_train)} and {len(self.x_test)} samples of {self.num_features}"
        return f"Task({self.name!r}, {self.kind}, {counts} features, {self.x_train.dtype})"

    @property
    def num_features(self) -> int:
        """Number p of features."""
        return int(self.x_train.shape[1])

    @property
    def is_classification(self) -> bool:
        """Whether every target is -1 or +1, so that the sign of a prediction decides."""
        return bool((self.y_train.abs() == 1).all() and (self.y_test.abs() == 1).all())

    @property
    def has_one_class(self) -> bool:
        """Whether all training targets are equal: a constant is all there is to learn."""
        return bool((self.y_train == self.y_train[0]).all())

    @property
    def kind(self) -> str:
        """``"classification"``, ``"regression"``, or ``"constant labels"``, which is neither."""
        if self.has_one_class:
            return "constant labels"
        return "classification" if self.is_classification else "regression"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Task:
        """Return the task with every tensor on another device or of another dtype.

        Args:
            device: The device; as it is when omitted.
            dtype: The dtype; as it is when omitted.

        Returns:
            The converted task.
        """
        parts = (self.x_train, self.y_train, self.x_test, self.y_test)
        return Task(self.name, *(part.to(device=device, dtype=dtype) for part in parts))

    def halves(self) -> tuple[Task, Task]:
        """Two tasks with every second training sample each, and the same test part.

        One for who makes a protection and one for who attacks it: what is made of samples is not
        judged on them. Loaders shuffle already, and no random state is needed.

        Raises:
            ValueError: If there is one training sample alone.
        """
        if len(self.x_train) < 2:
            raise ValueError("Task.halves: x_train must hold at least 2 samples, got 1")
        return (
            replace(self, x_train=self.x_train[::2], y_train=self.y_train[::2]),
            replace(self, x_train=self.x_train[1::2], y_train=self.y_train[1::2]),
        )

    def folds(self, count: int) -> list[Task]:
        """Cut the training part into tasks that test on one fold and train on the others.

        The test part is left out, so choices made on the folds do not see it. Fold i takes samples
        i, i + count, i + 2 count, ...: loaders shuffle already, and no random state is needed.

        Args:
            count: Number of folds, at least 2 and at most the number of training samples.

        Returns:
            ``count`` tasks.

        Raises:
            ValueError: If ``count`` is out of range.
        """
        n = self.x_train.shape[0]
        if not 2 <= count <= n:
            raise ValueError(f"Task.folds: count must be between 2 and {n}, got {count}")
        fold_of = torch.arange(n, device=self.x_train.device) % count
        return [
            Task(
                f"{self.name} (fold {fold + 1} of {count})",
                self.x_train[fold_of != fold],
                self.y_train[fold_of != fold],
                self.x_train[fold_of == fold],
                self.y_train[fold_of == fold],
            )
            for fold in range(count)
        ]
