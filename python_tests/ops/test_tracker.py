"""SpectrumTracker: equal to symmetric_extremes at every step, warm where it can be.

The torch-only route has no warm call: results are the same, and every call is cold.
"""

import gc

import pytest
import torch
from sample_inputs import compiled_only

from immunize_ext import _load
from immunize_ext.ops import SpectrumTracker, symmetric_extremes

TOLERANCE = 1e-13


def assert_calls(tracker, *, cold, warm):
    """How many calls were served which way; without kernels none is warm."""
    expected = (cold, warm) if _load.available() else (cold + warm, 0)
    assert (tracker.cold_calls, tracker.warm_calls) == expected


def assert_warm(tracker, least):
    """That kernels served so many calls warm, at least."""
    assert tracker.warm_calls >= least if _load.available() else tracker.warm_calls == 0


def gaussian_symmetric(side, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(side, side, generator=generator, dtype=torch.float64)
    return (a + a.mT) / 2


def rotation(side, seed):
    return torch.linalg.qr(gaussian_symmetric(side, seed) + torch.eye(side))[0]


def with_eigenvalues(q, eigenvalues):
    h = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.mT
    return (h + h.mT) / 2


def assert_equal(found, truth, size=1.0):
    assert abs(found.lambda_max - truth.lambda_max) <= TOLERANCE * size
    assert abs(found.lambda_min - truth.lambda_min) <= TOLERANCE * size
    assert torch.equal(found.multiplicity_max, truth.multiplicity_max)
    assert torch.equal(found.multiplicity_min, truth.multiplicity_min)


@pytest.mark.parametrize("side", [1, 2, 3, 40])
@pytest.mark.parametrize("step", [1e-6, 1e-3, 1e-1, 3.0])
def test_equals_the_stateless_operator_along_a_trajectory(side, step):
    start, direction = gaussian_symmetric(side, 0), gaussian_symmetric(side, 1)
    tracker = SpectrumTracker()
    for index in range(12):
        h = (start + step * index * direction).requires_grad_()
        found, truth = tracker(h), symmetric_extremes(h)
        size = float(h.detach().norm())
        assert_equal(found, truth, size)
        (grad,) = torch.autograd.grad(found.lambda_max - 2 * found.lambda_min, h)
        (expected,) = torch.autograd.grad(truth.lambda_max - 2 * truth.lambda_min, h)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-9)
    assert tracker.cold_calls + tracker.warm_calls == 12
    if side > 1 and step <= 1e-3:
        assert_warm(tracker, 10)


@pytest.mark.parametrize("steps", [7, 40, 41, 200])
def test_crossings_never_give_a_wrong_extreme(steps):
    """The top two and the bottom two change places, at a grid point and between grid points."""
    q = rotation(8, 2)
    tracker = SpectrumTracker()
    for index in range(steps + 1):
        s = 2 * index / steps - 1
        eigenvalues = [2 + 0.1 * s, 2 - 0.1 * s, 1, 0.5, 0, -0.5, -1 + 0.2 * s, -1 - 0.2 * s]
        found = tracker(with_eigenvalues(q, eigenvalues))
        assert found.lambda_max.item() == pytest.approx(max(eigenvalues), abs=TOLERANCE)
        assert found.lambda_min.item() == pytest.approx(min(eigenvalues), abs=TOLERANCE)
        meets = abs(s) < 1e-12
        assert found.multiplicity_max.item() == found.multiplicity_min.item() == 1 + meets
    assert_warm(tracker, 1)


def test_an_eigenvalue_that_jumps_over_the_tracked_one():
    """The tracked vector stays an exact eigenvector: only the proof can tell that it lost."""
    q = rotation(6, 3)
    tracker = SpectrumTracker()
    tracker(with_eigenvalues(q, [3.0, 1.0, 0.5, 0.2, 0.1, 0.0]))
    found = tracker(with_eigenvalues(q, [3.0, 1.0, 0.5, 0.2, 3.5, -0.5]))
    assert found.lambda_max.item() == pytest.approx(3.5)
    assert found.lambda_min.item() == pytest.approx(-0.5)
    assert tracker.cold_calls == 2


def test_entering_a_cluster_gives_the_mean_gradient():
    q = rotation(5, 4)
    tracker = SpectrumTracker()
    tracker(with_eigenvalues(q, [1.001, 1.0, 0.5, 0.2, 0.1]))
    h = with_eigenvalues(q, [1.0, 1.0, 0.5, 0.2, 0.1]).requires_grad_()
    found = tracker(h)
    assert found.multiplicity_max.item() == 2
    (grad,) = torch.autograd.grad(found.lambda_max, h)
    torch.testing.assert_close(grad, q[:, :2] @ q[:, :2].mT / 2)


def test_forwards_before_their_backwards():
    """Later calls replace buffers, they do not write into what autograd has saved."""
    tracker = SpectrumTracker()
    start, direction = gaussian_symmetric(20, 5), gaussian_symmetric(20, 6)
    matrices = [(start + 1e-3 * index * direction).requires_grad_() for index in range(4)]
    sum(tracker(h).lambda_max * (index + 1) for index, h in enumerate(matrices)).backward()
    for index, h in enumerate(matrices):
        fresh = h.detach().clone().requires_grad_()
        (symmetric_extremes(fresh).lambda_max * (index + 1)).backward()
        torch.testing.assert_close(h.grad, fresh.grad, rtol=0, atol=1e-12)
    assert_calls(tracker, cold=1, warm=3)


def test_no_graph_is_kept_from_step_to_step():
    tracker = SpectrumTracker()
    start = gaussian_symmetric(10, 7)
    for index in range(5):
        tracker((start + 1e-4 * index).requires_grad_()).lambda_max.backward()
    gc.collect()
    assert all(value.grad_fn is None for value in tracker.state_dict().values())


