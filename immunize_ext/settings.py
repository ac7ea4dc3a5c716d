"""Settings are dataclasses, once: flags, YAML keys, help and checks follow from them.

A settings dataclass is frozen, its fields have plain types (``int``, ``float``, ``bool``, ``str``,
``Literal``, ``tuple[X, ...]``, unions of these with ``None``), and each is described under
``Attributes:`` in its docstring. :mod:`immunize_ext.flags` makes command-line flags of it,
:func:`build` makes an instance of plain values, whether they come from a shell, a YAML file or a
results.json. What depends on more than one field is checked where it always is: in
``__post_init__``.

A :class:`Registry` holds the methods or the attacks of a wing by name. Registering a dataclass is
all that the command line needs to offer it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

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
    return meant(name, names) or f"known are {', '.join(names)}"


def meant(name: object, known: Iterable[str]) -> str:
    """What was probably meant, or nothing.

    Example:
        >>> meant("sede", ["seed", "steps"]), meant("x", ["seed", "steps"])
        ('did you mean seed', '')
    """
    known = list(known)
    folded = {word.casefold(): word for word in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    return f"did you mean {folded[near[0]]}" if near else ""


def hint(name: object, known: Iterable[str]) -> str:
    """What was probably meant, as the end of a message.

    Example:
        >>> f"got 'sede'{hint('sede', ['seed', 'steps'])}"
        "got 'sede'; did you mean seed"
    """
    found = meant(name, known)
    return f"; {found}" if found else ""


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


def settings_of(cls: Any) -> dict[str, Setting]:
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
    return _settings_of(cls)


@functools.cache
def _settings_of(cls: Any) -> dict[str, Setting]:
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
            found[field.name] = Setting(field.name, _read_as(hints[field.name]), default, text)
    return found


def _read_as(kind: Any) -> Any:
    """A type without the names that it lists beside any text: editors alone want to know them."""
    options = options_of(kind)
    if str in options:
        options = tuple(option for option in options if typing.get_origin(option) is not Literal)
    options = tuple(
        tuple[_read_as(typing.get_args(option)[0]), ...]  # type: ignore[misc]
        if length_of(option) == 0
        else option
        for option in options
    )
    return functools.reduce(operator.or_, options)


def plain(value: Any) -> Any:
    """A settings dataclass as JSON and YAML can say it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in settings_of(type(value))}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


# --- types ----------------------------------------------------------------------------------------


def options_of(kind: Any) -> tuple[Any, ...]:
    """The types that a union offers; a type itself where it is none."""
    return (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or (typing.get_origin(kind) is typing.Union)
        else (kind,)
    )


