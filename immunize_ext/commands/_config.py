"""Config files of the commands, and what a name that is not known was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from immunize_ext._extras import require_extra


def suggestion(name: object, known: Iterable[str]) -> str:
    """A hint for a name that is not known.

    Args:
        name: What was given.
        known: What there is.

    Returns:
        The nearest name, or all of them.

    Example:
        >>> suggestion("sede", ["seed", "steps"])
        'did you mean seed'
        >>> suggestion("x", ["seed", "steps"])
        'known are seed, steps'
    """
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]}" if near else f"known are {', '.join(names)}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a config file: a table of the names of flags, with ``_`` or ``-``, and values.

    Args:
        path: The file.

    Returns:
        Plain values by name, with ``_``; nothing is checked yet.

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtraError: If PyYAML is not installed.
        ValueError: If it is not YAML, or no table.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--config: must name a YAML file, got {path}, which is not there")
    yaml = require_extra("yaml", extra="report", purpose="config files")
    try:
        # safe_load builds plain values only; a file cannot run code.
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} must be a YAML file, got: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(
            f"--config: {path} must hold names with values, got a {type(loaded).__name__}"
        )
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}
