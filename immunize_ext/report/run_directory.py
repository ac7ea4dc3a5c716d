"""Run directories: complete under their final name, or not there at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from immunize_ext._files import new_folder

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
