"""The raw operators of the second-moment merge in torch operations.

They are library calls on every device: a triangular solve and a product. Measured against them, a
kernel of our own has nothing to win; what is summed in a kernel is the Gram matrix (merge_gram).
"""

from __future__ import annotations

import torch
from torch import Tensor


def moment_solve(n: Tensor, s: Tensor, chol: Tensor) -> Tensor:
    """N S^-1 (*, o, d) of n (*, o, d), s and its lower Cholesky factor chol (*, d, d), float64."""
    d = n.shape[-1]
    square = (*n.shape[:-2], d, d)
    for name, tensor in (("n", n), ("s", s), ("chol", chol)):
        if tensor.dtype != torch.float64:
            raise ValueError(f"moment_solve: {name} must be float64, got {tensor.dtype}")
    for name, tensor in (("s", s), ("chol", chol)):
        if tuple(tensor.shape) != square:
            raise ValueError(
                f"moment_solve: {name} must have shape {list(square)}, got {list(tensor.shape)}"
            )
    return torch.cholesky_solve(n.mT, chol).mT.contiguous()


def moment_product(a: Tensor, b: Tensor) -> Tensor:
    """A B (*, m, n) of a (*, m, k) and b (*, k, n), in their dtype."""
    if a.dim() < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"moment_product: b must have shape [*, {a.shape[-1]}, n] with the leading dimensions "
            f"of a, {list(a.shape)}, got {list(b.shape)}"
        )
    if a.dtype != b.dtype:
        raise ValueError(f"moment_product: b must have the dtype of a, {a.dtype}, got {b.dtype}")
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b).contiguous()
