"""Settings: one dataclass gives flags, help, YAML keys, types and refusals; registries add more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from immunize_ext.flags import CommandParser, add_flags, add_registry_flags, read_settings
from immunize_ext.settings import Registry, build, check_types, parse_yaml, plain, read_yaml


@dataclass(frozen=True)
class Toy:
    """A run.

    Attributes:
        primary: The task to keep, about 50% of the data.
        harmful: The tasks to make hard.
        method: How.
        steps: Number of steps.
        rate: Learning rate.
        grading: A choice of ``log`` and ``top``.
        erase: Whether to erase.
        strength: A number or ``auto``.
        settings: Of the method.
        attacks: Attacks.
        attack_settings: Of the attacks.
    """

    primary: str | None = None
    harmful: tuple[str, ...] = ()
    method: str = "first"
    steps: int = 3
    rate: float | None = None
    grading: Literal["log", "top"] = "log"
    erase: bool = True
    strength: float | Literal["auto"] = 30.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[str, ...] = ()
    attack_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


METHODS: Registry[Any] = Registry("method", key="method")
ATTACKS: Registry[Any] = Registry("attack", key="name")


@METHODS.register
@dataclass(frozen=True)
class First:
    """A method.

    Attributes:
        depth: How deep.
        steps: As the run has it.
    """

    method: ClassVar[str] = "first"
    depth: int = 2
    steps: int = 5


@METHODS.register
@dataclass(frozen=True)
class Second:
    """Another.

    Attributes:
        depth: How deep.
        rotate: Whether to rotate.
        window: From where to where.
    """

    method: ClassVar[str] = "second"
    depth: int = 7
    rotate: bool = True
    window: tuple[float, float] | None = None


@ATTACKS.register
@dataclass(frozen=True)
class LowRank:
    """An attack.

    Attributes:
        rank: Of the update.
    """

    name: ClassVar[str] = "low_rank"
    rank: int = 4


def parser() -> CommandParser:
    made = CommandParser(prog="toy", aliases={"--c": "--strength"})
    made.add_argument("--config")
    add_flags(made, Toy, leave_out=("settings", "attack_settings"))
    add_registry_flags(made, METHODS, ATTACKS, Toy)
    return made


def read(*argv: str) -> Toy:
    arguments = parser().parse_args(argv)
    return read_settings(arguments, Toy, METHODS, ATTACKS, old_names={"c": "strength"})


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


# --- what flags and files give --------------------------------------------------------------------


def test_every_kind_of_flag() -> None:
    assert read() == Toy()
    found = read(
        *("--primary", "4:9", "--harmful", "1", "2", "--steps", "4", "--rate", "1e-3"),
        *("--grading", "top", "--no-erase", "--strength", "auto", "--method", "second"),
        *(
            "--depth",
            "9",
            "--no-rotate",
            "--window",
            "1",
            "30",
            "--attacks",
            "low_rank",
            "--low-rank.rank",
            "16",
        ),
    )
    assert found == Toy(
        primary="4:9",
        harmful=("1", "2"),
        method="second",
        steps=4,
        rate=1e-3,
        grading="top",
        erase=False,
        strength="auto",
        settings={"depth": 9, "rotate": False, "window": (1.0, 30.0)},
        attacks=("low_rank",),
        attack_settings={"low_rank": {"rank": 16}},
    )
    assert plain(found)["harmful"] == ["1", "2"]


def test_help_says_what_the_docstrings_say(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    short = " ".join(capsys.readouterr().out.split())
    for words in (
        "methods (--method NAME): first A method second Another",
        "settings: toy --method NAME --help",
        "attacks (--attacks NAME): low_rank An attack",
    ):
        assert words in short
    assert "--depth" not in short.partition("options:")[2]
    with pytest.raises(SystemExit):
        parser().parse_args(["--method", "second", "--attacks=low_rank", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "method second: Another --depth N" in text
    assert "attack low_rank: An attack --low-rank.rank N" in text
    for words in (
        "--steps N Number of steps (default: 3)",
        "--primary PRIMARY The task to keep, about 50% of the data",
        "--grading {log,top} A choice of log and top (default: log)",
        "--erase, --no-erase Whether to erase (default: True)",
        "--depth N How deep",
        "--rotate, --no-rotate Whether to rotate (default: True)",
        "--window LOW HIGH From where to where",
        "--low-rank.rank N Of the update (default: 4)",
    ):
        assert words in text
    assert text.count("--steps N") == 2  # usage and help: the method's is the run's


def test_a_file_holds_the_same_and_flags_override_it(yaml: Callable[[str], str]) -> None:
    path = yaml(
        "primary: 4:9\nharmful: 7\nsteps: 6\nrate: 1e-3\nmethod: second\ndepth: 5\nerase: no\n"
        "settings: {rotate: false}\nattacks: [low_rank]\nlow-rank: {rank: 2}\n"
    )
    found = read("--config", path)
    assert found == Toy(
        primary="4:9",
        harmful=("7",),
        method="second",
        steps=6,
        rate=1e-3,
        erase=False,
        settings={"rotate": False, "depth": 5},
        attacks=("low_rank",),
        attack_settings={"low_rank": {"rank": 2}},
    )
    over = read("--config", path, "--steps", "8", "--set", "depth=1", "--low-rank.rank", "3")
    assert (over.steps, over.settings["depth"], over.attack_settings["low_rank"]["rank"]) == (
        8,
        1,
        3,
    )
    assert over.primary == "4:9"


def test_old_names_still_work_and_say_so(
    yaml: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert read("--c", "10").strength == read("--c=10").strength == 10.0
    assert capsys.readouterr().err == "toy: --c is called --strength now\n" * 2
    assert read("--config", yaml("c: 10")).strength == 10.0


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--grading", "Top"], "must be 'log' or 'top', got 'Top'; did you mean top"),
        (["--steps", "many"], "--steps must be an integer, got 'many'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "3.5"], "steps must be an integer"),
        (["--rate", "inf"], "rate must be a finite number, got 'inf'"),
        (["--rate", "nan"], "rate must be a finite number"),
        (["--grading", "tip"], "grading must be 'log' or 'top', got 'tip'"),
        (["--strength", "much"], "strength must be a finite number or 'auto', got 'much'"),
        (["--method", "frist"], "--method: frist is no method; did you mean first"),
        (["--method", "frist", "--depth", "3"], "--method: frist is no method"),
        (["--rotate"], "--rotate is no setting of first; known are depth, steps"),
        (["--depth", "x"], "--depth must be an integer, got 'x'"),
        (["--set", "dept=3"], "--set dept is no setting of first; did you mean depth"),
        (["--set", "depth"], "must look like NAME=VALUE, got 'depth'"),
        (["--set", "depth=.inf"], "--set depth must be an integer, got inf"),
        (["--set", "depth=[1"], "depth must have a plain value, got '[1'"),
        (["--set", "depth={a: *b}"], "depth must have a plain value"),
        (["--low-rank.rank", "x"], "--low-rank.rank must be an integer, got 'x'"),
    ],
)
def test_bad_values_are_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=r"must|no ") as caught:
        read(*argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stpes: 3", "stpes is no setting; did you mean steps"),
        ("low-rnk: {rank: 3}", "low_rnk is no setting; did you mean low_rank"),
        ("steps: .inf", "steps must be an integer, got inf"),
        ("steps: true", "steps must be an integer, got True"),
        ("rate: .nan", "rate must be a finite number"),
        ("erase: 3", "erase must be true or false, got 3"),
        ("method: null", "method must be a text, got None"),
        ("harmful: {a: b}", "harmful must be a list, each a text"),
        ("low_rank: 3", "low_rank must be a table of names and values, got 3"),
        ("settings: 3", "settings must be a table of names and values, got 3"),
        ("- a", "must hold names with values, got a list"),
        (
            "steps: [1",
            "must be a YAML file, got: while parsing a flow sequence, expected ',' or ']', but got "
            "'<stream end>' in line 1",
        ),
        ("a\0b", "special characters are not allowed at position 1"),
        ("method: frist", "frist is no method; did you mean first"),
        ("low-rank: {rank: x}", "low_rank: rank must be an integer, got 'x'"),
        ("steps: 1\nsteps: 2", "the key 'steps' stands twice"),
        (
            "attack-settings: 1\nattack_settings: 2",
            "must name each setting once, got 'attack-settings' and 'attack_settings'",
        ),
        ("settings: {depth: 1, depth: 2}", "the key 'depth' stands twice"),
        ("c: 3\nstrength: 4", "must name each setting once, got strength and its old name c"),
        ("strength: 4\nc: 3", "must name each setting once, got strength and its old name c"),
        ("method: second\ndepth: 1\nsettings: {depth: 2}", "depth must be given once, got it"),
        ("method: second\nsettings: {depth: 2}\ndepth: 1", "beside settings and in it"),
        ("low_rank: {rank: 2}\nattack_settings: {low-rank: {rank: 3}}", "beside attack_settings"),
        ("low_rank: {a-b: 2, a_b: 3}", "low_rank must name each setting once, got a_b twice"),
        ("!!python/object/apply:os.getcwd []", "must be a YAML file"),
        ("\udcff", "must be a YAML file"),
    ],
)
def test_bad_files_are_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"must|no ") as caught:
        read("--config", str(path))
    assert str(caught.value).startswith("--config")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_costs_nothing(yaml: Callable[[str], str]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ValueError, match=r"aliases \(\*name\) are not read"):
        read_yaml(yaml("\n".join(lines)))
    with pytest.raises(ValueError, match="must be at most 1 MiB"):
        read_yaml(yaml("a: " + "x" * (1 << 20)))
    with pytest.raises(ValueError, match="must be a YAML file"):
        read_yaml(yaml("a: " + "[" * 100_000))
    with pytest.raises(FileNotFoundError, match="which is not there"):
        read_yaml("missing.yaml")


def test_plain_words_are_read_as_yaml_1_2_has_them() -> None:
    read_as = {
        "4:9": "4:9", "1e-3": 1e-3, "no": "no", "010": 10, "0x10": 16, "-3": -3, ".5": 0.5,
        "true": True, "~": None, "2026-01-01": "2026-01-01", "1_000": "1_000", "'3'": "3",
        ".inf": math.inf, "+1.": 1.0, "": None,
    }  # fmt: skip
    assert {text: parse_yaml(text) for text in read_as} == read_as


def test_unknown_flags_say_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["--stepps", "3"], "unrecognized arguments: --stepps 3; did you mean --steps"),
        (["--step", "3"], "did you mean --steps"),  # no abbreviations
        (["--low-rank.rnk=3"], "did you mean --low-rank.rank"),
        (["--stare", "3"], "unrecognized arguments: --stare 3; see"),  # near to nothing
    ):
        with pytest.raises(SystemExit) as caught:
            parser().parse_args(argv)
        assert caught.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": "3"}, "steps must be an integer, got '3'"),
        ({"steps": 1.5}, "steps must be an integer, got 1.5"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"rate": "x"}, "rate must be a finite number, got 'x'"),
        ({"rate": math.nan}, "rate must be a finite number"),
        ({"primary": 3}, "primary must be a text, got 3"),
        ({"method": None}, "method must be a text, got None"),
        ({"harmful": "4:9"}, "harmful must be a list, each a text, got '4:9'"),
        ({"harmful": (3,)}, "harmful must be a list, each a text"),
        ({"grading": "tip"}, "grading must be 'log' or 'top', got 'tip'"),
        ({"erase": 1}, "erase must be true or false, got 1"),
        ({"strength": "much"}, "strength must be a finite number or 'auto'"),
        ({"settings": 3}, "settings must be a table, got 3"),
        ({"attack_settings": {"low_rank": 3}}, "attack_settings must be a table"),
    ],
)
def test_types_are_checked_where_python_builds_settings(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"must") as caught:
        Toy(**values)
    assert words in str(caught.value)


def test_a_pair_is_two_values(yaml: Callable[[str], str]) -> None:
    file = yaml("method: second\nsettings:\n  window: [1, 30]\n")
    assert read("--config", file).settings == {"window": (1.0, 30.0)}
    with pytest.raises(SystemExit):
        read("--method", "second", "--window", "1")
    for value in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="window must be 2 values, each a finite number"):
            METHODS.typed("second", {"window": value}, "file")


def test_what_has_the_right_type_is_kept() -> None:
    found = Toy(
        rate=1, strength="auto", settings={"depth": 3}, attack_settings={"low_rank": {"rank": 3}}
    )
    assert (found.rate, found.strength, found.settings) == (1, "auto", {"depth": 3})
    assert Toy(harmful=["a", "b"]).harmful == ("a", "b")  # type: ignore[arg-type]


# --- registries -----------------------------------------------------------------------------------


def test_registry_refuses_two_things_of_one_name() -> None:
    METHODS.register(First)  # the same again is nothing new
    with pytest.raises(ValueError, match="register: first is a method already"):
        METHODS.register(First(depth=9))
    assert METHODS.build("second", {"depth": "3"}, "flags", rotate=False, other=1) == Second(
        3, False
    )
    owners = {"depth": ["first", "second"], "steps": ["first"]}
    owners |= {"rotate": ["second"], "window": ["second"]}
    assert METHODS.all_settings() == owners


def test_required_settings_are_asked_for() -> None:
    @dataclass(frozen=True)
    class Needs:
        """Needs.

        Attributes:
            name: A name.
        """

        name: str

    with pytest.raises(ValueError, match="flags: name must be given"):
        build(Needs, {}, "flags")
