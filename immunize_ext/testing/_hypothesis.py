"""Import of hypothesis, with an error that says how to get it."""

from __future__ import annotations

from types import ModuleType

from immunize_ext._extras import require_extra


def require_hypothesis(purpose: str) -> ModuleType:
    """The module hypothesis.

    Args:
        purpose: What needs it; the message starts with it.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: hypothesis is not installed; an ``ImportError`` that names the extra
            ``test``.

    Example:
        >>> require_hypothesis("the example").__name__
        'hypothesis'
    """
    return require_extra("hypothesis", extra="test", purpose=purpose)
