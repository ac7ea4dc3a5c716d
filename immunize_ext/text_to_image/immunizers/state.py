"""State of the outer loop on disk: one safetensors file, from which a run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunize_ext.storage import load_checkpoint, save_checkpoint

_KIND = "immunize_ext.LoopState/2"


_FILE = "checkpoint.safetensors"


_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class LoopState:
    """Where a run is.

    Attributes:
        step: Steps done.
        best_objective: Least objective probed so far.
        best: Parameters there, by name.
        history: One record a step.
        memory: What a method carries from step to step beside the parameters.
        warnings: Sentences about the merges so far.
    """

    step: int
    best_objective: float
    best: dict[str, Tensor]
    history: list[dict[str, float]]
    memory: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def save_state(
    folder: Path,
    identity: Mapping[str, Any],
    leaves: Mapping[str, Tensor],
    optimizer: torch.optim.Adam,
    state: LoopState,
) -> None:
    """Write a checkpoint; the one before stays until the new one is complete.

    Args:
        folder: Where; made if it is not there.
        identity: Settings that a resumed run must share.
        leaves: The parameters now.
        optimizer: Its moments are kept.
        state: The rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        tensors[f"now/{name}"] = leaf
        tensors[f"best/{name}"] = state.best[name]
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[leaf][moment]
    tensors |= {f"memory/{name}": value for name, value in state.memory.items()}
    values = {
        "identity": dict(identity),
        "step": state.step,
        # JSON has no infinity; a run that was never probed has no best objective.
        "best_objective": None if state.best_objective == float("inf") else state.best_objective,
        "history": state.history,
        "warnings": state.warnings,
    }
    save_checkpoint(folder / _FILE, tensors, kind=_KIND, values=values)


def load_state(
    folder: Path,
    identity: Mapping[str, Any],
    leaves: Mapping[str, Tensor],
    optimizer: torch.optim.Adam,
    *,
    steps: int,
) -> LoopState | None:
    """Read a checkpoint into parameters and optimizer.

    Args:
        folder: Where it is.
        identity: Settings that it must share.
        leaves: The parameters, written into.
        optimizer: The optimizer, written into.
        steps: Steps of the run that wants to go on from it.

    Returns:
        The state; ``None`` if there is no checkpoint.

    Raises:
        ValueError: If it is of other settings or of a longer run, or no checkpoint.
    """
    file = folder / _FILE
    if not file.is_file():
        return None
    tensors, values = load_checkpoint(file, kind=_KIND, function="resume")
    for name, wanted in identity.items():
        found = values["identity"].get(name)
        # JSON gives lists for tuples.
        if found != (list(wanted) if isinstance(wanted, tuple) else wanted):
            raise ValueError(
                f"resume: {file} must be of a run with {name} = {wanted!r}, got {found!r}; use the "
                "same settings or another folder"
            )
    if values["step"] > steps:
        raise ValueError(
            f"resume: {file} is at step {values['step']}, beyond the {steps} that are asked for; "
            "use another folder"
        )
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(tensors[f"now/{name}"])
            optimizer.state[leaf] = {
                "step": torch.tensor(float(values["step"])),
                **{m: tensors[f"{m}/{name}"].to(leaf.device).clone() for m in _MOMENTS},
            }
    best = {name: tensors[f"best/{name}"].to(leaf.device) for name, leaf in leaves.items()}
    objective = values["best_objective"]
    return LoopState(
        values["step"],
        float("inf") if objective is None else objective,
        best,
        values["history"],
        {
            # A method may remember what no parameter is called.
            name.partition("/")[2]: tensor.to(next(iter(best.values())).device)
            for name, tensor in tensors.items()
            if name.startswith("memory/")
        },
        values["warnings"],
    )
