"""Task: what it accepts, what it refuses, how it is cut."""

import pytest
import torch

from immunize_ext.probing.data import Task, parse_digits


def make(**changes: torch.Tensor) -> Task:
    parts = {
        "x_train": torch.randn(6, 3, dtype=torch.float64),
        "y_train": torch.tensor([1.0, -1.0] * 3, dtype=torch.float64),
        "x_test": torch.randn(2, 3, dtype=torch.float64),
        "y_test": torch.tensor([1.0, -1.0], dtype=torch.float64),
    }
    return Task("toy", **{**parts, **changes})


def test_properties() -> None:
    task = make()
    assert task.num_features == 3
    assert task.is_classification
    assert not make(y_test=torch.tensor([0.5, 1.0], dtype=torch.float64)).is_classification


def test_to_converts_every_tensor() -> None:
    task = make().to(dtype=torch.float32)
    assert {t.dtype for t in (task.x_train, task.y_train, task.x_test, task.y_test)} == {
        torch.float32
    }


def test_halves_share_no_training_sample() -> None:
    task = make()
    owner, attacker = task.halves()
    joined = torch.cat([owner.x_train, attacker.x_train])
    assert sorted(joined.tolist()) == sorted(task.x_train.tolist())
    assert abs(len(owner.x_train) - len(attacker.x_train)) <= 1
    for half in (owner, attacker):
        assert torch.equal(half.x_test, task.x_test)
        assert half.name == task.name
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        Task("one", task.x_train[:1], task.y_train[:1], task.x_test, task.y_test).halves()


def test_folds_partition_the_training_part() -> None:
    task = make()
    folds = task.folds(3)
    tested = torch.cat([fold.x_test for fold in folds])
    assert sorted(map(tuple, tested.tolist())) == sorted(map(tuple, task.x_train.tolist()))
    for fold in folds:
        rows = set(map(tuple, fold.x_train.tolist()))
        assert rows.isdisjoint(map(tuple, fold.x_test.tolist()))
        # The test part of the task is in no fold.
        assert rows.isdisjoint(map(tuple, task.x_test.tolist()))


def test_a_task_says_in_a_line_what_it_is() -> None:
    text = repr(make())
    assert text.endswith("classification, 6 and 2 samples of 3 features, torch.float64)")
    assert "tensor" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": torch.randn(6)}, "x_train must be a floating-point matrix"),
        ({"x_train": torch.ones(6, 3, dtype=torch.int64)}, "x_train must be a floating-point"),
        ({"x_test": torch.randn(0, 3)}, "x_test must be a floating-point matrix"),
        ({"y_train": torch.ones(5, dtype=torch.float64)}, "y_train must be a vector of 6"),
        ({"y_train": torch.ones(6)}, "y_train must be a vector of 6 values of torch.float64"),
        ({"x_test": torch.randn(2, 4, dtype=torch.float64)}, "x_test must have 3 features"),
        ({"y_test": torch.tensor([1.0, torch.nan], dtype=torch.float64)}, "must be finite"),
    ],
)
def test_refusals(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_folds_refuses(count: int) -> None:
    with pytest.raises(ValueError, match="count must be between 2 and 6"):
        make().folds(count)


def test_parse_digits() -> None:
    assert parse_digits("3:8") == ((3,), (8,))
    assert parse_digits("4, 6:2,3,7") == ((4, 6), (2, 3, 7))


@pytest.mark.parametrize("text", ["", "3", "3:8:9", "a:b", "3:", "3:12", "3:3", "1,2:2"])
def test_parse_digits_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="parse_digits: "):
        parse_digits(text)


def test_kind_and_labels_that_would_be_taken_for_numbers() -> None:
    one = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert make().kind == "classification"
    assert make(y_test=0.5 * one).kind == "regression"
    assert make(y_train=torch.ones_like(make().y_train)).kind == "constant labels"
    with pytest.raises(ValueError, match=r"must be -1 and \+1 .*, got 0 and 1.*; give 2 \* y - 1"):
        make(y_train=(make().y_train + 1) / 2, y_test=(make().y_test + 1) / 2)
