"""Weights as they are in a network: of many shapes, some of them kernels of convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["convolution_matrix", "map_layers"]

R = TypeVar("R", Tensor, tuple[Tensor, ...])


def convolution_matrix(weight: Tensor, *, groups: int = 1) -> Tensor:
    r"""The matrix of a convolution: what multiplies the unfolded patches of its input.

    .. math:: W \in \mathbb R^{o \times i \times k_1 \times \dots}
              \mapsto \mathbb R^{o \times i k_1 \cdots}

    Its singular values are not those of the convolution as a map of whole images, which depend on
    the size of the images.

    Args:
        weight: Weight (o, i / groups, *kernel) of ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        groups: Groups of the convolution.

    Returns:
        A view: (o, i * kernel), or (groups, o / groups, i / groups * kernel) for several groups.

    Raises:
        ValueError: If there is no kernel, or groups do not divide o.

    Note:
        Differentiable; nothing is computed.

    Source:
        Unfolding ("im2col"): Chellapilla, Puri, Simard 2006.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import convolution_matrix, log_condition_number
        >>> weight = torch.nn.Conv2d(4, 8, 3).weight
        >>> convolution_matrix(weight).shape
        torch.Size([8, 36])
        >>> log_condition_number(convolution_matrix(weight)).shape
        torch.Size([])
    """
    if weight.dim() < 3:
        raise ValueError(
            "convolution_matrix: weight must have shape (o, i, *kernel), got "
            f"{tuple(weight.shape)}; a matrix needs no unfolding"
        )
    out = weight.shape[0]
    if groups < 1 or out % groups:
        raise ValueError(
            f"convolution_matrix: groups must divide the {out} output channels, got {groups}"
        )
    patch = math.prod(weight.shape[1:])
    return weight.reshape((out, patch) if groups == 1 else (groups, out // groups, patch))


def map_layers(function: Callable[..., R], layers: Sequence[Tensor], **settings: Any) -> R:
    r"""Apply a function of batched matrices to layers of different shapes: a call for each shape.

    .. math:: (A_1, \dots, A_L) \mapsto (f(A_1), \dots, f(A_L))

    Args:
        function: One that maps (*, n, p) to a tensor (*,) or a named tuple of them:
            ``log_condition_number``, ``r_well``, ``extremal_singular_values``.
        layers: Matrices (n_l, p_l), all on one device; of convolutions
            :func:`convolution_matrix`.
        **settings: What the function takes besides.

    Returns:
        What the function returns for a batch of L matrices, in their order.

    Raises:
        ValueError: If there is no layer, one is no matrix, or they stand on several devices; and
            as the function does.

    Note:
        Differentiable as the function is. Layers of one shape are stacked, which copies them.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import condition_number, map_layers
        >>> layers = [torch.eye(3), torch.diag(torch.tensor([1.0, 4.0])), 2 * torch.eye(3)]
        >>> map_layers(condition_number, layers).tolist()
        [1.0, 4.0, 1.0]
    """
    if not layers:
        raise ValueError("map_layers: layers must hold at least one matrix, got none")
    places: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.dim() != 2:
            raise ValueError(
                f"map_layers: layers must be matrices (n, p), got {tuple(layer.shape)} at "
                f"{index}; pass convolution_matrix of a convolution"
            )
        if layer.device != layers[0].device:
            raise ValueError(
                f"map_layers: layers must be on one device, got {layers[0].device} and "
                f"{layer.device}"
            )
        places.setdefault((layer.shape, layer.dtype), []).append(index)
    found: list[Any] = [None] * len(layers)
    for indices in places.values():
        result = function(torch.stack([layers[index] for index in indices]), **settings)
        for place, index in enumerate(indices):
            found[index] = (
                result[place]
                if isinstance(result, Tensor)
                else type(result)(*(field[place] for field in result))
            )
    joined: Any = (
        torch.stack(found)
        if isinstance(found[0], Tensor)
        else type(found[0])(*(torch.stack(column) for column in zip(*found, strict=True)))
    )
    return cast(R, joined)
