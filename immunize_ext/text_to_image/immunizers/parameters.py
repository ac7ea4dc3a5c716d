"""Which parameters of a denoiser an immunizer moves, as a plain table of tensors.

The loops are functional: they never write into the model while they compute, so a step that fails
leaves nothing behind, and derivatives through inner steps need no care.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from immunize_ext.text_to_image.projections import attention_blocks, linear_layers, parameters_of

Scope = Literal["kv", "attn2", "attn", "all"]


Parameters = dict[str, Tensor]


# A loss as a function of the denoiser's parameters.
Loss = Callable[[Mapping[str, Tensor]], Tensor]


def scope_parameters(unet: nn.Module, scope: Scope, *, function: str) -> dict[str, nn.Parameter]:
    """Parameters in a scope, by name.

    Args:
        unet: The denoiser.
        scope: ``"kv"`` for the text projections alone, ``"attn2"`` for the whole cross-attention
            blocks that hold them, ``"attn"`` for self-attention too, ``"all"`` for every parameter.
        function: Who asks; stands in the error.

    Returns:
        The parameters, in the order of the model.

    Raises:
        ValueError: If the scope is unknown or the model takes no text.
    """
    if scope not in get_args(Scope):
        raise ValueError(
            f"{function}: scope must be one of {', '.join(get_args(Scope))}, got {scope!r}"
        )
    # Asks whether the model takes text, also where all of it moves.
    blocks = attention_blocks(function, unet, "attention" if scope == "attn" else "attn2")
    if scope == "all":
        return dict(unet.named_parameters())
    return parameters_of(unet, linear_layers(function, unet, "kv") if scope == "kv" else blocks)


def gradient(loss: Tensor, parameters: Parameters, *, create_graph: bool = False) -> Parameters:
    """Gradient of a loss by parameter; zero where a parameter has no part in it."""
    found = torch.autograd.grad(
        loss, list(parameters.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(value) if part is None else part
        for (name, value), part in zip(parameters.items(), found, strict=True)
    }


def descend_by_adam(
    parameters: Parameters, losses: Sequence[Loss], *, rate: float, scale: float = 1.0
) -> tuple[Parameters, list[float]]:
    r"""Steps of Adam, as attackers take them, out of place and to first order.

    .. math:: \theta' = \theta + \mathrm{stopgrad}(\text{what Adam adds to } \theta)

    Args:
        parameters: theta, which may require gradients; all of them move.
        losses: One loss a step.
        rate: Adam's.
        scale: Factor on the loss while its gradient is computed, for float16.

    Returns:
        theta' after the last step, which depends on theta through the identity alone, and the
        losses met on the way.

    Source:
        Kingma and Ba, ICLR 2015, Algorithm 1.
    """
    current = {name: value.detach().clone() for name, value in parameters.items()}
    adam = torch.optim.Adam(list(current.values()), lr=rate)
    met = []
    for loss in losses:
        here = {name: value.detach().requires_grad_() for name, value in current.items()}
        with torch.enable_grad():
            value = loss(here)
        found = gradient(value * scale, here)
        for name, moved in current.items():
            moved.grad = found[name] / scale
        adam.step()
        met.append(float(value.detach()))
    return {n: value + (current[n] - value.detach()) for n, value in parameters.items()}, met


def descend(
    parameters: Parameters,
    losses: Sequence[Loss],
    *,
    rate: float,
    create_graph: bool,
    scale: float = 1.0,
) -> tuple[Parameters, list[float]]:
    r"""Unrolled steps of gradient descent, out of place.

    .. math:: \theta'_{j+1} = \theta'_j - \alpha \nabla L_j(\theta'_j)

    Args:
        parameters: theta, which may require gradients.
        losses: One loss a step.
        rate: alpha.
        create_graph: Whether the gradients themselves stay differentiable. Without it theta'
            depends on theta through the identity alone (first order).
        scale: Factor on the loss while its gradient is computed, for float16.

    Returns:
        theta' after the last step, a function of theta, and the losses met on the way.

    Note:
        Nothing is written in place: in-place updates break the graph that the outer derivative
        needs (pytorch/pytorch#61252).
    """
    current = dict(parameters)
    met = []
    for loss in losses:
        if create_graph:
            value = loss(current)
            step = gradient(value * scale, current, create_graph=True)
        else:
            here = {n: v.detach().requires_grad_() for n, v in current.items()}
            with torch.enable_grad():
                value = loss(here)
            step = gradient(value * scale, here)
        met.append(float(value.detach()))
        current = {n: value - (rate / scale) * step[n] for n, value in current.items()}
    return current, met
