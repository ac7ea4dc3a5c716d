r"""Rows of text features that belong to a concept, and the rows that may stand in their place.

What an encoder gives a token depends on the text before it (CLIP) or on all of it (T5), and so does
the answer to which rows are a concept's own:

- where features look back, those from the first token on that its prompt shares with no other;
- elsewhere every row moves with every word, and a row is the concept's own if it moves much: with
  h the features of its prompt and h' those of the prompt with the anchor in the name's place,

  .. math:: \lVert h_i - h'_{j(i)} \rVert > \delta \lVert h_i \rVert,

  j(i) the same token in the other prompt. Padding is left out: it is nobody's own.

An edit is another matter. Joint models attend to T5's padding without a mask, hundreds of rows of
it, so what an edit does to padding shows in every image: erasure maps it along with the words, and
a merge keeps it among what is to stay. Evenly spaced positions stand for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunize_ext.text_to_image.backbones import Segment
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.names import replace_names
from immunize_ext.text_to_image.text_layers import Rows

# Least share of its norm by which a row moves that is a concept's own.
_OWN = 0.25

# Positions of a prompt's padding that stand for all of it.
_PADDING = 32


class Replaced(NamedTuple):
    """A prompt and the same prompt with other words in the name's place."""

    prompt: str
    other: str


class ReplacedRows(NamedTuple):
    """Rows that differ between prompts.

    Attributes:
        rows: Of the prompts, ``(s, d)``.
        others: Of the others, row by row, ``(s, d)``.
        same: Which pairs the model sees no difference between.
        length: How many tokens it sees.
    """

    rows: Tensor
    others: Tensor
    same: list[int]
    length: int


def replaced_rows(model: TextToImage, pairs: Sequence[Replaced]) -> ReplacedRows:
    """Features of the tokens that differ, in both prompts, row by row.

    Prompts that differ in one word of one token stand against each other position by position. An
    anchor of more or fewer tokens shifts what comes after it; then the last token of the name
    stands against the last of the anchor, and what follows is matched from there. Where features
    look back, all that comes after the name differs, the end of the text and padding included;
    elsewhere everything does.

    Args:
        model: The model.
        pairs: The prompts.

    Returns:
        The rows, in the order of the prompts.
    """
    before, after = _features(model, pairs)
    segments = model.segments(before.shape[1])
    places = [
        (index, here, there)
        for index, pair in enumerate(pairs)
        for segment in segments
        for here, there in _matched(model, segment, pair)
    ]
    at, here, there = torch.tensor(places, dtype=torch.long).reshape(-1, 3).unbind(1)
    seen = set(at.tolist())
    return ReplacedRows(
        before[at, here],
        after[at, there],
        [index for index in range(len(pairs)) if index not in seen],
        max(segment.length for segment in segments),
    )


