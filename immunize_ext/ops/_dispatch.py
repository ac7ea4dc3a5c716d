"""Which route serves a tensor: the compiled kernels, or the torch-only composite."""

from __future__ import annotations

from torch import Tensor

from immunize_ext import _load


def has_kernel(tensor: Tensor) -> bool:
    """True if the compiled part has kernels for this tensor's device; warns once where it has not.

    A meta or fake tensor on a served device counts as served: it takes the registered fake kernels.
    """
    if not _load.available():
        _load.warn_fallback()
        return False
    if tensor.device.type in ("cpu", "meta"):
        return True
    _load.warn_fallback(f"there are no kernels for tensors on {tensor.device.type}")
    return False
