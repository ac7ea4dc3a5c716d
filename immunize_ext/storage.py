"""Files and folders that are written whole or not at all, checkpoints, and what a run left.

What is written stands beside its place under a name of its own until it is complete; the move is
one step of the file system. A failure, Ctrl-C and ``kill -9`` included, leaves what was there
before, and what a killed process had begun is removed by the next one that writes there.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from immunize_ext import _load
from immunize_ext._extras import require_extra
from immunize_ext._version import __version__
from immunize_ext.settings import hint

# --- files and folders ----------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Write one file, replacing one that is there only once the new one is complete.

    Args:
        path: The file; its folder must exist.
        content: What it shall hold.

    Raises:
        OSError: If it cannot be written; an existing one is then untouched.
    """
    temporary = _beside(path)
    try:
        with temporary.open("xb") as file:
            _lock(file.fileno())
            file.write(content)
            file.flush()
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into that takes the place of ``path`` once all went well.

    Whether a folder that is there may be replaced is for the caller to say, before. One that
    appears during the work is never replaced: what was written is then kept beside it.

    Args:
        path: The folder; its parents are made.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: If something else stands at ``path`` by the end.
        OSError: If it cannot be written; an existing one is then untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as outer:
        ...     with new_folder(Path(outer) / "run") as writing:
        ...         _ = (writing / "results.json").write_text("{}")
        ...     sorted(found.name for found in Path(outer).rglob("*"))
        ['results.json', 'run']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(path)
    before = _identity(path)
    writing = _beside(path)
    writing.mkdir()
    handle = os.open(writing, os.O_RDONLY)
    try:
        _lock(handle)
        yield writing
        _take_place(writing, path, before)
    finally:
        # After an exchange, this name is that of the folder which was replaced.
        shutil.rmtree(writing, ignore_errors=True)
        os.close(handle)


