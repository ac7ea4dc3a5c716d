"""Names of concepts in prompts: one matcher for erasure, attacks and concept files.

A name stands in a prompt as whole words, whatever the capitals and whatever joins its words:
``van_gogh`` is found in "An artwork of Van Gogh's" and in "van-gogh", ``cat`` is not found in
"cathedral".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

# What may stand between two words of a name, besides the spaces and marks that it has itself.
_JOINED = r"[\W_]{1,3}"
_CLOSE = r"[\W_]{0,3}"


@cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    # The longest first, so that "Vincent van Gogh" is not left as "Vincent art".
    found = "|".join(_one(name) for name in sorted(names, key=len, reverse=True) if name.strip())
    if not found:
        return re.compile(r"(?!)")  # nothing is found nowhere
    # An underscore joins words here, though it is a letter to the module re.
    return re.compile(rf"(?<![^\W_])(?:{found})(?![^\W_])", re.IGNORECASE)


def _one(name: str) -> str:
    text = unicodedata.normalize("NFC", name.strip())
    words = re.findall(r"[^\W_]+", text)
    if not words:
        return re.escape(text)
    between = re.findall(r"(?<=[^\W_])[\W_]+(?=[^\W_])", text)
    # "O'Keeffe" is also written "OKeeffe"; "van gogh" in one word is another word.
    joints = [_JOINED if re.search(r"[\s_-]", mark) else _CLOSE for mark in between]
    before, after = text[: text.index(words[0])], text[text.rindex(words[-1]) + len(words[-1]) :]
    parts = [f"(?:{re.escape(before)})?", re.escape(words[0])]
    for joint, word in zip(joints, words[1:], strict=True):
        parts += [joint, re.escape(word)]
    return "".join([*parts, f"(?:{re.escape(after)})?"])


def find_names(prompt: str, names: Sequence[str]) -> list[str]:
    """Where names stand in a prompt, as they are written there.

    Args:
        prompt: The prompt.
        names: A concept's name and its aliases.

    Returns:
        The words found, from left to right; empty if there are none.

    Example:
        >>> find_names("A cat near a cathedral, by Van-Gogh.", ["cat", "van_gogh"])
        ['cat', 'Van-Gogh']
    """
    return _pattern(tuple(names)).findall(unicodedata.normalize("NFC", prompt))


def replace_names(prompt: str, names: Sequence[str], replacement: str) -> str:
    """Put other words wherever one of the names stands in a prompt.

    Args:
        prompt: The prompt.
        names: A concept's name and its aliases.
        replacement: What stands there instead; nothing if empty.

    Returns:
        The prompt, with single spaces; as it was if no name stands in it.

    Example:
        >>> replace_names("An artwork of Van Gogh's", ["van_gogh"], "art")
        "An artwork of art's"
        >>> replace_names("a cat near a cathedral", ["cat"], "dog")
        'a dog near a cathedral'
    """
    text = unicodedata.normalize("NFC", prompt)
    replaced, count = _pattern(tuple(names)).subn(lambda _: replacement, text)
    return " ".join(replaced.split()) if count else prompt


def same_name(first: str, second: str) -> bool:
    """Whether two names are one to the matcher, as ``a b`` and ``A_b`` are."""
    return _plain(first) == _plain(second)


def _plain(name: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFC", name).casefold()
    return tuple(re.findall(r"[^\W_]+", text)) or (text.strip(),)
