"""Files and folders that are written whole or not at all.

What is written stands beside its place under a name of its own until it is complete; the move is
one rename on one file system. A failure, Ctrl-C included, leaves what was there before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
