"""Symmetric extremes and the regularizers on a GPU: equal to the CPU, served without a warning.

``FallbackWarning`` is an error in this project's tests, so every call here takes the kernels or
compositions of the CUDA build.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from immunize_ext.ops import SpectrumTracker, symmetric_extremes
from immunize_ext.ops.operators import has_kernel
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not has_kernel("symmetric_extremes", "cuda"), reason="built without CUDA kernels"
    ),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def symmetric(eigenvalues: list[float], batch: int = 2) -> Tensor:
    """Matrices (batch, p, p) with these eigenvalues."""
    basis, _ = torch.linalg.qr(normal(batch, len(eigenvalues), len(eigenvalues)))
    h = (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT
    return (h + h.mT) / 2


def value_and_gradient(function: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    leaf = x.detach().clone().requires_grad_()
    result = function(leaf)
    fields = [result] if isinstance(result, Tensor) else list(result)
    total = sum((k + 1) * f.sum() for k, f in enumerate(fields) if f.is_floating_point())
    (gradient,) = torch.autograd.grad(total, leaf)
    return [field.detach() for field in fields], gradient


def assert_same(function: Any, x: Tensor, rtol: float = 1e-9, atol: float = 0.0) -> None:
    cpu, cpu_gradient = value_and_gradient(function, x)
    gpu, gpu_gradient = value_and_gradient(function, x.cuda())
    for one, other in zip([*gpu, gpu_gradient], [*cpu, cpu_gradient], strict=True):
        assert one.is_cuda
        assert one.dtype == other.dtype
        numbers = other.is_floating_point()
        absolute = max(atol, rtol * float(other.abs().max())) if numbers else 0.0
        torch.testing.assert_close(one.cpu(), other, rtol=rtol, atol=absolute)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        [-3.0, -1.0, 0.5, 1.0, 2.0, 4.0],
        [-2.0, -2.0, 0.0, 1.0, 3.0, 3.0],
        [1.0] * 5,
        [float(k) for k in range(-70, 80)],
    ],
)
def test_symmetric_extremes_equal_those_of_the_cpu(eigenvalues: list[float]) -> None:
    assert_same(symmetric_extremes, symmetric(eigenvalues))


@pytest.mark.parametrize(
    ("low", "high", "inner"),
    [([], [], (1e-4, 1.0)), ([0.5] * 3, [3.0] * 2, (1.0, 2.0)), ([0.0] * 600, [], (1.0, 2.0))],
    ids=["graded", "repeated ends", "null space: decomposed"],
)
def test_large_sides_equal_those_of_the_cpu(
    low: list[float], high: list[float], inner: tuple[float, float]
) -> None:
    """Beyond a side of 1024 extremes are searched and proven, and decomposed where that fails."""
    middle = torch.linspace(*inner, 1030 - len(low) - len(high)).tolist()
    h = symmetric([*low, *middle, *high], batch=1)
    noise = 1030 * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(h, 2).max())
    assert_same(symmetric_extremes, h, rtol=1e-7, atol=noise)  # an eigenvalue of 0 is known to this


@pytest.mark.parametrize("scale", [2.0**-400, 2.0**400])
def test_scales(scale: float) -> None:
    assert_same(symmetric_extremes, scale * symmetric([-3.0, 1.0, 2.0, 4.0]))


def test_second_derivative() -> None:
    h = symmetric([-3.0, -1.0, 0.5, 2.0]).cuda().requires_grad_()

    def values(x: Tensor) -> tuple[Tensor, Tensor]:
        return symmetric_extremes((x + x.mT) / 2)[:2]

    assert torch.autograd.gradcheck(values, (h,))
    assert torch.autograd.gradgradcheck(values, (h,))
    cluster = torch.eye(3, dtype=torch.float64, device="cuda").requires_grad_()
    (gradient,) = torch.autograd.grad(values(cluster)[0], cluster, create_graph=True)
    with pytest.raises(NotImplementedError, match="repeated"):
        torch.autograd.grad(gradient.sum(), cluster)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be symmetric"):
        symmetric_extremes(normal(2, 4, 4).cuda())
    bad = torch.full((3, 3), torch.nan, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match="must be finite"):
        symmetric_extremes(bad)
    graph = torch.cuda.CUDAGraph()
    h = symmetric([1.0, 2.0, 3.0]).cuda()
    symmetric_extremes(h)
    with pytest.raises(NotImplementedError, match="CUDA graph"), torch.cuda.graph(graph):
        symmetric_extremes(h)
    assert bool(symmetric_extremes(h).lambda_max.isfinite().all())


def test_a_tracker_gives_what_a_cold_call_gives() -> None:
    tracker = SpectrumTracker()
    for step in range(3):
        h = symmetric([1.0, 2.0 + step, 3.0, 9.0], batch=1)[0].cuda()
        for one, other in zip(tracker(h), symmetric_extremes(h), strict=True):
            assert torch.equal(one, other)
    assert tracker.warm_calls == 0


@pytest.mark.parametrize("regularizer", [gram_r_well, gram_r_ill, r_well, r_ill])
@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (3, 33, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regularizers(regularizer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    assert_same(regularizer, normal(*shape).to(dtype), rtol)
