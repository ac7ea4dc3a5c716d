"""Erasure by UCE on a model, and the merge of adapted copies of its parameters."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attack_pipelines import concept, tiny_pipeline, tiny_xl_pipeline
from immunizer_settings import CAPTIONS, concepts, weights

from immunize_ext.text_to_image.concepts import ConceptSet
from immunize_ext.text_to_image.immunizers import (
    ConceptMerge,
    Erasure,
    JointTraining,
    MergeOnly,
    describe_erasure,
    erase,
)
from immunize_ext.text_to_image.immunizers.erase import erased_prompts
from immunize_ext.text_to_image.model import TextToImage
from immunize_ext.text_to_image.projections import find_text_projections, text_entrances

pytest.importorskip("diffusers")

BOTH = pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])


@BOTH
def test_an_erased_prompt_is_seen_as_its_anchor(make: Any) -> None:
    model = TextToImage(make())
    before = weights(model)
    projection = find_text_projections(model.unet)[0]
    old = projection.module.weight.detach().clone()
    texts = ["a photo of the digit three", "a photo of the digit digit", "a photo of the digit six"]
    three, digit, six = (model.token_features([text], positions="last")[0] for text in texts)
    edit = erase(model, concepts("three"), ridge=1e-3)
    new = projection.module.weight.detach()
    wanted = old @ digit
    assert (new @ three - wanted).norm() < 0.1 * (old @ three - wanted).norm()
    # What is kept moves by less than what is erased.
    assert (new @ six - old @ six).norm() < 0.5 * (old @ three - wanted).norm()
    changed = {n for n, p in weights(model).items() if not torch.equal(p, before[n])}
    # SDXL takes a vector of the whole prompt beside the tokens, which tells of the name as well.
    assert changed == {p.weight_name for p in text_entrances(model.unet)}
    assert len(changed) - len(find_text_projections(model.unet)) == len(model.text_encoders) - 1
    edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_nothing_is_edited_where_something_is_wrong() -> None:
    model = TextToImage(tiny_pipeline())
    before = weights(model)
    good = concept("three")
    for bad, words in [
        (concept("five", anchor=None), "must have an anchor"),
        (concept("five", prompts=("a photo of the digit six",)), "must hold its name"),
    ]:
        with pytest.raises(ValueError, match=words):
            erase(model, [good, bad])
    with pytest.raises(ValueError, match="at least one concept"):
        erase(model, [])
    layer = find_text_projections(model.unet)[-1].module
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        erase(model, [good])
    layer.weight.data[0, 0] = before[find_text_projections(model.unet)[-1].weight_name][0, 0]
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_fused_projections_are_not_edited_in_vain() -> None:
    model = TextToImage(tiny_pipeline())
    model.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="must not be fused"):
        erase(model, concepts("three"))


@BOTH
def test_merged_projections_answer_each_concepts_tokens_as_its_own_copy_does(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that goes on by one when it is read: the merge is measured, once.
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("immunize_ext.text_to_image.immunizers.concept_merge.time", clock)
    model = TextToImage(make())
    found = concepts()
    merge = ConceptMerge(model, found.concepts, CAPTIONS, ridge=1e-3)
    names = set(merge.projections)
    base = {n: p for n, p in weights(model).items() if ".attn2." in n}
    copies = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        copies.append(
            {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
        )
    merged = merge(base, copies)
    assert list(merged) == list(base)
    for name, weight in merged.items():
        if name in names:
            for rows, copy in zip(merge.embeddings, copies, strict=True):
                # float32 weights, kappa(T) around 1e3.
                torch.testing.assert_close(
                    rows @ weight.mT, rows @ copy[name].mT, rtol=1e-2, atol=1e-3
                )
        else:
            torch.testing.assert_close(weight, (copies[0][name] + copies[1][name]) / 2)
    assert merge.seconds == 1.0


def test_tokens_that_concepts_share_are_not_constrained() -> None:
    model = TextToImage(tiny_pipeline())
    merge = ConceptMerge(model, concepts().concepts, CAPTIONS, ridge=1e-3)
    # Two prompts each: the name and the end of the text are a concept's own; the start, "a photo
    # of the digit" and "a handwritten" are everybody's.
    assert [len(rows) for rows in merge.embeddings] == [4, 4]


def test_concepts_that_cannot_be_told_apart_are_refused() -> None:
    model = TextToImage(tiny_pipeline())
    same = ("a photo of the digit three",)
    pair = ConceptSet((concept("three", prompts=same), concept("five", prompts=same)))
    with pytest.raises(ValueError, match="own_tokens: concept 'three' must have tokens of its own"):
        ConceptMerge(model, pair.concepts, CAPTIONS, ridge=1e-3)


def test_names_are_replaced_as_words_whatever_their_capitals() -> None:
    cat = concept("cat", prompts=("a Cat near a cathedral", "a photo of a dog"), anchor="dog")
    first, second = erased_prompts(cat)
    assert (first.found, first.anchored) == (("Cat",), "a dog near a cathedral")
    assert (second.found, second.anchored) == ((), "a photo of a dog")
    assert describe_erasure([cat]) == [
        "cat: 'Cat' in 1 of 2 prompts becomes 'dog'; not in 'a photo of a dog'"
    ]
    known = replace(cat, aliases=("the cathedral's pet",))
    assert (
        erased_prompts(replace(known, prompts=("The  Cathedral\u2019s pet",)))[0].anchored == "dog"
    )


def test_the_docstrings_own_example_is_erased() -> None:
    model = TextToImage(tiny_pipeline())
    before = weights(model)
    van_gogh = concept("van_gogh", prompts=("An artwork of Van Gogh",), anchor="art")
    erase(model, [van_gogh])
    assert any(not torch.equal(p, before[n]) for n, p in weights(model).items())


def test_erasure_that_would_do_nothing_is_refused() -> None:
    model = TextToImage(tiny_pipeline())
    before = weights(model)
    # Twelve tokens are seen, the name is the 16th.
    far = concept("three", prompts=("a photo of " + "cat " * 12 + "three",))
    with pytest.raises(ValueError, match="'three' must differ from its anchor within the first 12"):
        erase(model, [far])
    with pytest.raises(ValueError, match="shorten the prompt"):
        erase(model, [concept("five"), far])
    with pytest.raises(ValueError, match="'three' must differ from its anchor"):
        erase(model, [concept("three", anchor="three")])
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_erasure_is_a_method_like_any_other() -> None:
    model = TextToImage(tiny_pipeline())
    before = weights(model)
    erased = Erasure(ridge=1e-3).fit(model, concepts("three"))
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    erase(model, concepts("three"), ridge=1e-3)
    mine, theirs = weights(model), weights(erased.model)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert erased.config["concepts"] == ["three"]
    assert erased.merge_share == 0.0
    with pytest.raises(ValueError, match="ridge must be finite and at least 0"):
        Erasure(ridge=float("nan"))


@pytest.mark.parametrize(
    ("name", "value"), [("weighting", "cvar"), ("concept_rate", 0.5), ("worst_share", 0.25)]
)
def test_concepts_immunized_alone_are_not_weighed(name: str, value: Any) -> None:
    usual = getattr(MergeOnly(), name)
    with pytest.raises(ValueError, match=f"merge_only: {name} must be left at {usual!r}"):
        MergeOnly(**{name: value})
    assert getattr(JointTraining(**{name: value}), name) == value
