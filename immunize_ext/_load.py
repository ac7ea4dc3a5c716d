"""Loading of the compiled part, ``immunize_ext._C``.

The package works without it: operators then take their torch-only route and say so once.  What
is installed is judged from the build record ``_build_info.json`` *before* the binary is touched,
because a library that was built for another torch may end the process when it is loaded.

torch promises no binary interface across releases, and changes it with every minor one: of the 234
symbols that a library built for 2.13 takes from torch, 8 are missing in 2.12 and 1 in 2.14. Patch
releases repair what is inside: 2.12.0 and 2.12.1, and 2.14.0 and 2.14.1, have the same headers but
for the version number, and export the same symbols, 50,734 and 48,393 of them.  So a library serves
every release of the minor that it was built for.  Versions of development builds and of those of
others (``2.14.0a0+git1a2b``, ``2.13.0+rocm6``) say nothing of the kind: there the whole text has to
be the same.

CPU kernels link to no CUDA library and serve torch with and without CUDA alike: the headers of both
builds of 2.13.0 are the same but for three that say how it was built, and the one with CUDA exports
every symbol that they need.  CUDA kernels ask for the CUDA release that they were built for.

Nothing here compiles anything, and importing this module changes no setting of torch.
"""

import importlib
import importlib.machinery
import json
import mmap
import os
import re
import shlex
import struct
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from immunize_ext.errors import FallbackWarning

BUILD_COMMAND = "pip install --no-build-isolation --no-deps {folder}"
"""What compiles the operators against the installed torch; ``{folder}`` is a checkout."""

_PACKAGE = Path(__file__).resolve().parent
_RECORD = _PACKAGE / "_build_info.json"
_DISABLE = "IMMUNIZE_EXT_DISABLE"

# What Python calls of the binary, beside its operators.
_CALLED = ("ask_before_rules", "build_info", "cached_bytes", "empty_cache", "instructions")

_lock = threading.Lock()
_status: "LoadStatus | None" = None
_warned = threading.Event()


@dataclass(frozen=True)
class LoadStatus:
    """Whether the compiled part is loaded, and why not.

    Attributes:
        loaded: True if ``torch.ops.immunize_ext`` has its operators.
        reason: One sentence: what is missing or does not fit; where loaded, what was built.
        built_for: The build record (keys ``compiled``, ``reason``, ``package``, ``python``,
            ``torch``, ``cuda``, ``cuda_arch_list``, ``compiler``), or None where there is none.
        installed: The torch version that is running.
        error: The exception that loading raised, if it came to that.
    """

    loaded: bool
    reason: str
    built_for: dict[str, Any] | None
    installed: str
    error: BaseException | None = None


def status() -> LoadStatus:
    """Load the compiled part if that was not tried yet, and return the outcome.

    Returns:
        The outcome of the one attempt of this process; later calls return the same object.

    Example:
        >>> status().installed == torch.__version__
        True
    """
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
    return _status


def available() -> bool:
    """Return True if the compiled operators are loaded.

    Example:
        >>> isinstance(available(), bool)
        True
    """
    return status().loaded


def build_command() -> str:
    """Return the command that builds the compiled part of this installation."""
    folder = _PACKAGE.parent
    if (folder / "setup.py").is_file() and (folder / "csrc").is_dir():
        return BUILD_COMMAND.format(folder=f"-e {shlex.quote(str(folder))}")
    return BUILD_COMMAND.format(folder=".") + " (in a checkout of immunize_ext)"


def warn_fallback(reason: str | None = None) -> None:
    """Warn, once in a process, that operators take the torch-only route.

    Inside ``torch.compile`` nothing is done: a graph cannot carry a warning.

    Args:
        reason: Why; by default what ``status()`` says.
    """
    if torch.compiler.is_compiling() or _warned.is_set():
        return
    with _lock:
        if _warned.is_set():
            return
        _warned.set()
    outcome = status()
    text = "immunize_ext runs its torch-only operators (same results, more time): "
    if outcome.loaded:
        text += reason or "asked for"
    else:
        text += (
            f"{reason or outcome.reason}. To build the compiled ones: {build_command()}; "
            "`immunize doctor` tells more"
        )
    warning = FallbackWarning(text)
    warning.__cause__ = outcome.error
    warnings.warn(warning, stacklevel=_caller_stacklevel())


def require_compiled(what: str) -> None:
    """Refuse to go on without the compiled operators.

    Benchmarks call this, so that no torch-only time is reported as that of the kernels.

    Args:
        what: What needs them, for the message.

    Raises:
        RuntimeError: If the compiled part is not loaded; its cause is what loading raised.
    """
    outcome = status()
    if not outcome.loaded:
        raise RuntimeError(
            f"{what} needs the compiled operators of immunize_ext, which are not loaded: "
            f"{outcome.reason}; build them with: {build_command()}"
        ) from outcome.error


