"""The table of measured speed-ups in docs/speed.md, made from the result files.

``python -m benchmarks.readme_table``                     print it
``python -m benchmarks.readme_table --write docs/speed.md``   put it between the marks
``python -m benchmarks.readme_table --check docs/speed.md``   exit status 1 where it differs
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import _results
from ._page import filled, table_row
from ._session import RESULTS, machine_in_words

BLOCK = "benchmarks"


class Line(NamedTuple):
    """One line of the table: a row of a result file and the contenders to show."""

    benchmark: str
    row: str
    work: str
    ours: str = "ours"
    published: str | None = "published"
    composite: str | None = "composite"
    few_lines: str | None = "bare"
    floor: str | None = "floor"


LINES = (
    Line("spectrum", "pair-64x784", "R_well or R_ill of features, 64 x 784, per matrix"),
    Line("spectrum", "pair-64x784-float32", "the same in float32"),
    Line("spectrum", "groups-20x100x768", "R_ill, 20 groups of 100 x 768"),
    Line("spectrum", "batch-90x64x784", "R_ill, 90 matrices of 64 x 784"),
    Line("spectrum", "tall-12000x784", "R_ill of features, 12000 x 784"),
    Line(
        "spectrum",
        "digit-5949x784",
        "R_ill of features short of rank, 5949 x 784",
        few_lines=None,
        floor=None,
    ),
    Line(
        "spectrum",
        "tiny-8x8",
        "log kappa, 1000 matrices of 8 x 8",
        "ours",
        None,
        None,
        "bare",
        None,
    ),
    Line("spectrum", "one-8x8", "log kappa, one 8 x 8", "ours", None, None, "svdvals", None),
    Line("spectrum", "hessian-768", "log kappa of a Hessian, 768 x 768", few_lines=None),
    Line("spectrum", "hessian-2048", "log kappa of a Hessian, 2048 x 2048", few_lines=None),
    Line("merge", "sd14-weights", "K/V merge, Stable Diffusion 1.4"),
    Line(
        "merge",
        "sd14-weights",
        "the same, factor kept from the step before",
        "ours_cached",
        None,
        None,
        "bare_cached",
        "floor_cached",
    ),
    Line("merge", "sd14-embeddings", "K/V merge, gradients of the embeddings too"),
    Line("merge", "sdxl-weights", "K/V merge, SDXL", published=None),
    Line(
        "merge",
        "sdxl-weights",
        "the same, factor kept",
        "ours_cached",
        None,
        None,
        "bare_cached",
        "floor_cached",
    ),
)

LEGEND = """\
How many times longer the others take; medians of one run, results compared before timing.
*Published code*: the procedure of the papers' repositories. *Careful torch*: the same checks,
accuracy and repeated values as here, from `torch.linalg`. *A few lines*: what one would write, in
the dtype of the input and without any check. *Floor*: ours in units of the matrix products or the
memory traffic that nobody avoids, as torch does them; below 1 where its products take AVX2 and ours
AVX-512."""


def _losses(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where anybody else is faster, and which goals were missed, in two sentences."""
    slower, missed = [], []
    for row in (row for content in contents for row in content["rows"]):
        medians = {
            entry["name"]: entry["both"]["median"] for entry in row["contenders"] if entry["both"]
        }
        what = f"{row['title']}, {row['dtype']}"
        for name in ("published", "composite", "bare", "svdvals", "eigvalsh"):
            if name in medians and medians[name] < medians["ours"]:
                slower.append(f"{what} ({name}, {medians[name] / medians['ours']:.2f}x)")
        missed += [
            f"{what}: {target['wording']} ({_ratio(target['measured'], 1.0)})"
            for target in row["targets"]
            if target["met"] is False
        ]
    return [
        f"Slower than another way: {'; '.join(slower) or 'nothing that was measured'}.",
        f"Goals that were missed: {'; '.join(missed) or 'none'}.",
    ]


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None, base: float) -> str:
    if value is None:
        return ""
    ratio = value / base
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def table_line(line: Line, row: Mapping[str, Any]) -> str:
    """One line of the table in markdown."""
    medians = {
        entry["name"]: entry["both"]["median"] for entry in row["contenders"] if entry["both"]
    }

    def median(name: str | None) -> float | None:
        if name is None:
            return None
        if name not in medians:
            raise ValueError(f"row {row['id']} has no time of {name}; run its benchmark again")
        return float(medians[name])

    ours = median(line.ours)
    assert ours is not None
    floor = median(line.floor)
    others = (line.published, line.composite, line.few_lines)
    cells = [
        line.work,
        _milliseconds(ours),
        *(_ratio(median(name), ours) for name in others),
        "" if floor is None else _ratio(ours, floor),
    ]
    return table_row(cells)


