"""What a part of the night found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Losses of one line that are told in full; the others are counted.
TOLD = 10


@dataclass
class Count:
    """Tried, survived and lost, of one kind.

    Attributes:
        tried: how often something was done to the package.
        lost: how often a promise was broken.
        notes: counts beside, such as what was refused by name.
        losses: the first losses, in words that repeat them.
    """

    tried: int = 0
    lost: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)

    def survived(self, note: str | None = None) -> None:
        """One more that went well, in the way that the note says."""
        self.tried += 1
        if note is not None:
            self.notes[note] = self.notes.get(note, 0) + 1

    def lose(self, words: str) -> None:
        """One more that did not."""
        self.tried += 1
        self.lost += 1
        if len(self.losses) < TOLD:
            self.losses.append(words)


def write_counts(path: Path, part: str, record: Mapping[str, Any]) -> None:
    """Put the record of one part beside those of the others."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found[part] = dict(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def plain(counts: Mapping[str, Count]) -> dict[str, dict[str, Any]]:
    """As JSON takes it."""
    return {name: asdict(count) for name, count in counts.items()}