def read_build_record() -> dict[str, Any] | None:
    """Return the record that the build left beside the package, None if there is none."""
    try:
        record = json.loads(_RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _load() -> LoadStatus:
    record = read_build_record()
    installed = torch.__version__

    def failed(reason: str, error: BaseException | None = None) -> LoadStatus:
        return LoadStatus(False, reason, record, installed, error)

    if os.environ.get(_DISABLE, "0") not in ("", "0"):
        return failed(f"it is switched off by {_DISABLE}={os.environ[_DISABLE]}")
    if record is None:
        return failed(f"no compiled part was built ({_RECORD.name} is missing or unreadable)")
    if not record.get("compiled"):
        return failed(f"the compiled part was not built: {record.get('reason', 'no reason given')}")
    if not fits(record, installed, torch.version.cuda):
        return failed(
            f"it was built for torch {_named(record.get('torch'), record.get('cuda'))}, but torch "
            f"{_named(installed, torch.version.cuda)} is installed"
        )
    candidates = [_PACKAGE / f"_C{end}" for end in importlib.machinery.EXTENSION_SUFFIXES]
    binary = next((path for path in candidates if path.is_file()), None)
    if binary is None:
        return failed(
            f"it was built for Python {record.get('python')}, but there is no binary for this "
            f"Python {sys.version_info.major}.{sys.version_info.minor}"
        )
    if not _is_whole(binary):
        return failed(f"the binary {binary.name} is incomplete")
    if missing := _names_not_in(binary):
        return failed(f"{binary.name} was built from older sources, without {', '.join(missing)}")
    try:
        importlib.import_module("immunize_ext._C")
    except (ImportError, OSError, RuntimeError, SystemError) as error:
        return failed(f"the binary cannot be loaded ({error})", error)
    return LoadStatus(True, f"compiled for torch {record.get('torch')}", record, installed)


_RELEASE = re.compile(r"(?P<minor>\d+\.\d+)\.\d+(\+(cpu|cu\d+))?")


def fits(record: dict[str, Any], installed: str, cuda: str | None) -> bool:
    """Whether what was built for one torch may be loaded into another (module docstring).

    Args:
        record: The build record.
        installed: ``torch.__version__``.
        cuda: ``torch.version.cuda``.

    Returns:
        True for the same version, and for releases of one minor with the CUDA that is needed.

    Example:
        >>> record = {"torch": "2.13.0+cpu", "cuda": None}
        >>> fits(record, "2.13.1", "13.0"), fits(record, "2.14.0+cpu", None)
        (True, False)
        >>> fits({"torch": "2.13.0+cu126", "cuda": "12.6"}, "2.13.1+cpu", None)
        False
    """
    built = str(record.get("torch"))
    if built == installed:
        return True
    releases = [_RELEASE.fullmatch(version) for version in (built, installed)]
    if None in releases or len({match["minor"] for match in releases if match}) > 1:
        return False
    return record.get("cuda") in (None, cuda)


def _named(version: str | None, cuda: str | None) -> str:
    """A version, with its CUDA where the version does not say it."""
    return str(version) if cuda is None or "+" in str(version) else f"{version} (CUDA {cuda})"


def _is_whole(binary: Path) -> bool:
    """Tell whether an ELF file reaches to its last part; other files count as whole.

    A truncated library must not be loaded: reading a mapped page behind the end of the file ends
    the process.  The table of sections stands at the end of the file, and the header says where.
    """
    size = binary.stat().st_size
    with binary.open("rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF":
        return size > 0
    if len(header) < 64:
        return False
    if header[4] != 2:  # not a 64-bit file
        return True
    order = "<" if header[5] == 1 else ">"
    (offset,) = struct.unpack_from(order + "Q", header, 40)
    entry_size, entries = struct.unpack_from(order + "HH", header, 58)
    return bool(offset + entry_size * entries <= size)


def _names_not_in(binary: Path) -> list[str]:
    """What Python would call in vain: names that the binary does not hold.

    Asked before it is loaded, for then its operators would be registered already.
    """
    with (
        binary.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        if content[:4] != b"\x7fELF":
            return []  # loading it will tell what is wrong
        return [name for name in _CALLED if content.find(name.encode() + b"\0") < 0]


def _caller_stacklevel() -> int:
    """Return the ``stacklevel`` of the first frame outside the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(module: str) -> bool:
    """Whether a frame belongs to the package, or to the dispatcher in between."""
    return module.partition(".")[0] in ("immunize_ext", "torch")
