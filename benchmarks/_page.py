"""Pages of docs/ that come from result files: blocks between marks, or the page as a whole.

A block is what is below one line ``<!-- NAME:begin -->`` and above one ``<!-- NAME:end -->``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._session import RESULTS


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """The page with these blocks in their places.

    Raises:
        ValueError: If the marks of a block do not stand once, in their order.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = page.partition(begin)
        between, _, after = rest.partition(end)
        if page.count(begin) != 1 or after.count(end) or not between.endswith("\n"):
            raise ValueError(
                f"the page must have the marks {begin} and, below it, {end}, each in one line"
            )
        page = f"{before}{begin}\n{block}\n{end}{after}"
    return page


def fill(page: Path, blocks: Mapping[str, str]) -> None:
    """Put blocks in their places in a file; errors as :func:`filled`."""
    page.write_text(filled(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")


def table_row(cells: Iterable[str]) -> str:
    """A row of a table of Markdown."""
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    return "\n".join([table_row(head), "|" + "---|" * len(head), *map(table_row, rows)])


def result_parser(description: str | None, out: Path) -> argparse.ArgumentParser:
    """Flags of a program whose results stand in one file and fill blocks of a page."""
    result = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    result.add_argument("--out", type=Path, default=out)
    result.add_argument(
        "--write", type=Path, metavar="PAGE", help="fill in the page, measure nothing"
    )
    return result


def fills(arguments: argparse.Namespace, parts: Callable[[Any], Mapping[str, str]]) -> bool:
    """Fill in the page of ``--write``, if there is one, and say whether."""
    if arguments.write is None:
        return False
    fill(arguments.write, parts(json.loads(arguments.out.read_text(encoding="utf-8"))))
    return True


def parser(description: str) -> argparse.ArgumentParser:
    """Flags of a program that measures and writes a page, or checks that the page is right."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    result.add_argument("--results", type=Path, default=RESULTS)
    action = result.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="PAGE", help="measure; results and page")
    action.add_argument("--check", type=Path, metavar="PAGE", help="is it what the results say")
    return result


def run(
    file: str,
    page: Callable[[dict[str, Any]], str],
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    flags: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Measure and print or write the page; with ``--check``, 1 if it is another one."""
    arguments = flags.parse_args(argv)
    path = arguments.results / file
    if arguments.check is not None:
        wanted = page(json.loads(path.read_text(encoding="utf-8")))
        if arguments.check.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{arguments.check} is not what {path} says", file=sys.stderr)
        return 1
    found = measure(arguments)
    if arguments.write is None:
        print(page(found))
        return 0
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    arguments.write.write_text(page(found), encoding="utf-8")
    return 0
