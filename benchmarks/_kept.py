"""What graphs keep in memory for their backward passes, counted: the same on every machine."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class Kept:
    """Bytes that graphs keep at the most while the block runs."""

    def __init__(self) -> None:
        self._now = self.most = 0

    def _forget(self, size: int) -> None:
        self._now -= size

    def _pack(self, tensor: Tensor) -> _Packed:
        packed, size = _Packed(tensor), tensor.numel() * tensor.element_size()
        weakref.finalize(packed, self._forget, size)
        self._now += size
        self.most = max(self.most, self._now)
        return packed

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda p: p.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)


class _Packed:
    """A tensor that a graph keeps; without its node, or they would keep each other."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
