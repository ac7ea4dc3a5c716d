"""Settings of a condition-number run: from flags and from a YAML file, checked alike."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from immunize_ext.settings import CommandParser, read_yaml, strength, suggestion


@dataclass(frozen=True)
class KappaConfig:
    """One immunization of a linear extractor, and how it is judged.

    Attributes:
        data: ``digits``, ``mnist``, ``house``, or a file of features (.npz, .safetensors).
        data_dir: Folder of the files of ``mnist`` and ``house``; fetched into a cache when omitted.
        primary: The task to keep: classes ``4,6:2,3,7`` or one class ``4``; nothing for ``house``
            and for a file that is one task.
        harmful: The tasks to make hard, in the same form, or files of features.
        method: Name of a method.
        c: Strength of the closed forms, a number of at least 1 or ``auto``.
        grading: How the closed form grades directions; the method's own when ``None``.
        objective: What ``opt-kappa`` minimises: ``difference`` or ``log-ratio``.
        batch: ``full`` or the batch size of ``condition-number``.
        steps: Steps (epochs with batches) of an iterative method; its own when ``None``.
        ill_share: Share of R_ill in ``condition-number``.
        first_change: First change of theta in iterative methods; the method's own when ``None``.
        learning_rate: Of ``condition-number``; the method's own when ``None``.
        weight: Weight of the harmful loss in ``imma``.
        eta_harmful: Step of ``multiplicative`` on the harmful task.
        ridge: Ridge on each K, relative to its largest eigenvalue.
        seed: Seed of splits, immunizer and random draws of metrics.
        size: Side of MNIST images.
        max_train: Largest number of training samples of each task; all when ``None``.
        attackers: Attackers beside those that every report shows; ``all`` for all.
        loss: What attackers minimise.
        base_budget: Steps of an attacker without immunization.
        limit: Largest slow-down looked for.
    """

    data: str = "digits"
    data_dir: str | None = None
    primary: str | None = None
    harmful: tuple[str, ...] = ()
    method: str = "closed-form"
    c: float | str = 30.0
    grading: str | None = None
    objective: str = "log-ratio"
    batch: str = "full"
    steps: int | None = None
    ill_share: float = 0.3
    first_change: float | None = None
    learning_rate: float | None = None
    weight: float = 1.0
    eta_harmful: float = 0.1
    ridge: float = 1e-2
    seed: int = 0
    size: int = 28
    max_train: int | None = None
    attackers: tuple[str, ...] = ()
    loss: str = "squared"
    base_budget: int = 1000
    limit: float = 64.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


FIELDS = {field.name: field for field in dataclasses.fields(KappaConfig)}


LISTS = ("harmful", "attackers")


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if isinstance(value, (dict, list, tuple, bool)):
        raise ValueError
    return str(value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_text, value if isinstance(value, (list, tuple)) else [value]))


def _strength(value: Any) -> float | str:
    return "auto" if value == "auto" else _number(value)


_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    **dict.fromkeys(
        ("steps", "seed", "size", "max_train", "base_budget"), (_integer, "an integer")
    ),
    **dict.fromkeys(
        ("ill_share", "first_change", "learning_rate", "weight", "eta_harmful", "ridge", "limit"),
        (_number, "a finite number"),
    ),
    **dict.fromkeys(LISTS, (_texts, "a text or a list of texts")),
    "c": (_strength, "a number or 'auto'"),
}


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings of the right kinds, or an error that names the setting.

    Args:
        values: Settings by name.
        where: Where they come from; stands in errors.

    Returns:
        The settings converted.

    Raises:
        ValueError: If a name is unknown or a value has the wrong kind.

    Example:
        >>> checked({"seed": 3, "harmful": "4:9"}, "config")
        {'seed': 3, 'harmful': ('4:9',)}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise ValueError(
                f"{where}: keys must be settings, got {name!r}; {suggestion(name, FIELDS)}"
            )
        if value is None:
            if FIELDS[name].default is not None:
                raise ValueError(f"{where}: {name} must have a value, got nothing")
            found[name] = None
            continue
        convert, kind = _KINDS.get(name, (_text, "a text"))
        try:
            found[name] = convert(value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{where}: {name} must be {kind}, got {value!r}") from None
    return found


def read_config(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file.

    Args:
        path: The file: a mapping of the names of flags, with ``_`` or ``-``, to values.

    Returns:
        Settings as plain values, checked.

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtraError: If PyYAML is not installed.
        ValueError: If it is not YAML, not a mapping or holds something unknown.
    """
    loaded = read_yaml(path)
    # Read as a digit pair, unquoted 4:9 is a base-60 number in YAML 1.1.
    tasks = [loaded.get("primary"), *_as_list(loaded.get("harmful"))]
    if any(isinstance(task, int) and task > 9 and not isinstance(task, bool) for task in tasks):
        raise ValueError(
            f"--config: {path} must quote tasks, got a number; YAML reads 4:9 as one, write '4:9'"
        )
    return checked(loaded, f"--config {path}")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def add_config_arguments(parser: CommandParser, *, leave_out: Sequence[str] = ()) -> None:
    """Add a flag for each setting. A flag that is not given leaves the config file's value.

    Args:
        parser: Where to.
        leave_out: Settings that the command takes in another form.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings")

    def add(name: str, text: str, **more: Any) -> None:
        if name in leave_out:
            return
        default = FIELDS[name].default
        shown = "" if default in (None, ()) else f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text + shown, **more)

    add("data", "digits, mnist, house, or a file of features (.npz, .safetensors)")
    add(
        "data_dir",
        "folder with the files of mnist or house; default: a cache, filled from the network once",
        metavar="DIR",
    )
    add(
        "primary",
        "the task to keep: classes against classes (4,6:2,3,7), or one class (4), whose images "
        "then get a constant label, as in the papers' code",
        metavar="TASK",
    )
    add(
        "harmful",
        "the task to make hard, in the same form or a file of features; several for several-harms",
        metavar="TASK",
        nargs="+",
    )
    add("method", "how to immunize; see below", metavar="METHOD")
    add("c", "strength of the closed forms, or auto", metavar="C", type=strength)
    add("grading", "of closed-form: log, linear, top; of several-harms: top, log")
    add("objective", "of opt-kappa: difference or log-ratio")
    add("batch", "of condition-number: full, or a batch size", metavar="N")
    add("steps", "steps of an iterative method (epochs with --batch N)", type=int)
    add("ill_share", "of condition-number: share of R_ill in the first step", type=float)
    add("first_change", "first relative change of theta", type=float)
    add("learning_rate", "of condition-number", type=float)
    add("weight", "of imma: weight of the harmful loss", type=float)
    add("eta_harmful", "of multiplicative: step on the harmful task", type=float)
    add("ridge", "ridge relative to the largest eigenvalue of K", type=float)
    add("seed", "seed of splits, immunizer and metrics", type=int)
    add("size", "side of MNIST images: 28, 14 or 7", type=int)
    add("max_train", "most training samples of a task", type=int, metavar="N")
    add(
        "attackers",
        "attackers beside those every report has, or all",
        nargs="+",
        metavar="NAME",
    )
    add("loss", "what attackers minimise: squared or logistic")
    add("base_budget", "steps of an attacker without immunization", type=int)
    add("limit", "largest slow-down looked for", type=float)


def config_from(arguments: argparse.Namespace) -> KappaConfig:
    """Settings of the config file, overridden by the flags that were given."""
    values = read_config(arguments.config) if arguments.config else {}
    given = {name: value for name, value in vars(arguments).items() if name in FIELDS}
    return KappaConfig(**{**values, **checked(given, "flags")})
