"""What MIMA has to be compared with: the same loop without one of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from immunize_ext.text_to_image.concepts import ConceptSet
from immunize_ext.text_to_image.immunizers.concept_merge import ConceptMerge
from immunize_ext.text_to_image.immunizers.imma import DiffusionIMMA
from immunize_ext.text_to_image.immunizers.immunized import ImmunizedPipeline
from immunize_ext.text_to_image.immunizers.loop import Immunizer, Run
from immunize_ext.text_to_image.immunizers.parameters import Parameters, scope_parameters
from immunize_ext.text_to_image.model import TextToImage


@dataclass(frozen=True, kw_only=True)
class JointTraining(DiffusionIMMA):
    """IMMA with all concepts in one batch: one attacker who adapts to all of them, no merge.

    Attributes: those of :class:`DiffusionIMMA`.

    Source:
        Baseline of MIMA.
    """

    method: ClassVar[str] = "joint_training"

    def check(self, concepts: ConceptSet) -> None:
        """Any number of concepts."""
        del concepts


@dataclass(frozen=True, kw_only=True)
class LossAscent(Immunizer):
    """Plain ascent of the denoising loss: no adaptation, no merge.

    The simplest thing that could work; whatever claims to be better has to beat it.
    """

    method: ClassVar[str] = "loss_ascent"

    def adapted(self, run: Run, parameters: Parameters, step: int) -> Parameters:
        """Nobody adapts."""
        del run, step
        return parameters


@dataclass(frozen=True, kw_only=True)
class MergeOnly:
    """One IMMA run for each concept alone, their results merged once at the end.

    Attributes:
        single: Settings of the runs.
        ridge: Of the merge, relative to the mean diagonal of the captions' Gram matrix.
        merge_prompts: Prompts of each concept whose tokens the merge constrains.

    Source:
        Baseline of MIMA (composition of separately immunized models).
    """

    method: ClassVar[str] = "merge_only"

    single: DiffusionIMMA = field(default_factory=DiffusionIMMA)
    ridge: float = 1e-4
    merge_prompts: int = 2

    def fit(
        self,
        model: TextToImage,
        concepts: ConceptSet,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        progress: Callable[[str, float], None] | None = None,
    ) -> ImmunizedPipeline:
        """Immunize a clone against each concept and merge; arguments as :meth:`Immunizer.fit`."""
        count = len(concepts.concepts)
        history: list[dict[str, float]] = []
        peak = 0
        tables: list[Parameters] = []
        scope = self.single.scope
        base = {
            name: parameter.detach().clone()
            for name, parameter in scope_parameters(model.unet, scope, function=self.method).items()
        }
        for index, name in enumerate(concepts.names):

            def shown(text: str, share: float, index: int = index, name: str = name) -> None:
                if progress is not None:
                    progress(f"{self.method}, {name}: {text}", (index + share) / count)

            folder = None if out is None else Path(out) / name
            found = self.single.fit(
                model, concepts.select([name]), out=folder, resume=resume, progress=shown
            )
            parameters = scope_parameters(found.model.unet, scope, function=self.method)
            tables.append({key: value.detach() for key, value in parameters.items()})
            history += found.history
            peak = max(peak, found.peak_memory)
        clone = model.clone()
        merge = ConceptMerge(
            clone,
            concepts.concepts,
            concepts.captions,
            ridge=self.ridge,
            prompts_per_concept=self.merge_prompts,
        )
        merged = merge(base, tables)
        with torch.no_grad():
            for key, parameter in scope_parameters(clone.unet, scope, function=self.method).items():
                parameter.copy_(merged[key])
        if history:
            history[-1]["merge_seconds"] += merge.seconds
            history[-1]["seconds"] += merge.seconds
        settings: dict[str, Any] = asdict(self.single)
        settings |= {"ridge": self.ridge, "merge_prompts": self.merge_prompts}
        settings |= {"concepts": list(concepts.names), "captions": len(concepts.captions)}
        return ImmunizedPipeline(clone, self.method, settings, history, peak)

    def with_seed(self, seed: int) -> MergeOnly:
        """The same method with another seed."""
        return replace(self, single=self.single.with_seed(seed))