def _features(model: TextToImage, pairs: Sequence[Replaced]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        before = model.conditioning([pair.prompt for pair in pairs]).hidden
        after = model.conditioning([pair.other for pair in pairs]).hidden
    return before, after


def _matched(model: TextToImage, segment: Segment, pair: Replaced) -> Iterator[tuple[int, int]]:
    """Positions of a segment that differ, and those that take their place; none if none does."""
    ids, other = (_ids(model, segment, text) for text in pair)
    if ids == other:
        return
    pairs = enumerate(zip(ids, other, strict=False))
    shorter = min(len(ids), len(other)) - 1
    first = next((i for i, (a, b) in pairs if a != b), shorter)
    shift = len(other) - len(ids)
    if segment.looks_back:
        positions = list(range(first, segment.length))
    else:
        positions = [*range(len(ids)), *_spaced(max(len(ids), len(other)), segment.length)]
    for position in positions:
        # Padding begins where the longer text ends, and stands where it stood.
        text = segment.looks_back or position < len(ids)
        there = position
        if text and position >= first:
            there = min(max(position + shift, first), segment.length - 1)
        yield segment.start + position, segment.start + there


def _ids(model: TextToImage, segment: Segment, text: str) -> list[int]:
    tokenizer: Any = model.tokenizers[segment.tokenizer]
    found: list[int] = tokenizer(text, truncation=True, max_length=segment.length)["input_ids"]
    return found


def _spaced(begin: int, end: int) -> list[int]:
    count = min(_PADDING, end - begin)
    return [begin + (index * (end - begin)) // count for index in range(count)]


def padding_rows(model: TextToImage, prompts: Sequence[str]) -> Tensor:
    """Features of padding, where the denoiser sees it and it looks both ways.

    Args:
        model: The model.
        prompts: What stands before the padding.

    Returns:
        Shape ``(s, d)``; no row of models that have no such padding.
    """
    with torch.no_grad():
        hidden = model.conditioning(prompts).hidden
    rows = [
        hidden[index, segment.start + position]
        for segment in model.segments(hidden.shape[1])
        if not segment.looks_back
        for index, text in enumerate(prompts)
        for position in _spaced(len(_ids(model, segment, text)), segment.length)
    ]
    return torch.stack(rows) if rows else hidden[0, :0]


def without_padding(model: TextToImage, rows: Rows | None, mask: Tensor, x: Tensor) -> Tensor:
    """What a layer receives without padding, where its rows are tokens.

    Padding of an encoder that looks back stays: with the end of the text it sums up the prompt.

    Args:
        model: The model.
        rows: What a row stands for (:class:`~immunize_ext.text_to_image.text_layers.TextLayer`).
        mask: True for tokens of the prompts, shape ``(b, t)``, or ``(1, t)`` for all alike.
        x: Input of the layer, shape ``(b, t, d)``, or ``(b, t + i, d)`` with the image behind.

    Returns:
        Rows that count, shape ``(s, d)``; ``x`` itself where rows are no tokens.
    """
    if rows not in ("text", "joint"):
        return x
    kept = mask.clone()
    for segment in model.segments(kept.shape[1]):
        if segment.looks_back:  # CLIP
            kept[:, segment.start : segment.start + segment.length] = True
    image = kept.new_ones(len(kept), x.shape[1] - kept.shape[1])
    return x[torch.cat([kept, image], 1).expand(len(x), -1)]


def own_tokens(
    model: TextToImage, concepts: Sequence[Concept], prompts_per_concept: int
) -> list[Tensor]:
    """Text features of the tokens that belong to one concept alone.

    Where features look back, a position belongs to a concept alone if the text up to it occurs in
    none of the other concepts' prompts; the first end-of-text position is taken along: it sums up
    the prompt, and attention looks at it. Elsewhere it is a row that moves when the anchor, or
    nothing if there is none, takes the name's place.

    Args:
        model: The model.
        concepts: The concepts.
        prompts_per_concept: Prompts of each that are looked at.

    Returns:
        One matrix a concept, shape ``(s_n, d)``.

    Raises:
        ValueError: If a concept has no token of its own.
    """
    texts = [list(concept.prompts[:prompts_per_concept]) for concept in concepts]
    with torch.no_grad():
        features = [model.conditioning(prompts).hidden for prompts in texts]
    rows: list[list[Tensor]] = [[] for _ in concepts]
    for segment in model.segments(features[0].shape[1]):
        if segment.looks_back:
            for index, places in enumerate(_own_places(model, segment, texts)):
                rows[index] += [features[index][row, position] for row, position in places]
        else:
            for index, concept in enumerate(concepts):
                rows[index] += _moving_rows(model, segment, concept, texts[index])
    for concept, found, prompts in zip(concepts, rows, texts, strict=True):
        if not found:
            raise ValueError(
                f"own_tokens: concept {concept.name!r} must have tokens of its own, got prompts "
                f"that other concepts have too: {prompts}"
            )
    return [torch.stack(found) for found in rows]


def _own_places(
    model: TextToImage, segment: Segment, texts: Sequence[Sequence[str]]
) -> list[list[tuple[int, int]]]:
    """By concept, prompt and position of tokens before which no other concept has the same text."""
    prefixes: list[dict[tuple[int, ...], tuple[int, int]]] = []
    for prompts in texts:
        found: dict[tuple[int, ...], tuple[int, int]] = {}
        for row, text in enumerate(prompts):
            ids = tuple(_ids(model, segment, text))
            for position in range(1, len(ids)):
                found.setdefault(ids[: position + 1], (row, segment.start + position))
        prefixes.append(found)
    return [
        [
            at
            for key, at in found.items()
            if not any(key in other for i, other in enumerate(prefixes) if i != index)
        ]
        for index, found in enumerate(prefixes)
    ]


def _moving_rows(
    model: TextToImage, segment: Segment, concept: Concept, prompts: Sequence[str]
) -> list[Tensor]:
    """Rows of a segment's text that the concept's name moves."""
    pairs = [
        Replaced(text, replace_names(text, concept.words, concept.anchor or "")) for text in prompts
    ]
    before, after = _features(model, pairs)
    found = []
    for index, pair in enumerate(pairs):
        end = segment.start + len(_ids(model, segment, pair.prompt))
        for here, there in _matched(model, segment, pair):
            row, other = before[index, here], after[index, there]
            if here < end and bool((row - other).norm() > _OWN * row.norm()):
                found.append(row)
    return found