def table(contents: Sequence[Mapping[str, Any]], device: str) -> str:
    """The table of one kind of device, with what it was measured on below it."""
    files = {
        content["benchmark"]: content
        for content in contents
        if content["environment"]["device"] == device
    }
    lines = [
        "| forward + backward | immunize_ext, ms | published code | careful torch | a few lines | "
        "floor |",
        "|---|---|---|---|---|---|",
    ]
    unmeasured: list[str] = []
    for line in LINES:
        content = files.get(line.benchmark)
        if content is None:
            raise ValueError(f"there is no result file {line.benchmark}-{device}.json")
        if content["settings"].get("quick"):
            raise ValueError(f"{line.benchmark}-{device}.json is from a quick run; run it in full")
        row = next((row for row in content["rows"] if row["id"] == line.row), None)
        if row is None:
            unmeasured.append(line.work)
            continue
        lines.append(table_line(line, row))
    if unmeasured:
        lines += ["", f"Not measured yet: {'; '.join(dict.fromkeys(unmeasured))}."]
    lines += ["", *LEGEND.splitlines(), ""]
    if device == "cpu":  # goals of a GPU are those of its page
        lines += [*(text + "\n" for text in _losses(list(files.values())))]
    for benchmark in dict.fromkeys(line.benchmark for line in LINES):
        environment = files[benchmark]["environment"]
        commit = environment["commit"]
        lines.append(
            f"`{environment['command']}`: {machine_in_words(environment)}, "
            f"{environment['date'][:10]}, commit "
            f"{'unknown' if commit is None else commit[:10]}"
            f"{' with changes' if environment['modified'] else ''}.  "
        )
    return "\n".join(lines).rstrip()


def block(contents: Sequence[Mapping[str, Any]]) -> str:
    """What stands between the marks: one table for each kind of device that was measured."""
    devices = sorted({content["environment"]["device"] for content in contents})
    if not devices:
        raise ValueError("there are no result files; make some with: python -m benchmarks.run")
    return "\n\n".join(table(contents, device) for device in devices)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", type=Path, metavar="docs/speed.md")
    action.add_argument("--write", type=Path, metavar="docs/speed.md")
    arguments = parser.parse_args(argv)
    try:
        made = block(_results.read_folder(arguments.results))
        page = arguments.check or arguments.write
        if page is None:
            print(made)
            return 0
        before = page.read_text(encoding="utf-8")
        after = filled(before, {BLOCK: made})
    except (OSError, ValueError) as error:
        print(f"benchmarks.readme_table: {error}", file=sys.stderr)
        return 2
    if arguments.write is not None:
        page.write_text(after, encoding="utf-8")
        return 0
    if before == after:
        return 0
    print(
        f"benchmarks.readme_table: the table in {page.name} differs from the result files; "
        f"python -m benchmarks.readme_table --write {page.name} puts it right",
        file=sys.stderr,
    )
    difference = difflib.unified_diff(
        before.splitlines(), after.splitlines(), page.name, str(arguments.results), lineterm="", n=0
    )
    print("\n".join(difference), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
