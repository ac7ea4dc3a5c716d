"""The command line of settings: a flag for every field, its help and its YAML key from one place.

What flags and files say is put together by :func:`read_settings`: flags override the file, and both
are checked alike.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from immunize_ext import _help
from immunize_ext.settings import (
    Registry,
    Setting,
    build,
    length_of,
    literals_of,
    options_of,
    parse_yaml,
    read_yaml,
    settings_of,
    suggestion,
    typed,
)

USAGE_ERROR = 2

T = TypeVar("T")

# Fields of a run that hold what its method and its attacks are given, by name.
_METHOD, _ATTACKS = "settings", "attack_settings"

# One name for one thing: what some settings call by its plural has the same flag everywhere.
_FLAGS = MappingProxyType({"seeds": "--seed"})


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line and say what was probably meant.

    Args:
        aliases: Flags that have another name now; they still work, and say so.
        keep_help: What to do with the page that ``--help`` shows.
        **more: As for ``argparse.ArgumentParser``; ``description`` may end in ``Example:`` and
            lines to copy.

    Attributes:
        hints: What to say of a flag that is not there, where another name is not the answer.
        registered: Methods and attacks whose settings have flags, for help.
    """

    def __init__(
        self,
        *,
        aliases: Mapping[str, str] | None = None,
        keep_help: Callable[[_help.Page], None] | None = None,
        **more: Any,
    ) -> None:
        # No abbreviations: what is unique today is not once another method is registered.
        super().__init__(**{"allow_abbrev": False, **more})
        self._aliases = dict(aliases or {})
        self._keep_help = keep_help
        self._argv: list[str] = []
        self.hints: dict[str, str] = {}
        self.registered: list[_help.Registered] = []

    def page(self) -> _help.Page:
        """Its help as plain data."""
        theirs = {tuple(o.flags) for one in self.registered for o in one.options if o.owners}
        own = [_help.option_of(action) for action in self._actions]
        own = [option for option in own if tuple(option.flags) not in theirs]
        own = [option for option in own if option.help != argparse.SUPPRESS]
        return _help.Page(self.prog, self.usage, self.description or "", own, self.registered)

    def print_help(self, file: Any = None) -> None:
        """Print the help of what was typed so far."""
        page = self.page()
        if self._keep_help is not None:
            self._keep_help(page)
        print(_help.text(page, self._argv), end="", file=file)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, with the old names of flags replaced."""
        known = self._argv = []
        for text in sys.argv[1:] if args is None else args:
            name, sign, value = text.partition("=")
            new = self._aliases.get(name, name)
            if new != name:
                print(f"{self.prog}: {name} is called {new} now", file=sys.stderr)
            known.append(new + sign + value)
        return super().parse_args(known, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message and how to get help, and leave with status 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            name = message.removeprefix(prefix).split()[0].partition("=")[0]
            # Without the dashes, which would make any two short flags look alike.
            flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(name.lstrip("-"), flags, n=1, cutoff=0.7)
            hint = self.hints.get(name, f"did you mean --{near[0]}" if near else "")
            message += f"; {hint}" if hint else ""
        elif (
            found := re.fullmatch(r"argument (\S+): invalid int value: (.*)", message)
        ) is not None:
            message = f"{found[1]} must be an integer, got {found[2]}"
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


# --- one flag for each setting --------------------------------------------------------------------


def flag_of(name: str) -> str:
    """The flag of a setting, as it is typed.

    Example:
        >>> flag_of("base_budget"), flag_of("seed"), flag_of("seeds")
        ('--base-budget', '--seed', '--seed')
    """
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def add_flags(parser: Any, cls: type, *, leave_out: Sequence[str] = ()) -> None:
    """Add a flag for each setting of a dataclass. What is not given stays out of the namespace.

    ``steps: int`` becomes ``--steps N``, ``erase: bool`` becomes ``--erase`` and ``--no-erase``, a
    tuple takes several values, a table takes ``NAME=VALUE`` and can be given again.

    Args:
        parser: A parser, or a group of one.
        cls: The dataclass.
        leave_out: Names that get no flag.
    """
    for setting in settings_of(cls).values():
        if setting.name not in leave_out:
            _add_flag(parser, setting, setting.name)


def add_registry_flags(
    parser: CommandParser, methods: Registry[Any], attacks: Registry[Any], of_run: type
) -> None:
    """Add the flags of the settings of every method and every attack of a wing.

    A setting of a method is a flag of its own, ``--steps``; one of an attack names it:
    ``--lora.rank``. A setting that the run has as well (its seed, its loss) goes for both, and gets
    no second flag.

    Args:
        parser: The parser.
        methods: The methods.
        attacks: The attacks.
        of_run: The dataclass of the run.
    """
    shared = settings_of(of_run)
    if methods:
        parser.add_argument(
            "--set",
            dest=_METHOD,
            action="append",
            default=argparse.SUPPRESS,
            metavar="NAME=VALUE",
            help="a setting of the method, as its flag sets it; again for more",
        )
        flag = "--methods" if "methods" in shared else "--method"
        parser.registered.append(_help.Registered("method", flag, _texts(methods), []))
    for name, owners in methods.all_settings().items():
        if name in shared or flag_of(name) in parser._option_string_actions:
            continue
        default = [getattr(methods[owner], name) for owner in owners]
        setting = settings_of(type(methods[owners[0]]))[name]
        shown = default[0] if all(value == default[0] for value in default) else None
        action = _add_flag(parser, setting._replace(default=shown), f"{_METHOD}.{name}")
        parser.registered[-1].options.append(_help.option_of(action, owners))
    if attacks:
        parser.registered.append(_help.Registered("attack", "--attacks", _texts(attacks), []))
    for owner, attack in attacks.items():
        for setting in settings_of(type(attack)).values():
            if setting.name != attacks.key and setting.name not in shared:
                shown = getattr(attack, setting.name)
                dest = f"{_ATTACKS}.{owner}.{setting.name}"
                action = _add_flag(
                    parser, setting._replace(default=shown), dest, prefix=f"{owner}."
                )
                parser.registered[-1].options.append(_help.option_of(action, [owner]))
    for action in parser._actions:
        if action.dest in ("method", "methods", "compare"):
            offer(action, methods)
        elif action.dest == "attacks":
            offer(action, [*attacks, "all"])


def _texts(registry: Registry[Any]) -> dict[str, str]:
    """What the entries of a registry are, by name."""
    found = {}
    for name, entry in registry.items():
        usual = settings_of(type(entry)).items()
        own = {key: getattr(entry, key) for key, setting in usual if key != registry.key}
        changed = [f"{k} {v}" for k, v in own.items() if v != dict(usual)[k].default]
        with_what = f" ({', '.join(changed)})" if changed else ""
        found[name] = (_help.description_of(entry) + with_what).replace("%", "%%")
    return found


def offer(action: argparse.Action, values: Iterable[str]) -> None:
    """Name the values that a shell completes; others stay possible."""
    action.completions = list(values)  # type: ignore[attr-defined]


def _add_flag(parser: Any, setting: Setting, dest: str, *, prefix: str = "") -> argparse.Action:
    flag = flag_of(prefix + setting.name)
    if flag in parser._option_string_actions:
        found: argparse.Action = parser._option_string_actions[flag]
        return found
    options = [kind for kind in options_of(setting.type) if kind is not type(None)]
    words = _help.for_terminal(setting.help) + _shown(setting.default)
    more: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS}
    more["help"] = words.replace("%", "%%")
    choices = literals_of(setting.type)
    if options == [bool]:
        more["action"] = argparse.BooleanOptionalAction
    elif any(length_of(kind) == 2 for kind in options):
        more |= {"nargs": 2, "metavar": ("LOW", "HIGH")}
    elif any(typing.get_origin(kind) is tuple for kind in options):
        more |= {"nargs": "+", "metavar": setting.name.removesuffix("s").upper()}
    elif _is_table(setting):
        more |= {"action": "append", "metavar": "NAME=VALUE"}
    elif all(typing.get_origin(kind) is Literal for kind in options):
        more["metavar"] = "{" + ",".join(choices) + "}"
    else:
        more["metavar"] = {int: "N", float: "X"}.get(options[0], setting.name.upper())
    action: argparse.Action = parser.add_argument(flag, **more)
    offer(action, choices)
    return action


def _shown(default: Any) -> str:
    if default in (None, (), {}, "") or default is dataclasses.MISSING:
        return ""
    text = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" (default: {text})"


def _is_table(setting: Setting) -> bool:
    origins = {typing.get_origin(kind) for kind in options_of(setting.type)}
    return bool(origins & {dict, collections.abc.Mapping})


# --- what was given -------------------------------------------------------------------------------


def name_and_value(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``, the value as YAML has it.

    Raises:
        ValueError: If it has another form.

    Example:
        >>> name_and_value("inner-rate=1e-3")
        ('inner_rate', 0.001)
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"a setting must look like NAME=VALUE, got {text!r}")
    try:
        return name.replace("-", "_"), parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"{name} must have a plain value, got {value!r}: {error}") from error


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The settings of a dataclass that flags gave, as texts and lists."""
    found = {}
    for name, setting in settings_of(cls).items():
        if hasattr(arguments, name):
            value = getattr(arguments, name)
            found[name] = dict(map(name_and_value, value)) if _is_table(setting) else value
    return found


