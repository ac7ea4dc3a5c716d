"""A supervised task: what every immunizer, attacker and metric is handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from immunize_ext.probing.data.classes import are_classes, class_targets, read_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Of samples that are not divided into a training and a test part, one in so many is to test on:
# also data that is sorted by its labels has all of them in both.
_EVERY = 5

TaskLike: TypeAlias = "Task | Sequence[Tensor | NDArray[Any] | Sequence[str]]"
"""A task, or what :meth:`Task.of` makes one of."""


@dataclass(frozen=True)
class Task:
    """One supervised task with a training and a test part that share no sample.

    Attributes:
        name: What the task is, in a few words; reports print it.
        x_train: Inputs to train on, shape ``(n, p)``, floating point.
        y_train: Their targets, same dtype. A vector ``(n,)`` has -1 and +1 for two classes, any
            real numbers for a regression. A matrix ``(n, k)`` has a column for each output of the
            head: for k classes 1 at the class and -1/(k - 1) elsewhere, as :meth:`of` makes it of
            class ids or names.
        x_test: Inputs to judge by, shape ``(m, p)``.
        y_test: Their targets, shape ``(m,)`` or ``(m, k)``.
        classes: Names of the classes where they are known, in the order of the columns; for a
            vector, of -1 and of +1.

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
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x: Tensor = getattr(self, f"x_{part}")
            y: Tensor = getattr(self, f"y_{part}")
            if x.dim() != 2 or 0 in x.shape or not x.dtype.is_floating_point:
                raise ValueError(
                    f"Task: x_{part} must be a floating-point matrix (n, p) with n, p >= 1, got "
                    f"{tuple(x.shape)} of {x.dtype}; give one row per sample"
                )
            fits = y.shape[:1] == x.shape[:1] and (
                y.dim() == 1 or (y.dim() == 2 and y.shape[1] > 1)
            )
            if not fits or y.dtype != x.dtype or y.device != x.device:
                raise ValueError(
                    f"Task: y_{part} must be a vector of {x.shape[0]} values of {x.dtype} on "
                    f"{x.device}, or a matrix of as many rows, got {tuple(y.shape)} of {y.dtype} "
                    f"on {y.device}; convert it to the dtype and device of the inputs, or give "
                    "class ids or names to Task.of"
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
        if self.y_train.shape[1:] != self.y_test.shape[1:]:
            raise ValueError(
                f"Task: y_test must have the outputs of y_train, {tuple(self.y_train.shape[1:])}, "
                f"got {tuple(self.y_test.shape[1:])}"
            )

        values = set(torch.cat([self.y_train, self.y_test]).unique().tolist())
        if values == {0.0, 1.0}:
            raise ValueError(
                "Task: y must be -1 and +1 for a classification task, got 0 and 1, which would be "
                "taken for the targets of a regression; give 2 * y - 1, or class ids to Task.of"
            )

    @classmethod
    def of(cls, data: TaskLike, name: str = "task") -> Task:
        """A task as it is, or made of arrays or tensors.

        Args:
            data: A task; inputs and targets of both parts, ``(x_train, y_train, x_test, y_test)``;
                or ``(x, y)``, of which every fifth sample is kept to test on. Inputs that are whole
                numbers become float64, targets get the dtype and the device of their inputs.
                Targets that are texts or whole numbers, not -1 and +1, are names and ids of
                classes, one output of the head each; two of them become -1 and +1 in their order.
                Whole numbers with fewer than two training samples a value are numbers.
            name: Name of a task that is made here.

        Returns:
            The task.

        Raises:
            ValueError: If it is none of these, a class is in the test part alone, or as on
                construction.

        Example:
            >>> import numpy as np
            >>> Task.of((np.eye(10), np.arange(10.0)), "count up")
            Task('count up', regression, 8 and 2 samples of 10 features, torch.float64)
            >>> Task.of((np.eye(12), ["cat", "dog", "emu"] * 4), "animals")
            Task('animals', 3 classes, 10 and 2 samples of 12 features, torch.float64)
        """
        if isinstance(data, Task):
            return data
        if not isinstance(data, (tuple, list)) or len(data) not in (2, 4):
            raise ValueError(
                "Task.of: data must be a Task, (x, y) or (x_train, y_train, x_test, y_test), got "
                f"{type(data).__name__}"
                + (f" of {len(data)}" if isinstance(data, (tuple, list)) else "")
            )
        inputs = [torch.as_tensor(x) for x in data[::2]]
        if not inputs[0].dtype.is_floating_point:
            inputs[0] = inputs[0].to(torch.float64)
        inputs = [x.to(inputs[0]) for x in inputs]
        labels = read_labels(data[1::2])
        targets = [torch.as_tensor(y) for y in data[1::2]] if labels is None else labels[0]
        if len(inputs) == 1:
            x, y = inputs[0], targets[0]
            tests = torch.arange(len(y)) % _EVERY == _EVERY - 1
            if x.dim() != 2 or len(x) != len(y) or not bool(tests.any()):
                raise ValueError(
                    f"Task.of: (x, y) must be a matrix and a target for each of at least {_EVERY} "
                    f"rows, got {tuple(x.shape)} and {tuple(y.shape)}"
                )
            inputs = [x[~tests], x[tests]]
            targets = [y[~tests], y[tests]]
        classes: tuple[str, ...] = ()
        if labels is not None:
            targets, classes = _of_classes(targets, *labels[1:])
        (x_train, x_test), (y_train, y_test) = inputs, (y.to(inputs[0]) for y in targets)
        return cls(name, x_train, y_train, x_test, y_test, classes)

    def __repr__(self) -> str:
        counts = f"{len(self.x_train)} and {len(self.x_test)} samples of {self.num_features}"
        return f"Task({self.name!r}, {self.summary}, {counts} features, {self.x_train.dtype})"

    @property
    def num_features(self) -> int:
        """Number p of features."""
        return int(self.x_train.shape[1])

    @property
    def is_classification(self) -> bool:
        """Whether targets are those of classes, so that the sign or the largest score decides."""
        return are_classes(self.y_train) and are_classes(self.y_test)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a regression task.

        Example:
            >>> import torch
            >>> Task.of((torch.eye(10), torch.arange(10) % 3)).num_classes
            3
        """
        if not self.is_classification:
            return 0
        return self.y_test.shape[1] if self.y_test.dim() == 2 else 2

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

    @property
    def summary(self) -> str:
        """The kind of task as terminals print it, with the number of classes beyond two."""
        count = self.num_classes
        return f"{count} classes" if count > 2 and not self.has_one_class else self.kind

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
        names = ("x_train", "y_train", "x_test", "y_test")
        moved = {name: getattr(self, name).to(device=device, dtype=dtype) for name in names}
        return replace(self, **moved)

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
            replace(
                self,
                name=f"{self.name} (fold {fold + 1} of {count})",
                x_train=self.x_train[fold_of != fold],
                y_train=self.y_train[fold_of != fold],
                x_test=self.x_train[fold_of == fold],
                y_test=self.y_train[fold_of == fold],
            )
            for fold in range(count)
        ]


def _of_classes(
    parts: Sequence[Tensor], names: tuple[str, ...], values: Tensor | None
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Targets of class ids; the numbers themselves where these are too many to be classes."""
    train, test = parts
    if values is not None and 2 * len(names) > len(train):
        return [values[ids] for ids in parts], ()
    missing = sorted(set(test.tolist()) - set(train.tolist()))
    if missing:
        raise ValueError(
            f"Task.of: y_test must hold classes of y_train, got {names[missing[0]]}, which is in "
            "no training sample; leave it out, or shuffle the samples"
        )
    return [class_targets(ids, len(names)) for ids in parts], names
