"""Run the notebooks of docs/ and keep what they show.

    python .ci/notebooks.py [NAME ...]

Needs the extras ``test`` and ``report``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """A notebook with what its cells show when they run in a folder; without what they log.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=None, resources=resources, record_timing=False, kernel_name="python3"
    )
    # One thread: what is small here is slowed by more wherever something else runs as well.
    found = client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return found


def main() -> None:
    """Run some or all, in place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="without .ipynb; all when omitted")
    names = parser.parse_args().names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for name in names:
        path = NOTEBOOKS / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as folder:
            found = executed(path, Path(folder))
        found.metadata.language_info = {"name": "python"}  # not the version it happened to run on
        nbformat.write(found, path)
        print(path)


if __name__ == "__main__":
    main()
