"""Methods and attacks of other packages, by entry points."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from immunize_ext import settings
from immunize_ext.settings import Registry

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar
from immunize_ext.probing.immunizers import METHODS
from immunize_ext.probing.immunizers import METHODS as again

@METHODS.register
@dataclass(frozen=True)
class Theirs:
    """A method of another package.

    Attributes:
        depth: How deep.
    """

    method: ClassVar[str] = "theirs"
    depth: int = 3
'''


def install(folder: Path, value: str) -> None:
    """What pip leaves of a package with one entry point."""
    made = folder / "theirs-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text(f"[immunize_ext.probing]\ntheirs = {value}\n")
    (folder / "their_module.py").write_text(MODULE)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[1])
    more = {"PYTHONPATH": os.pathsep.join([str(folder), root]), "XDG_CACHE_HOME": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | more, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_a_method_of_another_package_is_a_method(tmp_path: Path) -> None:
    install(tmp_path, "their_module")
    help_of_it = run(tmp_path, "-m", "immunize_ext", "kappa", "--method", "theirs", "--help")
    assert "method theirs:\n  A method of another package" in help_of_it.stdout
    assert "--depth N" in help_of_it.stdout
    code = (
        "from immunize_ext.probing.run import RunSettings\n"
        "print(RunSettings(method='theirs', settings={'depth': 4}).immunizer().depth)"
    )
    assert run(tmp_path, "-c", code).stdout == "4\n"


def test_one_that_fails_is_named_and_the_others_count(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("attack", key="name", plugins="some.group")

    class Point:
        def __init__(self, name: str, does: Any) -> None:
            self.name, self.value, self.load = name, f"{name}_module", does

    def good() -> None:
        asked.append(1)

    asked: list[int] = []
    points = [Point("bad", lambda: 1 / 0), Point("good", good)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    settings._import_plugins.cache_clear()
    with pytest.warns(UserWarning, match=r"bad \(bad_module\) of some.group cannot be imported"):
        assert list(registry) == []
    assert list(registry) == []
    assert asked == [1]
