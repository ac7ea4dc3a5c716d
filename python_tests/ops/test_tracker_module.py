"""A tracker as a module, and trajectories through matrices that leave nothing to start from."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from sample_inputs import diagonal, symmetric, taking_route
from torch import nn

from immunize_ext import _load
from immunize_ext.ops import SpectrumTracker, symmetric_extremes


def test_zero_matrices_cold_and_on_the_way(route):
    """Right: 0, 0, multiplicity p."""
    tracker = SpectrumTracker()
    trajectory = [torch.zeros(3, 3), diagonal(1, 2, 3), diagonal(1, 2, 3.0001), torch.zeros(3, 3)]
    trajectory += [torch.zeros(3, 3), diagonal(-1, 0, 1)]
    with taking_route(route):
        for h in trajectory:
            found, truth = tracker(h.double()), symmetric_extremes(h.double())
            for one, other in zip(found, truth, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
        zero = tracker(torch.zeros(4, 4).double())
    assert [x.item() for x in zero] == [0.0, 0.0, 4, 4]


def test_gradient_at_a_zero_matrix_is_the_mean(route):
    h = torch.zeros(3, 3).double().requires_grad_()
    with taking_route(route):
        SpectrumTracker()(h).lambda_max.backward()
    torch.testing.assert_close(h.grad, torch.eye(3).double() / 3)


def test_without_a_warm_kernel_every_call_is_cold_and_right():
    tracker = SpectrumTracker()
    with taking_route("composite"):
        for step in range(4):
            h = diagonal(1, 2, 3 + 1e-4 * step)
            assert tracker(h).lambda_max.item() == pytest.approx(3 + 1e-4 * step)
    assert (tracker.cold_calls, tracker.warm_calls) == (4, 0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tracker = SpectrumTracker()


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = Model()
    other.load_state_dict(torch.load(buffer), strict=True)
    return other


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_trajectory_goes_on_after(way):
    model = Model()
    h = symmetric(15)
    model.tracker(h)
    again = way(model)
    warm = again.tracker.warm_calls
    found = again.tracker(h + 1e-4 * symmetric(15, seed=1))
    assert again.tracker.warm_calls == warm + _load.available()
    truth = symmetric_extremes(h + 1e-4 * symmetric(15, seed=1))
    torch.testing.assert_close(found.lambda_min, truth.lambda_min)


def test_state_keeps_float64_and_moves():
    model = Model()
    model.tracker(symmetric(5))
    model.half()
    assert {b.dtype for b in model.buffers()} == {torch.float64}
    model.to("meta")
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert model.tracker(symmetric(5)).lambda_max.device.type == "cpu", "starts anew"


def test_a_state_that_does_not_fit_its_matrix_is_refused():
    """Reflectors (40, 1) beside a matrix of side 40 once ended the process."""
    tracker = SpectrumTracker()
    tracker(symmetric(40))
    state = tracker.state_dict()
    for name, shape in (("reflectors", (40, 1)), ("tridiagonal", (3, 1))):
        broken = {**state, name: torch.zeros(shape, dtype=torch.float64)}
        with pytest.raises(ValueError, match=name):
            SpectrumTracker().load_state_dict(broken)
    both = {**state, "reflectors": torch.zeros(40, 1).double(), "tridiagonal": torch.zeros(3, 1)}
    with pytest.raises(ValueError, match="reflectors"):
        SpectrumTracker().load_state_dict(both)
