"""Adapted copies become one: by token constraints (MIMA's Merge), by moments, by their mean."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from immunize_ext.bilevel import Parameters
from immunize_ext.ops import (
    LayerMoments,
    MergeReport,
    RegularizationFactor,
    collect_moments,
    factor_layers,
    gate_layers,
    merge_kv,
    merge_moments,
    merge_report,
)
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.immunizers.batches import Batch
from immunize_ext.text_to_image.immunizers.token_rows import (
    own_tokens,
    padding_rows,
    without_padding,
)
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import TextProjection, text_entrances
from immunize_ext.text_to_image.text_layers import find_text_layers


class Merge:
    """What the loop knows of a merge: a function of base and copies, its seconds, its reports.

    Attributes:
        seconds: Time spent merging so far, forward alone.
        reports: Where it is a list, every merge may add what it did.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.reports: list[MergeReport] | None = None

    def __call__(self, base: Parameters, adapted: Sequence[Parameters]) -> Parameters:
        """Merge.

        Args:
            base: W0 and the other parameters before adaptation, by name.
            adapted: The same after adaptation, one table a concept.

        Returns:
            The merged parameters, by name.
        """
        started = time.perf_counter()
        merged = self.layers(base, adapted)
        result = {
            name: merged[name] if name in merged else _mean([copy[name] for copy in adapted])
            for name in base
        }
        self.seconds += time.perf_counter() - started
        if self.reports is not None:
            self.report(merged, base, adapted)
        return result

    def layers(self, base: Parameters, adapted: Sequence[Parameters]) -> Parameters:
        """The parameters that are merged by more than their mean; here none."""
        del base, adapted
        return {}

    def report(self, merged: Parameters, base: Parameters, adapted: Sequence[Parameters]) -> None:
        """Add to the reports; nothing is known of a mean."""
        del merged, base, adapted