def test_steps_too_long_to_follow_cost_no_references():
    """Every result is right, and what a warm call starts from is made ever more rarely."""
    tracker = SpectrumTracker()
    made = []
    for index in range(60):
        h = gaussian_symmetric(12, 100 + index).requires_grad_()
        found, truth = tracker(h), symmetric_extremes(h.detach())
        torch.testing.assert_close(found.lambda_max, truth.lambda_max, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.lambda_min, truth.lambda_min, rtol=0, atol=1e-12)
        (grad,) = torch.autograd.grad(found.lambda_max, h)
        assert abs(grad.trace() - 1.0) <= 1e-12
        made.append(bool(tracker.state_dict()))
    assert tracker.warm_calls == 0
    assert sum(made) <= 6
    # It catches up once the steps get short.
    base, direction = gaussian_symmetric(12, 1), gaussian_symmetric(12, 2)
    for index in range(80):
        tracker(base + 1e-6 * index * direction)
    assert_warm(tracker, 40)


def test_two_hundred_steps_hold_the_memory_of_one():
    """The tensors alive after each step of training, counted, with their bytes."""
    tracker = SpectrumTracker()
    h = gaussian_symmetric(30, 17)
    direction = gaussian_symmetric(30, 18)

    def alive() -> tuple[int, int]:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return len(found), sum(t.untyped_storage().nbytes() for t in found)

    counts = []
    for index in range(200):
        leaf = (h + 1e-5 * index * direction).requires_grad_()
        found = tracker(leaf)
        (found.lambda_max - found.lambda_min).backward()
        del leaf, found
        if index in (9, 199):
            counts.append(alive())
    assert counts[0] == counts[1]
    assert_warm(tracker, 151)


def test_second_derivative():
    direction = gaussian_symmetric(6, 9)
    tracker = SpectrumTracker()
    tracker(gaussian_symmetric(6, 8))
    h = (gaussian_symmetric(6, 8) + 1e-3 * direction).requires_grad_()
    results = []
    for function in (tracker, symmetric_extremes):
        (grad,) = torch.autograd.grad(function(h).lambda_max, h, create_graph=True)
        results.append(torch.autograd.grad((grad * direction).sum(), h)[0])
    assert_calls(tracker, cold=1, warm=1)
    torch.testing.assert_close(*results)


@compiled_only
def test_state_dict_round_trip(tmp_path):
    start, direction = gaussian_symmetric(15, 10), gaussian_symmetric(15, 11)
    first = SpectrumTracker()
    first(start)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = SpectrumTracker()
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    for index in range(1, 4):
        h = start + 1e-3 * index * direction
        one, two = first(h), second(h)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert_calls(second, cold=0, warm=3)
    saved = first.state_dict()
    saved["vectors"].zero_()  # a copy: the tracker goes on undisturbed
    assert first(start).lambda_max.item() == pytest.approx(symmetric_extremes(start).lambda_max)
    first.load_state_dict({})
    first(start)
    assert_calls(first, cold=2, warm=4)


def test_reset_and_other_sizes_start_anew():
    tracker = SpectrumTracker()
    for side in (4, 5, 5):
        assert_equal(
            tracker(gaussian_symmetric(side, 12)), symmetric_extremes(gaussian_symmetric(side, 12))
        )
    assert_calls(tracker, cold=2, warm=1)
    tracker.reset()
    tracker(gaussian_symmetric(5, 12))
    assert_calls(tracker, cold=3, warm=1)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_scale(scale):
    tracker = SpectrumTracker()
    for index in range(3):
        h = gaussian_symmetric(9, 13) * (1 + 1e-3 * index)
        found, truth = tracker(h * scale), symmetric_extremes(h)
        assert found.lambda_max.item() / scale == pytest.approx(truth.lambda_max.item(), rel=1e-13)
        assert found.lambda_min.item() / scale == pytest.approx(truth.lambda_min.item(), rel=1e-13)
    assert_calls(tracker, cold=1, warm=2)


def test_float32():
    tracker = SpectrumTracker()
    for index in range(3):
        h = (gaussian_symmetric(9, 14) * (1 + 1e-3 * index)).float().requires_grad_()
        found = tracker(h)
        assert found.lambda_max.dtype == torch.float32
        found.lambda_max.backward()
        assert h.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("h", "message"),
    [
        (torch.eye(3).expand(2, 3, 3), "one tracker for each"),
        (torch.ones(2, 3), "must have shape"),
        (torch.full((2, 2), torch.nan), "must be finite"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "must be symmetric"),
    ],
)
def test_bad_matrices_are_refused_and_the_trajectory_survives(h, message):
    tracker = SpectrumTracker()
    tracker(torch.diag(torch.tensor([1.0, 2.0])))
    with pytest.raises(ValueError, match=message):
        tracker(h)
    assert tracker(torch.diag(torch.tensor([1.0, 2.0]))).lambda_max.item() == 2.0
    assert_calls(tracker, cold=1, warm=1)


@pytest.mark.parametrize("damage", ["missing", "shape", "dtype"])
def test_bad_states_are_refused(damage):
    tracker = SpectrumTracker()
    tracker(gaussian_symmetric(4, 15))
    state = tracker.state_dict()
    if damage == "missing":
        del state["matrix"]
    elif damage == "shape":
        state["vectors"] = state["vectors"][:, :2]
    else:
        state["ends"] = state["ends"].float()
    with pytest.raises(ValueError, match="SpectrumTracker"):
        SpectrumTracker().load_state_dict(state)
