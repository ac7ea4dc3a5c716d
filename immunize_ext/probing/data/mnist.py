"""MNIST from the four gzipped IDX files of a folder, which are downloaded where none is given."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from immunize_ext.probing.data.digits import (
    check_digits,
    check_seed,
    class_names,
    describe_digits,
    select_digits,
)
from immunize_ext.probing.data.download import fetch_mnist
from immunize_ext.probing.data.task import Task

# Mean and standard deviation of the training pixels on a scale of 0 to 1, as the field uses them.
PIXEL_MEAN = 0.1307


PIXEL_STD = 0.3081


# The largest of the files has 47 MB: what unpacks to more is something else, and a few kilobytes of
# gzip can unpack to any size.
_MOST_BYTES = 1 << 28


# An IDX file starts with two zero bytes, a type code (8: unsigned byte), the number of dimensions,
# then each dimension as a big-endian 32-bit integer.
_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes.

    Args:
        path: The file.

    Returns:
        Its array, in the shape that the file states.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete gzipped IDX file of unsigned bytes, or unpacks to more
            than 256 MiB.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with gzip.open(f"{folder}/two.gz", "wb") as file:
        ...         _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 2, 40, 50]))  # header, size, numbers
        ...     read_idx(f"{folder}/two.gz").tolist()
        [40, 50]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"read_idx: path must name a gzipped IDX file, got {path}, which does not exist; "
            "download the four MNIST files into one folder and give that folder"
        )
    try:
        with gzip.open(path) as file:
            content = file.read(_MOST_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"read_idx: path must name a gzipped IDX file, got {path}, which gzip cannot read; "
            "download it again"
        ) from error
    if len(content) > _MOST_BYTES:
        raise ValueError(
            f"read_idx: {path} must unpack to at most {_MOST_BYTES >> 20} MiB, got more; download "
            "it again"
        )
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise ValueError(
            f"read_idx: path must name an IDX file of unsigned bytes, got {path} with header "
            f"{content[:4].hex()}; download it again"
        )
    dims = content[3]
    start = 4 + 4 * dims
    if len(content) < start:
        raise ValueError(f"read_idx: {path} must hold {dims} sizes, got a file that ends before")
    shape = struct.unpack(f">{dims}I", content[4:start])
    data = np.frombuffer(content, dtype=np.uint8, offset=start)
    if data.size != int(np.prod(shape)):
        raise ValueError(
            f"read_idx: {path} must hold {shape} bytes as its header says, got {data.size}; "
            "download it again"
        )
    return data.reshape(shape)


def _read_part(
    folder: str | Path | None, train: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    folder = fetch_mnist() if folder is None else folder
    stem = "train" if train else "t10k"
    images = read_idx(Path(folder) / f"{stem}-images-idx3-ubyte.gz")
    labels = read_idx(Path(folder) / f"{stem}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"load_mnist: folder must hold 28 x 28 images with one label each, got images "
            f"{images.shape} and labels {labels.shape} in {folder}"
        )
    return images, labels.astype(np.int64)


def _standardise(images: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    block = 28 // size
    pooled = images.reshape(-1, size, block, size, block).mean(axis=(2, 4), dtype=np.float64)
    return ((pooled / 255.0 - PIXEL_MEAN) / PIXEL_STD).reshape(-1, size * size)


def _check_size(function: str, size: int) -> None:
    if size not in (28, 14, 7):
        raise ValueError(f"{function}: size must be 28, 14 or 7, got {size}")


def load_mnist(
    folder: str | Path | None = None, *, train: bool = True, size: int = 28
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Load MNIST images, standardised, and their digits.

    Args:
        folder: Folder with ``train-images-idx3-ubyte.gz`` and the three other files;
            :func:`~immunize_ext.probing.data.fetch_mnist` gets them when omitted.
        train: The 60000 training images, or the 10000 test images.
        size: Side of the images: 28, or 14 or 7 by averaging blocks of pixels.

    Returns:
        Images of shape ``(n, size * size)`` and labels of shape ``(n,)``.

    Raises:
        FileNotFoundError: If a file is missing.
        ConnectionError: If no folder is given and there is no network.
        ValueError: If a file is damaged or ``size`` is not one of the three.

    Example:
        >>> import tempfile
        >>> header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 28, 28)
        >>> with tempfile.TemporaryDirectory() as folder:  # two images, one white and one black
        ...     with gzip.open(f"{folder}/train-images-idx3-ubyte.gz", "wb") as file:
        ...         _ = file.write(header + bytes([255] * 784 + [0] * 784))
        ...     with gzip.open(f"{folder}/train-labels-idx1-ubyte.gz", "wb") as file:
        ...         _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 8]))
        ...     images, labels = load_mnist(folder, size=7)
        >>> images.shape, labels.tolist(), bool(images[0].min() > images[1].max())
        ((2, 49), [3, 8], True)
    """
    _check_size("load_mnist", size)
    images, labels = _read_part(folder, train)
    return _standardise(images, size), labels