class MomentMerge(Merge):
    r"""Merge of linear and convolution layers by the second moments of their inputs.

    .. math:: W = W_0 + \sum_n (W'_n - W_0)\, G_n \Bigl(G_{keep} + \rho I + \sum_m G_m\Bigr)^{-1}

    with G_n = E[h h^T] over what concept n's noisy images and prompts send through the layer, and
    G_keep over those of what is to be kept. Other parameters, and layers with more than
    :data:`WIDEST` inputs, whose moments would not fit, are the mean of their copies.

    Rows of T5's padding, which joint models send through their layers in hundreds, are left out.

    Args:
        model: The model, whose weights at the start the moments are of.
        names: Weights that may be merged, by their name in the denoiser.
        concepts: Batches of each concept.
        kept: Batches of what is to be kept; none if there is nothing.
        ridge: rho, relative to the mean diagonal of the sum of moments.
        labels: Names of the concepts, for reports.

    Source:
        DERIVED: ``ops.merge_moments`` in the place of MIMA's Merge.
    """

    def __init__(
        self,
        model: TextToImage,
        names: Sequence[str],
        concepts: Sequence[Sequence[Batch]],
        kept: Sequence[Batch],
        *,
        ridge: float,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.names = labels
        predicting = _Predicting(model)
        layers = [f"unet.{name}" for name in _mergeable(model.unet, names)]
        found = factor_layers(
            [predicting.moments(layers, batches) for batches in concepts],
            regularization=predicting.moments(layers, kept) if kept else None,
            ridge=ridge,
        )
        self.factors = {
            f"{layer.removeprefix('unet.')}.weight": factor for layer, factor in found.items()
        }

    def layers(self, base: Parameters, adapted: Sequence[Parameters]) -> Parameters:
        """Merge the layers whose moments are known."""
        names = [name for name in base if name in self.factors]
        merged = merge_moments(
            [base[name] for name in names],
            [[copy[name] for name in names] for copy in adapted],
            [self.factors[name] for name in names],
        )
        return dict(zip(names, merged, strict=True))

    def report(self, merged: Parameters, base: Parameters, adapted: Sequence[Parameters]) -> None:
        """How far each layer moved, and what each concept lost."""
        assert self.reports is not None
        names = [name for name in merged if name in self.factors]
        if not names:
            return
        self.reports.append(
            merge_report(
                [merged[name].detach() for name in names],
                [base[name].detach() for name in names],
                [[copy[name].detach() for name in names] for copy in adapted],
                None,
                [self.factors[name] for name in names],
                names=self.names,
            )
        )


class GatedMerge(MomentMerge):
    r"""Between the base, the mean of the copies and their merge by moments, layer by layer.

    .. math:: W = W_0 + g_1 (\bar W - W_0) + g_2 (W_{moments} - W_0), \qquad
              (g_0, g_1, g_2) = \mathrm{softmax}(\text{logits})

    with gates for every head of to_q, to_k and to_v, and for every other layer.

    Args:
        model: As for :class:`MomentMerge`.
        names: As there.
        concepts: As there.
        kept: As there.
        ridge: As there.
        labels: As there.

    Attributes:
        logits: (groups, 3), the groups of all layers one after the other; zero at first.

    Source:
        DERIVED: AdaMerging (ICLR 2024) learns one coefficient for each copy; here the copies are
        merged already, and the ways of doing it are weighed.
    """

    def __init__(self, model: TextToImage, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        modules = dict(model.unet.named_modules())
        self.groups = {name: _heads(modules, name) for name in self.factors}
        some = next(iter(self.factors.values())).chol
        self.logits = torch.zeros(
            sum(self.groups.values()), 3, dtype=torch.float32, device=some.device
        )

    def layers(self, base: Parameters, adapted: Sequence[Parameters]) -> Parameters:
        """Merge by moments, and go as far there, and to the mean, as the gates say."""
        merged = super().layers(base, adapted)
        shares = self.logits.softmax(-1)[:, 1:].mT
        gates = dict(zip(self.groups, shares.split(list(self.groups.values()), -1), strict=True))
        names = list(merged)
        gated = gate_layers(
            [base[name] for name in names],
            [
                [_mean([copy[name] for copy in adapted]) for name in names],
                [merged[name] for name in names],
            ],
            [gates[name] for name in names],
        )
        return dict(zip(names, gated, strict=True))


def _heads(modules: dict[str, nn.Module], weight: str) -> int:
    """How many heads the rows of a weight are divided among; 1 where there are none."""
    parent, _, part = weight.removesuffix(".weight").rpartition(".")
    heads = getattr(modules.get(parent), "heads", 1)
    return int(heads) if part in ("to_q", "to_k", "to_v") else 1


# A float64 matrix of this side takes 128 MB; four of them and their maps are held for a layer.
WIDEST = 4096


class _Predicting(nn.Module):
    """The denoiser as a function of a batch, whose hooks are those of the denoiser."""

    def __init__(self, model: TextToImage) -> None:
        super().__init__()
        self.unet = model.unet
        self._model = [model]  # in a list, or it would be looked through for modules
        self._rows = {f"unet.{layer.name}": layer.rows for layer in find_text_layers(model.unet)}
        self._mask = torch.empty(0)

    def forward(self, batch: Batch) -> Tensor:
        self._mask = batch.conditioning.mask
        return batch.prediction(self._model[0])

    def moments(self, layers: Sequence[str], batches: Sequence[Batch]) -> LayerMoments:
        """Of what batches send through layers."""
        return collect_moments(self, layers, batches, select=self._select)

    def _select(self, layer: str, x: Tensor) -> Tensor:
        return without_padding(self._model[0], self._rows.get(layer), self._mask, x)


def _mergeable(unet: nn.Module, names: Sequence[str]) -> list[str]:
    """Layers whose weights are among ``names`` and whose moments can be collected."""
    weights = set(names)
    return [
        layer
        for layer, module in unet.named_modules()
        if f"{layer}.weight" in weights
        and (
            isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        )
        and module.weight[0].numel() <= WIDEST
    ]


class ConceptMerge(Merge):
    r"""Merge of concept-adapted parameters, differentiable in all of them.

    For a layer by which text enters, with C what the concepts' own tokens send through it and C_reg
    what unrelated captions send,

    .. math:: W = \arg\min_W \lVert (W - W_0) C_{reg}^\top \rVert_F^2 + \rho \lVert W - W_0 \rVert^2
              \quad\text{subject to}\quad W c = W'_n c \ \text{for the tokens c of concept n},

    one factorisation for all layers that tokens enter by, and one for each that takes a vector of a
    whole prompt, whose c are those of the concept's prompts. A bias is the weight of a constant
    input 1 and is merged with its layer. Any other parameter is the mean of its adapted copies.

    Args:
        model: The model; its text encoders give C and C_reg.
        concepts: The concepts, in the order in which adapted copies will come.
        captions: Unrelated captions.
        ridge: rho, relative to the mean diagonal of the captions' Gram matrix.
        prompts_per_concept: Prompts of each concept whose tokens are constrained.

    Attributes:
        entrances: What is merged alike: layers, C and Q.
        seconds: Time spent merging so far, forward alone.
        reports: Where it is a list, every merge adds what it did; measuring takes about as long as
            two merges.

    Raises:
        ValueError: If there is no caption, or a concept has no token of its own.

    Note:
        Tokens that several concepts' prompts begin with ("a photo of the") have the same features
        in each of them where the text encoders only look back. Their targets would contradict each
        other, so they are left out, as is the start of the text.

    Source:
        MIMA, Algorithm 1 and its Merge; Custom Diffusion, the closed form.
    """

    def __init__(
        self,
        model: TextToImage,
        concepts: Sequence[Concept],
        captions: Sequence[str],
        *,
        ridge: float,
        prompts_per_concept: int = 2,
    ) -> None:
        if not captions:
            raise ValueError(
                "ConceptMerge: captions must hold at least one caption, got none; name unrelated "
                "captions in the concepts"
            )
        super().__init__()
        self.names = [concept.name for concept in concepts]
        layers = text_entrances(model.unet)
        tokens = [layer for layer in layers if layer.role != "pooled"]
        rows = torch.cat(
            [model.token_features(captions, positions="tokens"), padding_rows(model, captions)]
        )
        own = own_tokens(model, concepts, prompts_per_concept)
        self.entrances = [Entrance.of(tokens, own, rows, ridge)]
        for layer in layers:
            if layer.role == "pooled":
                *own, rows = (
                    model.received(model.conditioning(texts), layer.name)
                    for texts in (
                        *(list(c.prompts[:prompts_per_concept]) for c in concepts),
                        list(captions),
                    )
                )
                self.entrances.append(Entrance.of([layer], own, rows, ridge))

    @property
    def weights(self) -> list[str]:
        """Weights of all layers by which text enters."""
        return [name for entrance in self.entrances for name in entrance.weights]

    @property
    def projections(self) -> list[str]:
        """Weights of the layers that tokens enter by."""
        return self.entrances[0].weights

    @property
    def embeddings(self) -> list[Tensor]:
        """C of those, by concept, each ``(s_n, d)``."""
        return self.entrances[0].embeddings

    @property
    def factor(self) -> RegularizationFactor:
        """Of their Q."""
        return self.entrances[0].factor

    def layers(self, base: Parameters, adapted: Sequence[Parameters]) -> Parameters:
        """Merge the layers by which text enters."""
        found: Parameters = {}
        for entrance in self.entrances:
            weights = entrance.take(base)
            if not weights:
                continue
            merged = merge_kv(
                weights,
                [entrance.take(copy) for copy in adapted],
                entrance.embeddings,
                entrance.factor,
                names=self.names,
            )
            found |= entrance.give(base, merged)
        return found

    def report(self, merged: Parameters, base: Parameters, adapted: Sequence[Parameters]) -> None:
        """How far each layer moved, and what was lost."""
        assert self.reports is not None
        for entrance in self.entrances:
            if entrance.take(base):
                self.reports.append(
                    merge_report(
                        [weight.detach() for weight in entrance.take(merged)],
                        [weight.detach() for weight in entrance.take(base)],
                        [[w.detach() for w in entrance.take(copy)] for copy in adapted],
                        entrance.embeddings,
                        entrance.factor,
                        names=self.names,
                    )
                )


class Entrance(NamedTuple):
    """Layers that receive the same rows, which are known before any image is drawn.

    Attributes:
        weights: Names of their weights.
        biases: Names of their biases; empty if they have none.
        embeddings: C by concept, ``(s_n, d)``, or ``(s_n, d + 1)`` with a last input 1 for biases.
        factor: Of Q, as wide.
    """

    weights: list[str]
    biases: list[str]
    embeddings: list[Tensor]
    factor: RegularizationFactor

    @classmethod
    def of(
        cls,
        layers: Sequence[TextProjection],
        embeddings: Sequence[Tensor],
        captions: Tensor,
        ridge: float,
    ) -> Entrance:
        """Layers with what concepts and captions send through them."""
        biased = [layer.module.bias is not None for layer in layers]
        if any(biased) != all(biased):
            raise ValueError(
                "ConceptMerge: all layers that take tokens must have a bias, or none, got "
                f"{sum(biased)} of {len(biased)} with one"
            )
        rows = [_with_one(c) if all(biased) else c for c in (*embeddings, captions)]
        return cls(
            [layer.weight_name for layer in layers],
            [f"{layer.name}.bias" for layer in layers] if all(biased) else [],
            rows[:-1],
            RegularizationFactor.from_embeddings(rows[-1], ridge=ridge),
        )

    def take(self, parameters: Parameters) -> list[Tensor]:
        """Weights, with their biases as a last column, of the layers that are among parameters."""
        if not self.biases:
            return [parameters[name] for name in self.weights if name in parameters]
        return [
            torch.cat([parameters[name], parameters[bias].unsqueeze(1)], 1)
            for name, bias in zip(self.weights, self.biases, strict=True)
            if name in parameters
        ]

    def give(self, base: Parameters, merged: Sequence[Tensor]) -> Parameters:
        """By name, what :meth:`take` would have taken."""
        weights = [name for name in self.weights if name in base]
        if not self.biases:
            return dict(zip(weights, merged, strict=True))
        biases = [name for name in self.biases if name in base]
        return {
            **{name: w[:, :-1] for name, w in zip(weights, merged, strict=True)},
            **{name: w[:, -1] for name, w in zip(biases, merged, strict=True)},
        }


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


class ClassMerge(Merge):
    """Each layer by what is known of its inputs: token constraints where text enters, else moments.

    Args:
        exact: Of the layers by which text enters.
        moments: Of others; what neither merges is the mean of its copies.

    Source:
        DERIVED: what layers receive is found by probing (``text_layers``).
    """

    def __init__(self, exact: ConceptMerge, moments: MomentMerge) -> None:
        super().__init__()
        self.exact, self.moments = exact, moments

    def layers(self, base: Parameters, adapted: Sequence[Parameters]) -> Parameters:
        """Both, and constraints where there is a choice."""
        return {**self.moments.layers(base, adapted), **self.exact.layers(base, adapted)}

    def report(self, merged: Parameters, base: Parameters, adapted: Sequence[Parameters]) -> None:
        """Of the layers with constraints and of those merged by moments."""
        for part in (self.exact, self.moments):
            part.reports = self.reports
            part.report(merged, base, adapted)


def summary(reports: Sequence[MergeReport]) -> tuple[float, list[str]]:
    """The largest relative change of a layer, and all warnings, of the reports of one merge."""
    change = max(change for report in reports for change in report.relative_change)
    return change, list(dict.fromkeys(text for report in reports for text in report.warnings))


def check_merge(function: str, ridge: float, prompts_per_concept: int) -> None:
    """Refuse settings of a merge that are out of range.

    Raises:
        ValueError: Naming the setting.
    """
    if not (math.isfinite(ridge) and ridge >= 0.0):
        raise ValueError(f"{function}: ridge must be finite and at least 0, got {ridge}")
    if prompts_per_concept < 1:
        raise ValueError(f"{function}: merge_prompts must be at least 1, got {prompts_per_concept}")


def _mean(copies: Sequence[Tensor]) -> Tensor:
    """The mean, without a stack of all copies in memory: that takes longer than the merge."""
    total = copies[0]
    for copy in copies[1:]:
        total = total + copy
    # In place: no later step needs the sum. One copy is its own mean, and stays as it is.
    return total.div_(len(copies)) if len(copies) > 1 else total
