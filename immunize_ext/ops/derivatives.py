"""What every ``autograd.Function`` of this package shares: its rule for ``torch.vmap``.

The operators take leading batch dimensions, so a vmapped axis is moved to the front and folded into
them. Arguments that the axis does not touch are expanded along it, without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fold_batch(batch_size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Move the vmapped axis of each tensor in ``args`` to the front; expand the others along it.

    Args:
        batch_size: Length of the vmapped axis.
        in_dims: For each argument the position of that axis, or None.
        args: Positional arguments of an operator; whatever is no tensor passes unchanged.

    Returns:
        The arguments with the axis in front of their own batch dimensions.
    """
    folded: list[Any] = []
    for arg, dim in zip(args, in_dims, strict=True):
        if not isinstance(arg, Tensor):
            folded.append(arg)
        elif dim is None:
            folded.append(arg.unsqueeze(0).expand(batch_size, *arg.shape))
        else:
            folded.append(arg.movedim(dim, 0))
    return folded


class BatchedFunction(torch.autograd.Function):
    """An ``autograd.Function`` whose forward takes leading batch dimensions on every tensor."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the vmapped axis into the batch and apply the function once."""
        outputs = cls.apply(*fold_batch(info.batch_size, in_dims, args))
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)


class RequirePositive(BatchedFunction):
    """Identity that refuses numbers that are not positive.

    A function and no plain check, so that it sees plain tensors under ``torch.func``. Reads them on
    the host; not for use inside ``torch.compile``.
    """

    @staticmethod
    def forward(value: Tensor, message: str) -> Tensor:
        # NaN fails every comparison, so the test is for what is allowed.
        if not bool((value > 0).all()):
            raise ValueError(f"{message}, got {value.tolist()}")
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.clone()
