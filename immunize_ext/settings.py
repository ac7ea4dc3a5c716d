"""Settings are dataclasses, once: flags, YAML keys, help and checks follow from them.

A settings dataclass is frozen, its fields have plain types (``int``, ``float``, ``bool``, ``str``,
``Literal``, ``tuple[X, ...]``, unions of these with ``None``), and each is described under
``Attributes:`` in its docstring. :func:`add_flags` makes command-line flags of it, :func:`build`
makes an instance of plain values, whether they come from a shell, a YAML file or a results.json.
What depends on more than one field is checked where it always is: in ``__post_init__``.

A :class:`Registry` holds the methods or the attacks of a wing by name. Registering a dataclass is
all that the command line needs to offer it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, NoReturn, TypeVar

from immunize_ext._extras import require_extra

USAGE_ERROR = 2

T = TypeVar("T")


def suggestion(name: object, known: Iterable[str]) -> str:
    """A hint for a name that is not known.

    Args:
        name: What was given.
        known: What there is.

    Returns:
        The nearest name, or all of them.

    Example:
        >>> suggestion("sede", ["seed", "steps"])
        'did you mean seed'
        >>> suggestion("x", ["seed", "steps"])
        'known are seed, steps'
    """
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]}" if near else f"known are {', '.join(names)}"


# --- what a dataclass says about its fields -------------------------------------------------------


class Setting(NamedTuple):
    """One field of a settings dataclass.

    Attributes:
        name: Its name.
        type: Its type, resolved.
        default: Its default; ``dataclasses.MISSING`` if it has none.
        help: Its text under ``Attributes:``.
    """

    name: str
    type: Any
    default: Any
    help: str


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, in the order of its fields.

    Texts come from ``Attributes:`` of the class, or of the class it inherits the field from.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Toy:
        ...     '''A toy.
        ...
        ...     Attributes:
        ...         steps: Number of steps.
        ...     '''
        ...     steps: int = 3
        >>> settings_of(Toy)["steps"].help
        'Number of steps.'
    """
    import docstring_parser

    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and base.__doc__:
            for item in docstring_parser.parse(base.__doc__).params:
                texts[item.arg_name] = " ".join((item.description or "").split())
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.init:
            text = texts.get(field.name, "")
            found[field.name] = Setting(field.name, hints[field.name], default, text)
    return found


