"""House Prices in the splits of the condition-number paper: two CSV files, one per task.

The primary task predicts ``LotArea`` from D1.csv (309 rows of the smaller zoning classes), the
harmful task ``SalePrice`` from D2.csv (1151 rows of zone RL). Preprocessing as published: a missing
cell is 0 (empty, ``NA``, or ``None``, which the published reader takes for missing as well: 229 and
635 cells of ``MasVnrType``), text columns become the rank of their value in alphabetical order,
every column and the target are z-scored over the whole file (standard deviation with n - 1; 1 where
it is 0). Both target columns are left out of the features of both tasks, ``Id`` stays: 79 features.
The first 200 rows are for training, the next 100 for testing.

These choices reproduce the published inputs: on 200 rows both K have rank 74 of 79, and their
largest eigenvalues are 1795.2 and 2009.6 (``python_tests/probing/data/test_house_prices.py``).
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from immunize_ext.probing.data.download import fetch_house_prices
from immunize_ext.probing.data.task import Task

TARGETS = {"primary": "LotArea", "harmful": "SalePrice"}


FILES = {"primary": "D1.csv", "harmful": "D2.csv"}


# How the two files write a missing value.
_MISSING = ("", "NA", "None")


def _encode(cells: list[str]) -> NDArray[np.float64]:
    """Numbers as they are, missing cells as 0; a text column as the rank of each of its values."""
    try:
        return np.array([0.0 if cell in _MISSING else float(cell) for cell in cells])
    except ValueError:
        filled = ["0" if cell in _MISSING else cell for cell in cells]
        return np.unique(filled, return_inverse=True)[1].astype(np.float64)


def _standardise(values: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = values.std(axis=0, ddof=1)
    # A constant column would be 0 / 0: it becomes 0.
    return (values - values.mean(axis=0)) / np.where(deviation == 0, 1.0, deviation)


def house_prices_task(
    folder: str | Path | None,
    role: Literal["primary", "harmful"],
    *,
    train_rows: int = 200,
    test_rows: int | None = 100,
    dtype: torch.dtype = torch.float64,
) -> Task:
    r"""Load one of the two regression tasks on House Prices.

    Args:
        folder: Folder with ``D1.csv`` and ``D2.csv``; ``None`` gets them from OpenML once
            (:func:`~immunize_ext.probing.data.fetch_house_prices`).
        role: ``"primary"`` (LotArea, D1.csv) or ``"harmful"`` (SalePrice, D2.csv).
        train_rows: Number of rows to train on, from the top; 200 as published.
        test_rows: Number of rows after them to test on; 100 as published, ``None`` for the rest.
        dtype: dtype of the task's tensors.

    Returns:
        The task; inputs have shape ``(n, 79)``.

    Raises:
        FileNotFoundError: If the file is missing.
        ConnectionError: If no folder is given and there is no network.
        ValueError: If a column is missing or the file has too few rows.

    Note:
        Deterministic. The z-score uses the whole file, test rows included, as published.

    Example:
        >>> import tempfile
        >>> lines = ["LotArea,SalePrice,Rooms,Zone"]
        >>> lines += [f"{7 * n},{2000 + n},{n % 5},{'RL' if n % 2 else 'RM'}" for n in range(12)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "D2.csv").write_text("\n".join(lines))
        ...     task = house_prices_task(folder, "harmful", train_rows=8, test_rows=4)
        >>> task.name, task.x_train.shape
        ('House Prices, SalePrice', torch.Size([8, 2]))
    """
    if role not in FILES:
        raise ValueError(f"house_prices_task: role must be 'primary' or 'harmful', got {role!r}")
    folder = fetch_house_prices() if folder is None else folder
    path = Path(folder) / FILES[role]
    if not path.is_file():
        raise FileNotFoundError(
            f"house_prices_task: folder must hold {FILES[role]}, got {folder}, which does not; "
            "give the folder with the D1.csv and D2.csv of the published splits"
        )
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    missing = [target for target in TARGETS.values() if target not in header]
    if missing:
        raise ValueError(
            f"house_prices_task: {path} must have columns LotArea and SalePrice, got none named "
            f"{', '.join(missing)}; use the files of the published splits"
        )
    last = len(rows) if test_rows is None else train_rows + test_rows
    if not 0 < train_rows < last <= len(rows):
        raise ValueError(
            f"house_prices_task: train_rows and test_rows must fit into the {len(rows)} rows of "
            f"{path}, got {train_rows} and {test_rows}"
        )
    columns = {name: _encode([row[j] for row in rows]) for j, name in enumerate(header)}
    features = [values for name, values in columns.items() if name not in TARGETS.values()]
    x = torch.from_numpy(_standardise(np.stack(features, axis=1))).to(dtype)
    y = torch.from_numpy(_standardise(columns[TARGETS[role]])).to(dtype)
    return Task(
        f"House Prices, {TARGETS[role]}",
        x[:train_rows],
        y[:train_rows],
        x[train_rows:last],
        y[train_rows:last],
    )
