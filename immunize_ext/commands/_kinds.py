"""Kinds of finished runs, as ``results.json`` names them, and the modules that know them.

A module gives ``attack(folder, results, arguments) -> int``, which adds attack results to a run,
and ``compare(folders, arguments) -> int``, which writes the report of several. It is imported on
use.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from immunize_ext.storage import KINDS


def module_of(kind: str) -> ModuleType:
    """The module that knows a kind."""
    return importlib.import_module(KINDS[kind])
