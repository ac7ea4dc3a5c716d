"""A pipeline's folder, looked at before a library reads it: no code, no pickles, known classes.

diffusers runs Python files that ``model_index.json`` names beside it (without being asked in 0.36
and 0.37), and transformers offers to run what ``auto_map`` names. A folder that asks for either is
refused, whatever the installed versions would do.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from immunize_ext._extras import require_extra
from immunize_ext.text_to_image.backbones import COMPONENTS

INDEX = "model_index.json"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def check_folder(function: str, folder: Path) -> None:
    """Refuse a pipeline that is anything but weights and settings of known classes.

    Args:
        function: Who asks; stands in errors.
        folder: A folder with ``model_index.json``.

    Raises:
        ValueError: If it holds Python files, names classes that are not of diffusers or
            transformers, or asks for remote code.
    """
    refuse_code(function, folder)
    diffusers = require_extra("diffusers", extra="diffusion", purpose="text-to-image models")
    index = _json(function, folder / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or not isinstance(getattr(diffusers, kind, None), type):
        raise ValueError(
            f"{function}: {folder / INDEX} must name a pipeline class of diffusers, got {kind!r}; "
            "custom pipelines are not run"
        )
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        known = len(entry) == 2 and (entry == [None, None] or _is_known(*entry))
        if not known:
            raise ValueError(
                f"{function}: {part} in {folder / INDEX} must be a class of diffusers or "
                f"transformers, got {entry!r}; custom classes are not run"
            )


def _is_known(library: object, name: object) -> bool:
    if not isinstance(library, str) or not isinstance(name, str):
        return False
    if library in ("diffusers", "transformers"):
        return hasattr(require_extra(library, extra="diffusion", purpose="models"), name)
    pipelines = require_extra("diffusers.pipelines", extra="diffusion", purpose="models")
    # Such as ["stable_diffusion", "StableDiffusionSafetyChecker"].
    return library.isidentifier() and hasattr(getattr(pipelines, library, None), name)


def refuse_code(function: str, folder: Path) -> None:
    """Refuse a folder with Python files or settings that ask for some.

    Raises:
        ValueError: Naming the file.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".py", ".pyc"):
            raise ValueError(f"{function}: {folder} must hold no code, got {file}; remove it")
        if _is_settings(file) and "auto_map" in _json(function, file):
            raise ValueError(
                f"{function}: {file} must not ask for code (auto_map), which is never run; use a "
                "model of a class that diffusers or transformers has"
            )


def _is_settings(file: Path) -> bool:
    return file.name == INDEX or file.name.endswith("config.json")


def _json(function: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{function}: {file} must be JSON, got: {error}") from error
    return found if isinstance(found, dict) else {}


def denoiser_folder(folder: Path) -> Path:
    """Where a pipeline's folder keeps its denoiser, which decides variant and data type."""
    places = [folder / name for name in COMPONENTS]
    return next((place for place in places if place.is_dir()), places[0])


def weights_variant(function: str, folder: Path, wanted: str | None) -> str | None:
    """Which files of weights to read, as ``variant`` of diffusers.

    Args:
        function: Who asks; stands in errors.
        folder: The pipeline.
        wanted: What was asked for; the only one there is when ``None``.

    Returns:
        The variant; ``None`` for files without one.

    Raises:
        ValueError: If the denoiser has no safetensors files, or none of that variant.
    """
    part = denoiser_folder(folder)
    names = [file.name for file in sorted(part.glob("*.safetensors"))]
    found = sorted({_variant_of(name) for name in names}, key=lambda v: v or "")
    if not found:
        if any(part.glob("*.bin")):
            raise ValueError(
                f"{function}: {part} must hold safetensors files, got .bin, which are pickles and "
                "are not read; load it in diffusers and save it with safe_serialization=True"
            )
        return wanted  # diffusers says what is missing
    if wanted is not None and wanted not in found:
        there = ", ".join(repr(variant) for variant in found)
        raise ValueError(f"{function}: variant must be one of {there} in {part}, got {wanted!r}")
    return wanted if wanted is not None or None in found else found[0]


def _variant_of(name: str) -> str | None:
    """``fp16`` of ``diffusion_pytorch_model.fp16-00001-of-00002.safetensors``."""
    stem = name.removesuffix(".safetensors")
    stem = stem.partition("-0")[0]
    return stem.partition(".")[2] or None


def saved_dtype(folder: Path, variant: str | None) -> torch.dtype | None:
    """Data type that the denoiser's weights were saved in; ``None`` if the files do not say."""
    safetensors = require_extra("safetensors", extra="diffusion", purpose="model weights")
    for file in sorted(denoiser_folder(folder).glob("*.safetensors")):
        if _variant_of(file.name) != variant:
            continue
        with safetensors.safe_open(os.fspath(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                return _DTYPES.get(opened.get_slice(name).get_dtype())
    return None


def forget_places(folder: Path) -> None:
    """Take the local paths that libraries note in settings out of a written pipeline."""
    for file in filter(_is_settings, folder.rglob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.pop("_name_or_path", None) is not None:
            text = json.dumps(found, indent=2, sort_keys=True) + "\n"
            file.write_text(text, encoding="utf-8")
