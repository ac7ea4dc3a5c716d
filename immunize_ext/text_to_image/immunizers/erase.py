"""Erasure of concepts from a text-to-image model by UCE: all of it or none, with undo."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.erasure import uce
from immunize_ext.seams import Progress
from immunize_ext.text_to_image.concepts import Concept, ConceptSet
from immunize_ext.text_to_image.immunizers.immunized import ImmunizedPipeline
from immunize_ext.text_to_image.immunizers.token_rows import Replaced, replaced_rows
from immunize_ext.text_to_image.model import ModelLike, TextToImage
from immunize_ext.text_to_image.names import replace_names
from immunize_ext.text_to_image.projections import TextProjection, text_entrances
from immunize_ext.text_to_image.weight_edit import WeightEdit, apply_edit


def erase(
    model: TextToImage,
    concepts: ConceptSet | Sequence[Concept],
    *,
    preserve: Sequence[str] | None = None,
    ridge: float = 0.1,
    erase_scale: float = 1.0,
    preserve_scale: float = 0.1,
) -> WeightEdit:
    """Erase concepts: their prompts become those of their anchors.

    Every prompt that holds a concept's name or an alias (:mod:`immunize_ext.text_to_image.names`)
    is paired with the same prompt with the anchor in its place.
    The tokens from the name on, the end of the text and the padding are mapped to what the model
    sees in the paired prompt, and where it takes one vector of a whole prompt beside them, so is
    that (SDXL, SD3, FLUX).

    Args:
        model: The model, edited in place.
        concepts: What to erase; every concept needs an anchor. Of a set, ``retain`` is preserved.
        preserve: Prompts that shall keep their outputs; those of the set's ``retain`` if omitted.
        ridge: lambda of UCE, in the units of a squared text feature.
        erase_scale: Weight of erased tokens.
        preserve_scale: Weight of preserved tokens.

    Returns:
        The edit; its ``undo`` restores the weights bit for bit.

    Raises:
        ValueError: If a concept has no anchor, its name is not in its prompts or lies beyond the
            tokens that the model sees, nothing would change, or a layer cannot be edited. The model
            is then unchanged.

    Source:
        UCE (WACV 2024); see :func:`immunize_ext.ops.erasure.uce`.

    Example:
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concepts
        >>> from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
        >>> model = TextToImage(load_digits_pipeline())
        >>> before = model.digest()
        >>> with erase(model, digit_concepts(("three",))):
        ...     changed = model.digest() != before
        >>> changed, model.digest() == before
        (True, True)
    """
    chosen = concepts.concepts if isinstance(concepts, ConceptSet) else tuple(concepts)
    if not chosen:
        raise ValueError("erase: concepts must hold at least one concept, got none")
    if preserve is None:
        kept = concepts.retain if isinstance(concepts, ConceptSet) else ()
        preserve = [prompt for concept in kept for prompt in concept.prompts]
    pairs = [entry for concept in chosen for entry in erased_prompts(concept) if entry.found]
    edited: dict[str, Tensor] = {}
    for layers, rows, replacements, same in _inputs(model, pairs, preserve):
        found = uce(
            [layer.module.weight.detach() for layer in layers],
            rows,
            replacements,
            preserve=same,
            ridge=ridge,
            erase_scale=erase_scale,
            preserve_scale=preserve_scale,
        )
        edited |= {layer.weight_name: w for layer, w in zip(layers, found, strict=True)}
    old = dict(model.unet.named_parameters())
    if all(torch.equal(w, old[name]) for name, w in edited.items()):
        raise ValueError(
            "erase: the concepts must differ from their anchors for the model, got an edit that "
            "changes nothing; choose other anchors"
        )
    return apply_edit(model.unet, edited)


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """Erasure as a method of its own: what it takes away, an attacker brings back.

    Attributes:
        ridge: lambda of UCE, in the units of a squared text feature.
        erase_scale: Weight of erased tokens.
        preserve_scale: Weight of preserved tokens.

    Source:
        UCE (WACV 2024).
    """

    method: ClassVar[str] = "erasure"

    label: ClassVar[str] = "Erasure"

    ridge: float = 0.1
    erase_scale: float = 1.0
    preserve_scale: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        for name, least in (("ridge", 0.0), ("erase_scale", 0.0), ("preserve_scale", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(
                    f"{self.method}: {name} must be finite and at least 0, got {value}"
                )

    def fit(
        self,
        model: ModelLike,
        problem: ConceptSet,
        *,
        progress: Progress | None = None,
        resume: Path | None = None,
    ) -> ImmunizedPipeline:
        """Erase the concepts in a clone of a model; the retained ones are preserved.

        Args:
            model: The model; it is not changed.
            problem: What to erase, and what to keep.
            progress: Called when it is done.
            resume: Not used: there is nothing to go on from.

        Returns:
            The edited model.

        Raises:
            ValueError: As :func:`erase`.
        """
        del resume
        started = time.perf_counter()
        clone = TextToImage.of(model).clone()
        erase(clone, problem, **asdict(self))
        seconds = time.perf_counter() - started
        if progress is not None:
            progress(f"{self.method}: {', '.join(problem.names)}", 1.0)
        config = asdict(self) | {
            "concepts": list(problem.names),
            "retain": [concept.name for concept in problem.retain],
            "captions": len(problem.captions),
        }
        history = [{"step": 1.0, "seconds": seconds, "merge_seconds": 0.0}]
        return ImmunizedPipeline(clone, self.method, config, history)


class ErasedPrompt(NamedTuple):
    """One prompt of a concept, and what erasure makes of it.

    Attributes:
        prompt: The prompt.
        found: The concept's name or aliases as they are written in it; empty if they are not.
        anchored: The prompt with the anchor in their place.
    """

    prompt: str
    found: tuple[str, ...]
    anchored: str


def erased_prompts(concept: Concept) -> list[ErasedPrompt]:
    """What erasure does to each prompt of a concept.

    Args:
        concept: The concept, with an anchor.

    Returns:
        One entry a prompt. Those in which nothing was found are left as they are.

    Raises:
        ValueError: If it has no anchor, or no prompt of it holds its name.

    Example:
        >>> cat = Concept("cat", ("a Cat near a cathedral", "a kitten"), anchor="dog")
        >>> erased_prompts(cat)[0].found, erased_prompts(cat)[0].anchored
        (('Cat',), 'a dog near a cathedral')
        >>> erased_prompts(cat)[1].found
        ()
    """
    if concept.anchor is None:
        raise ValueError(
            f"erase: concept {concept.name!r} must have an anchor, the word that takes its place, "
            "got none"
        )
    found = [
        ErasedPrompt(
            text,
            tuple(concept.named_in(text)),
            replace_names(text, concept.words, concept.anchor),
        )
        for text in concept.prompts
    ]
    if not any(entry.found for entry in found):
        raise ValueError(
            f"erase: a prompt of concept {concept.name!r} must hold its name or an alias, got "
            f"{list(concept.prompts)}"
        )
    return found


def describe_erasure(concepts: Sequence[Concept]) -> list[str]:
    """What was found of each concept in its prompts, a line each.

    Args:
        concepts: The concepts.

    Returns:
        For example ``"cat: 'Cat' in 1 of 2 prompts becomes 'dog'; not in 'a kitten'"``.

    Example:
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concept
        >>> describe_erasure([digit_concept(3)])
        ["three: 'three' in 8 of 8 prompts becomes 'digit'"]
    """
    lines = []
    for concept in concepts:
        prompts = erased_prompts(concept)
        words = ", ".join(repr(w) for w in dict.fromkeys(w for p in prompts for w in p.found))
        missed = [repr(entry.prompt) for entry in prompts if not entry.found]
        line = (
            f"{concept.name}: {words} in {len(prompts) - len(missed)} of {len(prompts)} prompts "
            f"becomes {concept.anchor!r}"
        )
        lines.append(line + (f"; not in {', '.join(missed)}" if missed else ""))
    return lines


class _Inputs(NamedTuple):
    """What layers that are edited alike receive of erased, replacing and preserved prompts."""

    layers: list[TextProjection]
    rows: Tensor
    replacements: Tensor
    preserve: Tensor | None


def _inputs(
    model: TextToImage, pairs: Sequence[ErasedPrompt], preserve: Sequence[str]
) -> Iterator[_Inputs]:
    """Of the layers by which tokens enter, then of each that takes a vector a prompt."""
    entrances = text_entrances(model.unet)
    found = replaced_rows(model, [Replaced(entry.prompt, entry.anchored) for entry in pairs])
    if found.same:
        entry = pairs[found.same[0]]
        raise ValueError(
            f"erase: {entry.found[0]!r} must differ from its anchor within the first "
            f"{found.length} tokens, which are all that the model sees, got "
            f"{_shortened(entry.prompt)!r}; "
            "shorten the prompt, or choose another anchor"
        )
    tokens = [layer for layer in entrances if layer.role != "pooled"]
    kept = model.token_features(preserve) if preserve else None
    yield _Inputs(tokens, found.rows, found.others, kept)
    for layer in entrances:
        if layer.role == "pooled":
            before, after = (
                model.received(model.conditioning(texts), layer.name)
                for texts in ([p.prompt for p in pairs], [p.anchored for p in pairs])
            )
            kept = model.received(model.conditioning(preserve), layer.name) if preserve else None
            yield _Inputs([layer], before, after, kept)


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"
