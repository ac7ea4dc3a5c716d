"""Help of the command line as plain data: drawn for any terminal, kept for the next time.

Flags follow from the settings of methods and attacks, so that the whole package, torch included,
has to be imported to know them. What came of it is kept as JSON with a digest of the sources and
of what other packages register, and is shown from there in a fraction of a second; a copy made by
the build comes with the package. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGE = Path(__file__).resolve().parent
# Made by `make build`, beside the compiled operators.
SHIPPED = _PACKAGE / "_help.json"

# Groups of entry points by which other packages bring methods and attacks.
ENTRY_POINTS = ("immunize_ext.probing", "immunize_ext.text_to_image")


# --- what a page holds ----------------------------------------------------------------------------


class Option(NamedTuple):
    """One argument as help shows it.

    Attributes:
        flags: Its flags; a positional argument has none.
        metavar: What stands for its value, or its values with a space between.
        nargs: How many values, as argparse says it; 0 for none.
        help: Its text, ``%`` doubled.
        owners: Names of the methods or attacks whose setting it is; of a command's own it is empty.
    """

    flags: list[str]
    metavar: str
    nargs: str | int | None
    help: str
    owners: list[str]


class Registered(NamedTuple):
    """Methods or attacks, and the settings they have.

    Attributes:
        what: ``method`` or ``attack``.
        flag: The flag that chooses among them.
        texts: Their descriptions by name, the first line apart from the rest by a newline.
        options: The flags of their settings.
    """

    what: str
    flag: str
    texts: dict[str, str]
    options: list[Option]


class Page(NamedTuple):
    """The help of one command.

    Attributes:
        prog: Name of the command.
        usage: How it is called.
        text: What it does, in paragraphs, then ``Example:`` and indented lines to copy.
        options: Its own arguments.
        registered: Methods and attacks.
    """

    prog: str
    usage: str | None
    text: str
    options: list[Option]
    registered: list[Registered]

    @classmethod
    def from_plain(cls, values: Sequence[Any]) -> Page:
        """Take back what JSON made of a page."""
        prog, usage, text, options, registered = values
        return cls(
            prog,
            usage,
            text,
            [Option(*option) for option in options],
            [Registered(w, f, t, [Option(*o) for o in opts]) for w, f, t, opts in registered],
        )


def option_of(action: argparse.Action, owners: Sequence[str] = ()) -> Option:
    """An argument of a parser as a page holds it."""
    metavar = action.metavar or action.dest.upper()
    metavar = metavar if isinstance(metavar, str) else " ".join(metavar)
    return Option(
        list(action.option_strings), metavar, action.nargs, action.help or "", list(owners)
    )


def description_of(entry: object) -> str:
    """First paragraph of a docstring for a terminal: one line, without the documentation's marks.

    Example:
        >>> description_of(Page)
        'The help of one command'
    """
    first = (inspect.getdoc(type(entry) if not isinstance(entry, type) else entry) or "").split(
        "\n\n"
    )[0]
    return for_terminal(first)


def for_terminal(text: str) -> str:
    """Without the marks of the documentation, and without the full stop before a default."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split()))
    return text.replace("`", "").removesuffix(".")


# --- drawing --------------------------------------------------------------------------------------


