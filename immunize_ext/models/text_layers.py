"""Which layers of a UNet an attack moves."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from immunize_ext.models.text_projections import find_text_projections

AttentionScope = Literal["kv", "attn2", "attention"]


def _projections(function: str, unet: nn.Module) -> list[str]:
    names = [projection.name for projection in find_text_projections(unet)]
    if not names:
        raise ValueError(
            f"{function}: the UNet must have layers that take text, got none; give a "
            "text-conditioned model"
        )
    return names


def attention_blocks(function: str, unet: nn.Module, scope: AttentionScope) -> list[str]:
    """Names of the attention blocks in a scope, in the order of the model.

    Cross-attention is what holds a projection that receives text, whatever its name is.

    Args:
        function: Who asks; stands in the error.
        unet: The UNet.
        scope: ``"attn2"`` for cross-attention, ``"attention"`` for self-attention too.

    Returns:
        Module names.

    Raises:
        ValueError: If the scope is unknown or no layer takes text.
    """
    if scope not in get_args(AttentionScope):
        raise ValueError(
            f"{function}: scope must be one of {', '.join(get_args(AttentionScope))}, got {scope!r}"
        )
    cross = {name.rpartition(".")[0] for name in _projections(function, unet)}
    if scope == "attention":
        parts = ("to_q", "to_k", "to_v")
        cross |= {
            name for name, module in unet.named_modules() if all(hasattr(module, p) for p in parts)
        }
    return [name for name, _ in unet.named_modules() if name in cross]


def linear_layers(function: str, unet: nn.Module, scope: AttentionScope) -> list[str]:
    """Names of the linear layers in a scope: K and V of the text only, or whole blocks.

    Args:
        function: Who asks; stands in the error.
        unet: The UNet.
        scope: ``"kv"``, ``"attn2"`` or ``"attention"``.

    Returns:
        Module names.

    Raises:
        ValueError: As :func:`attention_blocks`.
    """
    blocks = attention_blocks(function, unet, scope)
    if scope == "kv":
        return _projections(function, unet)
    found = []
    for block in blocks:
        for name, module in unet.get_submodule(block).named_modules():
            if isinstance(module, nn.Linear):
                found.append(f"{block}.{name}")
    return found


def parameters_of(unet: nn.Module, modules: list[str]) -> dict[str, nn.Parameter]:
    """Parameters of modules by their name in the UNet."""
    return {
        f"{module}.{name}": parameter
        for module in modules
        for name, parameter in unet.get_submodule(module).named_parameters()
    }
