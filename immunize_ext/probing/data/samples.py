"""Inputs of any shape with their labels, taken batch by batch: what deep extractors are trained on.

A :class:`~immunize_ext.probing.data.Task` has rows of features; images and other inputs of a
network, and data sets that do not fit into memory, come as :class:`Samples`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# A pair of tensors, or anything with len() and [] that gives pairs.
Source = Any


class Samples:
    """Inputs and labels behind one interface, from tensors or from a map-style data set.

    Attributes:
        source: Where they come from.
        tensors: Inputs and labels where the source is a pair of tensors, else ``None``.

    Example:
        >>> samples = Samples((torch.zeros(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0])))
        >>> len(samples), samples.batch([0, 4])[1].tolist()
        (5, [0, 0])
    """

    def __init__(self, source: Source, *, name: str = "source") -> None:
        """Wrap a source.

        Args:
            source: A pair ``(inputs, labels)`` of tensors with equal first sizes, or a data set
                with ``len()`` whose items are pairs of an input tensor and a label.
            name: What it is called in errors.

        Raises:
            ValueError: If it is neither, or empty.
        """
        self.source: Source = source.source if isinstance(source, Samples) else source
        self.tensors = _tensors(self.source)
        if self.tensors is not None:
            inputs, labels = self.tensors
            if labels.dim() != 1 or inputs.dim() < 2 or len(inputs) != len(labels):
                raise ValueError(
                    f"Samples: {name} must be inputs (n, ...) with labels (n,), got "
                    f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
                )
        elif (
            isinstance(self.source, (tuple, Tensor))
            or not hasattr(self.source, "__len__")
            or not hasattr(self.source, "__getitem__")
        ):
            raise ValueError(
                f"Samples: {name} must be a pair of tensors or a data set with len() and [], got "
                f"{type(self.source).__name__}"
            )
        if len(self) == 0:
            raise ValueError(f"Samples: {name} must hold at least one sample, got none")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.source if self.tensors is None else self.tensors[1])

    def batch(self, indices: list[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Inputs ``(b, ...)`` and labels ``(b,)`` of some samples, in the order asked for."""
        if self.tensors is not None:
            index = torch.as_tensor(indices, dtype=torch.int64)
            inputs, labels = self.tensors
            return inputs[index.to(inputs.device)], labels[index.to(labels.device)]
        items = [self.source[int(i)] for i in indices]
        return (
            torch.stack([torch.as_tensor(item[0]) for item in items]),
            torch.stack([torch.as_tensor(item[1]) for item in items]),
        )

    def batches(self, size: int) -> Iterator[Tensor]:
        """Inputs in order, batch by batch; the last one may be smaller."""
        for start in range(0, len(self), size):
            yield self.batch(list(range(start, min(start + size, len(self)))))[0]


def _tensors(source: Source) -> tuple[Tensor, Tensor] | None:
    """Inputs and labels, if the source is a pair of tensors."""
    if isinstance(source, (tuple, list)) and len(source) == 2:
        first, second = source
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            return first, second
    return None
