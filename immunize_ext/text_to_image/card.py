"""The model card of an immunized pipeline: what was done to it, and who gets through.

The head of the card is metadata as huggingface.co reads it; the rest is for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAME = "README.md"


@dataclass(frozen=True)
class Measured:
    """What attacks reached on a model and on its unprotected twin.

    Attributes:
        measure: What was measured, such as ``accuracy``.
        steps: Steps of each attack.
        images: Images for each score.
        attacks: By name of the attack, the mean score on the unprotected and on the immunized
            model at the end.
    """

    measure: str
    steps: int
    images: int
    attacks: Mapping[str, tuple[float, float]]

    def worst(self) -> tuple[str, float]:
        """The attack that got furthest on the immunized model, and how far."""
        name = max(self.attacks, key=lambda one: self.attacks[one][1])
        return name, self.attacks[name][1]


def model_card(
    method: str,
    concepts: Sequence[str],
    settings: Mapping[str, Any],
    *,
    base: str | None = None,
    measured: Measured | None = None,
) -> str:
    """The card.

    Args:
        method: Name of the method.
        concepts: What was immunized against.
        settings: Settings of the method, as plain values.
        base: The model that was immunized: its name on a hub, if it has one.
        measured: What attacks reached, if somebody measured.

    Returns:
        Markdown with YAML metadata in front.

    Example:
        >>> found = Measured("accuracy", 40, 32, {"lora": (0.81, 0.07)})
        >>> card = model_card("mima", ["three"], {"steps": 60}, measured=found)
        >>> [line for line in card.splitlines() if line.startswith("| lora")]
        ['| lora | 0.81 | 0.07 |']
    """
    import yaml

    head: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "license_name": "that-of-the-base-model",
        "tags": ["model-immunization", "immunize_ext", method],
    }
    if base is not None:
        head["base_model"] = base
    names = ", ".join(concepts)
    parts = [
        f"# Immunized by {method}",
        f"Concepts: {names}. They were to be made hard to teach this model again. The licence is "
        "that of the model it was made from.",
    ]
    if measured is None:
        parts.append(
            "Who gets through was not measured; take it for unprotected until somebody did."
        )
    else:
        head["model-index"] = [_index_entry(method, measured)]
        parts += _who_gets_through(measured)
    parts += [
        "## How it was made",
        "```yaml\n" + yaml.safe_dump(dict(settings), sort_keys=False).strip() + "\n```",
        "`immunized.json` holds the settings and the history; plain diffusers loads the pipeline.",
    ]
    return "---\n" + yaml.safe_dump(head, sort_keys=False) + "---\n\n" + "\n\n".join(parts) + "\n"


def _who_gets_through(measured: Measured) -> list[str]:
    worst, reached = measured.worst()
    rows = [
        f"| {name} | {before:.2f} | {after:.2f} |"
        for name, (before, after) in measured.attacks.items()
    ]
    return [
        "## Who gets through",
        f"Mean {measured.measure} after {measured.steps} steps of an attack, {measured.images} "
        f"images a score. The furthest got: {worst}, {reached:.2f}. An attacker who is not in the "
        "table was not tried.",
        "\n".join(["| attack | unprotected | this model |", "|---|---|---|", *rows]),
    ]


def _index_entry(method: str, measured: Measured) -> dict[str, Any]:
    """Results as the metadata of a card names them: of the attack that got furthest."""
    worst, reached = measured.worst()
    metric = {"type": measured.measure, "value": round(reached, 4), "name": f"under {worst}"}
    task = {"type": "text-to-image", "name": "an attack that teaches the concept again"}
    data = {"type": "concepts", "name": "immunized concepts"}
    return {"name": method, "results": [{"task": task, "dataset": data, "metrics": [metric]}]}
