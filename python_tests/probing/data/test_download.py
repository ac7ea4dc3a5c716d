"""Fetched data: a stand-in for the network, what is written, and every way it can go wrong."""

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from immunize_ext.probing.data import (
    download,
    fetch_house_prices,
    fetch_mnist,
    house_prices_task,
    load_mnist,
    mnist_task,
)

datasets = pytest.importorskip("sklearn.datasets")
pandas = pytest.importorskip("pandas")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and small parts in the place of 60000 and 10000 images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_TRAIN", 40)
    monkeypatch.setattr(download, "_TEST", 20)
    return tmp_path / "cache" / "immunize_ext"


def mnist_bunch() -> SimpleNamespace:
    generator = np.random.default_rng(0)
    return SimpleNamespace(
        data=generator.integers(0, 256, (60, 784)).astype(np.float64),
        target=np.array([str(i % 10) for i in range(60)], dtype=object),
    )


def answer(monkeypatch: pytest.MonkeyPatch, reply: Any) -> list[dict[str, Any]]:
    """Let ``fetch_openml`` reply, or raise; gives the calls it gets."""
    calls: list[dict[str, Any]] = []

    def fetch(**arguments: Any) -> Any:
        calls.append(arguments)
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(datasets, "fetch_openml", fetch)
    return calls


def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise download.MissingExtraError("torchvision", extra="backbones", purpose="fetch_mnist")

    monkeypatch.setattr(download, "_mnist_torchvision", missing)


