"""Tables of tensors by name as vectors: what a Krylov method needs, sums in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Parameters: TypeAlias = dict[str, Tensor]
"""Parameters, a gradient or a direction: tensors by the names of the parameters."""

Loss: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""A scalar loss as a function of parameters by name, as ``functional_call`` takes them."""


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Inner product over all tensors, added up in float64 in the order of the names.

    Example:
        >>> dot({"w": torch.ones(3)}, {"w": torch.arange(3.0)})
        3.0
    """
    if not a:
        return 0.0
    parts = [
        torch.dot(value.detach().flatten().double(), b[name].detach().flatten().double())
        for name, value in a.items()
    ]
    return float(torch.stack(parts).sum())


def norm(a: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all tensors.

    Example:
        >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        5.0
    """
    return math.sqrt(dot(a, a))


def axpy(factor: float, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Parameters:
    """``factor x + y``, out of place.

    Example:
        >>> axpy(2.0, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([3., 3.])}
    """
    return {name: torch.add(value, x[name], alpha=factor) for name, value in y.items()}


def scaled(factor: float, x: Mapping[str, Tensor]) -> Parameters:
    """``factor x``, out of place.

    Example:
        >>> scaled(2.0, {"w": torch.ones(2)})
        {'w': tensor([2., 2.])}
    """
    return {name: factor * value for name, value in x.items()}
