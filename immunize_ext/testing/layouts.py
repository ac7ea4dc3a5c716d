"""The same numbers in other places of memory, inside a guarded buffer.

A kernel that assumes contiguous input, ignores a storage offset or writes past its output gives a
right answer on fresh tensors and a wrong one here.  Every layout lives in a larger buffer whose
other entries are NaN with a bit pattern of its own: read by mistake they poison the result, written
by mistake they lose the pattern.

* ``contiguous``: a row-major view in the middle of the buffer.
* ``transposed``: column-major matrices.
* ``sliced``: every second entry along every dimension, as ``t[::2, ::2]``.
* ``offset``: rows longer than the matrix is wide, starting at an odd offset.
* ``expanded``: one leading batch dimension of stride 0; only for tensors whose entries repeat along
  it, so it repeats the first element there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Layout: TypeAlias = Literal["contiguous", "transposed", "sliced", "offset", "expanded"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# The layouts that can hold any values.
FREE_LAYOUTS: tuple[Layout, ...] = ("contiguous", "transposed", "sliced", "offset")

_MARGIN = 3
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class GuardedTensor:
    """A tensor in some layout together with the buffer it is a view of.

    Attributes:
        tensor: the view; a leaf that requires no gradient.
        buffer: the whole buffer, one-dimensional.
        snapshot: a copy of the buffer as it was made.
        layout: the name of the layout.
    """

    tensor: Tensor
    buffer: Tensor
    snapshot: Tensor
    layout: Layout

    def changed_entries(self) -> int:
        """Number of entries of the whole buffer that differ bitwise from the snapshot."""
        differs = bits(self.buffer) != bits(self.snapshot)
        return int(torch.count_nonzero(differs).item())


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor as integers, so that NaN equals itself and -0 is not 0.

    Args:
        tensor: any dtype, any strides.

    Returns:
        An integer tensor of the same shape, contiguous.

    Example:
        >>> bool((bits(torch.tensor([float("nan")])) == bits(torch.tensor([float("nan")]))).all())
        True
    """
    copied = tensor.detach().contiguous()
    if copied.dtype == torch.bool or not copied.dtype.is_floating_point:
        return copied
    return copied.view(_INTEGERS[copied.element_size()])


def guarded(values: Tensor, layout: Layout) -> GuardedTensor:
    """Copy values into a guarded buffer in the given layout.

    Args:
        values: ``(*,)`` of any shape; dtype and device are kept.  "transposed" needs two
            dimensions, "expanded" one, with at least one element there unless empty.
        layout: see the module.

    Returns:
        :class:`GuardedTensor` whose ``tensor`` equals ``values`` (for "expanded": its first
        element along the leading dimension, repeated).

    Raises:
        ValueError: an unknown layout, or too few dimensions for it.

    Example:
        >>> held = guarded(torch.arange(6.0).reshape(2, 3), "transposed")
        >>> held.tensor.stride(), held.tensor[1].tolist(), held.changed_entries()
        ((1, 2), [3.0, 4.0, 5.0], 0)
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"guarded: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}; choose one"
        )
    needed = {"transposed": 2, "expanded": 1}.get(layout, 0)
    if values.dim() < needed:
        raise ValueError(
            f"guarded: values must have at least {needed} dimensions for layout {layout!r}, "
            f"got shape {tuple(values.shape)}; use another layout"
        )
    strides = _strides(tuple(values.shape), layout)
    extent = sum(
        (size - 1) * stride for size, stride in zip(values.shape, strides, strict=True) if size > 1
    )
    buffer = _sentinel(2 * _MARGIN + extent + 1, values)
    view = buffer.as_strided(tuple(values.shape), strides, _MARGIN)
    with torch.no_grad():
        if layout == "expanded":
            if values.shape[0]:
                view[0].copy_(values[0])
        else:
            view.copy_(values.detach())
    return GuardedTensor(view.detach(), buffer, buffer.clone(), layout)


def _strides(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Strides of the view, from the last dimension to the first."""
    order = list(range(len(shape)))
    if layout == "transposed":
        order[-1], order[-2] = order[-2], order[-1]
    strides = [0] * len(shape)
    step = 2 if layout == "sliced" else 1
    for position, dim in enumerate(reversed(order)):
        strides[dim] = step
        length = max(shape[dim], 1)
        if layout == "offset" and position == 0:
            length += 2  # rows longer than the matrix is wide
        step *= length * (2 if layout == "sliced" and position + 1 < len(shape) else 1)
    if layout == "expanded":
        strides[0] = 0
    return tuple(strides)


def _sentinel(count: int, like: Tensor) -> Tensor:
    """NaN with a payload where the dtype has one, else the largest value."""
    buffer = torch.empty(count, dtype=like.dtype, device=like.device)
    if not like.dtype.is_floating_point:
        return buffer.fill_(1 if like.dtype == torch.bool else torch.iinfo(like.dtype).max)
    buffer.fill_(float("nan"))
    integers = buffer.view(_INTEGERS[buffer.element_size()])
    integers += 5  # a quiet NaN stays one; the payload tells ours from a computed NaN
    return buffer
