r"""MIMA: immunization against many concepts at once, through their merge.

An attacker who teaches a model N concepts and merges the results ends up at
theta'(theta) = Merge(theta'_1, ..., theta'_N), with theta'_n the model adapted to concept n alone.
MIMA raises the denoising loss of every concept there, by descent on theta through the merge and
through the adaptation steps.

**What the merge adds to first order: nothing.** If the adaptation starts from the merge's own base,
theta'_n = theta - alpha g_n with g_n held fixed, then the merge is affine in its inputs and maps
equal inputs to themselves, so d theta' / d theta is the identity and the gradient that reaches
theta is the one at theta'. What differs from plain ascent is where it is taken. With
another ``hypergradient`` the term -alpha d g_n / d theta comes in.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from immunize_ext.bilevel import Hypergradient, Parameters
from immunize_ext.text_to_image.immunizers.batches import generator_of
from immunize_ext.text_to_image.immunizers.bilevel import BilevelImmunizer
from immunize_ext.text_to_image.immunizers.concept_merge import (
    ClassMerge,
    ConceptMerge,
    GatedMerge,
    Merge,
    MomentMerge,
    check_merge,
)
from immunize_ext.text_to_image.immunizers.loop import OUTER, Run

MergeKind = Literal["closed_form", "moments", "gated", "mean", "own_copies", "by_class"]

# Purpose of the draws that moments are collected over, beside those of the loop.
MOMENTS = 3

GATES = "gates"


@dataclass(frozen=True, kw_only=True)
class MIMA(BilevelImmunizer):
    r"""Multi-concept immunization through differentiable merging.

    .. math:: \theta^k = \theta^{k-1} + \beta \nabla_\theta \sum_n L(x^u_n, c_n; \theta'), \qquad
              \theta' = \mathrm{Merge}\bigl(\{\theta^{k-1} - \alpha \nabla L(x^l_n, c_n;
              \theta^{k-1})\}_n\bigr)

    Attributes:
        inner_steps: Adaptation steps of each concept; discarded after the outer step.
        inner_rate: alpha.
        ridge: Of the merge, relative to the mean diagonal of the captions' Gram matrix.
        merge_prompts: Prompts of each concept whose tokens the merge constrains.
        merge: How the copies become one: ``"closed_form"`` as published, the text projections by
            token constraints and everything else by the mean; ``"moments"``, every linear and
            convolution layer by the second moments of its inputs, collected once at the start;
            ``"by_class"``, token constraints where text alone arrives and moments elsewhere;
            ``"gated"``, each layer and head between its base, the mean and the merge by moments, by
            gates that lower what theta raises: the attacker's merge is learned against it;
            ``"mean"`` of everything, the control; ``"own_copies"``, no merge at all, each concept's
            loss at its own copy.
        gate_rate: How far a step moves the gate (before its softmax) with the largest gradient.
        moment_batches: Batches of each concept, and of what is kept, that moments are collected
            over.
        variant: ``"algorithm1"`` as published, or ``"alternating"`` as the released code does it:
            the inner steps are kept, their merge is where the next step starts, and nothing is
            differentiated through.

    Source:
        MIMA (AAAI 2025), Algorithm 1.

    Example:
        >>> from immunize_ext.text_to_image.immunizers import MIMA
        >>> MIMA(steps=10, inner_steps=2).inner_rate
        10.0
    """

    method: ClassVar[str] = "mima"

    label: ClassVar[str] = "MIMA"

    published: ClassVar[str] = "algorithm1"

    ridge: float = 1e-4
    merge_prompts: int = 2
    merge: MergeKind = "closed_form"
    moment_batches: int = 4
    gate_rate: float = 0.3
    variant: str = "algorithm1"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        check_merge(self.method, self.ridge, self.merge_prompts)
        if self.merge not in get_args(MergeKind):
            raise ValueError(
                f"{self.method}: merge must be one of {', '.join(get_args(MergeKind))}, got "
                f"{self.merge!r}"
            )
        if self.moment_batches < 1:
            raise ValueError(
                f"{self.method}: moment_batches must be at least 1, got {self.moment_batches}"
            )
        if not (math.isfinite(self.gate_rate) and self.gate_rate >= 0.0):
            raise ValueError(
                f"{self.method}: gate_rate must be finite and at least 0, got {self.gate_rate}"
            )
        if self.alternating and self.merge == "own_copies":
            raise ValueError(
                f"{self.method}: the alternating variant must have one model to go on from, got "
                "merge='own_copies'"
            )
        if self.alternating and self.merge == "gated":
            raise ValueError(
                f"{self.method}: merge must be another one in the alternating variant, which "
                "differentiates nothing that gates could learn from, got 'gated'"
            )

    def needs_merge(self) -> bool:
        """Of token constraints; the others are made of what the run draws."""
        return self.merge in ("closed_form", "by_class")

    def attacked_losses(self, run: Run, leaves: Parameters, step: int, batch: int) -> Tensor:
        """At the merge, or each concept's at its own copy."""
        if self.merge != "own_copies":
            return super().attacked_losses(run, leaves, step, batch)
        place = step * self.gradient_accumulation + batch
        copies = self._copies(run, leaves, place, self.differentiation())
        draws = run.draw(step, OUTER, batch)
        return torch.cat(
            [drawn.losses(run.model, copy) for drawn, copy in zip(draws, copies, strict=True)]
        )

    def prepare(self, run: Run, leaves: Parameters, step: int) -> None:
        """In the alternating variant: adapt, merge, and keep that."""
        super().prepare(run, leaves, step)
        if self.alternating:
            merged = self._merged(run, leaves, step, self.differentiation())
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(merged[name])

    def adapted(self, run: Run, parameters: Parameters, step: int) -> Parameters:
        """Adapt to each concept from theta, and merge."""
        if self.alternating:
            return parameters  # adapted already, for good
        return self._merged(run, parameters, step, self.differentiation())

    def ends(
        self, run: Run, parameters: Parameters, step: int, how: Hypergradient
    ) -> list[Parameters]:
        """The merge, or each concept's copy."""
        if self.merge == "own_copies":
            return self._copies(run, parameters, step, how)
        return [self._merged(run, parameters, step, how)]

    def diagnosis(self, run: Run, leaves: Parameters, step: int) -> dict[str, float]:
        """As every method's, and how far the gates go, on average."""
        found = super().diagnosis(run, leaves, step)
        if isinstance(run.merge, GatedMerge):
            shares = run.merge.logits.detach().softmax(-1).mean(0).tolist()
            found |= dict(zip(("gate_base", "gate_mean", "gate_moments"), shares, strict=True))
        return found

    def models_attacked(self, run: Run) -> int:
        """One, or each concept's copy."""
        return len(run.pools) if self.merge == "own_copies" else 1

    def _merged(
        self, run: Run, parameters: Parameters, step: int, how: Hypergradient
    ) -> Parameters:
        if run.merge is None:
            run.merge = Merge() if self.merge == "mean" else self._moment_merge(run)
        if self.merge == "by_class" and isinstance(run.merge, ConceptMerge):
            run.merge = ClassMerge(run.merge, self._moment_merge(run, run.merge.weights))
        if isinstance(run.merge, GatedMerge):
            run.merge.logits = self._gates(run, run.merge.logits)
        return run.merge(parameters, self._copies(run, parameters, step, how))

    def _copies(
        self, run: Run, parameters: Parameters, step: int, how: Hypergradient
    ) -> list[Parameters]:
        draws = self.inner_draws(run, step)
        return [
            self.adapt(run, parameters, [draw[index] for draw in draws], how)
            for index in range(len(run.pools))
        ]

    def _moment_merge(self, run: Run, merged: Collection[str] = ()) -> MomentMerge:
        """Moments of the model that the run began with, also in one that goes on.

        Of the weights that are not merged otherwise.
        """
        generator = generator_of(self.seed, 0, MOMENTS)
        count = range(self.moment_batches)
        kept = [run.retain.draw(self.retain_batch, generator) for _ in count]
        kind = GatedMerge if self.merge == "gated" else MomentMerge
        return kind(
            run.model,
            [name for name in run.moved if name not in merged],
            [[pool.draw(self.batch_size, generator) for _ in count] for pool in run.pools],
            [batch for batch in kept if batch is not None],
            ridge=self.ridge,
            labels=run.names,
        )

    def _gates(self, run: Run, start: Tensor) -> Tensor:
        """As the last step left them; the backward pass of this one moves those of the next.

        What theta descends is the loss with the opposite sign, so the gates ascend it.
        """
        now = run.memory.get(GATES, start).detach()
        gates = now.clone().requires_grad_()

        def moved(grad: Tensor) -> None:
            if run.accelerator.num_processes > 1:
                grad = run.accelerator.reduce(grad, reduction="mean")
            largest = grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny)
            share = self.gate_rate / self.gradient_accumulation
            run.memory = {**run.memory, GATES: run.memory.get(GATES, now) + share * grad / largest}

        gates.register_hook(moved)
        return gates
