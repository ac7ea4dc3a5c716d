"""Erasure of concepts from a text-to-image model by UCE: all of it or none, with undo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from immunize_ext.ops.erasure import uce
from immunize_ext.text_to_image.concepts import Concept, ConceptSet
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import find_text_projections
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

    Every prompt of a concept is paired with the same prompt with the anchor in place of the name.
    The tokens from the name on, the end of the text and the padding are mapped to what the model
    sees in the paired prompt.

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
        ValueError: If a concept has no anchor, its name is not in its prompts, or a layer cannot
            be edited. The model is then unchanged.

    Source:
        UCE (WACV 2024); see :func:`immunize_ext.ops.erasure.uce`.
    """
    chosen = concepts.concepts if isinstance(concepts, ConceptSet) else tuple(concepts)
    if not chosen:
        raise ValueError("erase: concepts must hold at least one concept, got none")
    if preserve is None:
        kept = concepts.retain if isinstance(concepts, ConceptSet) else ()
        preserve = [prompt for concept in kept for prompt in concept.prompts]
    pairs = [pair for concept in chosen for pair in _pairs(concept)]
    source, target = (list(side) for side in zip(*pairs, strict=True))
    rows, replacements = _aligned(model, source, target)
    found = find_text_projections(model.unet)
    base = [projection.module.weight.detach() for projection in found]
    edited = uce(
        base,
        rows,
        replacements,
        preserve=model.token_features(preserve) if preserve else None,
        ridge=ridge,
        erase_scale=erase_scale,
        preserve_scale=preserve_scale,
    )
    return apply_edit(
        model.unet,
        {projection.weight_name: w for projection, w in zip(found, edited, strict=True)},
    )


def _pairs(concept: Concept) -> list[tuple[str, str]]:
    if concept.anchor is None:
        raise ValueError(
            f"erase: concept {concept.name!r} must have an anchor, the word that takes its place, "
            "got none"
        )
    spoken = concept.name.replace("_", " ")
    found = [(text, text.replace(spoken, concept.anchor)) for text in concept.prompts]
    found = [pair for pair in found if pair[0] != pair[1]]
    if not found:
        raise ValueError(
            f"erase: a prompt of concept {concept.name!r} must hold its name, got "
            f"{list(concept.prompts)}"
        )
    return found


def _aligned(
    model: TextToImage, source: Sequence[str], target: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Features of the tokens that differ, in both prompts, row by row.

    Prompts that differ in one word of one token stand against each other position by position. An
    anchor of more or fewer tokens shifts what comes after it; then the last token of the name
    stands against the last of the anchor, and what follows is matched from there.
    """
    with torch.no_grad():
        before, after = model.conditioning(source).hidden, model.conditioning(target).hidden
    rows, replacements = [], []
    tokenizer = model.tokenizers[0]
    for index, (text, other) in enumerate(zip(source, target, strict=True)):
        ids, ids_other = (tokenizer(t, truncation=True)["input_ids"] for t in (text, other))
        length = before.shape[1]
        first = next(
            (i for i, pair in enumerate(zip(ids, ids_other, strict=False)) if pair[0] != pair[1]),
            min(len(ids), len(ids_other)) - 1,
        )
        shift = len(ids_other) - len(ids)
        for position in range(first, length):
            there = min(max(position + shift, first), length - 1)
            rows.append(before[index, position])
            replacements.append(after[index, there])
    return torch.stack(rows), torch.stack(replacements)
