"""Results as they were written once, by kind and schema: small, real, kept for as long as we read.

Schema 1 (no ``schema`` key) was written before reports were drawn from results alone. The training
losses of most steps are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parent / "report" / "data"


SAVED = sorted(
    (schema, path.stem) for schema in (1, 2) for path in (_DATA / f"schema_{schema}").glob("*.json")
)


def saved(kind: str, schema: int = 2) -> dict[str, Any]:
    """The results of a kind."""
    path = _DATA / f"schema_{schema}" / f"{kind}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
