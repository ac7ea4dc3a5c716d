"""What an immunizer hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
        """Write everything to one file that :meth:`load` reads back exactly."""
        torch.save(
            {
                "method": self.method,
                "theta": self.theta,
                "theta0": self.theta0,
                "config": self.config,
                "history": self.history,
            },
            path,
        )

    @classmethod
    def load(cls, path: str | Path) -> Immunized:
        """Read what :meth:`save` wrote. Runs no code from the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"Immunized.load: path must name a file, got {path}, which does not exist"
            )
        content = torch.load(path, weights_only=True)
        expected = {"method", "theta", "theta0", "config", "history"}
        if not isinstance(content, dict) or set(content) != expected:
            raise ValueError(
                f"Immunized.load: {path} must hold what Immunized.save wrote, got something else"
            )
        return cls(**content)
