"""Which route serves a tensor: the compiled kernels, or the torch-only composite."""

from __future__ import annotations

import torch
from torch import Tensor

from immunize_ext import _load

_NAMESPACE = "immunize_ext::"


def _find_operators() -> tuple[frozenset[str], frozenset[str]]:
    """All compiled operators, and those of them that have a CUDA kernel."""
    if not _load.available():
        return frozenset(), frozenset()
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(_NAMESPACE)]
    on_cuda = [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]
    every, cuda = (
        frozenset(n.removeprefix(_NAMESPACE) for n in found) for found in (names, on_cuda)
    )
    return every, cuda


# Asked once: a build has the kernels it has, and torch.compile cannot trace the question.
_OPERATORS, _CUDA_OPERATORS = _find_operators()

# Other devices compose what these fuse from the other operators, without a loss worth a kernel.
_CPU_ONLY = frozenset(
    {
        "gram_regularizer",
        "gram_regularizer_backward",
        "merge_gram",
        "symmetric_reference",
        "symmetric_track",
    }
)


def has_kernel(tensor: Tensor, *operators: str) -> bool:
    """True if the compiled part has kernels for this tensor's device; warns once where it has not.

    A meta or fake tensor on a served device counts as served: it takes the registered fake kernels.

    Args:
        tensor: Where it lives is what counts.
        operators: The operators of ``torch.ops.immunize_ext`` that must have one; by default all
            that any device but the CPU asks for.
    """
    if not _load.available():
        _load.warn_fallback()
        return False
    device = tensor.device.type
    if device in ("cpu", "meta"):
        return True
    if device == "cuda" and _CUDA_OPERATORS.issuperset(operators or _OPERATORS - _CPU_ONLY):
        return True
    reason = f"there are no kernels for tensors on {device}"
    _load.warn_fallback(reason + (" in this build" if device == "cuda" else ""))
    return False
