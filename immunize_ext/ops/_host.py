"""Questions whose answer has to be known on the host, also inside ``torch.vmap``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from immunize_ext.ops._transforms import BatchedFunction


class _Answer:
    """Carries a number out of a function that vmap calls; a list would be copied on the way."""

    value = False


class _AnyTrue(BatchedFunction):
    """Asks about the whole vmapped batch: the rule of the base class hands over plain tensors."""

    @staticmethod
    def forward(mask: Tensor, answer: _Answer) -> Tensor:
        answer.value = bool(mask.any())
        return mask.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def any_true(mask: Tensor) -> bool:
    """Whether any entry is true; under vmap, whether any is for any element of the batch.

    Not for use inside ``torch.compile``, which cannot branch on data in one graph.
    """
    try:
        return bool(mask.any())
    except RuntimeError:  # a batched tensor of torch.vmap, which cannot be read
        answer = _Answer()
        _AnyTrue.apply(mask, answer)
        return answer.value
