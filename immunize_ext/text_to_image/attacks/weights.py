"""Adapted weights on disk: one safetensors file, loaded back into a clone of the model."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from immunize_ext.ops.lora_files import LoraFormat, LoraLayer, write_lora
from immunize_ext.storage import load_checkpoint, save_checkpoint
from immunize_ext.text_to_image.attacks.adaptation import Adapted
from immunize_ext.text_to_image.attacks.lora import inject, with_attention
from immunize_ext.text_to_image.attacks.trainables import NewToken, freeze
from immunize_ext.text_to_image.model import TextToImage

_KIND = "immunize_ext text-to-image adaptation 1"


def save_adaptation(path: str | os.PathLike[str], adapted: Adapted) -> None:
    """Write what an attack trained, and how, to one file; whole or not at all.

    Args:
        path: Target file.
        adapted: What :meth:`Adaptation.adapt` gave.

    Raises:
        MissingExtraError: If safetensors is not installed.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> from immunize_ext.text_to_image.attacks import ATTACKS
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concepts
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> concepts = digit_concepts(("three",)).concepts
        >>> adapted = ATTACKS["kv_fine_tuning"].adapt(load_digits_pipeline(), concepts, steps=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adaptation(f"{folder}/adapted.safetensors", adapted)
        ...     os.listdir(folder)
        ['adapted.safetensors']
    """
    save_checkpoint(
        path,
        adapted.weights,
        kind=_KIND,
        values={
            "names": sorted(adapted.weights),
            "tokens": list(adapted.tokens),
            "lora": adapted.lora,
            "text_lora": adapted.text_lora,
            "config": adapted.curve.config,
        },
    )


def save_lora(
    folder: str | os.PathLike[str], adapted: Adapted, *, format: LoraFormat = "diffusers"
) -> Path:
    """Write the LoRA adapter that an attack trained, for libraries that know nothing of attacks.

    Args:
        folder: Folder to create.
        adapted: What a LoRA attack gave.
        format: ``"diffusers"`` for ``pipeline.load_lora_weights``, ``"peft"`` for
            ``PeftModel.from_pretrained`` of the denoiser.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists.
        ValueError: If the attack trained no adapter, or more than one of the denoiser.

    Example:
        >>> import tempfile
        >>> from immunize_ext.ops import read_lora
        >>> from immunize_ext.text_to_image.attacks import LoRAAttack
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concepts
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> concepts = digit_concepts(("three",)).concepts
        >>> adapted = LoRAAttack(targets="kv").adapt(load_digits_pipeline(), concepts, steps=1)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     layers = read_lora(save_lora(f"{parent}/adapter", adapted))
        >>> len(layers), {layer.rank for layer in layers.values()}
        (8, {4})
    """
    function, settings = "save_lora", adapted.lora
    if settings is None:
        raise ValueError(
            f"{function}: adapted must hold a LoRA adapter, got {adapted.curve.attack}"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapted.weights.items():
        module, _, part = name.removesuffix(".default.weight").rpartition(".lora_")
        if part not in ("A", "B") or module.startswith("text_encoder."):
            raise ValueError(
                f"{function}: adapted must hold an adapter of the denoiser alone, got {name}; keep "
                "all of it with save_adaptation"
            )
        factors.setdefault(module, {})[part] = tensor
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings["use_rslora"] else rank)
    layers = {
        module: LoraLayer(
            found["B"].flatten(1),
            found["A"].flatten(1),
            scale,
            tuple(found["A"].shape[1:]) if found["A"].dim() > 2 else (),
        )
        for module, found in factors.items()
    }
    return write_lora(layers, folder, format=format)


def load_adaptation(model: TextToImage, path: str | os.PathLike[str]) -> TextToImage:
    """Put saved weights into a clone of the model they were trained on.

    Args:
        model: The model that was attacked; it is not changed.
        path: A file that :func:`save_adaptation` wrote.

    Returns:
        The adapted clone. Its outputs are those of the model that was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, or it does not hold exactly the weights that
            have a place in the model, in their shapes.

    Example:
        >>> import tempfile
        >>> from immunize_ext.text_to_image.attacks import ATTACKS
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concepts
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> model = TextToImage(load_digits_pipeline())
        >>> concepts = digit_concepts(("three",)).concepts
        >>> adapted = ATTACKS["kv_fine_tuning"].adapt(model, concepts, steps=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adaptation(f"{folder}/adapted.safetensors", adapted)
        ...     loaded = load_adaptation(model, f"{folder}/adapted.safetensors")
        >>> loaded.digest() == adapted.model.digest() != model.digest()
        True
    """
    tensors, values = load_checkpoint(path, kind=_KIND, function="load_adaptation")
    clone = model.clone()
    freeze([clone.unet, clone.vae, *clone.text_encoders])
    part = clone.backbone.component
    tokens = [NewToken(clone, token) for token in values["tokens"]]
    rows = {name: row for token in tokens for name, row in token.named().items()}
    expected = set(rows) | set(values["names"])
    if values["lora"] is not None:
        expected |= {f"{part}.{name}" for name in inject(clone.unet, values["lora"])}
    if values.get("text_lora") is not None:  # files of earlier versions do not know it
        for index, encoder in with_attention(clone.text_encoders):
            found = inject(encoder, values["text_lora"])
            expected |= {f"text_encoder.{index}.{name}" for name in found}
    places = {f"{part}.{name}": p for name, p in clone.unet.named_parameters()} | rows
    for index, encoder in enumerate(clone.text_encoders):
        prefix = f"text_encoder.{index}."
        places |= {f"{prefix}{name}": p for name, p in encoder.named_parameters()}
    unknown = sorted(set(tensors) - set(places))
    missing = sorted(expected - set(tensors))
    if unknown or missing or not tensors:
        what = f"no place for {unknown[0]}" if unknown else f"nothing for {(missing or ['it'])[0]}"
        raise ValueError(
            f"load_adaptation: path must hold weights of this model, got {what} in "
            f"{os.fspath(path)}; load it into the model that was attacked"
        )
    for name, tensor in tensors.items():
        if tensor.shape != places[name].shape or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"load_adaptation: {name} must have shape {tuple(places[name].shape)} and be "
                f"finite, got {tuple(tensor.shape)} in {os.fspath(path)}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
    for token in tokens:
        token.settle()
    for module in (clone.unet, *clone.text_encoders):
        module.eval()
    return clone