class _Given(NamedTuple):
    """What one source says: of the run, of its method, of its attacks by name.

    Flags stand in errors as they were typed: ``spelled`` has them by the names of the namespace.
    """

    where: str
    run: dict[str, Any]
    method: dict[str, Any]
    attacks: dict[str, dict[str, Any]]
    spelled: Mapping[str, str] = MappingProxyType({})

    def typed_as(self, prefix: str) -> dict[str, str]:
        """Flags by the names of the settings of a method or an attack."""
        found = self.spelled.items()
        return {name.removeprefix(prefix): v for name, v in found if name.startswith(prefix)}


def read_settings(
    arguments: argparse.Namespace,
    cls: type[T],
    methods: Registry[Any],
    attacks: Registry[Any],
    *,
    old_names: Mapping[str, str] | None = None,
    **fixed: Any,
) -> T:
    """The settings of a run, out of its config file and its flags.

    Args:
        arguments: What was parsed by a parser with :func:`add_flags` and
            :func:`add_registry_flags`; ``config`` names the file, if any.
        cls: The dataclass of the run; ``settings`` and ``attack_settings`` of it hold what its
            method and its attacks are given.
        methods: The methods of the wing.
        attacks: The attacks of the wing.
        old_names: Keys that have another name now.
        **fixed: Settings that the command itself says.

    Returns:
        The settings, in their types.

    Raises:
        FileNotFoundError: If the config file is missing.
        ValueError: If a name is unknown or a value is wrong.
    """
    sources = [_of_flags(arguments, cls)]
    path = getattr(arguments, "config", None)
    if path is not None:
        named = {k: v for k, v in (old_names or {}).items() if k not in settings_of(cls)}
        if "seeds" in settings_of(cls):
            named["seed"] = "seeds"  # a file may name it as the flag is called
        values = _renamed(read_yaml(path), named, f"--config {path}")
        sources.insert(0, _of_file(values, f"--config {path}", cls, methods, attacks))
    run: dict[str, Any] = {}
    for source in sources:
        run |= typed(cls, source.run, source.where, source.spelled)
    run |= fixed
    # A method that is unknown is named by whoever looks it up, with the settings it has.
    method: dict[str, Any] = {}
    attack: dict[str, dict[str, Any]] = {}
    known = run.get("method", getattr(settings_of(cls).get("method"), "default", None))
    if known:
        saying = [source for source in sources if "method" in source.run]
        methods.find(known, saying[-1].spelled.get("method", saying[-1].where) if saying else "")
    for source in sources:
        method |= (
            methods.typed(known, source.method, source.where, source.typed_as(f"{_METHOD}."))
            if known
            else source.method
        )
        for name, values in source.attacks.items():
            typed_as = source.typed_as(f"{_ATTACKS}.{name}.")
            found = attacks.typed(name, values, source.where, typed_as)
            attack[name] = attack.get(name, {}) | found
    if _METHOD in settings_of(cls):
        run[_METHOD] = method
    if _ATTACKS in settings_of(cls):
        run[_ATTACKS] = attack
    return build(cls, run, "settings")


