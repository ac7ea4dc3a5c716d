"""The pencil against scipy, and the ceiling of RIR: never exceeded, attained in closed form."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.probing.data import mnist_task
from immunize_ext.probing.metrics import (
    log_rir_ceiling,
    pencil,
    relative_immunization_ratio,
    with_ridge,
)

seeds = st.integers(0, 2**31 - 1)


def features(rows: int, p: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, p, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 3), (3, 20)])
def test_against_scipy(n: int, m: int) -> None:
    x_primary, x_harmful = features(n, 6, 0), features(m, 6, 1)
    values, basis = pencil(x_primary, x_harmful, ridge=1e-3)
    grams = [(rows.mT @ rows) for rows in (with_ridge(x, 1e-3) for x in (x_primary, x_harmful))]
    expected = scipy.linalg.eigh(grams[1].numpy(), grams[0].numpy())[0][::-1]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-10)
    torch.testing.assert_close(basis.mT @ grams[0] @ basis, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(basis.mT @ grams[1] @ basis, torch.diag(values))


def test_directions_that_the_harmful_data_lacks_have_value_zero() -> None:
    values, basis = pencil(features(20, 6, 0), features(2, 6, 1), ridge=0.0)
    assert (values[2:] < 1e-20).all()
    assert basis.shape == (6, 6)


def test_singular_primary_names_the_ridge() -> None:
    x = features(4, 6, 0)
    with pytest.raises(NotPositiveDefiniteError, match="rank 4 of 6") as error:
        pencil(x, features(20, 6, 1), ridge=0.0)
    largest = float(torch.linalg.svdvals(x)[0]) ** 2
    assert error.value.needed_ridge is not None
    pencil(x, features(20, 6, 1), ridge=4.0 * error.value.needed_ridge / largest)


def test_refuses_different_numbers_of_features() -> None:
    with pytest.raises(ValueError, match="with the p of x_primary"):
        pencil(features(20, 6, 0), features(20, 5, 1))


@given(seed=seeds, p=st.integers(2, 6), ridge=st.sampled_from([0.0, 1e-4, 1e-1]))
def test_no_theta_exceeds_the_ceiling(seed: int, p: int, ridge: float) -> None:
    x_primary, x_harmful = features(2 * p, p, seed), features(2 * p, p, seed + 1)
    theta = features(p, p, seed + 2)
    ceiling = log_rir_ceiling(x_primary, x_harmful, ridge=ridge)
    ratio = relative_immunization_ratio(x_primary, x_harmful, theta, ridge=ridge)
    assert ratio.log_rir <= ceiling + 1e-9
    assert ceiling >= -1e-9  # theta = I has RIR 1


@given(seed=seeds, p=st.integers(2, 6), ridge=st.sampled_from([0.0, 1e-4, 1e-1]))
def test_whitening_the_primary_task_attains_it(seed: int, p: int, ridge: float) -> None:
    x_primary, x_harmful = features(3 * p, p, seed), features(3 * p, p, seed + 1)
    rows = with_ridge(x_primary, ridge)
    eigenvalues, vectors = torch.linalg.eigh(rows.mT @ rows)
    theta = vectors @ torch.diag(eigenvalues.rsqrt()) @ vectors.mT
    ceiling = log_rir_ceiling(x_primary, x_harmful, ridge=ridge)
    ratio = relative_immunization_ratio(x_primary, x_harmful, theta, ridge=ridge)
    assert ratio.log_rir == pytest.approx(ceiling, abs=1e-6)


def test_ceiling_is_relative_to_theta0() -> None:
    x_primary, x_harmful = features(12, 4, 0), features(12, 4, 1)
    theta0, theta = features(4, 4, 2), pencil(x_primary, x_harmful, ridge=1e-2).basis
    ceiling = log_rir_ceiling(x_primary, x_harmful, theta0, ridge=1e-2)
    ratio = relative_immunization_ratio(x_primary, x_harmful, theta, theta0, ridge=1e-2)
    assert ratio.log_rir == pytest.approx(ceiling, abs=1e-8)


def test_ceiling_without_a_ridge_on_missing_directions_is_infinite() -> None:
    assert log_rir_ceiling(features(20, 6, 0), features(2, 6, 1), ridge=0.0) == math.inf


@pytest.mark.shared
@pytest.mark.slow
def test_ceiling_found_on_mnist(shared_data: Path) -> None:
    # All training images of 4 (primary) and 9 (harmful), 784 features.
    task = mnist_task(shared_data / "mnist", (4,), (9,))
    x_primary, x_harmful = task.x_train[task.y_train > 0], task.x_train[task.y_train < 0]
    ceiling = math.exp(log_rir_ceiling(x_primary, x_harmful, ridge=1e-4))
    assert ceiling == pytest.approx(3234.0, rel=5e-3)
