"""The spectrum operators on a real GPU, against the CPU operators and the references."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from immunize_ext import reference
from immunize_ext.ops import extremal_singular_values, gram_extremes
from immunize_ext.testing.samples import matrix_from_spectrum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Operator = Callable[..., Any]
OPERATORS: list[Operator] = [extremal_singular_values, gram_extremes]
EPS = torch.finfo(torch.float64).eps
# 136 / 137 is where shared memory of 227 KiB ends, 116 / 117 where 163 KiB do.
SHAPES = [
    (1, 1),
    (2, 2),
    (31, 40),
    (32, 32),
    (33, 33),
    (64, 784),
    (784, 64),
    (100, 768),
    (117, 116),
    (117, 130),
    (128, 200),
    (137, 136),
    (137, 137),
    (200, 300),
    (300, 260),
]


@pytest.fixture(autouse=True)
def _served_by_kernels() -> Iterator[None]:
    """Every test is about the kernels; FallbackWarning is an error in this project's tests."""
    yield
    torch.cuda.synchronize()


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(n: int, p: int, sigma: Any, seed: int = 0) -> Tensor:
    return matrix_from_spectrum(np.random.default_rng(seed), n, p, sigma).matrix


def value_and_gradient(operator: Operator, a: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """The result and the gradient of a fixed combination of its differentiable fields."""
    leaf = a.detach().clone().requires_grad_()
    result = operator(leaf, **options)
    weights = (1.0, -0.5, 0.25)
    fields = [field for field in result if field.is_floating_point()]
    total = sum(w * field.sum() for w, field in zip(weights, fields, strict=False))
    (gradient,) = torch.autograd.grad(total, leaf)
    return result, gradient


def assert_same(operator: Operator, a: Tensor, **options: Any) -> None:
    """CPU and GPU agree on values, counts and the gradient of well separated extremes."""
    eps = torch.finfo(a.dtype).eps * 16 * max(a.shape[-2:])
    cpu, cpu_gradient = value_and_gradient(operator, a, **options)
    gpu, gpu_gradient = value_and_gradient(operator, a.cuda(), **options)
    assert gpu_gradient.dtype == a.dtype
    for expected, got in zip(cpu, gpu, strict=True):
        assert got.is_cuda
        assert got.dtype == expected.dtype
        largest = float(cpu[0].detach().abs().max()) if expected.is_floating_point() else 0.0
        torch.testing.assert_close(got.cpu(), expected, rtol=eps, atol=eps * largest)
    scale = float(cpu_gradient.abs().max())
    torch.testing.assert_close(
        gpu_gradient.cpu(), cpu_gradient, rtol=0.0, atol=(64 * eps + 1e-11) * max(scale, 1.0)
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_cpu(operator: Operator, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    t = min(shape)
    a = torch.stack([with_spectrum(*shape, np.linspace(3.0, 1.0, t), seed=s) for s in range(2)])
    assert_same(operator, a.to(dtype))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(operator: Operator, dtype: torch.dtype) -> None:
    a = gaussian(3, 8, 12).to(dtype)
    gpu, gradient = value_and_gradient(operator, a.cuda())
    assert gpu[0].dtype == gradient.dtype == dtype
    cpu, expected = value_and_gradient(operator, a)
    torch.testing.assert_close(gpu[0].cpu(), cpu[0])
    torch.testing.assert_close(gradient.cpu(), expected)


@pytest.mark.parametrize("shape", [(20, 30), (64, 64), (128, 140), (200, 220)])
@pytest.mark.parametrize("kappa", [1e4, 1e8, 1e12])
def test_accuracy_class_of_gesdd(shape: tuple[int, int], kappa: float) -> None:
    a = with_spectrum(*shape, np.geomspace(1.0, 1.0 / kappa, min(shape)))
    expected = reference.extremal_singular_values(a.numpy())
    result = extremal_singular_values(a.cuda())
    bound = 4 * max(shape) * EPS * float(expected.sigma_max)
    assert abs(float(result.sigma_max) - float(expected.sigma_max)) <= bound
    assert abs(float(result.sigma_min) - float(expected.sigma_min)) <= bound
    assert int(result.rank) == min(shape)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
@pytest.mark.parametrize("shape", [(6, 9), (150, 160)])
def test_scales(scale: float, shape: tuple[int, int]) -> None:
    a = gaussian(*shape)
    one, other = (extremal_singular_values(x.cuda()) for x in (a, scale * a))
    torch.testing.assert_close(other.sigma_max, scale * one.sigma_max, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(other.sigma_min, scale * one.sigma_min, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("rank", ["numerical", "full"])
@pytest.mark.parametrize("side", [5, 140])
def test_clusters_zero_and_deficient(operator: Operator, rank: str, side: int) -> None:
    sigma = np.linspace(3.0, 1.0, side)
    doublets, deficient = sigma.copy(), sigma.copy()
    doublets[1], doublets[-1] = doublets[0], doublets[-2]
    deficient[-2:] = 0.0
    a = torch.stack(
        [
            with_spectrum(side, side + 3, doublets),
            with_spectrum(side, side + 3, deficient),
            torch.zeros(side, side + 3, dtype=torch.float64),
            torch.ones(side, side + 3, dtype=torch.float64),
            torch.eye(side, side + 3, dtype=torch.float64),
            with_spectrum(side, side + 3, sigma),
        ]
    )
    assert_same(operator, a, rank=rank)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("batch", [65535, 65536, 262141])
def test_batches_beyond_the_grid(operator: Operator, batch: int) -> None:
    a = gaussian(batch, 2, 2) + 4 * torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    result, gradient = value_and_gradient(operator, a.cuda())
    sigma = torch.linalg.svdvals(a)
    power = 2 if operator is gram_extremes else 1
    torch.testing.assert_close(result[0].cpu(), sigma[:, 0] ** power, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result[1].cpu(), sigma[:, 1] ** power, rtol=1e-8, atol=1e-12)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("operator", OPERATORS)
def test_views_and_empty_batches(operator: Operator) -> None:
    base = gaussian(4, 9, 7).cuda()
    for view in (base.mT, base[:, ::2], base[1:3, :, 2:5], base[:1].expand(3, 9, 7)):
        result = operator(view)
        again = operator(view.contiguous())
        for one, other in zip(result, again, strict=True):
            assert torch.equal(one, other)
    empty = operator(base[:0])
    assert empty[0].shape == (0,)
    _, gradient = value_and_gradient(operator, base[:0])
    assert gradient.shape == (0, 9, 7)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(7, 5, 9), (3, 64, 100), (2, 140, 150)])
def test_two_runs_are_bitwise_equal(operator: Operator, shape: tuple[int, ...]) -> None:
    a = gaussian(*shape).cuda()
    first, first_gradient = value_and_gradient(operator, a)
    for _ in range(3):
        again, gradient = value_and_gradient(operator, a)
        assert torch.equal(gradient, first_gradient)
        for one, other in zip(again, first, strict=True):
            assert torch.equal(one, other)
    alone = operator(a[1:2])
    for one, whole in zip(alone, first, strict=True):
        assert torch.equal(one[0], whole[1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_non_finite_is_named_and_leaves_no_error_behind(operator: Operator) -> None:
    a = gaussian(4, 5, 6).cuda()
    bad = a.clone()
    bad[2, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        operator(bad)
    assert bool(operator(a)[0].isfinite().all())


def test_current_stream_is_used() -> None:
    producer = torch.cuda.Stream()
    a = gaussian(64, 32, 48)
    expected = extremal_singular_values(a.cuda()).sigma_max
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(50_000_000)  # the copy below is late: another stream would read zeros
        late = torch.zeros(64, 32, 48, dtype=torch.float64, device="cuda")
        late.copy_(a.pin_memory(), non_blocking=True)
        result = extremal_singular_values(late).sigma_max
        assert torch.equal(result, expected)
    producer.synchronize()


def test_cuda_graph() -> None:
    a = gaussian(4, 16, 24).cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            value_and_gradient(gram_extremes, a)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    leaf = a.clone().requires_grad_()
    with torch.cuda.graph(graph):
        captured = gram_extremes(leaf)
        (gradient,) = torch.autograd.grad(captured.lambda_max.sum(), leaf)
    other = gaussian(4, 16, 24, seed=1).cuda()
    with torch.no_grad():
        leaf.copy_(other)
    graph.replay()
    again = other.clone().requires_grad_()
    expected = gram_extremes(again)
    (expected_gradient,) = torch.autograd.grad(expected.lambda_max.sum(), again)
    assert torch.equal(captured.lambda_max, expected.lambda_max)
    assert torch.equal(gradient, expected_gradient)


def test_the_blocked_route_can_be_captured() -> None:
    """A capture takes the blocked route where a single matrix otherwise goes to the library."""
    a = gaussian(1, 150, 160).cuda()
    expected = extremal_singular_values(a)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(a)
    with torch.cuda.graph(graph):
        captured = extremal_singular_values(static)
    static.copy_(a)
    graph.replay()
    once = [field.clone() for field in captured]
    graph.replay()
    for one, other in zip(once, captured, strict=True):
        assert torch.equal(one, other)
    # Either route is backward stable: off by a few sqrt(n + p) eps sigma_max.
    bound = 2 * (8 + 2 * (150 + 160) ** 0.5) * EPS * float(expected.sigma_max)
    for one, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0.0, atol=bound if one.is_floating_point() else 0
        )


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_backward_pass_of_small_sides_does_not_wait(operator: Operator) -> None:
    leaf = gaussian(5, 30, 40).cuda().requires_grad_()
    total = operator(leaf)[0].sum()
    torch.autograd.grad(total, leaf, retain_graph=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(total, leaf)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensor_is_used() -> None:
    a = gaussian(3, 20, 30)
    with torch.cuda.device(0):
        result, gradient = value_and_gradient(gram_extremes, a.to("cuda:1"))
        assert result[0].device == gradient.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
    expected, _ = value_and_gradient(gram_extremes, a.to("cuda:0"))
    assert torch.equal(result[0].cpu(), expected[0].cpu())


def test_mixed_devices_are_refused() -> None:
    a = gaussian(3, 4, 5).cuda()
    outputs = torch.ops.immunize_ext.extremal_singular_values(a, 1e-15, 1e-15, False)
    grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.immunize_ext.extremal_singular_values_backward(
            grad, grad, a, *outputs[3:], 1e-15, 1e-15, False
        )


@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivative(operator: Operator) -> None:
    a = gaussian(2, 4, 3).cuda().requires_grad_()

    def values(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(field for field in operator(x) if field.is_floating_point())

    assert torch.autograd.gradcheck(values, (a,), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(values, (a,), nondet_tol=1e-9)
    cluster = torch.eye(3, dtype=torch.float64).cuda().requires_grad_()
    (gradient,) = torch.autograd.grad(operator(cluster)[0].sum(), cluster, create_graph=True)
    with pytest.raises(NotImplementedError, match="repeated"):
        torch.autograd.grad(gradient.sum(), cluster)


def test_memory_is_flat_over_1000_steps() -> None:
    a = gaussian(8, 32, 48).cuda()
    for _ in range(10):
        value_and_gradient(gram_extremes, a)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value_and_gradient(gram_extremes, a)
    peak = torch.cuda.max_memory_allocated()
    for _ in range(1000):
        value_and_gradient(gram_extremes, a)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == peak
