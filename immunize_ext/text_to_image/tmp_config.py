"""Settings of a text-to-image run: from flags and from a YAML file, checked alike."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from immunize_ext._extras import require_extra
from immunize_ext.settings import CommandParser, read_yaml, suggestion

DIGITS = "digits"


@dataclass(frozen=True)
class TextToImageConfig:
    """One immunization of a text-to-image model, and how it is judged.

    Attributes:
        method: Name of a method.
        model: Folder of a pipeline, or ``digits`` for the one that comes with the package.
        concepts: A concepts.yaml; for ``digits`` the targets say it.
        targets: Digits to immunize against, or names out of the concepts file; all when empty.
        control: A concept that is erased and not immunized: the specificity control.
        new_word: A concept taught under a new word: may benign users still adapt?
        erase: Whether targets and control are erased first.
        settings: Settings of the immunizer, by name.
        attacks: Attacks to judge by; the first is the one that headline numbers are about.
        attack_steps: Steps of each attack.
        evaluate_at: Steps at which it is judged; four in equal ratios when empty.
        seeds: Seeds: an immunization and its attacks for each.
        images: Images for each score.
        sampling_steps: Denoising steps of an image.
        guidance: Guidance scale.
        threshold: Score at which a concept counts as taught again.
        clip: Folder of a CLIP model, for models without a judge.
        dino: Folder of a DINO model, likewise.
        image_size: Side that images of the concepts are resized to; the model's own when ``None``.
    """

    method: str = "mima"
    model: str = DIGITS
    concepts: str | None = None
    targets: tuple[str, ...] = ()
    control: str | None = None
    new_word: str | None = None
    erase: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[str, ...] = ("lora", "full_fine_tuning")
    attack_steps: int = 40
    evaluate_at: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    images: int = 32
    sampling_steps: int = 20
    guidance: float = 1.5
    threshold: float = 0.8
    clip: str | None = None
    dino: str | None = None
    image_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def steps_to_judge(self) -> tuple[int, ...]:
        """Steps at which attacks are judged."""
        if self.evaluate_at:
            return self.evaluate_at
        last = self.attack_steps
        return tuple(sorted({0, max(1, last // 4), max(1, last // 2), last}))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


_FIELDS = {f.name: f for f in fields(TextToImageConfig)}


_LISTS = {"targets": str, "attacks": str, "evaluate_at": int, "seeds": int}


_NUMBERS: dict[str, type] = {
    "attack_steps": int,
    "images": int,
    "sampling_steps": int,
    "image_size": int,
    "guidance": float,
    "threshold": float,
}


def checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of the right kinds, or an error that names the setting.

    Args:
        values: Settings by name.
        where: Where they come from; stands in errors.

    Returns:
        The settings converted.

    Raises:
        ValueError: If a name is unknown or a value has the wrong kind.

    Example:
        >>> checked({"seeds": [0, 1], "guidance": 2}, "config")
        {'seeds': (0, 1), 'guidance': 2.0}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _FIELDS:
            raise ValueError(
                f"{where}: keys must be settings, got {name!r}; {suggestion(name, _FIELDS)}"
            )
        try:
            found[name] = _converted(name, value)
        except (ValueError, TypeError):
            raise ValueError(f"{where}: {name} must be {_kind(name)}, got {value!r}") from None
    return found


def _converted(name: str, value: Any) -> Any:
    if value is None:
        if _FIELDS[name].default is not None:
            raise ValueError
        return None
    if name in _LISTS:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_number(item, _LISTS[name]) for item in items)
    if name in _NUMBERS:
        return _number(value, _NUMBERS[name])
    if name == "erase":
        if not isinstance(value, bool):
            raise ValueError
        return value
    if name == "settings":
        if not isinstance(value, Mapping):
            raise ValueError
        return dict(value)
    if not isinstance(value, str):
        raise ValueError
    return value


def _number(value: Any, kind: type) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise ValueError
        return value
    if isinstance(value, bool) or (kind is int and int(value) != float(value)):
        raise ValueError
    return kind(value)


def _kind(name: str) -> str:
    if name in _LISTS:
        return "a list of integers" if _LISTS[name] is int else "a list of texts"
    if name in _NUMBERS:
        return "an integer" if _NUMBERS[name] is int else "a number"
    return {"erase": "true or false", "settings": "a table"}.get(name, "a text")


def read_config(path: str) -> dict[str, Any]:
    """Read settings from a YAML file: names of flags, with ``_`` or ``-``, and ``settings``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, no table, or holds something unknown.
    """
    return checked(read_yaml(path), f"--config {path}")


def setting(text: str) -> tuple[str, Any]:
    """Argument type ``NAME=VALUE``: a setting of the immunizer; the value as YAML has it."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    yaml = require_extra("yaml", extra="diffusion", purpose="--set")
    found = yaml.safe_load(value)
    if isinstance(found, str):
        # YAML 1.1 takes 1e-3 for a text; people mean the number.
        with suppress(ValueError):
            found = float(found)
    return name.replace("-", "_"), found


