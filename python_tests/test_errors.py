"""The named exceptions: what they derive from, their facts and their messages."""

import pickle

import pytest
import torch

from immunize_ext import errors


def test_not_positive_definite() -> None:
    error = errors.NotPositiveDefiniteError.for_matrix(
        "from_embeddings", "Q", dim=8, rank=5, needed_ridge=2.5e-9, batch_index=(1, 2)
    )
    assert isinstance(error, torch.linalg.LinAlgError)
    assert (error.batch_index, error.rank, error.needed_ridge) == ((1, 2), 5, 2.5e-9)
    assert str(error) == (
        "from_embeddings: Q must be positive definite, got rank 5 of 8 at batch index (1, 2); "
        "use a ridge of at least 2.5e-09"
    )
    bare = errors.NotPositiveDefiniteError.for_matrix("f", "K", dim=3)
    assert str(bare) == (
        "f: K must be positive definite, got an indefinite or singular matrix; add a ridge"
    )
    assert (bare.batch_index, bare.rank, bare.needed_ridge) == ((), None, None)


def test_negative_curvature() -> None:
    error = errors.NegativeCurvatureError.along("conjugate_gradients", -0.5, gamma=3.0, products=2)
    assert isinstance(error, torch.linalg.LinAlgError)
    assert (error.curvature, error.products) == (-0.5, 2)
    assert "got curvature -0.5 with gamma = 3 after 2 products" in str(error)


def test_contradictory_targets() -> None:
    error = errors.ContradictoryTargetsError.for_rows(
        "merge_kv", rows=[3, 9], names=["cat", "dog", "cat"]
    )
    assert isinstance(error, ValueError)
    assert (error.rows, error.names) == ((3, 9), ("cat", "dog"))
    assert "rows 3, 9 of concepts cat, dog" in str(error)


def test_equal_singular_values() -> None:
    error = errors.EqualSingularValuesError.for_matrix("r_ill", "s", batch_index=(4,))
    assert isinstance(error, ValueError)
    assert error.batch_index == (4,)
    assert "r_ill: s must have singular values that differ" in str(error)
    assert "at batch index (4,)" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        errors.NotPositiveDefiniteError("a", batch_index=(1,), rank=2, needed_ridge=0.5),
        errors.ContradictoryTargetsError("b", rows=[1], names=["x"]),
        errors.EqualSingularValuesError("c", batch_index=(3,)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_a_process_boundary(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_warnings_can_be_told_apart() -> None:
    assert issubclass(errors.NumericalWarning, UserWarning)
    assert issubclass(errors.FallbackWarning, UserWarning)
    assert not issubclass(errors.FallbackWarning, errors.NumericalWarning)
