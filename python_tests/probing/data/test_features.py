"""Feature matrices from files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from immunize_ext.probing.data import features_task
from immunize_ext.probing.data.problem import check_names, load_problem, other_pairs


def arrays(n: int = 10, p: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(n, p))
    return x, np.where(x[:, 0] > 0, 1, -1)


def write(path: Path, **named: np.ndarray) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **named)
    else:
        save = pytest.importorskip("safetensors.torch").save_file
        save({key: torch.from_numpy(np.array(value)) for key, value in named.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_four_parts_are_taken_as_they_are(tmp_path: Path, suffix: str) -> None:
    x, y = arrays()
    path = write(
        tmp_path / f"mine{suffix}",
        x_train=x[:6],
        y_train=y[:6],
        x_test=x[6:].astype(np.float32),
        y_test=y[6:],
        other=np.zeros(1),
    )
    task = features_task(path)
    assert task.name == "mine"
    np.testing.assert_array_equal(task.x_train.numpy(), x[:6])
    np.testing.assert_array_equal(task.y_test.numpy(), y[6:])
    assert task.x_test.dtype == torch.float64
    assert task.is_classification
    assert features_task(path, name="named", dtype=torch.float32).x_train.dtype == torch.float32


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_x_and_y_are_split_once(tmp_path: Path, suffix: str) -> None:
    x, y = arrays()
    path = write(tmp_path / f"whole{suffix}", x=x, y=y)
    state = torch.get_rng_state()
    task = features_task(path, train_fraction=0.7)
    assert torch.equal(state, torch.get_rng_state())
    assert task.x_train.shape == (7, 3)
    both = torch.cat([task.x_train, task.x_test]).numpy()
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(x, axis=0))
    targets = torch.cat([task.y_train, task.y_test]).numpy()
    np.testing.assert_array_equal(targets, np.where(both[:, 0] > 0, 1, -1))
    again, other = (features_task(path, train_fraction=0.7, seed=seed) for seed in (0, 1))
    assert torch.equal(task.x_train, again.x_train)
    assert not torch.equal(task.x_train, other.x_train)


def test_bad_files(tmp_path: Path) -> None:
    x, y = arrays()
    with pytest.raises(FileNotFoundError, match="must name a file"):
        features_task(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"must end in \.npz or \.safetensors, got 'x\.csv'"):
        features_task(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="x and y, got x, x_train"):
        features_task(write(tmp_path / "half.npz", x=x, x_train=x))
    with pytest.raises(ValueError, match="got none of them"):
        features_task(write(tmp_path / "empty.npz", a=x))
    with pytest.raises(ValueError, match=r"y must have shape \(n,\)"):
        features_task(write(tmp_path / "long.npz", x=x, y=y[:5]))
    with pytest.raises(ValueError, match=r"x must be real, got torch\.complex128"):
        features_task(write(tmp_path / "complex.npz", x=x.astype(complex), y=y))
    with pytest.raises(ValueError, match="must be finite"):
        features_task(write(tmp_path / "nan.npz", x=x * np.nan, y=y))
    path = write(tmp_path / "whole.npz", x=x, y=y)
    for fraction in (0.0, 1.0, 0.01, math.nan):
        with pytest.raises(ValueError, match="train_fraction must leave samples"):
            features_task(path, train_fraction=fraction)
    for name in ("broken.npz", "broken.safetensors"):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors")
        (tmp_path / name).write_bytes(b"PK\x03\x04 not a file")
        with pytest.raises(ValueError, match="path must name"):
            features_task(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_flipped_bit_of_an_archive_is_a_traceback(tmp_path: Path, save: Any) -> None:
    """Some of every header and array."""
    x, y = arrays(4)
    path = tmp_path / "whole.npz"
    save(path, x=x, y=y)
    content = bytearray(path.read_bytes())
    refused = 0
    for position in (*range(0, 8 * 32, 3), *range(8 * 32, 8 * len(content), 37)):
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            features_task(path)
        except ValueError:
            refused += 1
        content[position // 8] ^= 1 << position % 8
    assert refused > 40


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, x=np.array([[{}]], dtype=object), y=np.ones(1))
    with pytest.raises(ValueError, match="numeric arrays"):
        features_task(path)
    np.savez(path, x=np.array([["a"]]), y=np.ones(1))
    with pytest.raises(ValueError, match="numeric arrays"):
        features_task(path)


@pytest.mark.parametrize("whole", [True, False])
def test_labels_0_and_1_are_a_classification_task(whole: bool, tmp_path: Path) -> None:
    x, _ = arrays(12)
    y = np.array([0, 1] * 6)
    named = (
        {"x": x, "y": y}
        if whole
        else {"x_train": x[:8], "y_train": y[:8], "x_test": x[8:], "y_test": y[8:]}
    )
    signed = {k: 2 * v - 1 if k.startswith("y") else v for k, v in named.items()}
    task = features_task(write(tmp_path / "zeros.npz", **named))
    same = features_task(write(tmp_path / "signs.npz", **signed))
    assert task.kind == "classification"
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(task, part), getattr(same, part))


def test_names_of_classes(tmp_path: Path) -> None:
    x, _ = arrays(12)
    labels = np.array(["cat", "dog", "cow"] * 4)
    for kind in (labels, labels.astype("S3")):
        path = write(tmp_path / "animals.npz", x=x, y=kind)
        task = features_task(path)
        assert task.classes == ("cat", "cow", "dog")
        assert task.num_classes == 3
    problem = load_problem(str(path), "dog:cat", ("cow:cat,dog",))
    assert problem.primary.classes == ("cat", "dog")  # of two, that of -1 first
    assert problem.harmful[0].classes == ("cat or dog", "cow")
    # The rows of +1 are those of dogs.
    ones = problem.primary.x_train[problem.primary.y_train > 0]
    assert all((row == torch.from_numpy(x[labels == "dog"])).all(1).any() for row in ones)
    assert [t.name for t in other_pairs(str(path), "dog:cat", ("cow:cat",))] == ["animals, cow:dog"]
    with pytest.raises(ValueError, match="among cat, cow, dog, got 'dgo' in 'cat:dgo'; did you"):
        check_names(str(path), "cat:dgo", ("cow:cat",))
    with pytest.raises(ValueError, match="numeric arrays"):
        features_task(write(tmp_path / "texts.npz", x=labels[:, None], y=kind))
