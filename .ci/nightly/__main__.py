"""The command: parts, how much of each, and where the counts go."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import counts, page

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ROOT / ".nightly" / "counts.json"
PARTS = ("sanitizers", "fuzz", "kills", "flips")


def _fuzz(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .fuzz import OPERATORS, fuzz

    torch.set_num_threads(1)
    chosen = options.only or OPERATORS
    share = -(-options.cases // len(chosen))
    return {name: fuzz(name, share, options.seed) for name in chosen}


def _kills(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .kills import COMMANDS, MODULES, TEXT_TO_IMAGE, kills

    torch.set_num_threads(1)
    # What the children would otherwise import each for themselves; no thread runs before the fork.
    for name in options.only or COMMANDS:
        for module in MODULES[name in TEXT_TO_IMAGE]:
            importlib.import_module(module)
    found: dict[str, Any] = {}
    end = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as work:
        for number, name in enumerate(options.only or COMMANDS):
            if time.monotonic() > end:
                break
            found[name] = kills(name, options.trials, options.seed + number, Path(work))
            _tell(name, found[name])
    return found


def _flips(options: argparse.Namespace) -> dict[str, Any]:
    from .flips import KINDS, flips

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in options.only or KINDS:
            found[name] = flips(name, options.flips, options.seed, Path(work))
            _tell(name, found[name])
    return found


def _sanitizers(options: argparse.Namespace) -> dict[str, Any]:
    from .sanitizers import sanitizers

    return sanitizers(ROOT, options.only or ["python_tests/ops"], options.build)


def _tell(name: str, count: counts.Count) -> None:
    print(f"  {name}: {count.tried} tried, {count.lost} lost", flush=True)
    for words in count.losses:
        print(f"    lost: {words}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 where something was lost."""
    parser = argparse.ArgumentParser(prog="nightly", description=__doc__)
    parser.add_argument(
        "part", nargs="*", help=f"of {', '.join(PARTS)}, or page; all but the page when omitted"
    )
    parser.add_argument("--only", nargs="+", help="operators, commands, kinds of files or tests")
    parser.add_argument("--cases", type=int, default=20_000, help="fuzzed cases, of all operators")
    parser.add_argument("--trials", type=int, default=20, help="kills of each command")
    parser.add_argument("--flips", type=int, default=200, help="flipped bits of each kind of file")
    parser.add_argument("--minutes", type=float, default=600.0, help="no new command after these")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the clock")
    parser.add_argument("--build", default=".nightly/sanitized", help="folder of the ASan build")
    parser.add_argument("--out", type=Path, default=COUNTS, help="JSON of the counts")
    options = parser.parse_args(arguments)
    if options.part == ["page"]:
        page.write(options.out, ROOT / ".mutants" / "results.json")
        return 0
    if unknown := set(options.part) - set(PARTS):
        parser.error(f"part must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "sanitizers": _sanitizers,
        "fuzz": _fuzz,
        "kills": _kills,
        "flips": _flips,
    }
    lost = 0
    for part in options.part or PARTS:
        print(f"{part} (seed {options.seed})", flush=True)
        started = time.monotonic()
        found = parts[part](options)
        if part in ("fuzz", "sanitizers"):
            for name, count in found.items():
                _tell(name, count)
        lost += sum(count.lost for count in found.values())
        record = {
            "seed": options.seed,
            "seconds": round(time.monotonic() - started),
            "counts": counts.plain(found),
        }
        counts.write_counts(options.out, part, record)
    print(f"{lost} lost; counts in {options.out}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
