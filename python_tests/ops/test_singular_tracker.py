"""Extremal singular values along a trajectory of rectangular matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from immunize_ext import _load
from immunize_ext.ops import SingularTracker, extremal_singular_values


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of any size are followed, as large ones are."""
    monkeypatch.setattr("immunize_ext.ops.tracker._WORTHWHILE_SIDE", 1)
    monkeypatch.setattr("immunize_ext.ops.tracker._WORTHWHILE_ASPECT", 10.0)


def trajectory(n: int, p: int, steps: int, *, kappa: float = 30.0) -> list[Tensor]:
    """A matrix of known spectrum, rotated and moved a little in each step."""
    generator = torch.Generator().manual_seed(5)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    t = min(n, p)
    left, right = torch.linalg.qr(gaussian(n, t)).Q, torch.linalg.qr(gaussian(p, t)).Q
    sigma = torch.logspace(0.0, -1.0, t, kappa, dtype=torch.float64)
    w, step = (left * sigma) @ right.mT, 1e-6 * gaussian(n, p) / kappa
    return [w + count * step for count in range(steps)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_stateless_operator_along_a_trajectory(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    tracker = SingularTracker()
    for w in trajectory(*shape, steps=6):
        mine, theirs = (w.to(dtype).requires_grad_() for _ in range(2))
        found, expected = tracker(mine), extremal_singular_values(theirs)
        eps = torch.finfo(dtype).eps
        for name in ("sigma_max", "sigma_min"):
            a, b = getattr(found, name), getattr(expected, name)
            assert a.dtype == dtype
            assert abs(a - b) <= 8 * eps * expected.sigma_max
            (grad,) = torch.autograd.grad(a, mine, retain_graph=True)
            (right,) = torch.autograd.grad(b, theirs, retain_graph=True)
            torch.testing.assert_close(grad, right, rtol=0.0, atol=max(2e-9, 100 * eps))
        assert [int(c) for c in found[2:]] == [int(c) for c in expected[2:]]
    assert tracker.gram.warm_calls == 5 * _load.available()  # the torch-only route has none
    assert tracker.decompositions == 0


@pytest.mark.usefixtures("small")
def test_repeated_extremes_have_the_mean_gradient() -> None:
    tracker = SingularTracker()
    w = torch.zeros(4, 3, dtype=torch.float64)
    w.diagonal()[:] = torch.tensor([2.0, 1.0, 1.0])
    w.requires_grad_()
    found = tracker(w)
    (grad,) = torch.autograd.grad(found.sigma_min, w)
    assert grad.diagonal().tolist() == pytest.approx([0.0, 0.5, 0.5])
    assert (int(found.multiplicity_min), tracker.decompositions) == (2, 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("smallest", [1e-6, 1e-12, 0.0])
def test_what_the_gram_matrix_cannot_tell_is_decomposed(smallest: float) -> None:
    tracker = SingularTracker()
    w = torch.diag(torch.tensor([3.0, 1.0, smallest], dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    found, expected = tracker(turn @ w), extremal_singular_values(turn @ w)
    torch.testing.assert_close(found.sigma_min, expected.sigma_min, rtol=0.0, atol=0.0)
    assert int(found.rank) == int(expected.rank)
    assert tracker.decompositions == 1


@pytest.mark.usefixtures("small")
def test_values_are_sharper_than_the_gram_matrix() -> None:
    """At kappa 3e3 eigenvalues of the Gram matrix keep 9 digits of sigma_min; lengths keep 13."""
    w = trajectory(60, 20, 1, kappa=10.0**3.5)[0]
    found, expected = SingularTracker()(w), extremal_singular_values(w)
    assert abs(found.sigma_min / expected.sigma_min - 1.0) < 1e-12


@pytest.mark.usefixtures("small")
def test_refusals_and_the_state() -> None:
    tracker = SingularTracker()
    with pytest.raises(ValueError, match=r"w must have shape \(n, p\), got \(2, 3, 3\)"):
        tracker(torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="w must be finite"):
        tracker(torch.full((3, 2), torch.nan))
    first, second, *_ = trajectory(9, 5, 3)
    tracker(first)
    other = SingularTracker()
    other.load_state_dict(tracker.state_dict())
    torch.testing.assert_close(other(second).sigma_min, tracker(second).sigma_min)
    assert other.gram.warm_calls == _load.available()
    tracker.reset()
    tracker(second)
    assert tracker.gram.cold_calls == (2 if _load.available() else 3)


def test_what_is_decomposed_faster_is_decomposed() -> None:
    tracker = SingularTracker()
    for shape in ((40, 12), (12, 40)):
        for w in trajectory(*shape, steps=3):
            found, expected = tracker(w), extremal_singular_values(w)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (tracker.gram.cold_calls, tracker.decompositions) == (0, 6)
