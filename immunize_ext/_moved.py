"""Modules that stand elsewhere now: their old names still import, and say where to go.

An old module is an empty one that looks a name up in the new places. It warns when something is
taken from it, so that merely naming it in a type or a pickle costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

_ROOT = "immunize_ext"

# Still a module, but for some of its names.
_KEPT = "report"

# Old module, without the package's name, and where its names are looked up, in this order. A module
# inside an old package that is not listed kept its own name inside the first of the new places.
PLACES = MappingProxyType(
    {
        "regularizers": ("ops.regularizers",),
        "erasure": ("ops.erasure",),
        "immunizers": ("probing.immunizers",),
        "immunizers.text_to_image": ("text_to_image.immunizers",),
        "immunizers.text_to_image.immunized_pipeline": ("text_to_image.immunizers.immunized",),
        "attacks": ("probing.attacks", "seams"),
        "attacks.general": ("probing.attacks.probes",),
        "attacks.text_to_image": ("text_to_image.attacks", "seams"),
        "data": ("probing.data",),
        "data.concepts": ("text_to_image.concepts", "text_to_image.digits.concepts"),
        "data.digit_images": ("text_to_image.digits.images",),
        "metrics": ("probing.metrics", "text_to_image.metrics", "quantities"),
        "metrics.judge": ("text_to_image.digits.judge",),
        "metrics.similarity_gap": ("text_to_image.metrics.gaps",),
        "metrics.spread": ("quantities",),
        "models": (
            "probing.extractors",
            "text_to_image.model",
            "text_to_image.projections",
            "text_to_image.weight_edit",
        ),
        "models.digits_pipeline": ("text_to_image.digits.pipeline",),
        "models.text_projections": ("text_to_image.projections",),
        "models.text_to_image": ("text_to_image.model",),
        "models.weight_edit": ("text_to_image.weight_edit",),
        "probing.metrics.worst_harm": ("worst_case",),
        _KEPT: ("probing.evaluation", "storage"),
    }
)

# Names that changed as well.
NAMES = MappingProxyType({"attacks.ATTACKERS": "ATTACKS"})

# Modules of which no name is left, and where to find what they did.
GONE = MappingProxyType(
    {
        "commands": "immunize_ext.cli has the commands, and what they call is "
        "immunize_ext.probing.run and immunize_ext.text_to_image.run",
        "demo": "immunize_ext.cli has the demo and immunize_ext.report.demo its page",
        "report.html": "immunize_ext.probing.report makes the page and immunize_ext.report.page "
        "draws it",
        "ops.symmetric": "symmetric_extremes is in immunize_ext.ops",
        "ops.composite": "immunize_ext.ops.fallback has the route in torch alone",
    }
)


def places_of(name: str) -> tuple[str, ...]:
    """Where the names of an old module are now, as full names; none if it is no old module.

    Example:
        >>> places_of("immunize_ext.data.mnist"), places_of("immunize_ext.ops")
        (('immunize_ext.probing.data.mnist',), ())
    """
    short = name.removeprefix(f"{_ROOT}.")
    if short in PLACES:
        return tuple(f"{_ROOT}.{place}" for place in PLACES[short])
    parent, _, child = short.rpartition(".")
    if parent not in PLACES or parent == _KEPT:
        return ()
    place = f"{_ROOT}.{PLACES[parent][0]}.{child}"
    return (place,) if importlib.util.find_spec(place) is not None else ()


def names_of(module: str) -> list[str]:
    """The public names that an old module had or its new places have, for ``import *``.

    A place that needs a package which is not installed is left out.
    """
    short = module.removeprefix(f"{_ROOT}.")
    found = {name.rpartition(".")[2] for name in NAMES if name.rpartition(".")[0] == short}
    for place in places_of(module):
        with suppress(ImportError):
            there = importlib.import_module(place)
            found |= set(getattr(there, "__all__", None) or _own_names(there))
    return sorted(found)


def _own_names(module: ModuleType) -> list[str]:
    """Public names of a module without ``__all__``: those that it does not merely import."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", module.__name__) == module.__name__
    ]


def look_up(module: str, name: str) -> Any:
    """Take a name from where it is now, and warn.

    Args:
        module: The old module.
        name: A name in it.

    Returns:
        What has that name now.

    Raises:
        AttributeError: If nothing has.
    """
    if name == "__all__":
        return names_of(module)
    new = NAMES.get(f"{module.removeprefix(f'{_ROOT}.')}.{name}", name)
    if not name.startswith("__"):
        for place in places_of(module):
            found = importlib.import_module(place)
            if hasattr(found, new):
                # ``from module import name`` first asks whether there is such a name.
                if sys._getframe(2).f_globals.get("__name__") != "importlib._bootstrap":
                    warnings.warn(
                        f"{module}.{name} is {place}.{new} now", DeprecationWarning, stacklevel=3
                    )
                return getattr(found, new)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Makes old modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        gone = GONE.get(name.removeprefix(f"{_ROOT}.")) if name.startswith(f"{_ROOT}.") else None
        if gone is not None:
            # Without ``name=``, for which ``from package import module`` would not pass it on.
            raise ModuleNotFoundError(f"{name} is gone: {gone}")
        if not name.startswith(f"{_ROOT}.") or name == f"{_ROOT}.{_KEPT}" or not places_of(name):
            return None
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__getattr__ = lambda attribute: look_up(name, attribute)  # type: ignore[method-assign]
        module.__dir__ = lambda: names_of(name)  # type: ignore[method-assign]


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First: an emptied folder that an upgrade left behind would pass for a package.
        sys.meta_path.insert(0, _Finder())
