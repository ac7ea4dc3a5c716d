"""What an immunizer hands back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunize_ext.probing.data.samples import Samples, Source
from immunize_ext.probing.extractors.feature_extractor import (
    block_root,
    block_state,
    extract_features,
    fingerprint,
)
from immunize_ext.probing.metrics.rir import DeepRatio, computed_rank_rtol, deep_rir
from immunize_ext.storage import load_checkpoint, save_checkpoint

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

    def __repr__(self) -> str:
        shape, records = tuple(self.theta.shape), len(self.history)
        return f"Immunized({self.method!r}, theta {shape}, {records} records, {self.config})"

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

    def to(self, device: torch.device | str) -> Immunized:
        """The same on another device."""
        return replace(self, theta=self.theta.to(device), theta0=self.theta0.to(device))

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Immunized:
        """Read what :meth:`save` wrote. Runs no code from the file.

        Args:
            path: The file.
            device: Where the extractor shall be.

        Returns:
            The immunized extractor.

        Raises:
            FileNotFoundError: If there is no such file.
            MissingExtraError: If safetensors is not installed.
            ValueError: If it holds something else.
        """
        tensors, values = load_checkpoint(path, kind=_KIND, function="Immunized.load")
        return cls(theta=tensors["theta"], theta0=tensors["theta0"], **values).to(device)


_DEEP_KIND = "immunize_ext.ImmunizedExtractor/1"


@dataclass(frozen=True)
class ImmunizedExtractor:
    """An immunized deep extractor and how it came about.

    Attributes:
        method: Name of the objective.
        extractor: The model with theta_I, in evaluation mode.
        theta0: Parameters and buffers of the chosen blocks before, by their name in the model.
        head: The head of the primary task.
        blocks: Names of the chosen blocks.
        config: Every setting of the immunizer, seeds and the lambdas found included.
        history: One record for each step, of the batch at hand before that step.
        momentum: Buffers of the optimizer, by parameter name; a run goes on from them.
    """

    method: str
    extractor: nn.Module
    theta0: dict[str, Tensor]
    head: nn.Module
    blocks: list[str]
    config: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)
    momentum: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        model, steps = type(self.extractor).__name__, len(self.history)
        return f"ImmunizedExtractor({self.method!r}, {model}, blocks {self.blocks}, {steps} steps)"

    def original(self) -> nn.Module:
        """A copy of the model with theta_0."""
        model = copy.deepcopy(self.extractor)
        block_root(model).load_state_dict(self.theta0, strict=False)
        return model

    def rir(
        self,
        primary: Source,
        harmful: Source,
        *,
        groups: int = 20,
        group_size: int = 100,
        ridge: float = 1e-4,
        rank_rtol: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> DeepRatio:
        """RIR of theta_I against theta_0 (:func:`immunize_ext.probing.metrics.rir`).

        Args:
            primary: Samples of the primary task; the paper takes training samples.
            harmful: Samples of the harmful task.
            groups: Number of groups.
            group_size: Samples in a group.
            ridge: Ridge of policy ``"ridge"``.
            rank_rtol: Rank tolerance of policy ``"rank_aware"``; by the precision of the model's
                weights when omitted.
            seed: Seed of the draw.
            batch_size: Samples that go through the models at once.

        Returns:
            Ratios under all three policies, per group and in full data.

        Raises:
            ValueError: If there are fewer samples than ``group_size`` or features are not finite.

        Warns:
            NumericalWarning: If a group has fewer samples than features.
        """
        original = self.original()
        features = []
        for name, source in (("primary", primary), ("harmful", harmful)):
            samples = Samples(source, name=name)
            for model in (self.extractor, original):
                features.append(extract_features(model, samples.batches(batch_size)))
        if rank_rtol is None:
            # The features are held in float64, but computed in the precision of the weights.
            weights = [p.dtype for p in self.extractor.parameters() if p.is_floating_point()]
            coarsest = max(weights, key=lambda d: torch.finfo(d).eps, default=torch.float64)
            rank_rtol = computed_rank_rtol(features[0], coarsest)
        return deep_rir(
            *features,
            groups=groups,
            group_size=group_size,
            ridge=ridge,
            rank_rtol=rank_rtol,
            seed=seed,
        )

    def save(self, path: str | Path) -> None:
        """Write both states of the blocks, head, optimizer, settings and history to one file.

        Args:
            path: Target file, safetensors; replaced if it exists.

        Raises:
            MissingExtraError: If safetensors is not installed.
            OSError: If the file cannot be written; an existing one is then untouched.
        """
        parts = {
            "theta": block_state(self.extractor, self.blocks),
            "theta0": self.theta0,
            "head": dict(self.head.state_dict()),
            "momentum": self.momentum,
        }
        tensors = {
            f"{part}/{name}": v for part, state in parts.items() for name, v in state.items()
        }
        values = {
            "method": self.method,
            "blocks": self.blocks,
            "config": self.config,
            "history": self.history,
            "frozen": fingerprint(self.extractor, without=self.blocks),
        }
        save_checkpoint(path, tensors, kind=_DEEP_KIND, values=values)

    @classmethod
    def load(
        cls, path: str | Path, extractor: nn.Module, *, head: nn.Module | None = None
    ) -> ImmunizedExtractor:
        """Read what :meth:`save` wrote. Runs no code from the file.

        Args:
            path: The file.
            extractor: The backbone it was made with; copied, not changed. What its chosen blocks
                hold does not matter.
            head: A module like the head, where that is no linear layer; copied.

        Returns:
            The immunized extractor.

        Raises:
            FileNotFoundError: If there is no such file.
            MissingExtraError: If safetensors is not installed.
            ValueError: If it holds something else, or belongs to another backbone or head.
        """
        name = "ImmunizedExtractor.load"
        tensors, values = load_checkpoint(path, kind=_DEEP_KIND, function=name)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, _, rest = key.partition("/")
            parts.setdefault(part, {})[rest] = value
        blocks, state = values["blocks"], parts["theta"]
        model = copy.deepcopy(extractor).eval()
        own = {key: value.shape for key, value in block_root(model).state_dict().items()}
        fits = all(own.get(key) == value.shape for key, value in state.items())
        if not fits or fingerprint(model, without=blocks) != values["frozen"]:
            raise ValueError(
                f"{name}: extractor must be the backbone that {path} was made with, got other "
                f"weights or shapes in {type(block_root(extractor)).__name__}; load the same "
                "backbone with the same pretrained weights"
            )
        block_root(model).load_state_dict(state, strict=False)
        return cls(
            method=values["method"],
            extractor=model,
            theta0=parts["theta0"],
            head=_load_head(name, parts.get("head", {}), head),
            blocks=blocks,
            config=values["config"],
            history=values["history"],
            momentum=parts.get("momentum", {}),
        )


def _load_head(name: str, state: dict[str, Tensor], head: nn.Module | None) -> nn.Module:
    if head is None:
        if set(state) != {"weight", "bias"} or state["weight"].dim() != 2:
            raise ValueError(
                f"{name}: head must be given where it is no linear layer, got a file with "
                f"{', '.join(sorted(state))}"
            )
        outputs, inputs = state["weight"].shape
        # On the meta device, so that no random number is drawn for weights that are replaced.
        made: nn.Module = nn.Linear(inputs, outputs, device="meta", dtype=state["weight"].dtype)
        made = made.to_empty(device="cpu")
    else:
        made = copy.deepcopy(head)
    try:
        made.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: head must fit the file, got: {reason}") from error
    return made
