"""Where text enters a denoiser, and which layers attend to it.

The layers are found by what they receive (:mod:`immunize_ext.text_to_image.text_layers`), not by
what they are called. That gives ``attn2.to_k`` and ``attn2.to_v`` of Stable Diffusion 1 and 2,
every one of the stacked transformer blocks of SDXL, the one layer by which tokens enter SD3 and
FLUX, and layers of models that name them otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from immunize_ext.text_to_image.text_layers import find_text_layers

Role = Literal["key", "value", "context", "pooled"]

# Names that diffusers gives the two projections, by role. The role cannot be read off an input: K
# and V receive the same text.
_ROLES: dict[str, Role] = {
    "to_k": "key",
    "to_v": "value",
    "k_proj": "key",
    "v_proj": "value",
    "key": "key",
    "value": "value",
}


@dataclass(frozen=True)
class TextProjection:
    """A linear layer by which text enters.

    Attributes:
        name: Module path in the model.
        role: ``"key"`` or ``"value"``; ``"context"`` of the one layer by which all tokens enter a
            joint model; ``"pooled"`` of one that takes the vector of a whole prompt.
        module: The layer; its weight has shape ``(out_features, in_features)``.
        in_features: Width d of what it takes.
        out_features: Rows of the weight.
    """

    name: str
    role: Role
    module: nn.Linear
    in_features: int
    out_features: int

    @property
    def weight_name(self) -> str:
        """Name of the weight in ``model.named_parameters()``."""
        return f"{self.name}.weight"


def find_text_projections(unet: nn.Module) -> list[TextProjection]:
    """Find the layers by which the features of tokens enter a denoiser.

    Args:
        unet: A diffusers UNet (Stable Diffusion 1, 2, XL or one built alike), or the transformer of
            SD3 or FLUX.

    Returns:
        The layers in the order of the model: K before V in each cross-attention of a UNet, one
        layer of a transformer.

    Raises:
        ValueError: If a layer that takes text cannot be edited: fused projections, an injected
            adapter, a layer that is not linear, or one whose role is not known. The message names
            it and says what to do; nothing is changed.

    Note:
        As :func:`~immunize_ext.text_to_image.text_layers.find_text_layers`.

    Source:
        huggingface/diffusers#11903 and #14003 (fused projections keep their unfused copies, edits
        of which have no effect); adobe-research/custom-diffusion#73 (names that miss blocks).

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
        ...     block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=6,
        ...     attention_head_dim=4,
        ...     down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        ...     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ... )
        >>> found = find_text_projections(unet)
        >>> len(found), found[0].role, found[0].in_features
        (8, 'key', 6)
    """
    found = _entrances("find_text_projections", unet)
    return [entrance for entrance in found if entrance.role != "pooled"]


def text_entrances(denoiser: nn.Module) -> list[TextProjection]:
    """All layers by which text enters: those of tokens, and those of the pooled vector.

    Args:
        denoiser: As :func:`find_text_projections`.

    Returns:
        The layers in the order of the model.

    Raises:
        ValueError: As :func:`find_text_projections`.

    Example:
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> unet = load_digits_pipeline().unet  # takes no pooled vector
        >>> text_entrances(unet) == find_text_projections(unet)
        True
    """
    return _entrances("text_entrances", denoiser)


def _entrances(function: str, denoiser: nn.Module) -> list[TextProjection]:
    """All layers by which text enters, in the order of the model; errors say who asked."""
    _refuse_fused(function, denoiser)
    entrances = [layer for layer in find_text_layers(denoiser) if layer.entrance]
    # Those that take text are named first.
    refuse_adapters(
        function, [*((layer.name, layer.module) for layer in entrances), *denoiser.named_modules()]
    )
    of_tokens = [layer for layer in entrances if layer.rows == "text"]
    found = []
    for layer in entrances:
        name, module = layer.name, layer.module
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{function}: {name} takes text and must be a linear layer, got "
                f"{type(module).__name__}; unload adapters and quantization first"
            )
        last = name.rpartition(".")[2]
        role: Role = _ROLES.get(last, "context")
        if layer.rows == "prompt":
            role = "pooled"
        elif role == "context" and len(of_tokens) > 1:
            # Left out silently it would go on seeing the old text while K and V are edited.
            raise ValueError(
                f"{function}: {name} takes text and must be a key or a value projection "
                f"({', '.join(_ROLES)}), got the name {last!r}; this kind of model is not supported"
            )
        found.append(TextProjection(name, role, module, module.in_features, module.out_features))
    return found


def describe_projections(found: Sequence[TextProjection]) -> str:
    """Say how many layers there are and how wide, in one line.

    Args:
        found: What :func:`find_text_projections` returned.

    Returns:
        For example ``"32 text projections (16 K, 16 V): text width 768; rows 320 x 10, ..."``.

    Example:
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> layers = find_text_projections(load_digits_pipeline().unet)
        >>> describe_projections(layers).startswith(f"{len(layers)} text projections")
        True
    """
    if not found:
        return "no text projections"
    widths = sorted({projection.in_features for projection in found})
    rows = Counter(projection.out_features for projection in found)
    roles = Counter(projection.role for projection in found)
    counts = ", ".join(f"{roles[role]} {word}" for role, word in _WORDS.items() if roles[role])
    return (
        f"{len(found)} text projections ({counts}): text width "
        f"{', '.join(map(str, widths))}; rows "
        + ", ".join(f"{width} x {count}" for width, count in sorted(rows.items()))
    )


_WORDS: dict[Role, str] = {"key": "K", "value": "V", "context": "context", "pooled": "pooled"}


def refuse_adapters(function: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse a model with injected adapters, wherever they are.

    Inside a wrapper the weight is not what acts; beside one, weights are saved under names that
    plain diffusers does not know.

    Raises:
        ValueError: Naming the first one.
    """
    for name, module in modules:
        if hasattr(module, "base_layer") or type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{function}: {name or 'the model'} must be a plain layer, got the adapter "
                f"{type(module).__name__}; fuse or unload it first (unet.fuse_lora and "
                "unet.unload_lora, or peft's merge_and_unload)"
            )


