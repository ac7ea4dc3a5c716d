"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__``: names from where they stand, and its modules themselves.

    Args:
        package: Name of the package.
        places: Module of each name, relative to the package; a module stands for itself.

    Returns:
        The function.

    Example:
        >>> get = lazy("immunize_ext", {"check_count": "runtime", "runtime": "runtime"})
        >>> get("check_count") is get("runtime").check_count
        True
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{places[name]}")
        return module if places[name] == name else getattr(module, name)

    return get
