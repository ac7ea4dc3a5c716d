"""The k smallest singular values: values, derivatives, what does not count, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from immunize_ext.ops import extremal_singular_values, smallest_singular_values


def of_spectrum(values: list[float], n: int, p: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64, generator=generator))
    middle = torch.zeros(n, p, dtype=torch.float64)
    middle.diagonal()[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return left @ middle @ right


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 5, 3), (1, 6), (0, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_those_of_the_whole_spectrum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = torch.randn(shape, dtype=torch.float64).to(dtype)
    count = min(shape[-2:])
    found = smallest_singular_values(a, count)
    expected = np.linalg.svd(a.to(torch.float64).numpy(), compute_uv=False)[..., ::-1].copy()
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.from_numpy(expected).to(dtype))


def test_derivatives() -> None:
    a = of_spectrum([5.0, 3.0, 2.0, 0.5], 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: smallest_singular_values(a, 3), a)
    assert torch.autograd.gradgradcheck(lambda a: smallest_singular_values(a, 3), a)
    smallest, (grad,) = (
        smallest_singular_values(a, 1),
        torch.autograd.grad(smallest_singular_values(a, 1).sum(), a),
    )
    extreme = extremal_singular_values(a).sigma_min
    torch.testing.assert_close(smallest[0], extreme)
    torch.testing.assert_close(grad, torch.autograd.grad(extreme, a)[0])


def test_the_sum_of_a_cluster_has_its_derivative() -> None:
    a = of_spectrum([4.0, 1.0, 1.0, 1.0], 4, 4).requires_grad_()
    (grad,) = torch.autograd.grad(smallest_singular_values(a, 3).sum(), a)
    u, _, vh = torch.linalg.svd(a.detach())
    torch.testing.assert_close(grad, u[:, 1:] @ vh[1:])


def test_what_does_not_count() -> None:
    a = of_spectrum([4.0, 1.0], 4, 3).requires_grad_()
    full = smallest_singular_values(a, 2)
    assert full[0] == 0.0
    torch.testing.assert_close(full[1], torch.ones((), dtype=torch.float64))
    (grad,) = torch.autograd.grad(full[0], a)
    assert not grad.any()
    counted = smallest_singular_values(a, 2, rank="numerical")
    torch.testing.assert_close(counted, torch.tensor([1.0, 4.0], dtype=torch.float64))
    # Another rank in each matrix of a batch.
    batch = torch.stack([a.detach(), of_spectrum([5.0, 3.0, 2.0], 4, 3)])
    found = smallest_singular_values(batch, 2, rank="numerical")
    torch.testing.assert_close(found, torch.tensor([[1.0, 4.0], [2.0, 3.0]], dtype=torch.float64))


def test_refusals() -> None:
    a = of_spectrum([4.0, 1.0], 4, 3)
    with pytest.raises(ValueError, match="count must be at most the numerical rank, got 3"):
        smallest_singular_values(a, 3, rank="numerical")
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and 3, got {count}"):
            smallest_singular_values(a, count)
    with pytest.raises(ValueError, match="a must be finite"):
        smallest_singular_values(a * torch.nan, 1)
    with pytest.raises(ValueError, match="rank_rtol must be in"):
        smallest_singular_values(a, 1, rank_rtol=1.0)