def test_mnist_is_fetched_once_and_read_back(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bunch = mnist_bunch()
    calls = answer(monkeypatch, bunch)
    images, labels = load_mnist()
    assert [call["data_id"] for call in calls] == [554]
    np.testing.assert_array_equal(labels, np.arange(40) % 10)
    np.testing.assert_allclose(images, (bunch.data[:40] / 255 - 0.1307) / 0.3081)
    test_images, _ = load_mnist(train=False)
    np.testing.assert_allclose(test_images, (bunch.data[40:] / 255 - 0.1307) / 0.3081)
    assert mnist_task(None, [4], [9]).x_train.shape == (8, 784)
    assert len(calls) == 1
    assert sorted(p.name for p in (cache / "mnist").iterdir()) == sorted(download.MNIST_FILES)
    # Equal data gives equal files.
    first = (cache / "mnist" / download.MNIST_FILES[0]).read_bytes()
    fetch_mnist(cache / "again", source="openml")
    assert (cache / "again" / download.MNIST_FILES[0]).read_bytes() == first


def test_mnist_from_torchvision(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, URLError("no route"))
    bunch = mnist_bunch()

    class Fake:
        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            assert Path(root).is_dir()
            assert download
            part = slice(0, 40) if train else slice(40, None)
            self.data = torch.from_numpy(bunch.data[part].astype(np.uint8)).reshape(-1, 28, 28)
            self.targets = torch.arange(60)[part] % 10

    real = download.require_extra
    monkeypatch.setattr(
        download,
        "require_extra",
        lambda module, **about: (
            SimpleNamespace(MNIST=Fake)
            if module == "torchvision.datasets"
            else real(module, **about)
        ),
    )
    folder = fetch_mnist()
    images, labels = load_mnist(folder, train=False)
    np.testing.assert_array_equal(labels, np.arange(40, 60) % 10)
    np.testing.assert_allclose(images, (bunch.data[40:] / 255 - 0.1307) / 0.3081)


def test_no_network_is_one_line_that_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_torchvision(monkeypatch)
    answer(monkeypatch, URLError("[Errno -2]\nName or service not known"))
    with pytest.raises(ConnectionError) as caught:
        load_mnist()
    message = str(caught.value)
    assert "\n" not in message
    assert "Name or service not known" in message
    assert "torchvision is not installed" in message
    assert "train-images-idx3-ubyte.gz" in message
    with pytest.raises(ConnectionError, match="OpenML must be reachable for data set 42165"):
        house_prices_task(None, "primary")
    with pytest.raises(ConnectionError, match="OpenML must be reachable for data set 554"):
        fetch_mnist(source="openml")
    assert not cache.exists()


def test_torchvision_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(download, "require_extra", broken)
    with pytest.raises(ConnectionError, match="torchvision must be able to download MNIST"):
        fetch_mnist(source="torchvision")


@pytest.mark.parametrize("wrong", ["shape", "fraction", "label", "too_large"])
def test_what_is_not_mnist_is_refused_and_leaves_nothing(
    wrong: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bunch = mnist_bunch()
    if wrong == "shape":
        bunch.data = bunch.data[:, :100]
    elif wrong == "fraction":
        bunch.data[0, 0] = 0.5
    elif wrong == "too_large":
        bunch.data[0, 0] = 256
    else:
        bunch.target[3] = "11"
    answer(monkeypatch, bunch)
    with pytest.raises(ValueError, match="openml must give 60 images of 784 pixels"):
        fetch_mnist()
    assert not cache.exists()
    with pytest.raises(ValueError, match="source must be"):
        fetch_mnist(source="kaggle")  # type: ignore[arg-type]


def test_files_are_written_whole_or_not_at_all(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, mnist_bunch())
    real, calls = download._idx, []

    def fails_later(values: Any) -> bytes:
        calls.append(values)
        return real(values)

    def full_disk(descriptor: int, *_: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(download, "_idx", fails_later)
    monkeypatch.setattr(download.os, "fdopen", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fetch_mnist()
    assert len(calls) == 4
    assert list((cache / "mnist").iterdir()) == []


def house_frame() -> Any:
    frame = pandas.DataFrame(
        {
            "LotArea": [100, 200, 300, 400, 500],
            "SalePrice": [10, 20, 30, 40, 50],
            "MSZoning": pandas.Categorical(["RM", "RL", "FV", "RL", "RH"]),
            "Alley": pandas.Categorical(["Pave", None, None, "Grvl", "Pave"]),
            "LotFrontage": [60.0, np.nan, 70.0, 80.0, 50.0],
            "Id": [5, 2, 3, 4, 1],
        }
    )
    return SimpleNamespace(frame=frame)


def test_house_prices_are_split_by_zone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, house_frame())
    folder = fetch_house_prices()
    assert folder == cache / "house_prices"
    assert (folder / "D1.csv").read_text() == (
        "Id,LotArea,MSZoning,Alley,LotFrontage,SalePrice\n"
        "1,500,RH,Pave,50.0,50\n3,300,FV,,70.0,30\n5,100,RM,Pave,60.0,10\n"
    )
    assert (folder / "D2.csv").read_text() == (
        "Id,LotArea,MSZoning,Alley,LotFrontage,SalePrice\n2,200,RL,,,20\n4,400,RL,Grvl,80.0,40\n"
    )
    fetch_house_prices()
    assert [call["data_id"] for call in calls] == [42165]
    task = house_prices_task(None, "primary", train_rows=2, test_rows=1)
    assert task.x_train.shape == (2, 4)


def test_house_prices_without_id_or_columns(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bunch = house_frame()
    bunch.frame = bunch.frame.drop(columns="Id")
    answer(monkeypatch, bunch)
    assert (fetch_house_prices() / "D2.csv").read_text().splitlines()[1:] == [
        "2,200,RL,,,20",
        "4,400,RL,Grvl,80.0,40",
    ]
    bunch.frame = bunch.frame.drop(columns="MSZoning")
    with pytest.raises(ValueError, match="must have the columns MSZoning"):
        fetch_house_prices(cache / "other")
    bunch = house_frame()
    bunch.frame = bunch.frame[bunch.frame["MSZoning"] != "RL"]
    answer(monkeypatch, bunch)
    with pytest.raises(ValueError, match="must have rows of MSZoning RL, got none"):
        fetch_house_prices(cache / "other")
    assert not (cache / "other").exists()


@pytest.mark.shared
def test_fetched_splits_equal_the_published_files(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The whole set as OpenML gives it: both splits in the order of Id, text as categories.
    official = shared_data / "house_price"
    read = {"keep_default_na": False, "na_values": [""]}
    frame = pandas.concat([pandas.read_csv(official / f, **read) for f in ("D1.csv", "D2.csv")])
    frame = frame.sort_values("Id").reset_index(drop=True)
    for column in frame.select_dtypes(exclude="number").columns:
        frame[column] = frame[column].astype("category")
    answer(monkeypatch, SimpleNamespace(frame=frame))
    folder = fetch_house_prices(tmp_path / "fetched")
    for role in ("primary", "harmful"):
        expected, found = (house_prices_task(f, role, test_rows=None) for f in (official, folder))  # type: ignore[arg-type]
        for part in ("x_train", "y_train", "x_test", "y_test"):
            assert torch.equal(getattr(expected, part), getattr(found, part))


@pytest.mark.shared
def test_written_mnist_equals_the_published_files(shared_data: Path, tmp_path: Path) -> None:
    images = gzip.decompress((shared_data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    assert gzip.decompress(download._idx(pixels)) == images
