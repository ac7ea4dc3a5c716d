"""What a text-to-image immunizer hands back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from immunize_ext.settings import plain
from immunize_ext.text_to_image.card import NAME as CARD
from immunize_ext.text_to_image.card import Measured, model_card
from immunize_ext.text_to_image.model import TextToImage

_KIND = "immunize_ext.ImmunizedPipeline/1"


_FILE = "immunized.json"


@dataclass(frozen=True)
class ImmunizedPipeline:
    """An immunized text-to-image model and how it came about.

    Attributes:
        model: The immunized model, a model of its own.
        method: Name of the immunizer.
        config: Every setting, seeds and concepts included, as plain values.
        history: One record a step: ``loss`` (mean denoising loss on the concepts after adaptation,
            what is raised), ``retain``, ``inner_loss``, ``gradient_norm``, ``clamped`` (share of
            samples whose loss is at the clamp and gives no gradient), ``seconds``,
            ``merge_seconds`` and, where the step was probed, ``objective``; ``alpha_j`` where it
            was measured how far the first-order gradient can be trusted; where adaptation was
            differentiated, ``products`` with second derivatives, ``hypergradient_seconds``, the
            ``contraction`` of the gradient on its way through, and the solver's ``residual``.
        peak_memory: Most bytes held at once while immunizing.
        warnings: Sentences for a person about how it went, each with what to do.
    """

    model: TextToImage
    method: str
    config: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)
    peak_memory: int = 0
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        pipeline, records = type(self.model.pipeline).__name__, len(self.history)
        return f"ImmunizedPipeline({self.method!r}, {pipeline}, {records} steps, {self.config})"

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return sum(record["seconds"] for record in self.history)

    @property
    def merge_share(self) -> float:
        """Share of the steps' time that went into merging, forward alone."""
        return sum(record["merge_seconds"] for record in self.history) / max(self.seconds, 1e-12)

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        base: str | None = None,
        measured: Measured | None = None,
    ) -> None:
        """Write the pipeline in diffusers' layout, its record and a model card: all or nothing.

        Args:
            path: The folder; plain diffusers loads it.
            overwrite: Whether a pipeline that is there already is replaced.
            base: The model that was immunized, for the card: its name on a hub.
            measured: What attacks reached, for the card.

        Raises:
            FileExistsError: As :meth:`~immunize_ext.text_to_image.model.TextToImage.save`.
            OSError: If it cannot be written; an existing one is then untouched.
        """
        record = {
            "kind": _KIND,
            "method": self.method,
            "config": self.config,
            "history": self.history,
            "peak_memory": self.peak_memory,
            "warnings": list(self.warnings),
        }
        concepts = [str(name) for name in self.config.get("concepts", ())]
        card = model_card(self.method, concepts, plain(self.config), base=base, measured=measured)
        extra = {_FILE: json.dumps(record, indent=1), CARD: card}
        self.model.save(path, overwrite=overwrite, extra=extra)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> ImmunizedPipeline:
        """Read what :meth:`save` wrote. Runs no code from the files.

        Args:
            path: The folder.
            device: Where the pipeline shall be.

        Returns:
            The immunized pipeline.

        Raises:
            FileNotFoundError: If there is no such folder, or it holds no pipeline.
            ValueError: If it is a pipeline that no immunizer of this package wrote.
        """
        file = Path(path) / _FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"ImmunizedPipeline.load: {path} must hold {_FILE}, got none; give the folder that "
                "ImmunizedPipeline.save wrote"
            )
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            record = {}
        if not isinstance(record, dict) or record.pop("kind", None) != _KIND:
            raise ValueError(
                f"ImmunizedPipeline.load: {file} must hold {_KIND}, got something else"
            )
        record["warnings"] = tuple(record.get("warnings", ()))
        return cls(model=TextToImage.from_pretrained(path, device=device), **record)