def _words(kind: Any) -> str:
    """A type as an error names it: ``a number or 'auto'``."""
    simple = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}
    found = []
    for option in options_of(kind):
        if option is type(None):
            continue
        origin = typing.get_origin(option)
        if origin is Literal:
            found += [repr(value) for value in typing.get_args(option)]
        elif origin is tuple:
            item = _words(typing.get_args(option)[0])
            count = length_of(option)
            found.append(f"{count} values, each {item}" if count else f"a list, each {item}")
        elif origin in (Mapping, dict) or option in (Mapping, dict):
            found.append("a table")
        else:
            found.append(simple.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(found)


def length_of(kind: Any) -> int | None:
    """How many values a tuple holds, 0 for any number; ``None`` for what is no tuple.

    Example:
        >>> length_of(tuple[float, float]), length_of(tuple[str, ...]), length_of(float)
        (2, 0, None)
    """
    if typing.get_origin(kind) is not tuple:
        return None
    inner = typing.get_args(kind)
    return 0 if Ellipsis in inner else len(inner)


def literals_of(kind: Any) -> list[str]:
    """The texts that a type names, also inside a list."""
    inner = [part for option in options_of(kind) for part in (option, *typing.get_args(option))]
    named = [part for part in inner if typing.get_origin(part) is Literal]
    return [str(value) for part in named for value in typing.get_args(part)]


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value is what a field of that type holds: nothing is converted."""
    options = options_of(kind)
    if len(options) > 1:
        return any(_has_type(value, option) for option in options)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin is tuple:
        whole = isinstance(value, tuple) and length_of(kind) in (0, len(value))
        return whole and all(_has_type(item, inner[0]) for item in value)
    if Mapping in (kind, origin):
        return isinstance(value, Mapping) and (
            not inner or all(_has_type(item, inner[1]) for item in value.values())
        )
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, origin or kind)


def check_types(settings: Any) -> None:
    """Refuse a settings dataclass, built in Python, whose values have other types than its fields.

    A ``__post_init__`` calls it first. A list becomes the tuple that the field holds; nothing else
    is converted, as what comes from a shell is.

    Args:
        settings: The instance.

    Raises:
        ValueError: If a value has the wrong type or is not finite.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Toy:
        ...     steps: int = 3
        ...     def __post_init__(self) -> None:
        ...         check_types(self)
        >>> Toy(steps="4")
        Traceback (most recent call last):
        ValueError: steps must be an integer, got '4'
    """
    for name, setting in settings_of(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(settings, name, value)
        if not _has_type(value, setting.type):
            raise ValueError(f"{name} must be {_words(setting.type)}, got {value!r}")


# --- from plain values to a dataclass -------------------------------------------------------------


class _WrongKindError(Exception):
    """A value does not have the type of its field."""


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


def _as_text(value: Any) -> Any:
    """A number where a text is wanted: ``primary: 4`` names a class."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _convert(value: Any, kind: Any) -> Any:
    """A plain value in the type of its field."""
    options = options_of(kind)
    if value is None and type(None) not in options:
        raise _WrongKindError
    if any(typing.get_origin(option) is tuple for option in options):
        if value is not None and not isinstance(value, (tuple, list)):
            value = [value]  # one name alone is a list of one
        if isinstance(value, (tuple, list)) and tuple[str, ...] in options:
            value = [_as_text(item) for item in value]
    elif str in options and not {int, float} & set(options):
        value = _as_text(value)
    elif int in options and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        found = _reader(kind).parse_object({"value": value}).value
    except argparse.ArgumentError:
        raise _WrongKindError from None
    if not _finite(found):
        raise _WrongKindError
    return found


def typed(
    cls: type,
    values: Mapping[str, Any],
    where: str,
    spelled: Mapping[str, str] | None = None,
    of: str = "",
) -> dict[str, Any]:
    """Plain values in the types of the settings of a dataclass.

    Args:
        cls: The dataclass.
        values: Settings by name.
        where: Where they come from (``--config run.yaml``, ``results.json``); stands in errors.
        spelled: What was typed for a setting, as ``--base-budget``: stands in errors instead.
        of: Whose settings they are, for errors that name what was typed.

    Returns:
        The settings that were given, in their types.

    Raises:
        ValueError: If a name is unknown, or a value has the wrong type or is not finite.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Toy:
        ...     strength: float | Literal["auto"] = 30.0
        ...     harmful: tuple[str, ...] = ()
        >>> typed(Toy, {"strength": "auto", "harmful": "4:9"}, "flags")
        {'strength': 'auto', 'harmful': ('4:9',)}
        >>> typed(Toy, {"strenght": 3}, "flags")
        Traceback (most recent call last):
        ValueError: flags: strenght is no setting; did you mean strength
    """

    def said(name: str) -> str:
        return (spelled or {}).get(name) or f"{where}: {name}"

    known = settings_of(cls)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            whose = f" of {of}" if of and name in (spelled or {}) else ""
            raise ValueError(f"{said(name)} is no setting{whose}; {suggestion(name, known)}")
        tables: list[Any] = list(filter(dataclasses.is_dataclass, options_of(known[name].type)))
        if tables and isinstance(value, str):
            value = parse_yaml(value)
        if tables and isinstance(value, Mapping):
            found[name] = build(tables[0], value, said(name))
            continue
        try:
            found[name] = _convert(value, known[name].type)
        except _WrongKindError:
            several = isinstance(value, (tuple, list))
            near = [
                hint(one, literals_of(known[name].type))
                for one in (value if several else [value])
                if isinstance(one, str)
            ]
            raise ValueError(
                f"{said(name)} must be {_words(known[name].type)}, got {value!r}"
                f"{next(filter(None, near), '')}"
            ) from None
    return found


def build(
    cls: type[T],
    values: Mapping[str, Any],
    where: str,
    defaults: T | None = None,
    spelled: Mapping[str, str] | None = None,
) -> T:
    """A settings dataclass from plain values, or an error that names the setting.

    Args:
        cls: The dataclass.
        values: Settings by name; others keep their defaults.
        where: Where they come from; stands in errors.
        defaults: An instance whose settings hold where ``values`` has none.
        spelled: As for :func:`typed`.

    Returns:
        The instance.

    Raises:
        ValueError: As :func:`typed`, or if the dataclass refuses the settings together.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Toy:
        ...     steps: int = 3
        >>> build(Toy, {"steps": "4"}, "flags")
        Toy(steps=4)
    """
    found = typed(cls, values, where, spelled)
    if defaults is not None:
        return dataclasses.replace(defaults, **found)  # type: ignore[type-var]
    for name, setting in settings_of(cls).items():
        if setting.default is dataclasses.MISSING and name not in found:
            raise ValueError(f"{where}: {name} must be given")
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
    spelled: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise ValueError(
                f"{flag}: {path} must name each setting once, got {spelled[name]!r} and {key!r}"
            )
        found[name], spelled[name] = value, key
    return found


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text, as YAML 1.2 reads them: ``4:9`` is a text, ``1e-3`` a number.

    A key that stands twice would silently win or lose, and a few hundred bytes of nested aliases
    expand to gigabytes: both are refused.

    Raises:
        ValueError: If it is no YAML, has a key twice or an alias.

    Example:
        >>> parse_yaml("{primary: 4:9, rate: 1e-3, erase: false}")
        {'primary': '4:9', 'rate': 0.001, 'erase': False}
        >>> parse_yaml("{seed: 3, seed: 4}")
        Traceback (most recent call last):
        ValueError: the key 'seed' stands twice
    """
    import yaml

    try:
        return yaml.load(text, _loader())  # a SafeLoader: plain values only
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_problem(error)) from error


def _problem(error: Exception) -> str:
    """What a parser found and where, without the lines of the file that it quotes."""
    reason, problem = getattr(error, "reason", None), getattr(error, "problem", None)
    if reason is not None:  # a character, before there are lines
        return f"{reason} at position {getattr(error, 'position', 0)}"
    if problem is None:
        return " ".join(str(error).split())
    context, mark = getattr(error, "context", None), getattr(error, "problem_mark", None)
    where = "" if mark is None else f" in line {mark.line + 1}"
    return " ".join(f"{context + ', ' if context else ''}{problem}{where}".split())


# The core schema of YAML 1.2: what a plain word is, its pattern, what it can begin with.
_CORE = (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
)


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
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

        def construct_int(self, node: Any) -> int:
            return int(node.value, 16 if node.value.startswith("0x") else 10)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
    Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1
    for kind, pattern, first in _CORE:
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first
        )
    return Loader


# --- registries -----------------------------------------------------------------------------------


@functools.cache
def _import_plugins(group: str) -> None:
    """Import the modules that other packages name; one that fails is named, the others count."""
    import importlib.metadata
    import warnings

    for point in importlib.metadata.entry_points(group=group):
        try:
            point.load()
        except Exception as error:
            warnings.warn(
                f"the entry point {point.name} ({point.value}) of {group} cannot be imported: "
                f"{type(error).__name__}: {error}",
                stacklevel=4,
            )


class Registry(Mapping[str, T], Generic[T]):
    """The methods, or the attacks, of a wing: settings dataclasses by name.

    An entry is an instance with the settings that hold where nothing else is said, so that one
    class can stand under several names with other defaults.

    Args:
        what: What they are, for messages: ``method``, ``attack``.
        key: The attribute that holds the name.
        plugins: Group of entry points: modules of other packages that register entries when they
            are imported. They are, when the registry is first looked into.

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

    def __init__(self, what: str, *, key: str, plugins: str | None = None) -> None:
        self.what, self.key = what, key
        self._own: dict[str, T] = {}
        self._plugins = plugins

    @property
    def _found(self) -> dict[str, T]:
        """All entries, those of other packages included."""
        group, self._plugins = self._plugins, None
        if group is not None:
            _import_plugins(group)
        return self._own

    def register(self, entry: Any) -> Any:
        """Add a settings dataclass, or an instance of one, under its own name; a decorator.

        Raises:
            ValueError: If the name is taken by something else.
        """
        made = entry() if isinstance(entry, type) else entry
        name = getattr(made, self.key)
        if name in self._own and self._own[name] != made:
            raise ValueError(f"register: {name} is a {self.what} already, choose another name")
        self._own[name] = made
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

    def typed(
        self,
        name: str,
        values: Mapping[str, Any],
        where: str,
        spelled: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Settings of an entry in their types; see :func:`typed`."""
        return typed(type(self.find(name, where)), values, f"{where}: {name}", spelled, name)

    def all_settings(self) -> dict[str, list[str]]:
        """Every setting of any entry, with the names of the entries that have it."""
        found: dict[str, list[str]] = {}
        for name, entry in self._found.items():
            for setting in settings_of(type(entry)):
                if setting != self.key:
                    found.setdefault(setting, []).append(name)
        return found

    def __getitem__(self, name: str) -> T:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)
