"""Image files, read as they were meant: one reader for folders of classes and of concepts.

A file is turned upright by its EXIF orientation, laid on white where it is transparent, and brought
from 16 bits a channel to 8 by its scale. Other readers get all three silently wrong.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from immunize_ext._extras import require_extra

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

# Where Pillow itself gives up: more would take over half a gigabyte. A file of a few kilobytes can
# claim any size.
MAX_PIXELS = 178_956_970


def image_files(folder: str | Path, *, recursive: bool = False) -> list[Path]:
    """Image files of a folder, in alphabetical order.

    Hidden files are left out: ``._photo.png`` is what macOS leaves beside ``photo.png`` on foreign
    disks, and no image.

    Args:
        folder: The folder.
        recursive: Whether to look into its subfolders, hidden ones left out.

    Returns:
        Paths that begin with ``folder``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     for file in ("b.png", "a.JPG", "._b.png", "notes.txt"):
        ...         Path(name, file).touch()
        ...     [path.name for path in image_files(name)]
        ['a.JPG', 'b.png']
    """
    root = Path(folder)
    found = root.rglob("*") if recursive else root.iterdir()
    return sorted(
        path
        for path in found
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )


def read_rgb(path: str | Path, *, function: str = "read_rgb") -> Any:
    """Read an image file as a Pillow image of mode RGB.

    Args:
        path: The file. Of an animation, the first frame counts.
        function: Name of the caller, for messages.

    Returns:
        A ``PIL.Image.Image``: upright, on white, 8 bits a channel.

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtraError: If Pillow is not installed.
        ValueError: If the file is no image, has more than 178,956,970 pixels, or holds real
            numbers, whose scale nobody knows.
    """
    pillow = require_extra("PIL.Image", extra="diffusion", purpose="reading images")
    operations = require_extra("PIL.ImageOps", extra="diffusion", purpose="reading images")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{function}: path must name an image, got {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # below our own limit
            with pillow.open(path) as file:
                width, height = file.size
                if width * height > MAX_PIXELS:
                    raise pillow.DecompressionBombError
                return _on_white(_eight_bits(operations.exif_transpose(file), pillow), pillow)
    except pillow.DecompressionBombError:
        raise ValueError(
            f"{function}: {path} must have at most {MAX_PIXELS:,} pixels, got more; scale it down"
        ) from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{function}: {path} must be an image, got: {reason}") from error


def _eight_bits(image: Any, pillow: Any) -> Any:
    """Grey values of 16 bits on the scale of 8; Pillow itself would cut them off at 255."""
    if image.mode == "F":
        raise ValueError("real numbers, which have no scale; save it with 8 or 16 bits a channel")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("more than 16 bits a channel; save it with 8 or 16")
    return pillow.fromarray((values / 257.0).round().astype(np.uint8))


def _on_white(image: Any, pillow: Any) -> Any:
    """RGB with what is transparent replaced by white, as a page shows it."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", layer.size, "white"), layer).convert("RGB")


def content_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits: what tells whether it changed."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_pictures(first: Iterable[Path], second: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Files of two lists that hold the same bytes, whatever they are called.

    Args:
        first: Files of one split.
        second: Files of another.

    Returns:
        Pairs, one for each file of ``second`` that ``first`` has as well; empty where the splits
        share no picture.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     a, b, c = (Path(name, letter) for letter in "abc")
        ...     _ = a.write_bytes(b"cat"), b.write_bytes(b"dog"), c.write_bytes(b"cat")
        ...     [(x.name, y.name) for x, y in same_pictures([a, b], [c])]
        [('a', 'c')]
    """
    known: dict[str, Path] = {}
    for path in first:
        known.setdefault(content_digest(path), path)
    pairs = ((known.get(content_digest(path)), path) for path in second)
    return [(found, path) for found, path in pairs if found is not None]
