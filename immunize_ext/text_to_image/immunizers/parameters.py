"""Which parameters of a denoiser an immunizer moves, as a plain table of tensors.

The loops are functional: they never write into the model while they compute, so a step that fails
leaves nothing behind, and derivatives through inner steps need no care.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from immunize_ext.text_to_image.backbones import backbone_of
from immunize_ext.text_to_image.projections import attention_blocks, linear_layers, parameters_of

Scope = Literal["kv", "attn2", "attn", "all"]


def scope_parameters(unet: nn.Module, scope: Scope, *, function: str) -> dict[str, nn.Parameter]:
    """Parameters in a scope, by name.

    Args:
        unet: The denoiser.
        scope: ``"kv"`` for the text projections alone, ``"attn2"`` for the whole cross-attention
            blocks that hold them, ``"attn"`` for self-attention too, ``"all"`` for every parameter.
            Layers whose outputs the denoiser throws away are in none.
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
        chosen = dict(unet.named_parameters())
    else:
        chosen = parameters_of(
            unet, linear_layers(function, unet, "kv") if scope == "kv" else blocks
        )
    family = backbone_of(unet)
    idle = tuple(f"{layer}." for layer in family.unused(unet.config)) if family else ()
    return {name: p for name, p in chosen.items() if not idle or not name.startswith(idle)}
