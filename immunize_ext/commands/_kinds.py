"""Kinds of finished runs, as ``results.json`` names them, and the modules that know them.

A module gives ``attack(folder, results, arguments) -> int``, which adds attack results to a run,
and ``compare(folders, arguments) -> int``, which writes the report of several. It is imported on
use.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS: dict[str, str] = {
    "kappa": "immunize_ext.commands._kappa_kind",
    "kappa-sweep": "immunize_ext.commands._kappa_kind",
    "mima": "immunize_ext.commands._text_to_image_kind",
    "mima-sweep": "immunize_ext.commands._text_to_image_kind",
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


def module_of(kind: str) -> ModuleType:
    """The module that knows a kind."""
    return importlib.import_module(KINDS[kind])
