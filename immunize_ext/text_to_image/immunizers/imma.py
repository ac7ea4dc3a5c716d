"""IMMA: immunization against one concept, a bad start for whoever adapts to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from immunize_ext.bilevel import Hypergradient, Parameters, gradient
from immunize_ext.text_to_image.concepts import ConceptSet
from immunize_ext.text_to_image.immunizers.batches import join
from immunize_ext.text_to_image.immunizers.bilevel import BilevelImmunizer, denoising_loss
from immunize_ext.text_to_image.immunizers.loop import Run


@dataclass(frozen=True, kw_only=True)
class DiffusionIMMA(BilevelImmunizer):
    r"""Bi-level immunization of one concept.

    .. math:: \max_\theta L(x^u, c; \theta'(\theta)), \qquad
              \theta' = \theta - \alpha \nabla L(x^l, c; \theta)

    Attributes:
        inner_steps: Adaptation steps.
        inner_rate: alpha.
        variant: ``"unrolled"``: adaptation starts from theta in every step and is discarded.
            ``"alternating"``, as the released code does it: the adaptation is a displacement of
            its own that goes on from step to step, and theta is moved with it in place.

    Source:
        IMMA (ECCV 2024); its released code for the alternating variant.

    Example:
        >>> from immunize_ext.text_to_image.immunizers import DiffusionIMMA
        >>> DiffusionIMMA(variant="alternating").method
        'imma'
    """

    method: ClassVar[str] = "imma"

    label: ClassVar[str] = "IMMA"

    published: ClassVar[str] = "unrolled"

    variant: str = "unrolled"

    def check(self, problem: ConceptSet) -> None:
        """One concept only: several are what joint training and MIMA are for."""
        if len(problem.concepts) != 1:
            raise ValueError(
                f"imma: concepts must hold exactly one, got {len(problem.concepts)}; choose one "
                "with concepts.select([name]), or use JointTraining or MIMA"
            )

    def prepare(self, run: Run, leaves: Parameters, step: int) -> None:
        """In the alternating variant: move the attacker's displacement on."""
        super().prepare(run, leaves, step)
        if not self.alternating:
            return
        moved = {n: run.memory.get(n, torch.zeros_like(p)) for n, p in leaves.items()}
        for batch in map(join, self.inner_draws(run, step)):
            here = {
                name: (leaf.detach() + moved[name]).requires_grad_()
                for name, leaf in leaves.items()
            }
            with torch.enable_grad():
                loss = denoising_loss(run, batch)(here)
            run.inner_losses.append(float(loss.detach()))
            found = gradient(loss * run.scale, here)
            rate = self.inner_rate / run.scale
            moved = {name: value - rate * found[name] for name, value in moved.items()}
        run.memory = run.memory | moved

    def adapted(self, run: Run, parameters: Parameters, step: int) -> Parameters:
        """Adapt to all concepts in one batch."""
        if self.alternating:
            if not parameters.keys() <= run.memory.keys():  # a probe before the first step
                return parameters
            return {name: value + run.memory[name] for name, value in parameters.items()}
        return self.ends(run, parameters, step, self.differentiation())[0]

    def ends(
        self, run: Run, parameters: Parameters, step: int, how: Hypergradient
    ) -> list[Parameters]:
        """The one model that knows all concepts."""
        draws = [join(draw) for draw in self.inner_draws(run, step)]
        return [self.adapt(run, parameters, draws, how)]
