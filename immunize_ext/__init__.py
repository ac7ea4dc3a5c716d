"""Fast, exact, differentiable linear algebra for model immunization.

``immunize_ext.ops`` holds the operators, ``immunize_ext.ops.regularizers`` their compositions,
``immunize_ext.bilevel`` derivatives through adaptation;
``immunize_ext.probing`` and ``immunize_ext.text_to_image`` are the two jobs built on them.
Importing the package imports nothing else, changes no setting of torch, and never fails for lack of
the compiled part: without it the operators take a torch-only route and say so once.
"""

from typing import TYPE_CHECKING, Any

from immunize_ext import _moved
from immunize_ext._version import __version__

if TYPE_CHECKING:
    from immunize_ext import (
        bilevel,
        callbacks,
        errors,
        ops,
        probing,
        reference,
        testing,
        text_to_image,
    )
    from immunize_ext._load import available, status
    from immunize_ext.memory import empty_cache

__all__ = [
    "__version__",
    "available",
    "bilevel",
    "callbacks",
    "empty_cache",
    "errors",
    "ops",
    "probing",
    "reference",
    "status",
    "testing",
    "text_to_image",
]

_moved.install()


def __getattr__(name: str) -> Any:
    # On use: the command line has to answer before torch is there.
    import importlib

    if name in ("available", "status"):
        return getattr(importlib.import_module("immunize_ext._load"), name)
    if name == "empty_cache":
        return importlib.import_module("immunize_ext.memory").empty_cache
    if name in __all__ or _moved.places_of(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
