"""What an immunizer hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from immunize_ext._checkpoint import load_checkpoint, save_checkpoint

_KIND = "immunize_ext.Immunized/1"


@dataclass(frozen=True)
class Immunized:
    """An immunized linear extractor and how it came about.

    Attributes:
        method: Name of the immunizer.
        theta: The immunized extractor, shape ``(p, p)``; features are ``x @ theta``.
        theta0: The extractor before, shape ``(p, p)``.
        config: Every setting of the immunizer, seeds included, as plain values.
        history: One record per step, the state before the first step at index 0.
    """

    method: str
    theta: Tensor
    theta0: Tensor
    config: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)

    def features(self, x: Tensor) -> Tensor:
        """Features ``x @ theta`` of inputs of shape ``(*, n, p)``."""
        return x @ self.theta.to(x.dtype)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file that :meth:`load` reads back exactly.

        Args:
            path: Target file; replaced if it exists.

        Raises:
            MissingExtraError: If safetensors is not installed.
            OSError: If the file cannot be written; an existing one is then untouched.
        """
        save_checkpoint(
            path,
            {"theta": self.theta, "theta0": self.theta0},
            kind=_KIND,
            values={"method": self.method, "config": self.config, "history": self.history},
        )

    @classmethod
    def load(cls, path: str | Path) -> Immunized:
        """Read what :meth:`save` wrote. Runs no code from the file.

        Args:
            path: The file.

        Returns:
            The immunized extractor.

        Raises:
            FileNotFoundError: If there is no such file.
            MissingExtraError: If safetensors is not installed.
            ValueError: If it holds something else.
        """
        tensors, values = load_checkpoint(path, kind=_KIND, function="Immunized.load")
        return cls(theta=tensors["theta"], theta0=tensors["theta0"], **values)