def plain(value: Any) -> Any:
    """A settings dataclass as JSON and YAML can say it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in settings_of(type(value))}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


# --- from plain values to a dataclass -------------------------------------------------------------


class _WrongKindError(Exception):
    """A value does not have the type of its field."""


def _options(kind: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or (typing.get_origin(kind) is typing.Union)
        else (kind,)
    )


def _words(kind: Any) -> str:
    """A type as an error names it: ``a number or 'auto'``."""
    simple = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}
    found = []
    for option in _options(kind):
        if option is type(None):
            continue
        origin = typing.get_origin(option)
        if origin is Literal:
            found += [repr(value) for value in typing.get_args(option)]
        elif origin is tuple:
            item = _words(typing.get_args(option)[0])
            found.append(f"a list, each {item}")
        elif origin in (Mapping, dict) or option in (Mapping, dict):
            found.append("a table")
        else:
            found.append(simple.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(found)


@functools.cache
def _reader(kind: Any) -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def _finite(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _convert(value: Any, kind: Any) -> Any:
    """A plain value in the type of its field."""
    options = _options(kind)
    if any(typing.get_origin(option) is tuple for option in options):
        if value is not None and not isinstance(value, (tuple, list)):
            value = [value]  # one name alone is a list of one
    elif int in options and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        found = _reader(kind).parse_object({"value": value}).value
    except argparse.ArgumentError:
        raise _WrongKindError from None
    if not _finite(found):
        raise _WrongKindError
    return found


def build(cls: type[T], values: Mapping[str, Any], where: str, defaults: T | None = None) -> T:
    """A settings dataclass from plain values, or an error that names the setting.

    Args:
        cls: The dataclass.
        values: Settings by name; others keep their defaults.
        where: Where they come from (``--config run.yaml``, ``flags``); stands in errors.
        defaults: An instance whose settings hold where ``values`` has none.

    Returns:
        The instance.

    Raises:
        ValueError: If a name is unknown, a value has the wrong type or is not finite, or the
            dataclass refuses them together.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Toy:
        ...     strength: float | Literal["auto"] = 30.0
        ...     harmful: tuple[str, ...] = ()
        >>> build(Toy, {"strength": "auto", "harmful": "4:9"}, "flags")
        Toy(strength='auto', harmful=('4:9',))
        >>> build(Toy, {"strenght": 3}, "flags")
        Traceback (most recent call last):
        ValueError: flags: strenght is no setting; did you mean strength
    """
    known = settings_of(cls)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: {name} is no setting; {suggestion(name, known)}")
        table = next((k for k in _options(known[name].type) if dataclasses.is_dataclass(k)), None)
        if table is not None and isinstance(value, Mapping):
            found[name] = build(table, value, f"{where}: {name}")
            continue
        try:
            found[name] = _convert(value, known[name].type)
        except _WrongKindError:
            raise ValueError(
                f"{where}: {name} must be {_words(known[name].type)}, got {value!r}"
            ) from None
    if defaults is not None:
        return dataclasses.replace(defaults, **found)  # type: ignore[type-var]
    missing = [
        name for name, s in known.items() if s.default is dataclasses.MISSING and name not in found
    ]
    if missing:
        raise ValueError(f"{where}: {missing[0]} must be given")
    return cls(**found)


# --- YAML -----------------------------------------------------------------------------------------

# A config is a page; what is larger was meant to be something else.
_MAX_YAML = 1 << 20


def read_yaml(path: str | Path, *, flag: str = "--config") -> dict[str, Any]:
    """Read a config file: a table of the names of settings, with ``_`` or ``-``, and values.

    Args:
        path: The file.
        flag: Which flag named it; stands in errors.

    Returns:
        Plain values by name, with ``_``; nothing is checked yet.

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtraError: If PyYAML is not installed.
        ValueError: If it is not YAML, no table, has a key twice or an alias, or is over 1 MiB.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{flag}: must name a YAML file, got {path}, which is not there")
    if file.stat().st_size > _MAX_YAML:
        raise ValueError(f"{flag}: {path} must be at most 1 MiB, got {file.stat().st_size} bytes")
    try:
        loaded = parse_yaml(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: {path} must be a YAML file, got: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{flag}: {path} must hold names with values, got a {type(loaded).__name__}"
        )
    found: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise ValueError(f"{flag}: {path} must name each setting once, got {key!r} twice")
        found[name] = value
    return found


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    A key that stands twice would silently win or lose, and a few hundred bytes of nested aliases
    expand to gigabytes: both are refused.

    Raises:
        MissingExtraError: If PyYAML is not installed.
        ValueError: If it is no YAML, has a key twice or an alias.

    Example:
        >>> parse_yaml("{seed: 3, seed: 4}")
        Traceback (most recent call last):
        ValueError: the key 'seed' stands twice
    """
    yaml = require_extra("yaml", extra="report", purpose="YAML")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise ValueError("aliases (*name) are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise ValueError(f"the key {key.value!r} stands twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values only
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


# --- flags ----------------------------------------------------------------------------------------


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line and say what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print the message and how to get help, and leave with status 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            name = message.removeprefix(prefix).split()[0].partition("=")[0]
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(name, flags, n=1)
            message += f"; did you mean {near[0]}" if near else ""
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def _shown(default: Any) -> str:
    if default in (None, (), {}, "") or default is dataclasses.MISSING:
        return ""
    text = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" (default: {text})"


def add_flags(
    parser: Any,
    cls: type,
    *,
    prefix: str = "",
    leave_out: Sequence[str] = (),
    of: str = "",
    defaults: Any = None,
) -> None:
    """Add a flag for each setting of a dataclass. What is not given stays out of the namespace.

    ``steps: int`` becomes ``--steps N``, ``erase: bool`` becomes ``--erase`` and ``--no-erase``, a
    tuple takes several values, a table takes ``NAME=VALUE`` and can be given again.

    Args:
        parser: A parser, or a group of one.
        cls: The dataclass.
        prefix: Put before each name: ``lora.`` gives ``--lora.rank``.
        leave_out: Names that get no flag.
        of: Put before each help text, as the name of the method whose setting it is.
        defaults: An instance whose settings are shown as defaults.
    """
    for setting in settings_of(cls).values():
        if setting.name in leave_out or "--" + _flag(prefix, setting.name) in (
            parser._option_string_actions
        ):
            continue
        options = [kind for kind in _options(setting.type) if kind is not type(None)]
        text = (f"{of}: " if of else "") + setting.help.replace("``", "").replace("%", "%%")
        more: dict[str, Any] = {"dest": prefix + setting.name, "default": argparse.SUPPRESS}
        default = setting.default if defaults is None else getattr(defaults, setting.name)
        more["help"] = text + _shown(default).replace("%", "%%")
        if options == [bool]:
            more["action"] = argparse.BooleanOptionalAction
        elif any(typing.get_origin(kind) is tuple for kind in options):
            more |= {"nargs": "+", "metavar": setting.name.rstrip("s").upper()}
        elif any(typing.get_origin(kind) in (Mapping, dict) for kind in options):
            more |= {"action": "append", "metavar": "NAME=VALUE"}
        else:
            more["metavar"] = {int: "N", float: "X"}.get(options[0], setting.name.upper())
        parser.add_argument("--" + _flag(prefix, setting.name), **more)


def _flag(prefix: str, name: str) -> str:
    return (prefix + name).replace("_", "-")


def given(arguments: argparse.Namespace, cls: type, *, prefix: str = "") -> dict[str, Any]:
    """The settings of a dataclass that flags gave, as texts and lists; :func:`build` reads them."""
    found = {}
    for name, setting in settings_of(cls).items():
        if not hasattr(arguments, prefix + name):
            continue
        value = getattr(arguments, prefix + name)
        tables = [typing.get_origin(kind) in (Mapping, dict) for kind in _options(setting.type)]
        if any(tables):
            value = dict(name_and_value(text) for text in value)
        found[name] = value
    return found


def name_and_value(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``, the value as YAML has it.

    Raises:
        ValueError: If it has another form.

    Example:
        >>> name_and_value("inner-rate=1e-3")
        ('inner_rate', '1e-3')
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"a setting must look like NAME=VALUE, got {text!r}")
    try:
        return name.replace("-", "_"), parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"{name} must have a plain value, got {value!r}: {error}") from error


# --- registries -----------------------------------------------------------------------------------


class Registry(Mapping[str, T], Generic[T]):
    """The methods, or the attacks, of a wing: settings dataclasses by name.

    An entry is an instance with the settings that hold where nothing else is said, so that one
    class can stand under several names with other defaults.

    Args:
        what: What they are, for messages: ``method``, ``attack``.
        key: The attribute that holds the name.

    Example:
        >>> ATTACKS: Registry[Any] = Registry("attack", key="name")
        >>> @ATTACKS.register
        ... @dataclasses.dataclass(frozen=True)
        ... class Nothing:
        ...     name: str = "nothing"
        ...     strength: float = 1.0
        >>> twice = ATTACKS.register(Nothing(name="nothing_twice", strength=2.0))
        >>> ATTACKS.build("nothing_twice", {"strength": "3"}, "--attacks").strength
        3.0
        >>> ATTACKS.find("nothin", "--attacks")
        Traceback (most recent call last):
        ValueError: --attacks: nothin is no attack; did you mean nothing
    """

    def __init__(self, what: str, *, key: str) -> None:
        self.what, self.key = what, key
        self._found: dict[str, T] = {}

    def register(self, entry: Any) -> Any:
        """Add a settings dataclass, or an instance of one, under its own name; a decorator.

        Raises:
            ValueError: If the name is taken by something else.
        """
        made = entry() if isinstance(entry, type) else entry
        name = getattr(made, self.key)
        if name in self._found and self._found[name] != made:
            raise ValueError(f"register: {name} is a {self.what} already, choose another name")
        self._found[name] = made
        return entry

    def find(self, name: str, where: str) -> T:
        """The entry of a name.

        Raises:
            ValueError: If there is none.
        """
        if name not in self._found:
            raise ValueError(f"{where}: {name} is no {self.what}; {suggestion(name, self._found)}")
        return self._found[name]

    def build(self, name: str, values: Mapping[str, Any], where: str, **shared: Any) -> T:
        """An entry with other settings, from plain values.

        Args:
            name: Which.
            values: Settings by name; an unknown one is an error.
            where: Where they come from.
            **shared: Values that hold for every entry; those that it does not know are left out.
        """
        entry: Any = self.find(name, where)
        known = settings_of(type(entry))
        common = {k: v for k, v in shared.items() if k in known}
        return build(type(entry), {**common, **values}, f"{where}: {name}", entry)

    def all_settings(self) -> dict[str, list[str]]:
        """Every setting of any entry, with the names of the entries that have it."""
        found: dict[str, list[str]] = {}
        for name, entry in self._found.items():
            for setting in settings_of(type(entry)):
                found.setdefault(setting, []).append(name)
        return found

    def __getitem__(self, name: str) -> T:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


# Of the old command modules; gone with them.
Commands = Any


def strength(text: str) -> float | str:
    """Argument type: a number, or ``auto``."""
    return text if text == "auto" else float(text)
