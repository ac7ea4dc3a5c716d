"""Writes the tables of docs/mima.md from committed results, or checks them.

python -m benchmarks.protection.mima_page --write docs/mima.md
python -m benchmarks.protection.mima_page --check docs/mima.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"
NAMES = {
    "mima": "MIMA",
    "joint_training": "Joint training",
    "merge_only": "Merge of separate immunizations",
    "loss_ascent": "Plain loss ascent",
    "imma": "IMMA on *three* alone",
    "lora": "LoRA",
    "full_fine_tuning": "Full fine-tuning",
    "textual_inversion": "Textual Inversion",
    "dreambooth": "DreamBooth with prior preservation",
}


def _spread(value: dict[str, Any] | None) -> str:
    if value is None:
        return "not reached"
    return f"{value['mean']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _curve(points: list[dict[str, Any]]) -> str:
    return " ".join(f"{point['mean']:.2f}" for point in points)


def tables() -> str:
    """Both tables in Markdown."""
    first = json.loads((HERE / "mima_digits.json").read_text())
    second = json.loads((HERE / "mima_digits_attackers.json").read_text())
    step = first["methods"]["mima"]["evaluation"]["summary"]["lora"]["delay"]["unprotected"]
    lines = [
        f"| method | MSGR at step {step} | at steps 20, 40 | three / five / eight at step {step} "
        "| what is kept | control | new word |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in first["methods"].items():
        evaluation = row["evaluation"]
        found = evaluation["summary"]["lora"]
        at = str(step)
        by_concept = " / ".join(f"{s['at'][at]['mean']:.2f}" for s in found["sgr"].values())
        later = ", ".join(_spread(found["msgr"]["at"][after]) for after in ("20", "40"))
        change = evaluation["retained_change"]
        lines.append(
            f"| {NAMES[name]} | {_spread(found['msgr_at_threshold'])} | {later} | {by_concept} | "
            f"{change['mean']:+.3f} (least {change['min']:+.3f}) | "
            f"{found['control_sgr']['at'][at]['mean']:+.2f} | "
            f"{found['new_word_sgr']['at'][at]['mean']:+.2f} |"
        )
    lines += [
        "",
        "| attack on MIMA, accuracy after 0, 10, 20, 40 steps | without | immunized |",
        "|---|---|---|",
    ]
    rows = [("lora", first["methods"]["mima"])]
    attacked = second["methods"]["mima"]
    rows += [(name, attacked) for name in attacked["evaluation"]["attacks"]]
    for name, row in rows:
        found = row["evaluation"]["summary"][name]
        lines.append(
            f"| {NAMES[name]} | {_curve(found['unprotected'])} | {_curve(found['immunized'])} |"
        )
    tuning = json.loads((HERE / "mima_tuning.json").read_text())
    lines += [
        "",
        "| tuned on seeds "
        + " and ".join(map(str, tuning["seeds"]))
        + " | rates tried, and what came out | taken |",
        "|---|---|---|",
    ]
    for name, found in tuning["attacks"].items():
        tried = ", ".join(f"{rate}: {score:.2f}" for rate, score in found["table"].items())
        lines.append(f"| {NAMES[name]}, accuracy | {tried} | {found['rate']:g} |")
    for name, found in tuning["methods"].items():
        tried = ", ".join(
            f"{rate}: {row['msgr']:.2f} at {row['retained_change']:+.3f}"
            for rate, row in found["table"].items()
        )
        lines.append(f"| {NAMES[name]}, MSGR at what is kept | {tried} | {found['rate']:g} |")
    shares = first["methods"]["mima"]["merge_share"]
    lines += [
        "",
        f"The merge took {min(shares):.1%} to {max(shares):.1%} of MIMA's time (forward pass). The "
        f"judge gets {first['judge_accuracy']:.1%} of held-out real images right.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = arguments.page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    wanted = f"{head}{BEGIN}\n{tables()}\n{END}{tail}"
    if arguments.write:
        arguments.page.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print(f"{arguments.page} does not say what the results say; run it with --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