def _of_flags(arguments: argparse.Namespace, cls: type) -> _Given:
    method = dict(map(name_and_value, getattr(arguments, _METHOD, ())))
    attacks: dict[str, dict[str, Any]] = {}
    spelled = {f"{_METHOD}.{name}": f"--set {name}" for name in method}
    for dest, value in vars(arguments).items():
        first, _, name = dest.partition(".")
        if first == _METHOD and name:
            method[name] = value
            spelled[dest] = flag_of(name)
        elif first == _ATTACKS and name:
            owner, _, setting = name.partition(".")
            attacks.setdefault(owner, {})[setting] = value
            spelled[dest] = flag_of(name)
    run = {k: v for k, v in given(arguments, cls).items() if k not in (_METHOD, _ATTACKS)}
    spelled |= {name: flag_of(name) for name in run}
    return _Given("flags", run, method, attacks, spelled)


def build_of_flags(cls: type[T], values: Mapping[str, Any]) -> T:
    """A settings dataclass of what flags gave, without a file; errors name the flags.

    Raises:
        ValueError: If a value is wrong.
    """
    return build(cls, values, "flags", spelled={name: flag_of(name) for name in values})


def _renamed(values: Mapping[str, Any], old_names: Mapping[str, str], where: str) -> dict[str, Any]:
    """The values under the names that settings have now; no setting may be named twice."""
    for old, new in old_names.items():
        if old in values and new in values:
            raise ValueError(
                f"{where} must name each setting once, got {new} and its old name {old}"
            )
    return {old_names.get(name, name): value for name, value in values.items()}


