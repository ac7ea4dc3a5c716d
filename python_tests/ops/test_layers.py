"""Layers of many shapes at once, and convolutions, which are no batch of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunize_ext.ops import (
    Preconditioner,
    condition_number,
    convolution_matrix,
    extremal_singular_values,
    gram_extremes,
    map_layers,
    precondition_gradient,
    smallest_singular_values,
    symmetric_extremes,
)
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well

SHAPES = ((3, 5), (4, 4), (3, 5), (6, 2))


def layers(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("function", [condition_number, r_well, r_ill])
def test_a_list_of_layers_is_each_of_them(function: Callable[..., Tensor]) -> None:
    mine = [layer.requires_grad_() for layer in layers()]
    theirs = [layer.requires_grad_() for layer in layers()]
    found = map_layers(function, mine)
    expected = torch.stack([function(layer) for layer in theirs])
    torch.testing.assert_close(found, expected)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_named_results_and_settings_are_passed_on() -> None:
    found = map_layers(extremal_singular_values, layers(), rank_rtol=0.4)
    each = [extremal_singular_values(layer, rank_rtol=0.4) for layer in layers()]
    assert type(found) is type(each[0])
    for name in found._fields:
        column = torch.stack([getattr(one, name) for one in each])
        torch.testing.assert_close(getattr(found, name), column)
    assert len(set(found.rank.tolist())) > 1


def test_one_call_for_each_shape() -> None:
    seen = []

    def counted(batch: Tensor) -> Tensor:
        seen.append(tuple(batch.shape))
        return batch.sum((-1, -2))

    map_layers(counted, layers())
    assert seen == [(2, 3, 5), (1, 4, 4), (1, 6, 2)]


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one matrix, got none"):
        map_layers(condition_number, [])
    convolution = nn.Conv2d(2, 3, 3).weight
    with pytest.raises(ValueError, match=r"got \(3, 2, 3, 3\) at 1; pass convolution_matrix"):
        map_layers(condition_number, [torch.eye(2), convolution])
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        map_layers(condition_number, [torch.eye(2), torch.eye(2, device="meta")])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_the_matrix_of_a_convolution_multiplies_its_patches(kind: Any, groups: int) -> None:
    layer = kind(4, 6, 2, bias=False, groups=groups, dtype=torch.float64)
    # An image as large as the kernel is one patch.
    image = torch.randn(1, 4, *layer.kernel_size, dtype=torch.float64)
    matrix = convolution_matrix(layer.weight, groups=groups)
    patches = image.reshape(groups, -1, 1)
    torch.testing.assert_close((matrix @ patches).reshape(-1), layer(image).reshape(-1))
    condition_number(matrix).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_what_is_no_convolution_has_no_matrix() -> None:
    with pytest.raises(ValueError, match="needs no unfolding"):
        convolution_matrix(torch.eye(3))
    with pytest.raises(ValueError, match="groups must divide the 6 output channels, got 4"):
        convolution_matrix(torch.zeros(6, 2, 3), groups=4)


@pytest.mark.parametrize(
    "function",
    [
        condition_number,
        extremal_singular_values,
        gram_extremes,
        symmetric_extremes,
        lambda a: smallest_singular_values(a, 1),
        r_well,
        r_ill,
        gram_r_well,
        gram_r_ill,
        lambda a: precondition_gradient(a, Preconditioner.from_features(torch.eye(3))),
    ],
)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Conv3d])
def test_a_convolution_is_never_a_batch_of_its_kernels(
    function: Callable[[Tensor], object], kind: Any
) -> None:
    weight = kind(2, 4, 3).weight
    with pytest.raises(ValueError, match=r"as a convolution has; pass convolution_matrix"):
        function(weight)


def test_a_batch_of_batches_is_taken_where_it_is_one() -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4, 5, dtype=torch.float64))
    assert condition_number(weight.view_as(weight)).shape == (2, 3)
    assert condition_number(weight.detach()).shape == (2, 3)
    assert condition_number(nn.Parameter(weight.detach()[0])).shape == (3,)
