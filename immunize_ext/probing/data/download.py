"""MNIST and House Prices from the network: fetched once, kept as the files that the loaders read.

What is fetched is checked and written whole or not at all, so that a broken download leaves
nothing behind that would be read next time.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import struct
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from immunize_ext._extras import MissingExtraError, require_extra

MnistSource = Literal["auto", "openml", "torchvision"]


MNIST_ID = 554  # "mnist_784", version 1


HOUSE_PRICES_ID = 42165  # "house_prices": 1460 rows of Ames, as on Kaggle


MNIST_FILES = tuple(
    f"{stem}-{kind}-ubyte.gz"
    for stem in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)


# The splits of the condition-number paper by zoning class.
_ZONES = {"D1.csv": ("RM", "FV", "RH", "C (all)"), "D2.csv": ("RL",)}


_TRAIN, _TEST, _PIXELS = 60000, 10000, 784


def cache_folder() -> Path:
    """Where fetched data is kept: ``$XDG_CACHE_HOME/immunize_ext``, or that in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "immunize_ext"


def fetch_mnist(folder: str | Path | None = None, *, source: MnistSource = "auto") -> Path:
    """Get MNIST's four gzipped IDX files, downloading them unless they are there.

    Args:
        folder: Where they are kept; the folder ``mnist`` of :func:`cache_folder` when omitted.
        source: ``"openml"`` (through scikit-learn), ``"torchvision"``, or ``"auto"``: the first of
            them that is installed and answers.

    Returns:
        The folder, for :func:`immunize_ext.probing.data.mnist_task`.

    Raises:
        ConnectionError: If no source answers; the message gives the reason of each.
        MissingExtraError: If the library of the source is not installed.
        ValueError: If ``source`` is unknown or what arrives is not MNIST.
        OSError: If the folder cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in MNIST_FILES:
        ...         (Path(folder) / name).touch()
        ...     fetch_mnist(folder) == Path(folder)  # they are there: nothing is fetched
        True
    """
    sources = {"openml": _mnist_openml, "torchvision": _mnist_torchvision}
    if source != "auto" and source not in sources:
        raise ValueError(
            f"fetch_mnist: source must be 'auto', 'openml' or 'torchvision', got {source!r}"
        )
    target = cache_folder() / "mnist" if folder is None else Path(folder)
    if all((target / name).is_file() for name in MNIST_FILES):
        return target
    failures = []
    for name, fetch in sources.items():
        if source not in ("auto", name):
            continue
        try:
            images, labels = fetch()
        except (MissingExtraError, ConnectionError) as error:
            if source != "auto":
                raise
            failures.append(f"{name}: {error}")
            continue
        _write_mnist(target, name, images, labels)
        return target
    raise ConnectionError(
        f"fetch_mnist: MNIST must be downloadable, got no answer ({'; '.join(failures)}); connect "
        f"to a network, or put {MNIST_FILES[0]} and the three other files into a folder and give it"
    )


def fetch_house_prices(folder: str | Path | None = None) -> Path:
    """Get D1.csv and D2.csv of the condition-number paper, from OpenML unless they are there.

    D1 has the rows of the zoning classes RM, FV, RH and C (all), D2 those of RL, both in the order
    of the house's ``Id``.

    Args:
        folder: Where they are kept; the folder ``house_prices`` of :func:`cache_folder` when
            omitted.

    Returns:
        The folder, for :func:`immunize_ext.probing.data.house_prices_task`.

    Raises:
        ConnectionError: If OpenML does not answer.
        MissingExtraError: If scikit-learn or pandas is not installed.
        ValueError: If what arrives is not House Prices.
        OSError: If the folder cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("D1.csv", "D2.csv"):
        ...         (Path(folder) / name).touch()
        ...     fetch_house_prices(folder) == Path(folder)  # they are there: nothing is fetched
        True
    """
    target = cache_folder() / "house_prices" if folder is None else Path(folder)
    if all((target / name).is_file() for name in _ZONES):
        return target
    require_extra("pandas", extra="data", purpose="fetch_house_prices")
    advice = "or give the folder with D1.csv and D2.csv of the published splits"
    bunch = _openml("fetch_house_prices", HOUSE_PRICES_ID, advice, as_frame=True)
    frame = bunch.frame
    wanted = {"MSZoning", "LotArea", "SalePrice"}
    if not wanted <= set(frame.columns):
        raise ValueError(
            "fetch_house_prices: the data set must have the columns MSZoning, LotArea and "
            f"SalePrice, got {len(frame.columns)} others; {advice}"
        )
    frame = frame.copy()
    if "Id" in frame.columns:
        frame = frame.sort_values("Id", kind="stable")
    else:
        # An identifier that OpenML leaves out; rows are in its order.
        frame.insert(0, "Id", range(1, len(frame) + 1))
    ordered = ["Id", *(c for c in frame.columns if c not in ("Id", "SalePrice")), "SalePrice"]
    frame = frame[ordered]
    zones = frame["MSZoning"].astype(str)
    files = {}
    for name, members in _ZONES.items():
        part = frame[zones.isin(members)]
        if len(part) == 0:
            raise ValueError(
                f"fetch_house_prices: the data set must have rows of MSZoning {', '.join(members)},"
                f" got none; {advice}"
            )
        files[name] = _csv(part)
    _write(target, files)
    return target


