"""MNIST files: reading, damage, selection."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from immunize_ext.probing.data import load_mnist, mnist_task, read_idx


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four small files in MNIST's format."""
    generator = np.random.default_rng(0)
    for stem, count in (("train", 40), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


def test_read_idx_round_trip(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "file.gz", values)
    np.testing.assert_array_equal(read_idx(tmp_path / "file.gz"), values)


def test_read_idx_refuses_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="download the four MNIST files"):
        read_idx(tmp_path / "none.gz")
    path = tmp_path / "file.gz"
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="gzip cannot read"):
        read_idx(path)
    whole = gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 3) + b"abc")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="gzip cannot read"):
        read_idx(path)
    for content, message in (
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "IDX file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0\0\x01", "must hold 3 sizes"),
        (b"\0\0\x08\x01\0\0\0\x09abc", "must hold .9,. bytes"),
    ):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=message):
            read_idx(path)


def test_pooling_averages_blocks(folder: Path) -> None:
    full, labels = load_mnist(folder, size=28)
    pooled, _ = load_mnist(folder, size=14)
    expected = full.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196)
    np.testing.assert_allclose(pooled, expected, atol=1e-12)
    np.testing.assert_array_equal(labels, np.arange(40) % 10)


def test_task_uses_the_official_split(folder: Path) -> None:
    task = mnist_task(folder, (4,), (9,), size=7)
    assert task.x_train.shape == (8, 49)
    assert task.x_test.shape == (4, 49)
    images, labels = load_mnist(folder, train=False, size=7)
    expected = {row.tobytes() for row in images[np.isin(labels, (4, 9))]}
    assert {row.tobytes() for row in task.x_test.numpy()} == expected
    assert task.name == "MNIST digit 4 against 9"


def test_task_limits_the_training_images(folder: Path) -> None:
    few = mnist_task(folder, (4,), (9,), size=7, max_train=3)
    all_of_them = mnist_task(folder, (4,), (9,), size=7)
    torch.testing.assert_close(few.x_train, all_of_them.x_train[:3], rtol=0, atol=0)
    assert len(few.x_test) == len(all_of_them.x_test)


def test_refusals(folder: Path) -> None:
    with pytest.raises(ValueError, match="size must be 28, 14 or 7"):
        load_mnist(folder, size=10)
    with pytest.raises(ValueError, match="max_train must be at least 1"):
        mnist_task(folder, (4,), (9,), max_train=0)
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(3))
    with pytest.raises(ValueError, match="one label each"):
        load_mnist(folder)


@pytest.mark.shared
def test_real_files(shared_data: Path) -> None:
    task = mnist_task(shared_data / "mnist", (3,), (8,), size=14, max_train=1000)
    # 1010 threes and 974 eights are in the test file.
    assert task.x_test.shape == (1984, 196)
    assert int((task.y_test > 0).sum()) == 1010


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("immunize_ext.probing.data.mnist._MOST_BYTES", 1 << 20)
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.gz must unpack to at most 1 MiB, got more"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20  # not all of it was unpacked
    tracemalloc.stop()
