"""How an attacker words what it wants.

An immunization learned with one prompt may not hold for another, so an attack can train and
generate with:

- ``"canonical"``: the concept's first prompt, which immunizers see too;
- ``"paraphrase"``: its second one;
- ``"rare_token"``: the canonical prompt with a word that means nothing in place of the name;
- ``"name_left_out"``: the canonical prompt without the name;
- ``"unrelated_word"``: a prompt that has nothing to do with it, :data:`UNRELATED_PROMPT`;
- any other text: that text, ``{}`` in it standing for the concept's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from immunize_ext.text_to_image.concepts import Concept
from immunize_ext.text_to_image.names import find_names, replace_names

PromptVariant = Literal["canonical", "paraphrase", "rare_token", "name_left_out", "unrelated_word"]


PROMPT_VARIANTS: tuple[PromptVariant, ...] = get_args(PromptVariant)


# The word that DreamBooth made usual: in CLIP's vocabulary, and without a meaning there.
RARE_TOKEN = "sks"


# Nothing that an immunizer has seen stands in it.
UNRELATED_PROMPT = "a photo of a cat on paper"


def replace_name(prompt: str, name: str | Sequence[str], replacement: str) -> str:
    """Put other words where a concept's name stands in a prompt.

    Args:
        prompt: The prompt.
        name: The name, or all that the concept is called; one of them has to stand in the prompt,
            as :mod:`immunize_ext.text_to_image.names` finds it.
        replacement: What stands there instead; nothing if empty.

    Returns:
        The prompt, with single spaces.

    Raises:
        ValueError: If the name is not in the prompt.

    Example:
        >>> replace_name("An artwork of Van Gogh", "van_gogh", "sks")
        'An artwork of sks'
        >>> replace_name("a photo of a three", "three", "")
        'a photo of a'
    """
    words = [name] if isinstance(name, str) else list(name)
    if not find_names(prompt, words):
        raise ValueError(
            f"replace_name: prompt must contain the concept's name {words[0]!r}, got {prompt!r}; "
            "give the concept an alias, or the attack a prompt of its own"
        )
    return replace_names(prompt, words, replacement)


def attack_prompt(concept: Concept, variant: str) -> str:
    """The prompt that an attack trains and generates with.

    Args:
        concept: What it wants.
        variant: One of :data:`PROMPT_VARIANTS`, or a text of its own (module docstring).

    Returns:
        The prompt.

    Raises:
        ValueError: If the concept has no second prompt to paraphrase with, or its name is not in
            its prompt.

    Example:
        >>> from immunize_ext.text_to_image.digits.concepts import digit_concept
        >>> attack_prompt(digit_concept(3), "name_left_out")
        'a photo of the digit'
    """
    canonical = concept.prompts[0]
    if variant == "canonical":
        return canonical
    if variant == "paraphrase":
        if len(concept.prompts) < 2:
            raise ValueError(
                f"attack_prompt: concept {concept.name!r} must have a second prompt to paraphrase "
                "with, got one prompt; add one to the concept or give the attack a text"
            )
        return concept.prompts[1]
    if variant == "rare_token":
        return replace_name(canonical, concept.words, RARE_TOKEN)
    if variant == "name_left_out":
        return replace_name(canonical, concept.words, "")
    if variant == "unrelated_word":
        return UNRELATED_PROMPT
    return variant.replace("{}", concept.spoken)