def _openml(function: str, data_id: int, advice: str, *, as_frame: bool) -> Any:
    """Ask OpenML through scikit-learn, which keeps what it got."""
    datasets = require_extra("sklearn.datasets", extra="data", purpose=function)
    try:
        return datasets.fetch_openml(data_id=data_id, as_frame=as_frame, parser="auto")
    # A ValueError: OpenML's own errors, and checksums that do not fit.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(
            f"{function}: OpenML must be reachable for data set {data_id}, got: {reason}; connect "
            f"to a network, {advice}"
        ) from error


def _mnist_openml() -> tuple[NDArray[Any], NDArray[Any]]:
    bunch = _openml("fetch_mnist", MNIST_ID, "or give a folder of IDX files", as_frame=False)
    return np.asarray(bunch.data), np.asarray(bunch.target).astype(np.int64)


def _mnist_torchvision() -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        datasets = require_extra(
            "torchvision.datasets", extra="backbones", purpose="fetch_mnist from torchvision"
        )
        with tempfile.TemporaryDirectory() as root:
            parts = [datasets.MNIST(root, train=train, download=True) for train in (True, False)]
            images = np.concatenate([part.data.numpy() for part in parts])
            labels = np.concatenate([part.targets.numpy() for part in parts])
    except MissingExtraError:
        raise
    # A RuntimeError: files that none of its mirrors has, or operators of another torch.
    except (OSError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(
            f"fetch_mnist: torchvision must be able to download MNIST, got: {reason}; connect to a "
            "network, or give a folder of IDX files"
        ) from error
    return images.reshape(len(images), -1), labels


def _write_mnist(
    target: Path, source: str, images: NDArray[Any], labels: NDArray[np.int64]
) -> None:
    count = _TRAIN + _TEST
    good = (
        images.shape == (count, _PIXELS)
        and labels.shape == (count,)
        and bool(np.isin(labels, range(10)).all())
        and bool((images == np.clip(np.round(images), 0, 255)).all())
    )
    if not good:
        raise ValueError(
            f"fetch_mnist: {source} must give {count} images of {_PIXELS} pixels from 0 to 255 "
            f"with digits, got {images.shape} and {labels.shape}; give a folder of IDX files"
        )
    pixels = images.reshape(count, 28, 28).astype(np.uint8)
    digits = labels.astype(np.uint8)
    parts = (pixels[:_TRAIN], digits[:_TRAIN], pixels[_TRAIN:], digits[_TRAIN:])
    _write(target, {name: _idx(part) for name, part in zip(MNIST_FILES, parts, strict=True)})


def _idx(values: NDArray[np.uint8]) -> bytes:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    # A fixed time, so that equal data gives equal files.
    return gzip.compress(header + values.tobytes(), compresslevel=6, mtime=0)


def _csv(frame: Any) -> bytes:
    """A table as CSV; a missing value is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(frame.columns)
    missing = frame.isna().to_numpy()
    for row, holes in zip(frame.astype(object).to_numpy(), missing, strict=True):
        writer.writerow("" if hole else cell for cell, hole in zip(row, holes, strict=True))
    return text.getvalue().encode()


def _write(target: Path, files: dict[str, bytes]) -> None:
    """Write files beside their place, then move them there, the last one last."""
    target.mkdir(parents=True, exist_ok=True)
    made: list[tuple[Path, Path]] = []
    try:
        for name, content in files.items():
            handle, temporary = tempfile.mkstemp(dir=target, prefix=f".{name}.")
            made.append((Path(temporary), target / name))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)  # mkstemp makes it private
        for temporary_path, final in made:
            os.replace(temporary_path, final)
    finally:
        for temporary_path, _ in made:
            temporary_path.unlink(missing_ok=True)
