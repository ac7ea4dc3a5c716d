"""What MIMA has to be compared with: the same loop without one of its parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch

from immunize_ext.bilevel import Parameters
from immunize_ext.seams import Progress
from immunize_ext.text_to_image.concepts import ConceptSet
from immunize_ext.text_to_image.immunizers.concept_merge import (
    ConceptMerge,
    check_merge,
    summary,
)
from immunize_ext.text_to_image.immunizers.imma import DiffusionIMMA
from immunize_ext.text_to_image.immunizers.immunized import ImmunizedPipeline
from immunize_ext.text_to_image.immunizers.loop import Immunizer
from immunize_ext.text_to_image.immunizers.parameters import scope_parameters
from immunize_ext.text_to_image.model import ModelLike, TextToImage


@dataclass(frozen=True, kw_only=True)
class JointTraining(DiffusionIMMA):
    """IMMA with all concepts in one batch: one attacker who adapts to all of them, no merge.

    Attributes: those of :class:`DiffusionIMMA`.

    Source:
        Baseline of MIMA.
    """

    method: ClassVar[str] = "joint_training"

    label: ClassVar[str] = "Joint training"

    def check(self, problem: ConceptSet) -> None:
        """Any number of concepts."""
        del problem


@dataclass(frozen=True, kw_only=True)
class LossAscent(Immunizer):
    """Plain ascent of the denoising loss: no adaptation, no merge.

    The simplest thing that could work; whatever claims to be better has to beat it.
    """

    method: ClassVar[str] = "loss_ascent"

    label: ClassVar[str] = "Plain loss ascent"


@dataclass(frozen=True, kw_only=True)
class MergeOnly(DiffusionIMMA):
    """One IMMA run for each concept alone, their results merged once at the end.

    No run sees two concepts, so they cannot be weighed against each other: ``weighting`` and its
    settings must be left alone.

    Attributes:
        ridge: Of the merge, relative to the mean diagonal of the captions' Gram matrix.
        merge_prompts: Prompts of each concept whose tokens the merge constrains.

    Source:
        Baseline of MIMA (composition of separately immunized models).
    """

    method: ClassVar[str] = "merge_only"

    label: ClassVar[str] = "Merge of separate immunizations"

    ridge: float = 1e-4
    merge_prompts: int = 2

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        for name in ("weighting", "concept_rate", "worst_share"):
            value, usual = getattr(self, name), getattr(Immunizer, name)
            if value != usual:
                raise ValueError(
                    f"{self.method}: {name} must be left at {usual!r}, got {value!r}: each concept "
                    "is immunized alone; weigh concepts with mima or joint_training"
                )
        check_merge(self.method, self.ridge, self.merge_prompts)

    def check(self, problem: ConceptSet) -> None:
        """Any number of concepts."""
        del problem

    def fit(
        self,
        model: ModelLike,
        problem: ConceptSet,
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> ImmunizedPipeline:
        """Immunize a clone against each concept and merge; arguments as :meth:`Immunizer.fit`."""
        count = len(problem.concepts)
        model = TextToImage.of(model)
        clone = model.clone()
        merge = ConceptMerge(
            clone,
            problem.concepts,
            problem.captions,
            ridge=self.ridge,
            prompts_per_concept=self.merge_prompts,
        )
        merge.reports = []
        moved = scope_parameters(clone.unet, self.scope, function=self.method)
        base = {name: parameter.detach().clone() for name, parameter in moved.items()}
        single = self._single()
        parts: list[ImmunizedPipeline] = []
        for index, name in enumerate(problem.names):

            def shown(text: str, share: float, index: int = index, name: str = name) -> None:
                if progress is not None:
                    progress(f"{self.method}, {name}: {text}", (index + share) / count)

            folder = None if resume is None else Path(resume) / f"concept-{index}"
            parts.append(single.fit(model, problem.select([name]), progress=shown, resume=folder))
        tables: list[Parameters] = [
            {**scope_parameters(part.model.unet, self.scope, function=self.method)}
            for part in parts
        ]
        with torch.no_grad():
            merged = merge(base, tables)
            for key, parameter in moved.items():
                parameter.copy_(merged[key])
        history = [dict(record) for part in parts for record in part.history]
        history[-1]["merge_seconds"] += merge.seconds
        history[-1]["seconds"] += merge.seconds
        history[-1]["merge_change"], said = summary(merge.reports)
        settings = asdict(self) | {
            "concepts": list(problem.names),
            "retain": [concept.name for concept in problem.retain],
            "captions": len(problem.captions),
        }
        return ImmunizedPipeline(
            clone,
            self.method,
            settings,
            history,
            max(part.peak_memory for part in parts),
            tuple(f"merge: {text}" for text in said),
        )

    def _single(self) -> DiffusionIMMA:
        """What each concept is immunized with."""
        return DiffusionIMMA(**{f.name: getattr(self, f.name) for f in fields(DiffusionIMMA)})
