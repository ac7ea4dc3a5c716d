"""The embedded digits: split, labels, seeds, and two tasks that see different features."""

import numpy as np
import pytest
import torch

from immunize_ext._extras import MissingExtraError
from immunize_ext.probing.data import digits, digits_task, load_digits


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in x.numpy()}


def test_load_digits_is_standardised() -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 64)
    assert labels.shape == (1797,)
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1.0) < 1e-4


def test_every_image_is_in_one_part() -> None:
    images, labels = load_digits()
    task = digits_task((3,), (8,), train_fraction=0.7)
    kept = np.isin(labels, (3, 8))
    assert len(task.x_train) + len(task.x_test) == kept.sum()
    assert abs(len(task.x_train) - 0.7 * kept.sum()) < 1.0
    assert rows(task.x_train) | rows(task.x_test) == {r.tobytes() for r in images[kept]}
    assert rows(task.x_train).isdisjoint(rows(task.x_test))


def test_labels_follow_the_digits() -> None:
    images, labels = load_digits()
    digit_of = {image.tobytes(): digit for image, digit in zip(images, labels, strict=True)}
    task = digits_task((4, 6), (2, 3, 7))
    for image, label in zip(task.x_train.numpy(), task.y_train, strict=True):
        assert label == (1.0 if digit_of[image.tobytes()] in (4, 6) else -1.0)


def test_seed_decides_the_split_and_nothing_else() -> None:
    state = torch.get_rng_state()
    first, again, other = (digits_task((3,), (8,), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first.x_train, again.x_train, rtol=0, atol=0)
    assert rows(first.x_train) != rows(other.x_train)


def test_tasks_have_different_grams() -> None:
    primary, harmful = digits_task((4, 6), (2, 3, 7)), digits_task((5, 9), (0, 1, 8))
    grams = [t.x_train.mT @ t.x_train / len(t.x_train) for t in (primary, harmful)]
    difference = (grams[0] - grams[1]).norm() / grams[0].norm()
    assert difference > 0.1


def test_name_and_dtype() -> None:
    task = digits_task((4, 6), (2, 3, 7), dtype=torch.float32)
    assert task.name == "digits 4 or 6 against 2, 3 or 7"
    assert task.x_train.dtype == task.y_test.dtype == torch.float32


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_fraction_must_leave_both_parts(fraction: float) -> None:
    with pytest.raises(ValueError, match="digits_task: train_fraction must"):
        digits_task((3,), (8,), train_fraction=fraction)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="sklearn")

    monkeypatch.setattr("immunize_ext._extras.importlib.import_module", missing)
    with pytest.raises(
        MissingExtraError, match=r"scikit-learn is not installed; run: pip install"
    ) as e:
        digits.load_digits()
    assert e.value.extra == "data"


def test_broken_package_raises_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ModuleNotFoundError("No module named 'joblib'", name="joblib")

    monkeypatch.setattr("immunize_ext._extras.importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="joblib"):
        digits.load_digits()
