"""apply_edit: all weights or none, and back again bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from immunize_ext.text_to_image.weight_edit import apply_edit


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_writes_every_weight_and_takes_it_back() -> None:
    net = model()
    before = snapshot(net)
    new = {"0.weight": torch.ones(4, 3), "1.weight": torch.zeros(2, 4)}
    edit = apply_edit(net, new)
    assert edit.active
    assert torch.equal(net[0].weight, new["0.weight"])
    assert torch.equal(net[1].weight, new["1.weight"])
    edit.undo()
    assert_unchanged(net, before)
    assert not edit.active


def test_second_undo_does_not_touch_later_training() -> None:
    net = model()
    edit = apply_edit(net, {"0.weight": torch.ones(4, 3)})
    edit.undo()
    with torch.no_grad():
        net[0].weight.fill_(7.0)
    edit.undo()
    assert (net[0].weight == 7.0).all()


def test_context_manager_undoes_after_an_exception() -> None:
    net = model()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="attack failed"):  # noqa: SIM117
        with apply_edit(net, {"0.weight": torch.ones(4, 3)}):
            raise RuntimeError("attack failed")
    assert_unchanged(net, before)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"9.weight": torch.ones(4, 3)}, "must name parameters"),
        ({"1.weight": torch.ones(4, 2)}, "1.weight must have shape"),
        ({"1.weight": torch.ones(2, 4, dtype=torch.float64)}, "dtype"),
        ({"1.weight": torch.full((2, 4), float("inf"))}, "1.weight must be finite"),
    ],
)
def test_one_bad_value_leaves_all_weights(bad: dict[str, Tensor], message: str) -> None:
    net = model()
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        apply_edit(net, {"0.weight": torch.ones(4, 3), **bad})
    assert_unchanged(net, before)


def test_failure_while_writing_restores_what_was_written() -> None:
    net = model()
    before = snapshot(net)

    class Interrupting(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            if name == "1.weight":
                raise KeyboardInterrupt
            return super().__getitem__(name)

    new = Interrupting({"0.weight": torch.ones(4, 3), "1.weight": torch.ones(2, 4)})
    with pytest.raises(KeyboardInterrupt):
        apply_edit(net, new)
    assert_unchanged(net, before)


def test_tied_weights_are_refused() -> None:
    net = nn.Module()
    net.a = nn.Linear(2, 2, bias=False)
    net.b = nn.Linear(2, 2, bias=False)
    net.b.weight = nn.Parameter(net.a.weight.data)  # another Parameter over the same storage
    with pytest.raises(ValueError, match="same weight"):
        apply_edit(net, {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)})


def test_gradients_and_identity_of_parameters_survive() -> None:
    net = model()
    weight = net[0].weight
    apply_edit(net, {"0.weight": torch.ones(4, 3)})
    assert net[0].weight is weight
    assert weight.requires_grad
    net(torch.ones(3)).sum().backward()
    assert weight.grad is not None


def test_the_models_own_weights_are_swapped() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = snapshot(net)
    apply_edit(net, {"0.weight": net[1].weight, "1.weight": net[0].weight})
    assert torch.equal(net[0].weight, before["1.weight"])
    assert torch.equal(net[1].weight, before["0.weight"])


def test_parameters_that_overlap_are_refused() -> None:
    net, memory = nn.Module(), torch.zeros(6)
    net.a, net.b = nn.Parameter(memory[:4]), nn.Parameter(memory[3:])
    with pytest.raises(ValueError, match="a and b are the same weight, or share a part"):
        apply_edit(net, {"a": torch.ones(4), "b": torch.ones(3)})
    net.b = nn.Parameter(memory[4:])
    apply_edit(net, {"a": torch.ones(4), "b": torch.ones(2)})
    assert memory.tolist() == [1.0] * 6


def test_empty_parameters_are_no_overlap_and_meta_ones_are_refused() -> None:
    net = nn.Module()
    net.a, net.b = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    apply_edit(net, {"a": torch.zeros(0), "b": torch.zeros(0)})
    with pytest.raises(ValueError, match="weight must hold numbers, got a meta tensor"):
        apply_edit(nn.Linear(2, 2, device="meta"), {"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="weight must hold numbers, got a meta tensor"):
        apply_edit(nn.Linear(2, 2), {"weight": torch.zeros(2, 2, device="meta")})


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_edits_are_undone_in_any_order(order: tuple[int, int]) -> None:
    net = model()
    before = snapshot(net)
    first = {"0.weight": torch.ones(4, 3), "1.bias": torch.ones(2)}
    second = {"0.weight": torch.zeros(4, 3), "0.bias": torch.ones(4)}
    edits = [apply_edit(net, weights) for weights in (first, second)]
    edits[order[0]].undo()
    # What is left is the other edit, and it alone.
    left = (first, second)[order[1]]
    assert_unchanged(net, before | left)
    edits[order[1]].undo()
    assert_unchanged(net, before)


def test_undo_reaches_parameters_that_were_exchanged() -> None:
    net = model()
    before = snapshot(net)
    edit = apply_edit(net, {"0.weight": torch.ones(4, 3)})
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    edit.undo()
    assert_unchanged(net, before)
    edit = apply_edit(net, {"0.weight": torch.ones(4, 3)})
    net[0] = nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"0.weight must be a parameter of shape \(4, 3\)"):
        edit.undo()
