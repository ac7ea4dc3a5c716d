r"""MIMA: immunization against many concepts at once, through their merge.

An attacker who teaches a model N concepts and merges the results ends up at
theta'(theta) = Merge(theta'_1, ..., theta'_N), with theta'_n the model adapted to concept n alone.
MIMA raises the denoising loss of every concept there, by descent on theta through the merge and
through the adaptation steps.

**What the merge adds to first order: nothing.** If the adaptation starts from the merge's own base,
theta'_n = theta - alpha g_n with g_n held fixed, then the merge is affine in its inputs and maps
equal inputs to themselves, so d theta' / d theta is the identity and the gradient that reaches
theta is the one at theta'. What differs from plain ascent is where it is taken. With
``second_order`` the term -alpha d g_n / d theta comes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from immunize_ext.text_to_image.immunizers.bilevel import BilevelImmunizer
from immunize_ext.text_to_image.immunizers.concept_merge import check_merge
from immunize_ext.text_to_image.immunizers.loop import Run
from immunize_ext.text_to_image.immunizers.parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class MIMA(BilevelImmunizer):
    r"""Multi-concept immunization through differentiable merging.

    .. math:: \theta^k = \theta^{k-1} + \beta \nabla_\theta \sum_n L(x^u_n, c_n; \theta'), \qquad
              \theta' = \mathrm{Merge}\bigl(\{\theta^{k-1} - \alpha \nabla L(x^l_n, c_n;
              \theta^{k-1})\}_n\bigr)

    Attributes:
        inner_steps: Adaptation steps of each concept, 1 to 5; discarded after the outer step.
        inner_rate: alpha.
        second_order: Whether adaptation is differentiated through (``create_graph``).
        ridge: Of the merge, relative to the mean diagonal of the captions' Gram matrix.
        merge_prompts: Prompts of each concept whose tokens the merge constrains.
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
    variant: str = "algorithm1"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        check_merge(self.method, self.ridge, self.merge_prompts)

    def needs_merge(self) -> bool:
        """Always."""
        return True

    def prepare(self, run: Run, leaves: Parameters, step: int) -> None:
        """In the alternating variant: adapt, merge, and keep that."""
        if self.alternating:
            merged = self._merged(run, leaves, step)
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(merged[name])

    def adapted(self, run: Run, parameters: Parameters, step: int) -> Parameters:
        """Adapt to each concept from theta, and merge."""
        if self.alternating:
            return parameters  # adapted already, for good
        return self._merged(run, parameters, step)

    def _merged(self, run: Run, parameters: Parameters, step: int) -> Parameters:
        assert run.merge is not None
        draws = self.inner_draws(run, step)
        copies = [
            self.adapt(run, parameters, [draw[index] for draw in draws])
            for index in range(len(run.pools))
        ]
        return run.merge(parameters, copies)