def mnist_task(
    folder: str | Path | None,
    positive: Sequence[int],
    negative: Sequence[int],
    *others: Sequence[int],
    size: int = 28,
    seed: int = 0,
    max_train: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Task:
    """Make the task of telling some MNIST digits from others, on MNIST's own split.

    Args:
        folder: Folder with the four gzipped IDX files; ``None`` downloads them once
            (:func:`~immunize_ext.probing.data.fetch_mnist`).
        positive: Digits labelled +1.
        negative: Digits labelled -1.
        others: Further groups of digits: each group is a class of its own then, in this order.
        size: Side of the images, 28, 14 or 7.
        seed: Seed of the order of the images, hence of what ``max_train`` keeps.
        max_train: Number of training images to keep; all when omitted.
        dtype: dtype of the task's tensors.

    Returns:
        The task; inputs have shape ``(n, size * size)``.

    Raises:
        FileNotFoundError: If a file is missing.
        ConnectionError: If no folder is given and there is no network.
        ValueError: If a file is damaged or an argument is out of range.

    Note:
        Deterministic given ``seed``; torch's random state is neither read nor changed.

    Example:
        >>> import tempfile
        >>> header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 28, 28)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for part in ("train", "t10k"):  # two images each, a white three and a black eight
        ...         with gzip.open(f"{folder}/{part}-images-idx3-ubyte.gz", "wb") as file:
        ...             _ = file.write(header + bytes([255] * 784 + [0] * 784))
        ...         with gzip.open(f"{folder}/{part}-labels-idx1-ubyte.gz", "wb") as file:
        ...             _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 8]))
        ...     task = mnist_task(folder, [3], [8], size=7)
        >>> task.x_train.shape, sorted(task.y_train.tolist())
        (torch.Size([2, 49]), [-1.0, 1.0])
    """
    sides = tuple(map(tuple, (positive, negative, *others)))
    check_digits("mnist_task", *sides)
    check_seed("mnist_task", seed)
    _check_size("mnist_task", size)
    if max_train is not None and max_train < 1:
        raise ValueError(f"mnist_task: max_train must be at least 1, got {max_train}")
    parts = []
    for train in (True, False):
        # Selected before they are standardised: all of MNIST takes 376 MB in float64.
        images, targets = select_digits(*_read_part(folder, train), *sides, seed=seed)
        if train and max_train is not None:
            images, targets = images[:max_train], targets[:max_train]
        parts.append(torch.from_numpy(_standardise(images, size)).to(dtype))
        parts.append(torch.from_numpy(targets).to(dtype))
    x_train, y_train, x_test, y_test = parts
    name = "MNIST " + describe_digits(*sides)
    return Task(name, x_train, y_train, x_test, y_test, class_names(*sides))
