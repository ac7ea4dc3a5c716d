"""Digests of tensors: whether two models or data sets are the same, wherever they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and values of tensors, in the order given.

    Args:
        named: Pairs of a name and a tensor on any device, in any layout.

    Returns:
        64 hexadecimal digits; equal for equal content only.

    Example:
        >>> x = torch.arange(6.0).reshape(2, 3)
        >>> tensor_digest([("x", x)]) == tensor_digest([("x", x.mT.contiguous().mT)])
        True
        >>> tensor_digest([("x", x)]) == tensor_digest([("x", x.mT)])
        False
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