def add_config_arguments(parser: CommandParser, *, method: bool = True) -> None:
    """Add the flags of the settings to a parser."""
    from immunize_ext.text_to_image.attacks import ATTACKS

    default = TextToImageConfig()
    if method:
        parser.add_argument(
            "--method",
            metavar="NAME",
            help="mima, joint_training, merge_only or loss_ascent (default: mima)",
        )
    parser.add_argument("--config", metavar="FILE", help="settings as YAML; flags override it")
    parser.add_argument("--model", metavar="PATH", help="folder of a pipeline (default: digits)")
    parser.add_argument("--concepts", metavar="FILE", help="concepts.yaml")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="concepts to immunize against")
    parser.add_argument("--control", metavar="NAME", help="concept erased but not immunized")
    parser.add_argument("--new-word", metavar="NAME", help="concept taught under a new word")
    parser.add_argument(
        "--no-erase", dest="erase", action="store_false", default=None, help="concepts are erased"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        type=setting,
        metavar="NAME=VALUE",
        help="a setting of the immunizer, e.g. steps=60 inner_rate=10; again for more",
    )
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="NAME",
        help=f"attacks to judge by, of {', '.join(ATTACKS)} (default: {' '.join(default.attacks)})",
    )
    for name, words in (
        ("attack-steps", "steps of each attack"),
        ("images", "images for each score"),
        ("sampling-steps", "denoising steps of an image"),
        ("image-size", "side that images of concepts are resized to"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=words)
    parser.add_argument("--guidance", type=float, metavar="X", help="guidance scale")
    parser.add_argument("--threshold", type=float, metavar="X", help="score that counts as taught")
    parser.add_argument("--evaluate-at", nargs="+", type=int, metavar="STEP", help="steps to judge")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="seeds (default: 0)")
    parser.add_argument("--clip", metavar="PATH", help="folder of a CLIP model to judge with")
    parser.add_argument("--dino", metavar="PATH", help="folder of a DINO model to judge with")


def config_from(arguments: argparse.Namespace, **fixed: Any) -> TextToImageConfig:
    """The settings that flags and the config file make.

    Args:
        arguments: Parsed flags.
        **fixed: Settings that the command itself decides.

    Returns:
        The settings.

    Raises:
        ValueError: If a setting is unknown or has the wrong kind.
        FileNotFoundError: If the config file is missing.
    """
    values = read_config(arguments.config) if arguments.config else {}
    for name in _FIELDS:
        given = getattr(arguments, name, None)
        if given is not None and name != "settings":
            values[name] = given
    settings = {**values.get("settings", {}), **dict(getattr(arguments, "settings", None) or ())}
    values["settings"] = settings
    return dataclasses.replace(TextToImageConfig(), **checked(values, "flags"), **fixed)
