"""The preconditioned gradient on a GPU: both routes, streams, graphs, no waiting, flat memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from immunize_ext.ops import Preconditioner, precondition_gradient
from immunize_ext.ops.operators import has_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not has_kernel("precondition", "cuda"), reason="built without CUDA kernels"),
]
# One rounding to the stored type, and for float64 two triangular solves at kappa near 1e3.
RTOL = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pair(side: int, woodbury: bool = False) -> tuple[Preconditioner, Preconditioner]:
    """The same preconditioner on the CPU and on the GPU, from one factor."""
    x = normal(side // 2 if woodbury else 3 * side, side)
    cpu = Preconditioner.from_features(x, ridge=1e-2)
    gpu = Preconditioner(cpu.factor.cuda(), cpu.basis.cuda(), ridge=cpu.ridge)
    return cpu, gpu


def solved(preconditioner: Preconditioner, grad: Tensor) -> Tensor:
    """The operator alone: apply reads the gradient on the host."""
    rest = (preconditioner.factor, preconditioner.basis, preconditioner.ridge)
    result: Tensor = torch.ops.immunize_ext.precondition(grad, *rest)
    return result


# 128 / 129 is where the fused kernel ends.
@pytest.mark.parametrize("side", [1, 31, 32, 33, 64, 128, 129, 300])
@pytest.mark.parametrize("dtype", list(RTOL))
def test_equals_the_cpu(side: int, dtype: torch.dtype) -> None:
    cpu, gpu = pair(side)
    grad = normal(2, 17, side, seed=1).to(dtype)
    expected, got = cpu.apply(grad), gpu.apply(grad.cuda())
    assert got.is_cuda
    assert got.dtype == dtype
    error = (got.cpu().double() - expected.double()).abs().max()
    assert float(error) <= RTOL[dtype] * float(expected.double().abs().max())


@pytest.mark.parametrize("rows", [1, 65535, 65536, 524_281])
@pytest.mark.parametrize("side", [8, 130])
def test_any_number_of_rows(rows: int, side: int) -> None:
    _, gpu = pair(side)
    grad = normal(rows, side, seed=2).cuda()
    result = gpu.apply(grad)
    assert result.shape == grad.shape
    residual = (result[-3:] @ (gpu.factor @ gpu.factor.mT) - grad[-3:]).abs().max()
    assert float(residual) <= 1e-10 * float(grad[-3:].abs().max())


def test_views_and_batches_do_not_matter() -> None:
    _, gpu = pair(20)
    grad = normal(6, 40, 30, seed=3).cuda()
    for view in (grad[:, ::2, 5:25], grad.mT[:, :, :20], grad[:1, :4, :20].expand(3, 4, 20)):
        assert torch.equal(gpu.apply(view), gpu.apply(view.contiguous()))
    assert torch.equal(gpu.apply(grad[2, :, :20]), gpu.apply(grad[:, :, :20])[2])


@pytest.mark.parametrize("side", [16, 200])
@pytest.mark.parametrize("woodbury", [False, True])
def test_nothing_waits_and_bits_repeat(side: int, woodbury: bool) -> None:
    _, gpu = pair(side, woodbury)
    grad = normal(50, side, seed=4).cuda()
    first = solved(gpu, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = solved(gpu, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)


def test_current_stream_and_graph() -> None:
    _, gpu = pair(40)
    grad = normal(60, 40, seed=5).cuda()
    expected = solved(gpu, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read zeros
        late = torch.zeros_like(grad)
        late.copy_(grad)
        result = solved(gpu, late)
    stream.synchronize()
    assert torch.equal(result, expected)
    static = torch.zeros_like(grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solved(gpu, static)
    static.copy_(grad)
    graph.replay()
    assert torch.equal(captured, expected)


def test_backward_of_a_weight_and_memory_over_1000_steps() -> None:
    _, gpu = pair(32)
    weight = normal(10, 32, seed=6).cuda().requires_grad_()
    cotangent = normal(10, 32, seed=7).cuda()

    def step() -> Tensor:
        (grad,) = torch.autograd.grad(precondition_gradient(weight, gpu), weight, cotangent)
        return grad

    assert torch.equal(step(), solved(gpu, cotangent))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        step()
    assert torch.cuda.memory_allocated() == before


def test_mixed_devices_are_refused() -> None:
    cpu, gpu = pair(6)
    with pytest.raises(ValueError, match="device"):
        cpu.apply(normal(3, 6).cuda())
    with pytest.raises(ValueError, match="device"):
        gpu.apply(normal(3, 6))
