"""What the loops of several immunizers share: inputs, records, the check that theta is finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.corridor import project_to_corridor
from immunize_ext.probing.metrics.hessian import check_ridge, with_ridge


def check_settings(
    name: str,
    positive: dict[str, float],
    choices: dict[str, tuple[str, ...]],
    given: dict[str, str],
) -> None:
    """Refuse numbers that are not finite and positive, and words that are not known."""
    for argument, value in positive.items():
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{name}: {argument} must be finite and positive, got {value}")
    for argument, allowed in choices.items():
        if given[argument] not in allowed:
            raise ValueError(
                f"{name}: {argument} must be one of {', '.join(allowed)}, got {given[argument]!r}"
            )


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they read back from a file: lists instead of tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
    }


@dataclass
class LinearProblem:
    """Inputs with their ridge, the start, and a history that grows by one record a step.

    Attributes:
        primary: Rows whose Gram matrix is K_P with its ridge, shape ``(n + p, p)``.
        harmful: The same for K_H.
        start: theta_0, shape ``(p, p)``, float64.
        corridor: The least and the largest kappa_P, or ``None``.
        history: The records so far.
        name: Who runs the loop; stands in errors.
    """

    name: str
    primary: Tensor
    harmful: Tensor
    start: Tensor
    corridor: tuple[float, float] | None
    history: list[dict[str, float]]

    @classmethod
    def of(
        cls,
        name: str,
        primary: Task,
        harmful: Task,
        theta0: Tensor | None,
        ridge: float,
        corridor: tuple[float, float] | None,
    ) -> LinearProblem:
        """Take the inputs of two tasks, checked against each other."""
        check_ridge(name, ridge)
        p = primary.num_features
        if harmful.num_features != p:
            raise ValueError(
                f"{name}.fit: harmful must have the {p} features of primary, got "
                f"{harmful.num_features}; preprocess both tasks alike"
            )
        if theta0 is not None and theta0.shape != (p, p):
            raise ValueError(
                f"{name}.fit: theta0 must have shape ({p}, {p}), got {tuple(theta0.shape)}"
            )
        device = primary.x_train.device
        start = torch.eye(p, dtype=torch.float64, device=device) if theta0 is None else theta0
        rows = [with_ridge(t.x_train.to(torch.float64), ridge) for t in (primary, harmful)]
        start = start.detach().to(torch.float64)
        return cls(name, rows[0], rows[1], start, corridor, [])

    def record(self, theta: Tensor, **values: float) -> None:
        """Append the record of an iterate."""
        logs = []
        for rows in (self.primary, self.harmful):
            extremes = gram_extremes(rows @ theta.detach())
            logs.append(float(extremes.lambda_max.log() - extremes.lambda_min.log()))
        base = self.history[0] if self.history else None
        first = (
            (logs[0], logs[1])
            if base is None
            else (base["log_kappa_primary"], base["log_kappa_harmful"])
        )
        self.history.append(
            {
                "step": float(len(self.history)),
                "log_kappa_primary": logs[0],
                "log_kappa_harmful": logs[1],
                "log_rir": (logs[1] - first[1]) - (logs[0] - first[0]),
                **values,
            }
        )

    def settled(self, theta: Tensor) -> Tensor:
        """An iterate checked finite and brought into the corridor, if there is one."""
        if not bool(torch.isfinite(theta).all()):
            raise ValueError(
                f"{self.name}.fit: step sizes must keep theta finite, got NaN or infinity at step "
                f"{len(self.history)}; lower the step size"
            )
        if self.corridor is None:
            return theta
        return project_to_corridor(theta, self.primary, self.corridor)
