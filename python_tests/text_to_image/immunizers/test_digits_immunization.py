"""On the embedded pipeline: erased digits come back under LoRA, but not after MIMA."""

from __future__ import annotations

import pytest
import torch

from immunize_ext.text_to_image.attacks import ATTACKS
from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.digits.concepts import digit_concepts
from immunize_ext.text_to_image.digits.judge import DigitJudge
from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline
from immunize_ext.text_to_image.immunizers import MIMA, erase
from immunize_ext.text_to_image.model import TextToImage

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

IMAGES, STEPS = 24, 20


@pytest.mark.slow
def test_relearning_erased_digits_is_delayed_and_the_others_stay() -> None:
    judge, model = DigitJudge(), TextToImage(load_digits_pipeline())
    concepts = digit_concepts()

    def accuracy(judged: TextToImage, which: tuple[Concept, ...]) -> float:
        scores = []
        for concept in which:
            assert concept.label is not None
            images = judged.generate([concept.prompts[0]] * IMAGES, seed=7)
            scores.append(judge.score(images, concept.label))
        return sum(scores) / len(scores)

    erase(model, concepts)
    retained = accuracy(model, concepts.retain)
    assert retained > 0.9
    assert accuracy(model, concepts.concepts) < 0.3
    immunized = MIMA().fit(model, concepts)

    def relearned(attacked: TextToImage) -> float:
        three = concepts.concepts[:1]
        with torch.random.fork_rng(devices=[]):
            adapted = ATTACKS["lora"].adapt(attacked, three, steps=STEPS, seed=0).model
        return accuracy(adapted, three)

    assert relearned(model) > 0.5
    assert relearned(immunized.model) < 0.1
    # 0.05 as the aim; seven digits of 24 images each have a standard error of 0.01.
    assert accuracy(immunized.model, concepts.retain) > retained - 0.05 - 0.02
    assert immunized.merge_share < 0.05
