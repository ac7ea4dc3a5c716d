"""Checkpoints: safetensors files, written whole or not at all, read without running any code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext._files import write_file


def save_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    values: Mapping[str, Any],
) -> None:
    """Write tensors and plain values to one safetensors file.

    Args:
        path: Target file; replaced if it exists, and only once the new one is complete.
        tensors: Name to tensor.
        kind: What the file holds, with a version; :func:`load_checkpoint` asks for it.
        values: Anything that JSON can say.

    Raises:
        MissingExtraError: If safetensors is not installed.
        OSError: If the file cannot be written.
    """
    safetensors = require_extra("safetensors.torch", extra="report", purpose="checkpoints")
    target = Path(path)
    # One metadata entry a value: safetensors knows strings only.
    metadata = {name: json.dumps(value) for name, value in values.items()} | {"kind": kind}
    # A copy each, since safetensors refuses tensors that share memory.
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    payload: bytes = safetensors.save(plain, metadata=metadata)
    write_file(target, payload)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    kind: str,
    function: str,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote.

    Args:
        path: The file.
        kind: What it must hold.
        function: Name of the caller, for messages.
        device: Where the tensors shall live.

    Returns:
        The tensors and the values.

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtraError: If safetensors is not installed.
        ValueError: If the file is no safetensors file, or one of another kind.
    """
    safetensors = require_extra("safetensors", extra="report", purpose="checkpoints")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{function}: path must name a file, got {os.fspath(path)}, which does not exist"
        )
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            metadata = dict(file.metadata() or {})
            found = metadata.pop("kind", None)
            if found != kind:
                raise ValueError(
                    f"{function}: path must hold {kind}, got {found or 'something else'} in "
                    f"{os.fspath(path)}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{function}: path must name a safetensors file, got {os.fspath(path)}: {error}"
        ) from error
    return tensors, {name: json.loads(value) for name, value in metadata.items()}