def _refuse_fused(function: str, unet: nn.Module) -> None:
    # ``fused_projections`` stays set after ``unfuse_qkv_projections``; the processor tells.
    for name, module in unet.named_modules():
        if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
            raise ValueError(
                f"{function}: {name} must not be fused, got fused projections, whose "
                "separate copies have no effect; call unet.unfuse_qkv_projections() first"
            )


AttentionScope = Literal["kv", "attn2", "attention"]


def _projections(function: str, unet: nn.Module) -> list[TextProjection]:
    """Where text enters, as scopes count it: K and V of a UNet, both entrances of a joint model."""
    found = _entrances(function, unet)
    tokens = [projection for projection in found if projection.role != "pooled"]
    if not tokens:
        raise ValueError(
            f"{function}: the UNet must have layers that take text, got none; give a "
            "text-conditioned model"
        )
    return found if tokens[0].role == "context" else tokens


def attention_blocks(function: str, unet: nn.Module, scope: AttentionScope) -> list[str]:
    """Names of the modules in a scope, in the order of the model.

    Cross-attention is what holds a projection that receives text, whatever its name is. A joint
    model has none: what stands for it there are the entrances of the text and the layers that
    tokens alone go through on their way into attention and out of it.

    Args:
        function: Who asks; stands in the error.
        unet: The denoiser.
        scope: ``"attn2"`` for cross-attention, ``"attention"`` for all attention blocks.

    Returns:
        Module names; none lies inside another.

    Raises:
        ValueError: If the scope is unknown or no layer takes text.
    """
    if scope not in get_args(AttentionScope):
        raise ValueError(
            f"{function}: scope must be one of {', '.join(get_args(AttentionScope))}, got {scope!r}"
        )
    parts = ("to_q", "to_k", "to_v")
    attending = {
        name for name, module in unet.named_modules() if all(hasattr(module, p) for p in parts)
    }
    entrances = _projections(function, unet)
    if entrances[0].role in ("key", "value"):
        chosen = {projection.name.rpartition(".")[0] for projection in entrances}
    else:
        chosen = {projection.name for projection in entrances}
        if scope == "attn2":
            chosen |= {
                layer.name
                for layer in find_text_layers(unet)
                if layer.rows == "text" and layer.name.rpartition(".")[0] in attending
            }
    if scope == "attention":
        chosen |= attending
    return [name for name, _ in unet.named_modules() if name in chosen]


def linear_layers(function: str, unet: nn.Module, scope: AttentionScope) -> list[str]:
    """Names of the linear layers in a scope: where text enters, or whole blocks.

    Args:
        function: Who asks; stands in the error.
        unet: The UNet.
        scope: ``"kv"``, ``"attn2"`` or ``"attention"``.

    Returns:
        Module names.

    Raises:
        ValueError: As :func:`attention_blocks`.
    """
    if scope == "kv":
        return [projection.name for projection in _projections(function, unet)]
    return [
        f"{block}.{name}" if name else block
        for block in attention_blocks(function, unet, scope)
        for name, module in unet.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear)
    ]


def block_layers(function: str, unet: nn.Module) -> list[str]:
    """Names of all linear and convolution layers in the transformer and residual blocks.

    Attention, feed-forward layers, the projections around them, convolutions, and those that change
    the resolution: what LoCon adapts. Time embedding, first and last convolution stay out.

    Args:
        function: Who asks; stands in the error.
        unet: The UNet.

    Returns:
        Module names, in the order of the model.

    Raises:
        ValueError: As :func:`attention_blocks`.
    """
    _projections(function, unet)  # asks whether the model takes text
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.partition(".")[0].endswith(_BLOCKS)
    ]


# What diffusers calls stacks of blocks.
_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks")


def parameters_of(unet: nn.Module, modules: list[str]) -> dict[str, nn.Parameter]:
    """Parameters of modules by their name in the UNet."""
    return {
        f"{module}.{name}": parameter
        for module in modules
        for name, parameter in unet.get_submodule(module).named_parameters()
    }
