"""Every notebook of docs/ runs in an empty folder, opens with a picture, and was kept as it ran."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

nbformat: Any = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_notebooks", ROOT / ".ci" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_was_kept(path: Path, runner: ModuleType, tmp_path: Path) -> None:
    kept = code_cells(nbformat.read(path, as_version=4))
    found = code_cells(runner.executed(path, tmp_path))
    # Numbers move in their last digits between machines; the kinds of output do not.
    kinds = [[[o.output_type for o in cell.outputs] for cell in cells] for cells in (kept, found)]
    assert kinds[0] == kinds[1]
    assert pictures(kept[0]) == pictures(found[0]) == 1
    assert [cell.execution_count for cell in kept] == list(range(1, len(kept) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    texts = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#\s]+)", " ".join(texts))
    assert links
    assert [link for link in links if not (path.parent / link).is_file()] == []


def test_there_are_four() -> None:
    assert len(NOTEBOOKS) == 4
