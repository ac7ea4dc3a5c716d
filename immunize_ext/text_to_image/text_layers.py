r"""What text does to each linear layer of a denoiser: found by moving one input at a time.

A denoiser is a function of a noisy image, a time, features of the prompt's tokens and, in some
models, one pooled vector. It is called at its smallest size, then once more with each of them
moved; a layer depends on whatever changes what it receives. That gives three classes:

- **exact**: a function of the text alone. The rows that a concept sends are known before any image
  is drawn, and constraints on them are met to rounding. In a UNet these are K and V of
  cross-attention, in SD3 and FLUX ``context_embedder`` and the pooled vector's embedder.
- **modulated**: a function of text and time. The first joint block scales and shifts the embedded
  text by the time: for each time an affine function of known rows.
- **propagated**: of text and image. What arrives is known by its second moments only.

Of the exact layers those that another exact one feeds (the second layer of a small network) need no
edit of their own; the others are where text enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from immunize_ext.text_to_image.backbones import Backbone, Given, backbone_of

LayerClass = Literal["exact", "modulated", "propagated"]

Rows = Literal["text", "prompt", "image", "joint"]

# Tokens of the probe: a prime that no image has positions for.
_TOKENS = 7

# Positions of the smallest image of a joint model: two patches a side.
_PATCHES = 4


@dataclass(frozen=True)
class TextLayer:
    """A linear layer that depends on the text.

    Attributes:
        name: Module path in the denoiser.
        module: The layer.
        kind: ``"exact"``, ``"modulated"`` or ``"propagated"``.
        rows: What a row of its input stands for: ``"text"``, one a token; ``"prompt"``, one vector;
            ``"image"``, one a position; ``"joint"``, tokens and then positions.
        entrance: Whether it is exact and fed by no other exact layer.
    """

    name: str
    module: nn.Module
    kind: LayerClass
    rows: Rows
    entrance: bool


def find_text_layers(denoiser: nn.Module) -> list[TextLayer]:
    """Find the linear layers that text reaches, and how it does.

    Args:
        denoiser: A UNet or a transformer of diffusers, of a family that
            :mod:`immunize_ext.text_to_image.backbones` has.

    Returns:
        The layers in the order of the model; those that no text reaches are left out.

    Raises:
        ValueError: If the denoiser is of no known family.

    Note:
        Six calls at the smallest size, without gradients; no global random number is drawn, and
        training mode, buffers and weights stay as they were. Dependence is of the model at hand: a
        branch behind a gate of zeros is not seen. Asked again, a model whose modules and weights
        are what they were is not probed again.

    Example:
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> found = find_text_layers(load_digits_pipeline().unet)
        >>> {layer.kind for layer in found if layer.name.endswith("attn2.to_k")}
        {'exact'}
    """
    family = backbone_of(denoiser)
    if family is None:
        raise ValueError(
            "find_text_layers: denoiser must be of a family that is known, got "
            f"{type(denoiser).__name__}; give the unet or transformer of a supported pipeline"
        )
    state = _state(denoiser)
    known = _KNOWN.get(denoiser)
    found = known[1] if known is not None and known[0] == state else _probed(denoiser, family)
    if state is not None:
        _KNOWN[denoiser] = state, found
    return [
        TextLayer(x.name, denoiser.get_submodule(x.name), x.kind, x.rows, x.entrance) for x in found
    ]


class _Found(NamedTuple):
    """A layer without the module, which might hold the denoiser that is to be forgotten."""

    name: str
    kind: LayerClass
    rows: Rows
    entrance: bool


# What was found in a denoiser, and the state that it had then.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[object], list[_Found]]] = WeakKeyDictionary()


def _state(denoiser: nn.Module) -> list[object] | None:
    """What decides the classes of a plain model's layers; ``None`` of a model that is not plain.

    Modules and processors by identity; of each tensor where it lies, how often it was written to,
    and its norm, for writes that are not counted (``.data``): a gate that opens shows in it, and a
    weight that is no number equals nothing. Hooks, adapters, quantized layers and modules that are
    not of torch or diffusers may do anything: such models are probed each time.
    """
    state: list[object] = []
    for module in denoiser.modules():
        library = type(module).__module__.partition(".")[0]
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if library not in ("torch", "diffusers") or hooked:
            return None
        parts = (module, getattr(module, "processor", None))
        state += [ref(part) for part in parts if part is not None]
    norms: list[Tensor] = []
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
            return None
        state.append((tensor.data_ptr(), tensor._version))
        if tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(tensor.detach(), dtype=wide))
        elif isinstance(tensor, nn.Parameter):
            return None
    return [*state, *map(float, norms)]


def _probed(denoiser: nn.Module, family: Backbone) -> list[_Found]:
    config: Any = denoiser.config
    sizes = family.sizes(config)
    parameter = next(denoiser.parameters())
    generator = torch.Generator().manual_seed(0)

    def draw(time: int) -> dict[str, Any]:
        shapes = {"noisy": (1, *sizes.latents), "hidden": (1, _TOKENS, sizes.text)}
        if sizes.pooled is not None:
            shapes["pooled"] = (1, sizes.pooled)
        found = {
            name: torch.randn(shape, generator=generator).to(parameter)
            for name, shape in shapes.items()
        }
        return {"pooled": None, **found, "timesteps": torch.tensor([time]).to(parameter.device)}

    first, moved = draw(600), draw(150)
    layers = {
        name: module
        for name, module in denoiser.named_modules()
        if name and (isinstance(module, nn.Linear) or hasattr(module, "base_layer"))
    }

    def inputs(arguments: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        with _listening(layers) as heard:
            family.predict(denoiser, config, Given(**arguments, scale=1))
        return heard

    with torch.no_grad(), _evaluating(denoiser):
        before = inputs(first)
        after = {
            name: inputs({**first, name: value})
            for name, value in moved.items()
            if value is not None
        }
        depends = {
            name: {
                what for what, heard in after.items() if not _same(heard.get(name), before[name])
            }
            for name in before
        }
        kinds = {name: _class(found) for name, found in depends.items()}
        exact = [name for name, kind in kinds.items() if kind == "exact"]
        with _shifted(layers[name] for name in exact):
            beyond = inputs(first)
    found = []
    for name in layers:
        kind = kinds.get(name)
        if kind is not None:
            entrance = kind == "exact" and _same(beyond.get(name), before[name])
            found.append(_Found(name, kind, _rows(before[name][0]), entrance))
    return found


def _class(depends: set[str]) -> LayerClass | None:
    if not depends & {"hidden", "pooled"}:
        return None
    if "noisy" in depends:
        return "propagated"
    return "modulated" if "timesteps" in depends else "exact"


def _rows(x: Tensor) -> Rows:
    if x.dim() < 3 or x.shape[-2] == 1:
        return "prompt"
    if x.shape[-2] == _TOKENS:
        return "text"
    return "joint" if x.shape[-2] == _TOKENS + _PATCHES else "image"


def _same(one: list[Tensor] | None, other: list[Tensor]) -> bool:
    return (
        one is not None
        and len(one) == len(other)
        and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    )


@contextmanager
def _listening(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """What layers receive in the block, call by call."""
    heard: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                heard.setdefault(name, []).append(inputs[0].detach().clone())

        return hook

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in layers.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _shifted(modules: Iterator[nn.Module]) -> Iterator[None]:
    """The modules give outputs larger by one in the block."""
    handles = [module.register_forward_hook(lambda _m, _x, y: y + 1.0) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout in the block."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
