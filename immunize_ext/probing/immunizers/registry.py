"""Every way to immunize linear features by name. A new one is a dataclass and one line here."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from immunize_ext.seams import Immunizer
from immunize_ext.settings import Registry

METHODS: Registry[Immunizer[Any, Any, Any]] = Registry(
    "method", key="method", plugins="immunize_ext.probing"
)

MethodName: TypeAlias = Literal[
    "r-ill-only",
    "r-well-only",
    "opt-kappa",
    "graded",
    "whitening",
    "partial-whitening",
    "closed-form",
    "condition-number",
    "condition-number-plain",
    "imma",
    "lock",
    "pencil-lock",
    "label-direction",
    "learning-curve",
    "local-control",
    "mini-batch",
    "multiplicative",
    "several-harms",
    "optimizer-aware",
]
"""Names of the methods of the package; those that others register are texts as well."""


def label_of(immunizer: Immunizer[Any, Any, Any]) -> str:
    """What reports call a method with its variant: its label, or its name.

    Example:
        >>> label_of(METHODS["opt-kappa"]), label_of(METHODS["whitening"])
        ('opt-kappa, log-ratio', 'whitening')
    """
    return str(getattr(immunizer, "label", immunizer.method))


def knob_of(immunizer: Immunizer[Any, Any, Any]) -> str | None:
    """The setting by which a method trades slow-down of the harm for cost; ``None`` without one.

    Example:
        >>> knob_of(METHODS["closed-form"])
        'strength'
    """
    knob: str | None = getattr(immunizer, "knob", None)
    return knob


def grid_of(immunizer: Immunizer[Any, Any, Any]) -> tuple[float, ...]:
    """Values of the knob that a frontier tries.

    Example:
        >>> len(grid_of(METHODS["closed-form"])) > 1
        True
    """
    return tuple(getattr(immunizer, "grid", ()))
