"""docs/reliability.md from the committed counts: no number of it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / ".ci" / "nightly.json"
PAGE = ROOT / "docs" / "reliability.md"

HEAD = """# What was tried against it

Made by `python -m nightly page` from `.ci/nightly.json`, which `make nightly` and `make mutants`
fill; `make test` repeats a small share of every part. Lost means: a wrong number, a crash, a
traceback, a damaged or mixed result. Accuracy has a page of its own, [numerics.md](numerics.md);
what is trusted and what not stands in [SECURITY.md](../SECURITY.md).
"""

PARTS = {
    "fuzz": (
        "Operators against the numpy reference",
        "operator",
        "Random matrices of every kind of `immunize_ext.testing`: near and exact clusters, rank\n"
        "deficient, condition numbers to 1e16, scales to 1e+-290, mixed batches, strided, float64\n"
        "and float32, compiled and torch-only. Values, ranks, multiplicities and gradients may\n"
        "differ by the rounding that the docstrings allow.",
    ),
    "kills": (
        "Killed and started again",
        "command",
        "`kill -9` after a random part of the work, once or twice, a third of the time with\n"
        "`--force` over an earlier run; then the same command again. What stands in the place\n"
        "after the kill must be whole, and the end equal to the uninterrupted run in every file,\n"
        "seconds and peak memory aside.",
    ),
    "flips": (
        "One flipped bit in a file that is read",
        "file",
        "Refused by name, or harmless (the same content is read). Text, JSON and weights without\n"
        "a checksum are written by users and other programs: there a flip may leave another\n"
        "valid file, which is counted beside.",
    ),
    "sanitizers": (
        "AddressSanitizer and UndefinedBehaviorSanitizer",
        "tests",
        "The CPU operators compiled with both, under the operator tests, hostile lists of tensors\n"
        "for the raw operators included.",
    ),
}


def _table(part: str, record: Mapping[str, Any]) -> list[str]:
    title, first, words = PARTS[part]
    counts = record["counts"]
    notes = sorted({note for count in counts.values() for note in count["notes"]})
    if part in ("fuzz", "sanitizers", "kills"):
        notes = []
    lines = [f"\n## {title}\n", words + "\n"]
    lines.append(f"| {first} | tried | survived | lost |{''.join(f' {n} |' for n in notes)}")
    lines.append("|---|" + "---|" * (3 + len(notes)))
    rows = [(name, c["tried"], c["lost"], c["notes"]) for name, c in sorted(counts.items())]
    total: dict[str, int] = {n: sum(r[3].get(n, 0) for r in rows) for n in notes}
    rows.append(("**all**", sum(r[1] for r in rows), sum(r[2] for r in rows), total))
    for name, tried, lost, found in rows:
        more = "".join(f" {found.get(n, 0):,} |" for n in notes)
        shown = name if name.startswith("**") else f"`{name}`"
        lines.append(f"| {shown} | {tried:,} | {tried - lost:,} | {lost:,} |{more}")
    told = [f"- `{name}`: {words}" for name, c in counts.items() for words in c["losses"]]
    lines += ["\nLost:\n", *told] if told else []
    return lines if part == "sanitizers" else [*lines, f"\nSeed {record['seed']}."]


def _mutants(record: Mapping[str, Any]) -> list[str]:
    files: dict[str, list[str]] = {}
    for found in record["verdicts"].values():
        files.setdefault(found["file"], []).append(found["verdict"])
    judged = sum(len(words) for words in files.values())
    killed = sum(words.count("killed") for words in files.values())
    lines = [
        "\n## Planted faults\n",
        f"{record['planted']} plausible faults stand in `.ci/mutants.toml`; `make mutants` plants\n"
        "one at a time and runs the tests that claim the file. "
        f"{judged} are judged here, {killed} of them killed"
        f" ({killed / max(judged, 1):.1%}).\n",
        "| file | judged | killed |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{file}` | {len(words)} | {words.count('killed')} |"
        for file, words in sorted(files.items())
    ]
    left = {n: f for n, f in record["verdicts"].items() if f["verdict"] != "killed"}
    if left:
        lines.append("\nNot killed:\n")
        lines += [f"- {name}: {found['reason']}" for name, found in sorted(left.items())]
    return lines


def page(record: Mapping[str, Any]) -> str:
    """The page of the counts."""
    lines = [HEAD.rstrip("\n")]
    for part in PARTS:
        if part in record:
            lines += _table(part, record[part])
    if "mutants" in record:
        lines += _mutants(record["mutants"])
    return "\n".join(lines) + "\n"


def write(counts: Path | None = None, verdicts: Path | None = None) -> None:
    """Take the latest counts and verdicts into the record, and write the page."""
    import tomllib

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    if counts is not None and counts.is_file():
        record.update(json.loads(counts.read_text(encoding="utf-8")))
    if verdicts is not None and verdicts.is_file():
        entries = tomllib.loads((ROOT / ".ci" / "mutants.toml").read_text(encoding="utf-8"))
        reasons = {m["name"]: m.get("reason", "no reason given") for m in entries["mutant"]}
        found = json.loads(verdicts.read_text(encoding="utf-8"))
        record["mutants"] = {
            "planted": len(reasons),
            "verdicts": {
                name: {
                    "file": one["file"],
                    "verdict": one["verdict"],
                    **({} if one["verdict"] == "killed" else {"reason": reasons[name]}),
                }
                for name, one in sorted(found.items())
                if name in reasons
            },
        }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")
