"""The model card of a saved pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from immunize_ext.text_to_image.card import Measured, model_card


def head_of(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_a_card_says_who_gets_through() -> None:
    measured = Measured(
        "accuracy", 40, 32, {"lora": (0.81, 0.07), "by: another # word": (0.8, 0.78)}
    )
    card = model_card(
        "mima", ["three", "van gogh"], {"steps": 60}, base="owner/m", measured=measured
    )
    head = head_of(card)
    assert head["base_model"] == "owner/m"
    assert head["library_name"] == "diffusers"
    assert "mima" in head["tags"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [
        {"type": "accuracy", "value": 0.78, "name": "under by: another # word"}
    ]
    assert "Concepts: three, van gogh." in card
    assert "The furthest got: by: another # word, 0.78." in card
    assert "| lora | 0.81 | 0.07 |" in card


def test_a_card_without_numbers_promises_nothing() -> None:
    card = model_card("mima", ["three"], {})
    assert "model-index" not in head_of(card)
    assert "base_model" not in head_of(card)
    assert "take it for unprotected" in card
    assert "Who gets through\n" not in card


def test_a_saved_pipeline_has_one(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from immunize_ext.text_to_image import METHODS, ImmunizedPipeline
    from immunize_ext.text_to_image.digits.concepts import digit_concepts
    from immunize_ext.text_to_image.digits.pipeline import load_digits_pipeline

    made = METHODS["erasure"].fit(load_digits_pipeline(), digit_concepts(("three",)))
    measured = Measured("accuracy", 40, 32, {"lora": (0.8, 0.1)})
    made.save(tmp_path / "model", measured=measured)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Concepts: three." in card
    assert "| lora | 0.80 | 0.10 |" in card
    again = ImmunizedPipeline.load(tmp_path / "model")  # the seal covers the card
    assert again.config == made.config
