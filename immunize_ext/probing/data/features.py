"""Any feature matrix from a file: ``.npz`` of numpy or ``.safetensors``."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from immunize_ext._extras import require_extra
from immunize_ext.probing.data.digits import check_seed
from immunize_ext.probing.data.task import Task

_PARTS = ("x_train", "y_train", "x_test", "y_test")


_WHOLE = ("x", "y")


# What a file of features ends in.
FILES = (".npz", ".safetensors")

# What reading a damaged archive raises: by zipfile (other versions and methods, a password that it
# takes a bit for), by zlib, and by numpy where a header asks for another array.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError),
    *(ValueError, TypeError, AttributeError, KeyError, OverflowError, MemoryError),
)


def _read_npz(path: Path, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        # Without allow_pickle, so that a file cannot run code.
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files if name in wanted}
    except _DAMAGED as error:
        raise ValueError(
            f"features_task: path must name an .npz file of numeric arrays, got {path}: {error}"
        ) from error


def _are_names(targets: NDArray[Any]) -> bool:
    return targets.dtype.kind in "SU"


def target_names(path: str | Path) -> tuple[str, ...]:
    """Names of the classes of a file whose targets are texts, sorted; none for numbers.

    Args:
        path: As for :func:`features_task`. The features in it are not read.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return ()
    found = _read_npz(path, _PARTS[1::2] + _WHOLE[1:]).values()
    texts = {str(name) for targets in found if _are_names(targets) for name in targets.astype(str)}
    return tuple(sorted(texts))


def _tensors_of_npz(path: Path) -> dict[str, Tensor]:
    """Targets that are names become the ids that :func:`target_names` puts them at."""
    found, names = _read_npz(path, _PARTS + _WHOLE), np.asarray(target_names(path))
    for name, array in found.items():
        if name.startswith("y") and _are_names(array):
            found[name] = np.searchsorted(names, array.astype(str))
    try:
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in found.items()}
    except TypeError as error:  # texts, dates
        raise ValueError(
            f"features_task: path must name an .npz file of numeric arrays, got {path}: {error}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = require_extra("safetensors", extra="report", purpose="features in .safetensors")
    found = {}
    try:
        with safetensors.safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if name in _PARTS + _WHOLE:
                    found[name] = tensors.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"features_task: path must name a whole safetensors file, got {path}: {error}"
        ) from error
    return found


def features_task(
    path: str | Path,
    *,
    name: str | None = None,
    train_fraction: float = 0.6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Task:
    """Load a task from a file of features and targets, of a backbone for instance.

    The file holds either ``x_train``, ``y_train``, ``x_test`` and ``y_test``, or ``x`` and ``y``,
    which are shuffled and split. Other entries are left alone. Features that are integers become
    floating point, targets that are integers are class ids (:meth:`Task.of`); nothing is
    standardised.

    Args:
        path: File whose name ends in ``.npz`` or ``.safetensors``; features are ``(n, p)``, targets
            ``(n,)``: -1 and +1, or 0 and 1, which becomes the same, for two classes; integer ids
            for more; or, in an ``.npz``, names of classes.
        name: Name of the task; that of the file when omitted.
        train_fraction: Share of the samples to train on, for a file of ``x`` and ``y``.
        seed: Seed of that split.
        dtype: dtype of the task's tensors.

    Returns:
        The task.

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtraError: If a safetensors file is given and safetensors is not installed.
        ValueError: If the file is of another kind, damaged or lacks an entry, an entry does not
            fit, or an argument is out of range.

    Note:
        Deterministic given ``seed``; torch's global random state is neither read nor changed. No
        code in the file is run.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "toy.npz"
        ...     np.savez(path, x=np.eye(5), y=np.array([1, -1, 1, -1, 1]))
        ...     task = features_task(path)
        >>> task.name, tuple(task.x_train.shape), task.is_classification
        ('toy', (3, 5), True)
    """
    parts = load_features(path, train_fraction=train_fraction, seed=seed, dtype=dtype)
    title = Path(path).stem if name is None else name
    if names := target_names(path):
        named = np.asarray(names)
        x_train, y_train, x_test, y_test = parts
        return Task.of((x_train, named[y_train], x_test, named[y_test]), title)
    values = set(torch.cat([parts[1], parts[3]]).unique().tolist())
    if values == {0.0, 1.0}:
        # As numbers they would be a regression task, whose attackers have to learn the mean as
        # well: the same features then look many times slower to misuse.
        parts = parts[0], 2.0 * parts[1] - 1.0, parts[2], 2.0 * parts[3] - 1.0
    return Task.of(parts, title)


def _targets(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Class ids as they are, numbers in the dtype of the task."""
    return y.to(dtype) if y.is_floating_point() else y


def load_features(
    path: str | Path,
    *,
    train_fraction: float = 0.6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and targets of a file as they stand there; as :func:`features_task` otherwise.

    Names of classes are ids here, in the order of :func:`target_names`.

    Returns:
        Inputs and targets to train on, and to test on.
    """
    path = Path(path)
    check_seed("features_task", seed)
    readers = {".npz": _tensors_of_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise ValueError(
            f"features_task: path must end in {' or '.join(readers)}, got {path.name!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"features_task: path must name a file, got {path}, which is not there"
        )
    found = readers[path.suffix](path)
    wrong = [key for key, value in found.items() if value.is_complex()]
    if wrong:
        raise ValueError(f"features_task: {wrong[0]} must be real, got {found[wrong[0]].dtype}")
    if all(part in found for part in _PARTS):
        x, x_test = (found[part].to(dtype) for part in _PARTS[::2])
        y, y_test = (_targets(found[part], dtype) for part in _PARTS[1::2])
        return x, y, x_test, y_test
    if not all(part in found for part in _WHOLE):
        raise ValueError(
            f"features_task: the file must hold {', '.join(_PARTS)}, or {' and '.join(_WHOLE)}, "
            f"got {', '.join(sorted(found)) or 'none of them'}"
        )
    x, y = found["x"].to(dtype), _targets(found["y"], dtype)
    if x.dim() != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"features_task: y must have shape (n,) for x of shape (n, p), got {tuple(y.shape)} "
            f"and {tuple(x.shape)}"
        )
    # Asked first, so that NaN is refused here and not by round.
    cut = round(train_fraction * len(y)) if 0.0 < train_fraction < 1.0 else 0
    if not 0 < cut < len(y):
        raise ValueError(
            f"features_task: train_fraction must leave samples to train and to test on, got "
            f"{train_fraction} of {len(y)} samples"
        )
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return x[:cut], y[:cut], x[cut:], y[cut:]
