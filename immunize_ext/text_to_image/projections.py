"""Which layers of a denoiser take text: found by what they receive, not by what they are called.

A probe call with marked text features goes through the model; a linear layer whose input is those
features takes text. That finds ``attn2.to_k`` and ``attn2.to_v`` of Stable Diffusion 1 and 2, every
one of the stacked transformer blocks of SDXL, and layers of models that name them otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

# Names that diffusers gives the two projections, by role. The role cannot be read off an input: K
# and V receive the same text.
_ROLES: dict[str, Literal["key", "value"]] = {
    "to_k": "key",
    "to_v": "value",
    "k_proj": "key",
    "v_proj": "value",
    "key": "key",
    "value": "value",
}


@dataclass(frozen=True)
class TextProjection:
    """A linear layer that takes text features.

    Attributes:
        name: Module path in the model.
        role: ``"key"`` or ``"value"``.
        module: The layer; its weight has shape ``(out_features, in_features)``.
        in_features: Width d of the text features.
        out_features: Rows of the weight.
    """

    name: str
    role: Literal["key", "value"]
    module: nn.Linear
    in_features: int
    out_features: int

    @property
    def weight_name(self) -> str:
        """Name of the weight in ``model.named_parameters()``."""
        return f"{self.name}.weight"


def find_text_projections(unet: nn.Module) -> list[TextProjection]:
    """Find the K and V projections of the text in a denoiser.

    Args:
        unet: A diffusers UNet (Stable Diffusion 1, 2, XL or one built alike).

    Returns:
        The layers in the order of the model, K before V in a block.

    Raises:
        ValueError: If a layer that takes text cannot be edited: fused projections, an injected
            adapter, a layer that is not linear, or one whose role is not known. The message names
            it and says what to do; nothing is changed.

    Note:
        One forward pass at the smallest size the model takes, without gradients; no random number
        is drawn, and training mode, buffers and weights stay as they were.

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
    _refuse_fused(unet)
    reached = _layers_that_receive_text(unet)
    # Those that take text are named first.
    refuse_adapters("find_text_projections", [*reached, *unet.named_modules()])
    found = []
    for name, module in reached:
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"find_text_projections: {name} takes text and must be a linear layer, got "
                f"{type(module).__name__}; unload adapters and quantization first"
            )
        last = name.rpartition(".")[2]
        if last not in _ROLES:
            # Left out silently it would go on seeing the old text while K and V are edited.
            raise ValueError(
                f"find_text_projections: {name} takes text and must be a key or a value projection "
                f"({', '.join(_ROLES)}), got the name {last!r}; this kind of model is not supported"
            )
        found.append(
            TextProjection(name, _ROLES[last], module, module.in_features, module.out_features)
        )
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
    keys = sum(projection.role == "key" for projection in found)
    return (
        f"{len(found)} text projections ({keys} K, {len(found) - keys} V): text width "
        f"{', '.join(map(str, widths))}; rows "
        + ", ".join(f"{width} x {count}" for width, count in sorted(rows.items()))
    )


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


def _refuse_fused(unet: nn.Module) -> None:
    # ``fused_projections`` stays set after ``unfuse_qkv_projections``; the processor tells.
    for name, module in unet.named_modules():
        if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
            raise ValueError(
                f"find_text_projections: {name} must not be fused, got fused projections, whose "
                "separate copies have no effect; call unet.unfuse_qkv_projections() first"
            )


@torch.no_grad()
def _layers_that_receive_text(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    text, arguments = _probe(unet)
    reached: list[tuple[str, nn.Module]] = []
    seen: set[str] = set()
    # Self-attention's input has as many tokens as the image has positions; the text's has a length
    # of its own, and its values are marked, so that a copy or a reshape of it is recognised too.
    mark = text.detach().flatten()[:4].clone()

    def hook(name: str, module: nn.Module) -> Any:
        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not inputs or not isinstance(inputs[0], Tensor) or name in seen:
                return
            x = inputs[0]
            same = x.numel() == text.numel() and x.shape[-1] == text.shape[-1]
            if same and torch.equal(x.detach().flatten()[:4], mark):
                seen.add(name)
                reached.append((name, module))

        return module.register_forward_pre_hook(look)

    leaves = [
        (name, module)
        for name, module in unet.named_modules()
        if name and (isinstance(module, nn.Linear) or hasattr(module, "base_layer"))
    ]
    handles = [hook(name, module) for name, module in leaves]
    training = {module: module.training for module in unet.modules()}
    try:
        unet.eval()
        unet(**arguments)
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    order = {name: index for index, (name, _) in enumerate(unet.named_modules())}
    return sorted(reached, key=lambda item: order[item[0]])


def _probe(unet: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """Marked text features, and the arguments of a call that takes them."""
    config: Any = unet.config
    parameter = next(unet.parameters())
    width = config.cross_attention_dim
    width = max(width) if isinstance(width, (list, tuple)) else int(width)
    if getattr(config, "encoder_hid_dim", None):
        width = int(config.encoder_hid_dim)
    options: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
    # A prime number of tokens, which no image of a power of two has positions for.
    text = torch.linspace(-1.0, 1.0, 7 * width).reshape(1, 7, width).to(**options)
    # One pixel more than the smallest: normalising groups of one channel needs two values.
    side = 2 ** len(config.block_out_channels)
    arguments: dict[str, Any] = {
        "sample": torch.zeros(1, config.in_channels, side, side, **options),
        "timestep": torch.zeros(1, device=parameter.device, dtype=torch.long),
        "encoder_hidden_states": text,
    }
    if getattr(config, "addition_embed_type", None) == "text_time":
        times = config.addition_time_embed_dim * 6
        pooled = config.projection_class_embeddings_input_dim - times
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, pooled, **options),
            "time_ids": torch.zeros(1, 6, **options),
        }
    return text, arguments


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


# What a diffusers UNet calls its stacks of blocks.
_BLOCKS = ("down_blocks", "mid_block", "up_blocks")


def parameters_of(unet: nn.Module, modules: list[str]) -> dict[str, nn.Parameter]:
    """Parameters of modules by their name in the UNet."""
    return {
        f"{module}.{name}": parameter
        for module in modules
        for name, parameter in unet.get_submodule(module).named_parameters()
    }