def clear_abandoned(path: Path) -> None:
    """Remove what killed processes had begun to write in the place of ``path``.

    Whoever writes holds a lock on it, which the system drops when the process dies.
    """
    for text in glob.glob(str(path.with_name(f".{glob.escape(path.name)}-*.part"))):
        found = Path(text)
        with suppress(OSError):
            handle = os.open(found, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(found) if found.is_dir() else found.unlink()
            finally:
                os.close(handle)
    for text in sorted(glob.glob(str(path.with_name(f".{glob.escape(path.name)}-*.old")))):
        with suppress(OSError):  # see _take_place
            Path(text).rename(path) if _identity(path) is None else shutil.rmtree(text)


def _beside(path: Path) -> Path:
    # Not tempfile: its files and folders are private, whatever the umask says.
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")


def _lock(handle: int) -> None:
    with suppress(OSError):  # some network file systems have none; then nothing is ever abandoned
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _identity(path: Path) -> tuple[int, int] | None:
    """What stands at a path, whatever it is named; ``None`` for nothing or an empty folder."""
    try:
        found = path.lstat()
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            return None
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _take_place(writing: Path, path: Path, before: tuple[int, int] | None) -> None:
    if before is None:
        try:
            os.rename(writing, path)  # fails where there is anything but an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
    elif _exchange(writing, path):
        if _identity(writing) == before:
            return
        _exchange(writing, path)  # someone had put another one there
    elif _identity(path) == before:
        # Not in one step, where the file system has none: a process that is killed between the two
        # leaves the old one under a name from which clear_abandoned takes it back.
        aside = writing.with_suffix(".old")
        path.rename(aside)
        try:
            writing.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        return
    kept = next(
        name
        for number in range(2, 1_000_000)
        if not (name := path.with_name(f"{path.name}-{number}")).exists()
    )
    writing.rename(kept)
    raise FileExistsError(
        f"{path} appeared while this was being written and is left alone; this one stands in {kept}"
    )


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step; false where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = rename(here, os.fsencode(first), here, os.fsencode(second), exchange)
    return done == 0


# --- checksums ------------------------------------------------------------------------------------


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
    hasher = hashlib.sha256()
    for name, tensor in named:
        plain = tensor.detach().cpu().contiguous()
        hasher.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def digest(*parts: Any) -> str:
    """SHA-256 over everything that made a piece of work: what may be gone on from, and what not.

    Args:
        *parts: Plain values, tensors, modules (by their state), paths (by the content of the file
            or folder), dataclasses (by the name of the class and their fields), and lists, tuples
            and tables of these. The order of a table does not matter.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: If something is of another kind, whose content nobody could tell.

    Example:
        >>> digest({"steps": 3, "rate": 0.1}) == digest({"rate": 0.1, "steps": 3})
        True
        >>> digest(torch.zeros(2)) == digest(torch.zeros(3))
        False
    """
    return hashlib.sha256(_content(parts).encode()).hexdigest()


def _content(value: Any) -> str:
    """A text that is the same for the same content only."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, Tensor):
        return f"tensor:{tensor_digest([('', value)])}"
    if isinstance(value, torch.nn.Module):
        return f"module:{tensor_digest(sorted(value.state_dict().items()))}"
    if isinstance(value, np.ndarray):
        return f"array:{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, bytes):
        return f"bytes:{hashlib.sha256(value).hexdigest()}"
    if isinstance(value, Path):
        files = sorted(p for p in value.rglob("*") if p.is_file()) if value.is_dir() else [value]
        return "path:" + _content({str(p.relative_to(value)): p.read_bytes() for p in files})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return f"{type(value).__qualname__}:{_content(fields)}"
    if isinstance(value, Mapping):
        items = sorted((str(key), _content(item)) for key, item in value.items())
        return f"table:{items!r}"
    if isinstance(value, (Sequence, set, frozenset)):
        items_of = [_content(item) for item in value]
        return f"list:{sorted(items_of) if isinstance(value, (set, frozenset)) else items_of!r}"
    raise TypeError(
        f"digest: parts must be plain values, tensors, modules, paths or dataclasses, got a "
        f"{type(value).__name__}"
    )


# Beside what it vouches for, in the form that ``sha256sum -c`` reads.
SUMS = "SHA256SUMS"


def seal_folder(folder: Path) -> None:
    """Write the checksums of all files of a folder into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{_file_digest(path)}  {path.relative_to(folder)}\n" for path in files]
    write_file(folder / SUMS, "".join(lines).encode())


def check_sealed(folder: Path, *, function: str) -> None:
    """Refuse a folder with a file that is not as :func:`seal_folder` saw it.

    A folder without checksums, of an earlier version or of others, is taken as it is.

    Raises:
        ValueError: If a file is missing or has other content.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        wanted, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or _file_digest(path) != wanted:
            raise ValueError(
                f"{function}: {folder} must be as it was written, but {name or SUMS} is missing or "
                "damaged; make it again"
            )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- checkpoints ----------------------------------------------------------------------------------

_CHECKSUM = "sha256:"


def save_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    values: Mapping[str, Any],
) -> None:
    """Write tensors and plain values to one safetensors file, with a checksum over its content.

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
    metadata["checksum"] = _checksum(plain, metadata)
    payload: bytes = safetensors.save(plain, metadata=metadata)
    clear_abandoned(target)
    write_file(target, payload)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return _CHECKSUM + digest(dict(metadata), tensor_digest(sorted(tensors.items())))


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
        ValueError: If the file is no safetensors file, one of another kind, or damaged. Files of
            versions that wrote no checksum are taken as they are.
    """
    safetensors = require_extra("safetensors", extra="report", purpose="checkpoints")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{function}: path must name a file, got {os.fspath(path)}, which does not exist"
        )
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # what a damaged header raises depends on which byte it was
        raise ValueError(
            f"{function}: path must name a safetensors file, got {os.fspath(path)}: {error}"
        ) from error
    wanted = metadata.pop("checksum", None)
    # A flip in its own name must not make it look like a file that has none.
    hidden = any(value.startswith(_CHECKSUM) for value in metadata.values())
    if hidden or (wanted is not None and wanted != _checksum(tensors, metadata)):
        raise ValueError(
            f"{function}: path must name an undamaged file, but the content of {os.fspath(path)} "
            "is not what was written; make it again"
        )
    found = metadata.pop("kind", None)
    if found != kind:
        raise ValueError(
            f"{function}: path must hold {kind}, got {found or 'something else'} in "
            f"{os.fspath(path)}"
        )
    try:
        values = {name: json.loads(value) for name, value in metadata.items()}
    except ValueError as error:
        raise ValueError(
            f"{function}: path must hold {kind}, got values that are no JSON in {os.fspath(path)}"
        ) from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}, values


# --- run directories ------------------------------------------------------------------------------

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

    If the block raises, Ctrl-C included, what it wrote is removed and the target is as it was.

    Args:
        target: The run directory.
        force: Whether an existing run directory is replaced.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: As :func:`check_target` and :func:`new_folder`.

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


def work_folder(target: str | Path) -> Path:
    """Where a run keeps, until it is finished, what a run that is cut off can go on from."""
    path = Path(target)
    return path.with_name(f".{path.name}.work")


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


def write_whole(path: Path, value: Any) -> None:
    """Write one JSON document whole or not at all."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(path, text.encode())


def write_numbered(folder: Path, value: Any) -> Path:
    """Write one JSON document under the next free number: ``001.json``, ``002.json`` ...

    Args:
        folder: Where; made if it is not there, its parent must be.
        value: The document.

    Returns:
        The file.
    """
    folder.mkdir(exist_ok=True)
    number = 1
    while (path := folder / f"{number:03d}.json").exists():
        number += 1
    write_whole(path, value)
    return path


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


# --- results.json ---------------------------------------------------------------------------------

SCHEMA = 2
"""Of results.json: what :func:`read_results` gives, whatever wrote the file."""

KINDS = ("kappa", "kappa-sweep", "mima", "mima-sweep", "demo")


@dataclasses.dataclass(frozen=True)
class ManyRuns:
    """Several runs beside each other, in a folder of their own: a comparison, or a sweep's points.

    Attributes:
        content: What ``results.json`` holds.
        path: The folder.
        words: The same in a few lines.
    """

    content: dict[str, Any]
    path: Path
    words: str

    def results(self) -> dict[str, Any]:
        """Exactly what ``results.json`` holds."""
        return self.content

    def summary(self) -> str:
        """A few lines for a terminal."""
        return self.words


def read_results(folder: str | Path) -> dict[str, Any]:
    """Read a run's results, those of earlier versions included.

    Args:
        folder: The run directory.

    Returns:
        The content of ``results.json``, as :data:`SCHEMA` has it.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it is of no kind that is known, or of a later version.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        unfinished = (Path(folder) / "sweep.json").is_file()
        what = "the sweep is not finished; run its command again" if unfinished else "give a run"
        near = "" if unfinished else hint(Path(folder), _runs_near(Path(folder)))
        raise FileNotFoundError(f"{folder} must be a run directory with results.json; {what}{near}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}") from error
    kind = results.get("kind") if isinstance(results, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{path} must be of kind {', '.join(KINDS)}, got {kind!r}")
    try:
        return migrate(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must hold what a {kind} run wrote, got no {error}") from error


def _runs_near(folder: Path) -> list[str]:
    """Runs beside a folder, and inside it."""
    beside = (file.parent for file in sorted(folder.parent.glob(f"*/{RESULTS}")))
    inside = (file.parent for file in sorted(folder.glob(f"*/{RESULTS}")))
    return [str(found) for found in (*inside, *beside)]


def migrate(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results of an earlier version as :data:`SCHEMA` has them.

    What an earlier version did not write is not there afterwards either: whoever reads results has
    to do without it.

    Raises:
        ValueError: If they are of a later version.
    """
    found = dict(results)
    schema = found.get("schema", 1)
    if schema == 1:
        change = _FROM_SCHEMA_1.get(found["kind"])
        return {**(change(found) if change else found), "schema": SCHEMA}
    if schema != SCHEMA:
        raise ValueError(
            f"results.json must be of schema 1 to {SCHEMA}, got {schema!r}; it needs a newer "
            "immunize_ext"
        )
    return found


# Settings of a run that schema 1 had beside those of the method.
_OF_RUN = (
    *("data", "data_dir", "primary", "harmful", "method", "ridge", "seed", "size", "max_train"),
    *("loss", "base_budget", "limit"),
)


def _kappa_from_1(results: dict[str, Any]) -> dict[str, Any]:
    """Settings of the method in a table of their own; ``c`` was the strength."""
    request = results["request"]
    known = {"c": "strength", "batch": "batch_size"}
    settings = {
        known.get(name, name): value
        for name, value in request.items()
        if value is not None and name not in (*_OF_RUN, "attackers")
    }
    of_run = {name: request[name] for name in _OF_RUN if name in request}
    made = {**of_run, "attacks": request["attackers"], "settings": settings}
    knob = results.get("knob")
    if knob is not None:
        results["knob"] = {**knob, "name": known.get(knob["name"], knob["name"])}
    return {**results, "request": made}


def _demo_from_1(results: dict[str, Any]) -> dict[str, Any]:
    """The parts are results of their own, with their kinds."""
    whole = results.pop("mima_run", None)
    if whole is not None:
        results["mima"] = migrate({**whole, "mima": results["mima"], "kind": "mima"})
    results["kappa"] = {**results["kappa"], "kind": "kappa", "schema": SCHEMA}
    return results


_FROM_SCHEMA_1 = {"kappa": _kappa_from_1, "demo": _demo_from_1}
