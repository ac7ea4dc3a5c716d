"""A page as a reader has it: its words, what it refers to, and whether it is well formed."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class ParsedPage(HTMLParser):
    """Collects tags, attributes, references, identifiers and visible text of a page.

    Attributes:
        references: Values of ``href`` and ``src``.
        identifiers: Values of ``id``.
        tags: Names of all elements.
        handlers: Attributes that would run code.
        open: Elements that were never closed.
    """

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.identifiers: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.open: list[str] = []
        self._words: list[str] = []
        self._source = text
        self.feed(text)

    @property
    def text(self) -> str:
        """What a reader sees, with single spaces."""
        return " ".join("".join(self._words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.identifiers.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._words.append(" ")

    def handle_data(self, text: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self._words.append(text)

    def check(self) -> None:
        """It is well formed, stands alone, and runs nothing."""
        assert self.open == []
        assert "script" not in self.tags
        assert self.handlers == []
        inside = [r for r in self.references if not r.startswith("data:image/")]
        assert all(reference.startswith("#") for reference in inside)
        used = {reference[1:] for reference in inside}
        used |= set(re.findall(r"url\(#([^)]*)\)", self._source))
        assert used <= set(self.identifiers)
        assert len(self.identifiers) == len(set(self.identifiers))
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", self._source)
