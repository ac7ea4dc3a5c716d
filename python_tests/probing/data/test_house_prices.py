"""House Prices: preprocessing on made-up files, published facts on the real ones."""

from pathlib import Path

import pytest
import torch

from immunize_ext.probing.data import house_prices_task

CSV = """Id,Zone,LotArea,Porch,SalePrice
1,RM,100,,10
2,FV,200,3,20
3,,300,NA,30
4,RM,400,5,50
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("D1.csv", "D2.csv"):
        (tmp_path / name).write_text(CSV, encoding="utf-8")
    return tmp_path


def test_preprocessing(folder: Path) -> None:
    task = house_prices_task(folder, "primary", train_rows=3, test_rows=None)
    x = torch.cat([task.x_train, task.x_test])
    y = torch.cat([task.y_train, task.y_test])

    def standardised(values: list[float]) -> torch.Tensor:
        column = torch.tensor(values, dtype=torch.float64)
        return (column - column.mean()) / column.std()

    # "0" (the missing zone) sorts before "FV" and "RM".
    expected = [[1, 2, 3, 4], [2, 1, 0, 2], [0, 3, 0, 5]]
    for column, values in enumerate(expected):
        torch.testing.assert_close(x[:, column], standardised([float(v) for v in values]))
    torch.testing.assert_close(y, standardised([100.0, 200.0, 300.0, 400.0]))
    assert x.shape == (4, 3)
    assert task.name == "House Prices, LotArea"


def test_constant_column_becomes_zero(folder: Path) -> None:
    (folder / "D2.csv").write_text(
        CSV.replace("RM", "RL").replace("FV", "RL").replace(",,3", ",RL,3")
    )
    task = house_prices_task(folder, "harmful", train_rows=3, test_rows=1)
    assert float(task.x_train[:, 1].abs().max()) == 0.0


def test_refusals(folder: Path) -> None:
    with pytest.raises(ValueError, match="must fit into the 4 rows"):
        house_prices_task(folder, "primary")
    with pytest.raises(ValueError, match="role must be"):
        house_prices_task(folder, "other")  # type: ignore[arg-type]
    (folder / "D1.csv").write_text("Id,LotArea\n1,2\n3,4\n")
    with pytest.raises(ValueError, match="none named SalePrice"):
        house_prices_task(folder, "primary", train_rows=1, test_rows=1)
    (folder / "D1.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold D1\.csv"):
        house_prices_task(folder, "primary")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("role", "largest", "kappa", "total"),
    [("primary", 1795.2, 7.73e3, 309), ("harmful", 2009.6, 2.08e5, 1151)],
)
def test_published_facts(
    shared_data: Path, role: str, largest: float, kappa: float, total: int
) -> None:
    task = house_prices_task(shared_data / "house_price", role, test_rows=None)  # type: ignore[arg-type]
    assert task.x_train.shape == (200, 79)
    assert len(task.x_train) + len(task.x_test) == total
    eigenvalues = torch.linalg.eigvalsh(task.x_train.mT @ task.x_train).flip(0)
    assert int((eigenvalues > 1e-8 * eigenvalues[0]).sum()) == 74
    assert float(eigenvalues[0]) == pytest.approx(largest, rel=3e-5)
    assert float(eigenvalues[0] / eigenvalues[73]) == pytest.approx(kappa, rel=2e-2)


def test_none_is_a_missing_value(folder: Path) -> None:
    text = CSV.replace("2,FV", "2,None")
    (folder / "D1.csv").write_text(text, encoding="utf-8")
    task = house_prices_task(folder, "primary", train_rows=3, test_rows=None)
    zones = torch.cat([task.x_train, task.x_test])[:, 1]
    # "None" would sort before "RM" and after "0"; it is "0" as an empty cell is.
    assert float(zones[1]) == float(zones[2]) == float(zones.min())
