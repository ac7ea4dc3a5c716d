"""What every run of this folder is measured by, and the paper's numbers beside it."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from immunize_ext.probing.attacks import compare_attack
from immunize_ext.probing.data import Task
from immunize_ext.probing.metrics import (
    log_rir_ceiling,
    relative_immunization_ratio,
    spectral_slowdown,
)
from immunize_ext.storage import environment, to_json

# Ridge of the ridge-floored condition numbers and of the ceiling, relative to lambda_max(K).
RIDGE = 1e-4

# Means of tables 1 and 2 of "Model Immunization from a Condition Number Perspective".
PAPER_HOUSE = {
    "R_ill only": {"i": 90.02, "ii": 72.42, "rir": 1.24},
    "IMMA": {"i": 7.05, "ii": 3.55, "rir": 2.00},
    "Opt kappa": {"i": 1.52, "ii": 0.016, "rir": 92.58},
    "Ours (theirs)": {"i": 18.92, "ii": 0.053, "rir": 356.20},
}
PAPER_MNIST = {"R_ill only": 1.93, "IMMA": 1.77, "Opt kappa": 69.73, "Ours (theirs)": 70.04}


def ratios(
    primary: Tensor, harmful: Tensor, theta: Tensor, bias: Tensor | None = None
) -> dict[str, Any]:
    """RIR with its parts under the three rank policies, and the share of the ceiling.

    A bias is a row of theta under one more input, which is 1, and 0 for the extractor before. With
    the ridge, whose ceiling is one of linear extractors, it is left out.
    """
    found: dict[str, Any] = {}
    for policy in ("official", "rank_aware", "ridge"):
        inputs, extractors = [primary, harmful], [theta, torch.eye(len(theta), dtype=theta.dtype)]
        if bias is not None and policy != "ridge":
            inputs = [torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x in inputs]
            rows = bias, torch.zeros_like(bias)
            extractors = [
                torch.cat([t, row[None]]) for t, row in zip(extractors, rows, strict=True)
            ]
        ratio = relative_immunization_ratio(
            *inputs,
            *extractors,
            policy=policy,  # type: ignore[arg-type]
            ridge=RIDGE,
        )
        found[policy] = {"i": ratio.i, "ii": ratio.ii, "rir": ratio.rir}
        if policy == "ridge":
            log_share = ratio.log_rir - log_rir_ceiling(primary, harmful, ridge=RIDGE)
            found["share_of_ceiling"] = math.exp(min(log_share, 0.0))
    return found


def slowdowns(primary: Task, harmful: Task, theta: Tensor) -> dict[str, dict[str, float]]:
    """Slow-down of both tasks on the training loss: two attackers from the spectrum, one run.

    On House Prices the lowest test loss is that of an early stop, which another path may never
    meet, however fast it is; so the training loss is what attackers are timed by here.
    """
    return {
        role: {
            "gradient_descent": spectral_slowdown(task.x_train, task.y_train, theta).ratio,
            "conjugate_gradients": spectral_slowdown(
                task.x_train, task.y_train, theta, attacker="conjugate_gradients"
            ).ratio,
            "whitened": compare_attack(task, theta, attacker="whitened").slowdown.ratio,
        }
        for role, task in (("harmful", harmful), ("primary", primary))
    }


class Interval(NamedTuple):
    """Mean of seeds and its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Interval:
        """Of one value a seed; a single one has no interval."""
        found = list(values)
        mean = statistics.fmean(found)
        if len(found) < 2:
            return cls(mean, -math.inf, math.inf)
        half = float(student.ppf(0.975, len(found) - 1)) * statistics.stdev(found)
        half /= math.sqrt(len(found))
        return cls(mean, mean - half, mean + half)

    @classmethod
    def of_logs(cls, values: Iterable[float]) -> Interval:
        """The geometric mean of ratios, and its interval."""
        return cls(*map(math.exp, cls.of(map(math.log, values))))

    def share(self) -> Interval:
        """Of a share: no end beyond 0 or 1; a single seed stays without."""
        if math.isinf(self.high):
            return self
        return Interval(self.mean, max(self.low, 0.0), min(self.high, 1.0))

    def text(self, form: str = ".2f") -> str:
        """As a cell; a single seed has its value alone."""
        if math.isinf(self.high):
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}})"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and largest value."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def write(path: Path, command: str, content: dict[str, Any]) -> None:
    """Write a result file with what it was measured on, whole or not at all."""
    record = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "environment": environment(),
        **content,
    }
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def one_thread() -> None:
    """Timings of one process are those of one core."""
    torch.set_num_threads(1)
