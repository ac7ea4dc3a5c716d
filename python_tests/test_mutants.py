"""The mutation tool on a toy checkout: killed, survived, stale, and kept for the next run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

TOY = """
[tests]
all = ["python_tests/test_toy.py"]

[[mutant]]
name = "adds in place of multiplying"
where = "toy/*.py"
old = "return a * b"
new = "return a + b"
tests = ["all"]

[[mutant]]
name = "no end"
where = "toy/*.py"
old = "left = a"
new = "left = a + ("
tests = ["all"]

[[mutant]]
name = "the other order of a product"
where = "toy/*.py"
old = "return b * a"
new = "return a * b  # the same"
tests = ["all"]
reason = "multiplication commutes"

[[mutant]]
name = "moved away"
where = "toy/*.py"
old = "return a - b"
new = "return b - a"
tests = ["all"]
"""


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / ".ci" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "mutants", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {
        ".ci/mutants.toml": TOY,
        "toy/product.py": "def product(a, b):\n    left = a\n    return a * b\n",
        "toy/turned.py": "def turned(a, b):\n    return b * a\n",
        "python_tests/test_toy.py": "from toy.product import product\n\n\n"
        "def test_product():\n    assert product(3, 4) == 12\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_verdicts_are_kept_and_explained(
    mutants: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutants.main([], checkout) == 1, "one can no longer be planted"
    said = capsys.readouterr().out
    assert "moved away: the text must stand once in toy/*.py, found 0 times" in said
    assert "survived: the other order of a product (multiplication commutes)" in said
    assert "2 of 3 killed" in said
    results = checkout / ".mutants" / "results.json"
    verdicts = json.loads(results.read_text())
    assert verdicts["adds in place of multiplying"]["verdict"] == "killed"
    assert "test_product" in verdicts["adds in place of multiplying"]["by"]
    assert verdicts["no end"]["verdict"] == "killed", "it cannot even be imported"
    # The copy is whole again, the checkout was never touched.
    for tree in (checkout, checkout / ".mutants" / "tree"):
        assert "return a * b" in (tree / "toy" / "product.py").read_text()

    # A second run judges only what changed since.
    verdicts["adds in place of multiplying"]["by"] = "remembered"
    verdicts["the other order of a product"]["digest"] = "of another file"
    results.write_text(json.dumps(verdicts))
    mutants.main([], checkout)
    verdicts = json.loads(results.read_text())
    assert verdicts["adds in place of multiplying"]["by"] == "remembered"
    assert verdicts["the other order of a product"]["digest"] != "of another file"


def test_tests_that_fail_without_a_fault_judge_nothing(
    mutants: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "python_tests" / "test_toy.py").write_text("def test_bad():\n    assert False\n")
    assert mutants.main(["--only", "adds"], checkout) == 1
    said = capsys.readouterr().out
    assert "unjudged adds in place of multiplying: fails without a fault: FAILED" in said
    assert "0 of 0 killed" in said
    assert not (checkout / ".mutants" / "results.json").exists()


def test_the_list_of_this_checkout_is_readable(mutants: ModuleType) -> None:
    """Names are unique, tests exist; whether the texts still stand is for ``make mutants``."""
    found = mutants.read_mutants(ROOT / ".ci" / "mutants.toml")
    assert len(found) >= 60
    missing = {t for m in found for t in m.tests if not (ROOT / t.split("::")[0]).is_file()}
    assert not missing
