"""How attacks word a concept."""

from __future__ import annotations

import pytest
from attack_pipelines import concept
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.text_to_image.attacks import (
    ATTACKS,
    PROMPT_VARIANTS,
    Target,
    asked_by,
    attack_label,
    attack_prompt,
    registered_name,
    replace_name,
)

words = st.text(st.characters(categories=["Ll", "Lu"]), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("canonical", "a photo of the digit three"),
        ("paraphrase", "a handwritten three"),
        ("rare_token", "a photo of the digit sks"),
        ("name_left_out", "a photo of the digit"),
        ("unrelated_word", "a photo of a cat on paper"),
        ("", ""),
        ("a drawing of {}", "a drawing of three"),
        ("a drawing", "a drawing"),
    ],
)
def test_variants(variant: str, expected: str) -> None:
    assert attack_prompt(concept(), variant) == expected


@pytest.mark.parametrize(
    ("prompt", "name", "expected"),
    [
        ("An artwork of Van Gogh", "van_gogh", "An artwork of X"),
        ("an artwork of van-gogh, blue", "Van Gogh", "an artwork of X, blue"),
        ("thirty three of three", "three", "thirty X of X"),
        ("threefold three", "three", "threefold X"),
        ("a {odd} $name^", "{odd} $name^", "a X"),
    ],
)
def test_names_in_prompts(prompt: str, name: str, expected: str) -> None:
    assert replace_name(prompt, name, "X") == expected


@given(st.lists(words, min_size=1, max_size=4), words)
def test_a_name_is_found_wherever_it_stands(rest: list[str], name: str) -> None:
    rest = [word for word in rest if word.lower() != name.lower()]
    for position in range(len(rest) + 1):
        prompt = " ".join([*rest[:position], name, *rest[position:]])
        # Some letters change their length with their case; the name itself is always found.
        assert "<x>" in replace_name(prompt, name, "<x>").split()
        assert replace_name(prompt, name, "").split().count(name) == 0


def test_what_cannot_be_worded() -> None:
    with pytest.raises(ValueError, match="must contain the concept's name 'three'"):
        replace_name("a threefold", "three", "x")
    with pytest.raises(ValueError, match="must contain"):
        replace_name("a photo", " ", "x")
    with pytest.raises(ValueError, match="second prompt"):
        attack_prompt(concept(prompts=("a three",)), "paraphrase")


def test_registry() -> None:
    usual = {"canonical", "paraphrase", "rare_token", "name_left_out", "unrelated_word"}
    assert set(PROMPT_VARIANTS) == usual
    for name, attack in ATTACKS.items():
        assert attack.name == name
    target = Target([concept()])
    prompts = {name: attack.prompts(target)["three"] for name, attack in ATTACKS.items()}
    assert prompts["lora"] == "a photo of the digit three"
    assert prompts["dreambooth"] == "a photo of the digit sks"
    assert prompts["custom_diffusion"] == "a photo of the digit <new1>"


def test_attacks_repeated_under_several_wordings() -> None:
    wordings = ("canonical", "rare_token", "a drawing of {}")
    chosen = [ATTACKS[name] for name in ("lora", "dreambooth", "textual_inversion")]
    found = asked_by(chosen, wordings)
    assert [attack.name for attack in found] == [
        *("lora", "lora:rare_token", "lora:a drawing of {}"),
        # Its own wording is the rare word.
        *("dreambooth:canonical", "dreambooth", "dreambooth:a drawing of {}"),
        # It brings its own word.
        "textual_inversion",
    ]
    asked = [attack.prompts(Target([concept()]))["three"] for attack in found[:3]]
    assert asked == ["a photo of the digit three", "a photo of the digit sks", "a drawing of three"]
    for attack in found:
        one = ATTACKS[registered_name(attack.name)]
        assert type(attack) is type(one)
        assert attack_label(attack.name).startswith(attack_label(one.name))
    assert asked_by(chosen, ()) == chosen
