"""Optional packages: imported where they are used, asked for by name where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

# Packages whose name to import differs from the name to install.
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "Pillow", "yaml": "PyYAML"}


class MissingExtraError(ImportError):
    """A package that only some features need is not installed.

    Attributes:
        extra: Name of the extra of immunize_ext that brings it.

    Example:
        >>> print(MissingExtraError("matplotlib", extra="report", purpose="the plots"))
        the plots: matplotlib is not installed; run: pip install 'immunize_ext[report]'
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose}: {package} is not installed; run: pip install 'immunize_ext[{extra}]'"
        )
        self.extra = extra


def require_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: Dotted name, e.g. ``"matplotlib.figure"``.
        extra: The extra of immunize_ext that installs it.
        purpose: What needs it; the message starts with it.

    Returns:
        The module.

    Raises:
        MissingExtraError: If the package is not installed. An installed package that fails to
            import raises its own error, which says more.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(
            _DISTRIBUTIONS.get(package, package), extra=extra, purpose=purpose
        ) from error