def asked_for(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return not {"-h", "--help"}.isdisjoint(argv)


def text(page: Page, argv: Sequence[str] = ()) -> str:
    """A page as a terminal shows it.

    Args:
        page: The page.
        argv: What else was typed. Settings are shown of the methods and attacks that it names; of
            others a line each.

    Returns:
        The text, with a newline at its end.
    """
    width = max(shutil.get_terminal_size().columns - 2, 40)
    body, _, example = page.text.partition("Example:")
    parser = argparse.ArgumentParser(
        prog=page.prog,
        usage=page.usage,
        description=_paragraphs(body, width),
        epilog=f"example:\n{textwrap.indent(textwrap.dedent(example).strip(), '  ')}"
        if example
        else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    own = parser.add_argument_group("options")
    for option in page.options:
        _add(own if option.flags else parser, option)
    for found in page.registered:
        _add_registered(parser, found, page.prog, argv, width)
    return parser.format_help()


def _paragraphs(words: str, width: int) -> str:
    found = inspect.cleandoc(words).split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in found)


def _add(parser: Any, option: Option) -> None:
    if not option.flags:
        # A positional argument: argparse asks for none of the others.
        parser.add_argument(option.metavar, nargs=option.nargs, help=option.help)
    elif option.nargs == 0:
        parser.add_argument(*option.flags, action="store_true", help=option.help)
    else:
        names = tuple(option.metavar.split()) if option.nargs == 2 else option.metavar
        parser.add_argument(*option.flags, nargs=option.nargs, metavar=names, help=option.help)


def _values_of(flag: str, argv: Sequence[str]) -> list[str]:
    """What a command line gives a flag, as ``--flag a b`` or ``--flag=a``."""
    found: list[str] = []
    taking = False
    for word in argv:
        if word.startswith("-"):
            name, sign, value = word.partition("=")
            taking = name == flag and not sign
            if name == flag and sign:
                found = [value]
            elif taking:
                found = []
        elif taking:
            found.append(word)
    return found


def _add_registered(
    parser: argparse.ArgumentParser,
    found: Registered,
    prog: str,
    argv: Sequence[str],
    width: int,
) -> None:
    asked = _values_of(found.flag, argv)
    chosen = [name for name in found.texts if name in asked or "all" in asked]
    if not chosen:
        room = max(map(len, found.texts), default=0) + 2
        lines = [
            textwrap.fill(f"{name:<{room}}{words}", width - 2, subsequent_indent=" " * room)
            for name, words in found.texts.items()
        ]
        if any(option.owners for option in found.options):
            lines += [f"settings: {prog} {found.flag} NAME --help"]
        parser.add_argument_group(f"{found.what}s ({found.flag} NAME)", "\n".join(lines))
        return
    for name in chosen:
        options = [option for option in found.options if name in option.owners]
        words = textwrap.fill(found.texts[name], width - 2)
        group = parser.add_argument_group(f"{found.what} {name}", words)
        for option in options:
            # Two that were asked for may share a flag, which a parser takes once.
            if option.flags[0] not in parser._option_string_actions:
                _add(group, option)


# --- keeping --------------------------------------------------------------------------------------


def recall(prog: str) -> Page | None:
    """The page of a command, where one of these very sources is kept."""
    digest = _digest()
    for path in (SHIPPED, _kept()):
        kept = _read(path)
        if kept.get("digest") == digest and prog in kept["pages"]:
            with suppress(TypeError, ValueError):
                return Page.from_plain(kept["pages"][prog])
    return None


def remember(pages: Mapping[str, Page], path: Path | None = None) -> None:
    """Keep pages for the next time; where nothing can be written, nothing is.

    Args:
        pages: Pages by their command.
        path: The file; one in the user's cache when omitted.
    """
    target = _kept() if path is None else path
    digest = _digest()
    kept = _read(target)
    if kept.get("digest") != digest:
        kept = {"digest": digest, "pages": {}}
    kept["pages"] |= pages
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, suffix=".json", delete=False, encoding="utf-8"
        ) as writing:
            json.dump(kept, writing)
        os.chmod(writing.name, 0o644)
        os.replace(writing.name, target)


def _kept() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "immunize_ext" / "help.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    usable = isinstance(found, dict) and isinstance(found.get("pages"), dict)
    return found if usable else {}


def _digest() -> str:
    """Of everything that decides which flags there are."""
    hasher = hashlib.blake2b(digest_size=16)
    for path in sorted(_PACKAGE.rglob("*.py")):
        hasher.update(f"{path.relative_to(_PACKAGE)}\0".encode())
        hasher.update(path.read_bytes())
    for group in ENTRY_POINTS:
        for point in importlib.metadata.entry_points(group=group):
            made = f"{point.dist.name} {point.dist.version}" if point.dist else ""
            hasher.update(f"{group} {point.name} {point.value} {made}\0".encode())
    return hasher.hexdigest()
