"""The regularizers on a GPU: one fused operator, equal to that of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from immunize_ext.errors import EqualSingularValuesError
from immunize_ext.ops.operators import has_kernel
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not has_kernel("regularizer", "cuda"), reason="built without CUDA kernels"),
]
REGULARIZERS = [r_well, r_ill, gram_r_well, gram_r_ill]
Regularizer = Callable[..., Tensor]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def value_and_gradient(regularizer: Regularizer, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    value = regularizer(leaf)
    weights = torch.linspace(1.0, 2.0, max(value.numel(), 1), dtype=torch.float64).to(value)
    (gradient,) = torch.autograd.grad((value.reshape(-1) * weights).sum(), leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 33, 40), (64, 200), (2, 150, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_equals_the_cpu(
    regularizer: Regularizer, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = gaussian(*shape, dtype=dtype)
    expected, expected_gradient = value_and_gradient(regularizer, x)
    value, gradient = value_and_gradient(regularizer, x.cuda())
    assert value.dtype == gradient.dtype == dtype
    rtol = 64 * max(shape[-2:]) * torch.finfo(dtype).eps
    torch.testing.assert_close(value.cpu(), expected, rtol=rtol, atol=0)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("scale", [1e-120, 1e-60, 1e60, 1e75])
def test_squares_that_leave_the_range(regularizer: Regularizer, scale: float) -> None:
    x = gaussian(2, 6, 8) * torch.tensor([1.0, scale], dtype=torch.float64).view(2, 1, 1)
    expected, expected_gradient = value_and_gradient(regularizer, x)
    value, gradient = value_and_gradient(regularizer, x.cuda())
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-9, atol=0)


@pytest.mark.parametrize("regularizer", [r_ill, gram_r_ill])
def test_equal_singular_values_are_named(regularizer: Regularizer) -> None:
    x = torch.stack([gaussian(4, 4), 2 * torch.eye(4, dtype=torch.float64)]).cuda()
    with pytest.raises(EqualSingularValuesError, match="batch index"):
        regularizer(x)
    assert bool(regularizer(x, floor=1e-3).isfinite().all())


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_repeated_extremes_have_the_mean_gradient(regularizer: Regularizer) -> None:
    u, _ = torch.linalg.qr(gaussian(6, 6))
    v, _ = torch.linalg.qr(gaussian(8, 6, seed=1))
    x = (u * torch.tensor([3.0, 3.0, 2.0, 1.5, 1.0, 1.0], dtype=torch.float64)) @ v.mT
    _, expected = value_and_gradient(regularizer, x)
    _, gradient = value_and_gradient(regularizer, x.cuda())
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_second_derivative(regularizer: Regularizer) -> None:
    x, z = gaussian(5, 7), gaussian(5, 7, seed=1)

    def second(device: str) -> Tensor:
        leaf = x.to(device).requires_grad_()
        (first,) = torch.autograd.grad(regularizer(leaf), leaf, create_graph=True)
        return torch.autograd.grad((first * z.to(device)).sum(), leaf)[0].cpu()

    torch.testing.assert_close(second("cuda"), second("cpu"), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_cuda_graph(regularizer: Regularizer) -> None:
    """Value and gradient of what the buffer holds when the graph is replayed."""
    buffer = gaussian(8, 12).cuda().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(regularizer(buffer), buffer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = regularizer(buffer)
        (gradient,) = torch.autograd.grad(value, buffer)
    other = gaussian(8, 12, seed=3)
    with torch.no_grad():
        buffer.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    expected, expected_gradient = value_and_gradient(regularizer, other)
    torch.testing.assert_close(value.detach().cpu(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-9, atol=1e-12)
