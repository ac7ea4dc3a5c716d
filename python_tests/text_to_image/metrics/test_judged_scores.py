"""Measures of generated images, and the quality that a model keeps."""

from __future__ import annotations

import pickle

import pytest
import torch
from attack_pipelines import concept
from torch import Tensor

from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.digits.concepts import digit_concept
from immunize_ext.text_to_image.metrics.generation import (
    Sampling,
    retained_qualities,
    retained_quality,
)
from immunize_ext.text_to_image.metrics.similarity import (
    JudgedAccuracy,
    LpipsDistance,
    PromptSimilarity,
    ReferenceSimilarity,
)


def test_judged_accuracy_on_real_digits() -> None:
    pytest.importorskip("sklearn")
    accuracy = JudgedAccuracy()
    three, eight = digit_concept(3), digit_concept(8)
    images = (three.images("attack") + 1) / 2
    assert accuracy(images, three) > 0.9
    assert accuracy(images, eight) < 0.1
    again = pickle.loads(pickle.dumps(accuracy))
    assert again(images, three) == accuracy(images, three)
    with pytest.raises(ValueError, match="must have a label"):
        accuracy(images, Concept("three", ("a three",)))


def test_judges_say_how_often_they_err() -> None:
    pytest.importorskip("sklearn")
    accuracy, four = JudgedAccuracy(), digit_concept(4)
    errors = accuracy.errors(four)
    assert errors is not None
    assert errors.sensitivity > 0.9
    assert errors.false_positives < 0.05
    assert (errors.images, errors.others) == (40, 360)
    assert JudgedAccuracy(Always()).errors(four) is None
    assert accuracy.errors(Concept("four", ("a four",))) is None


class Always:
    def score(self, images: Tensor, label: int) -> float:
        return 0.5 + label


def test_other_judges() -> None:
    accuracy = JudgedAccuracy(Always())
    assert accuracy(torch.zeros(1, 1, 8, 8), digit_concept(0)) == 0.5
    assert pickle.loads(pickle.dumps(accuracy))(torch.zeros(1, 1, 8, 8), digit_concept(2)) == 2.5


def test_similarity_to_the_concepts_own_images() -> None:
    lpips = LpipsDistance(lambda a, b: (a - b).square().mean((1, 2, 3)))
    measure = ReferenceSimilarity(lpips.similarity, split="immunize")
    wanted = concept(count=1)
    # Its images come in [-1, 1] and are compared in [0, 1].
    assert measure((wanted.images("immunize") + 1) / 2, wanted) == 1.0
    assert measure((wanted.images("attack") + 1) / 2, wanted) < 1.0


def test_prompt_similarity_asks_for_the_first_prompt() -> None:
    class Clip:
        def image_text(self, images: Tensor, prompts: list[str]) -> float:
            assert prompts == ["a photo of the digit three"]
            return 0.25

    assert PromptSimilarity(Clip())(torch.zeros(1, 3, 8, 8), concept()) == 0.25  # type: ignore[arg-type]


class Fixed:
    """A model whose images are as bright as its prompt is long, a little more for each seed."""

    def generate(self, prompts: list[str], *, steps: int, guidance: float, seed: int) -> Tensor:
        value = len(prompts[0]) / 100 + seed / 1e8
        return torch.full((len(prompts), 1, 2, 2), value)


def test_retained_quality() -> None:
    concepts = [concept(prompts=("a" * 20,)), concept("five", prompts=("b" * 40,))]
    found = retained_quality(
        Fixed(),  # type: ignore[arg-type]
        concepts,
        lambda images, _: float(images.mean()),
        sampling=Sampling(images=2),
        seeds=(0, 1),
    )
    # Each seed has noise of its own, 1e5 apart.
    assert found.by_concept["three"].values == pytest.approx((0.2, 0.201))
    assert found.mean.values == pytest.approx((0.3, 0.301))
    with pytest.raises(ValueError, match="must not be empty"):
        retained_quality(Fixed(), [], lambda *_: 0.0)  # type: ignore[arg-type]


def test_several_measures_see_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def note(images: Tensor, _: Concept) -> float:
        seen.append(images)
        return float(images.mean())

    wanted = [concept(prompts=("a" * 20,))]
    found = retained_qualities(Fixed(), wanted, {"one": note, "other": note})  # type: ignore[arg-type]
    assert found["one"] == found["other"] == retained_quality(Fixed(), wanted, note)  # type: ignore[arg-type]
    assert seen[0] is seen[1]