def _of_file(
    values: Mapping[str, Any],
    where: str,
    cls: type,
    methods: Registry[Any],
    attacks: Registry[Any],
) -> _Given:
    """A file names settings of the method beside those of the run, and attacks as tables."""
    of_run, of_methods = settings_of(cls), methods.all_settings()
    found = _Given(where, {}, {}, {})

    def keep(into: dict[str, Any], name: str, value: Any, table: str) -> None:
        if name in into:
            raise ValueError(f"{where}: {name} must be given once, got it beside {table} and in it")
        into[name] = value

    for name, value in values.items():
        if name == _METHOD:
            for setting, item in _table(name, value, where).items():
                keep(found.method, setting, item, _METHOD)
        elif name == _ATTACKS:
            for owner, settings in _table(name, value, where).items():
                keep(found.attacks, owner, _table(owner, settings, where), _ATTACKS)
        elif name in of_run:
            found.run[name] = value
        elif name in of_methods:
            keep(found.method, name, value, _METHOD)
        elif name in attacks:
            keep(found.attacks, name, _table(name, value, where), _ATTACKS)
        else:
            known: Iterable[str] = (*of_run, *of_methods, *attacks)
            raise ValueError(f"{where}: {name} is no setting; {suggestion(name, known)}")
    return found


def _table(name: str, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {name} must be a table of names and values, got {value!r}")
    found: dict[str, Any] = {}
    for key, item in value.items():
        if (setting := str(key).replace("-", "_")) in found:
            raise ValueError(f"{where}: {name} must name each setting once, got {setting} twice")
        found[setting] = item
    return found
