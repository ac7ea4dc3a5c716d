"""Files and folders that are written whole or not at all.

What is written stands beside its place under a name of its own until it is complete; the move is
one rename on one file system. A failure, Ctrl-C included, leaves what was there before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from immunize_ext import _load
from immunize_ext._extras import require_extra
from immunize_ext._version import __version__


def write_file(path: Path, content: bytes) -> None:
    """Write one file, replacing one that is there only once the new one is complete.

    Args:
        path: The file; its folder must exist.
        content: What it shall hold.

    Raises:
        OSError: If it cannot be written; an existing one is then untouched.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into that takes the place of ``path`` once all went well.

    Whether a folder that is there may be replaced is for the caller to say, before and, where
    someone may have been faster, at the end of the block.

    Args:
        path: The folder; its parents are made.

    Yields:
        The folder to write into.

    Raises:
        OSError: If it cannot be written; an existing one is then untouched.

    Example:
        >>> with tempfile.TemporaryDirectory() as outer:
        ...     with new_folder(Path(outer) / "run") as writing:
        ...         _ = (writing / "results.json").write_text("{}")
        ...     sorted(found.name for found in Path(outer).rglob("*"))
        ['results.json', 'run']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent))
    try:
        # mkdtemp makes it private; the result has the permissions of any new folder.
        umask = os.umask(0)
        os.umask(umask)
        writing.chmod(0o777 & ~umask)
        yield writing
        _replace(writing, path)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _replace(writing: Path, path: Path) -> None:
    if not path.exists():
        writing.rename(path)
        return
    # A folder that is not empty cannot be renamed over: move the old one aside first.
    aside = writing.with_suffix(".old")
    path.rename(aside)
    try:
        writing.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and values of tensors, in the order given.

    Args:
        named: Pairs of a name and a tensor on any device, in any layout.

    Returns:
        64 hexadecimal digits; equal for equal content only.

    Example:
        >>> x = torch.arange(6.0).reshape(2, 3)
        >>> tensor_digest([("x", x)]) == tensor_digest([("x", x.mT.contiguous().mT)])
        True
        >>> tensor_digest([("x", x)]) == tensor_digest([("x", x.mT)])
        False
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


# What marks a folder as one that we wrote and may replace.
RESULTS = "results.json"


def check_target(target: str | Path, *, force: bool) -> None:
    """Refuse a target that exists, before any work is done for it.

    Args:
        target: The run directory to be written.
        force: Whether an existing run directory may be replaced.

    Raises:
        FileExistsError: If the target exists and ``force`` is not given, or if it is anything but
            an empty folder or a run directory: ``force`` never deletes what this package did not
            write.
    """
    path = Path(target)
    for parent in path.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise FileExistsError(f"{parent} is a file, not a folder; choose another folder")
            break
    if not (path.exists() or path.is_symlink()):
        return
    ours = path.is_dir() and not path.is_symlink()
    ours = ours and ((path / RESULTS).is_file() or not any(path.iterdir()))
    if not ours:
        raise FileExistsError(f"{target} exists and is not a run directory; choose another folder")
    if not force:
        raise FileExistsError(
            f"{target} exists; choose another folder, or replace it with force (--force)"
        )


@contextmanager
def run_directory(target: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Give a folder to write into, and move it to its final name once all went well.

    The folder stands beside the target, so that the move is one rename on one file system. If the
    block raises, Ctrl-C included, it is removed and the target is as it was.

    Args:
        target: The run directory.
        force: Whether an existing run directory is replaced.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: As :func:`check_target`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with run_directory(Path(folder) / "run") as writing:
        ...         _ = (writing / "results.json").write_text("{}")
        ...     sorted(path.name for path in Path(folder).rglob("*"))
        ['results.json', 'run']
    """
    path = Path(target)
    check_target(path, force=force)
    with new_folder(path) as writing:
        yield writing
        check_target(path, force=force)  # someone may have been faster


def to_json(value: Any) -> Any:
    """Make a value fit for strict JSON: infinities as ``"inf"`` and ``"-inf"``, NaN as null."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, indented."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON document per line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(to_json(row), allow_nan=False, ensure_ascii=False) + "\n")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, the device, and whether the compiled operators were there."""
    status = _load.status()
    return {
        "immunize_ext": __version__,
        "compiled_operators": status.loaded,
        "compiled_operators_reason": status.reason,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


KINDS: dict[str, str] = {
    "kappa": "immunize_ext.probing.tmp_kind",
    "kappa-sweep": "immunize_ext.probing.tmp_kind",
    "mima": "immunize_ext.text_to_image.tmp_kind",
    "mima-sweep": "immunize_ext.text_to_image.tmp_kind",
}


def read_results(folder: str | Path) -> dict[str, Any]:
    """Read a run's results.

    Args:
        folder: The run directory.

    Returns:
        The content of ``results.json``.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it is of no kind that is known.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        unfinished = (Path(folder) / "sweep.json").is_file()
        hint = "the sweep is not finished; run its command again" if unfinished else "give a run"
        raise FileNotFoundError(f"{folder} must be a run directory with results.json; {hint}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got: {error}") from error
    kind = results.get("kind") if isinstance(results, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{path} must be of kind {', '.join(KINDS)}, got {kind!r}")
    found: dict[str, Any] = results
    return found
