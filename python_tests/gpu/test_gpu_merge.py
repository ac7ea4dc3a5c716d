"""The merge and the preconditioned gradient on a GPU: equal to the CPU, and good citizens there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from immunize_ext.errors import ContradictoryTargetsError
from immunize_ext.ops import Preconditioner, RegularizationFactor, merge_kv
from immunize_ext.ops.operators import has_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not has_kernel("merge_apply", "cuda"), reason="built without CUDA kernels"),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Relative to the largest entry: a few roundings of the stored type.
RTOL = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


class Problem:
    """A merge on the CPU with everything requiring gradients, and its copy on a device."""

    def __init__(
        self,
        dtype: torch.dtype,
        outputs: tuple[int, ...] = (320, 33, 640),
        rows: tuple[int, ...] = (5, 17),
        d: int = 200,
        values: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.base = [normal(o, d, dtype=dtype) for o in outputs]
        self.embeddings = [normal(n, d) for n in rows]
        self.c_reg = normal(3 * d, d)
        self.concepts = [[w + normal(*w.shape, dtype=dtype) for w in self.base] for _ in rows]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.values = [normal(o, sum(rows), dtype=wide) for o in outputs] if values else None
        self.cotangents = [normal(*w.shape, dtype=dtype) for w in self.base]

    def leaves(self, device: str) -> dict[str, list[Tensor]]:
        groups = {
            "base": self.base,
            "embeddings": self.embeddings,
            "c_reg": [self.c_reg],
            "targets": self.values or [w for layers in self.concepts for w in layers],
        }
        return {
            name: [t.to(device).requires_grad_() for t in tensors]
            for name, tensors in groups.items()
        }

    def merge(self, leaves: dict[str, list[Tensor]], **options: Any) -> list[Tensor]:
        factor = RegularizationFactor.from_embeddings(leaves["c_reg"][0])
        targets, layers = leaves["targets"], len(self.base)
        concepts = [targets[i : i + layers] for i in range(0, len(targets), layers)]
        if self.values is not None:
            options["values"] = targets
        return merge_kv(
            leaves["base"],
            None if self.values is not None else concepts,
            leaves["embeddings"],
            factor,
            **options,
        )

    def run(self, device: str, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Merged weights and all gradients."""
        leaves = self.leaves(device)
        merged = self.merge(leaves, **options)
        flat = [t for tensors in leaves.values() for t in tensors]
        cotangents = [g.to(device) for g in self.cotangents]
        grads = torch.autograd.grad(merged, flat, cotangents)
        return [w.detach() for w in merged], list(grads)


def assert_close(got: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        scale = max(1e-30, float(other.abs().max()))
        assert float((one.cpu().double() - other.double()).abs().max()) <= rtol * scale


def raw_arguments(
    device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Any, ...]:
    """Arguments of the raw operator merge_apply."""
    problem = Problem(dtype, seed=seed)
    c = torch.cat(problem.embeddings).to(device)
    b = torch.linalg.pinv(c).mT.contiguous()
    base = [w.to(device) for w in problem.base]
    targets = [w.to(device) for layers in problem.concepts for w in layers]
    return base, targets, [5, 17], False, c, b


@contextmanager
def no_waiting() -> Iterator[None]:
    """Every wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- values and derivatives ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("d", [64, 127, 200, 768, 1100])
def test_values_and_gradients_equal_those_of_the_cpu(
    dtype: torch.dtype, values: bool, d: int
) -> None:
    problem = Problem(dtype, values=values, d=d)
    expected, expected_grads = problem.run("cpu")
    merged, grads = problem.run("cuda")
    assert_close(merged, expected, RTOL[dtype])
    assert_close(grads, expected_grads, 20 * RTOL[dtype])
    assert all(w.device.type == "cuda" for w in merged + grads)


@pytest.mark.parametrize("rows", [(1,), (16,), (40, 1, 77)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_tokens(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = Problem(dtype, rows=rows, outputs=(17, 64))
    expected, expected_grads = problem.run("cpu")
    merged, grads = problem.run("cuda")
    assert_close(merged, expected, RTOL[dtype])
    assert_close(grads, expected_grads, 20 * RTOL[dtype])


def test_second_derivatives() -> None:
    problem = Problem(torch.float64, outputs=(3, 2), rows=(2, 1), d=6)
    leaves = problem.leaves("cuda")
    flat = [t for tensors in leaves.values() for t in tensors]
    names = [(name, len(tensors)) for name, tensors in leaves.items()]

    def merged(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = list(tensors)
        again = {name: [left.pop(0) for _ in range(count)] for name, count in names}
        return tuple(problem.merge(again))

    assert torch.autograd.gradgradcheck(merged, flat, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("woodbury", [False, True])
def test_preconditioned_gradient_equals_that_of_the_cpu(dtype: torch.dtype, woodbury: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20 if woodbury else 90, 50, generator=generator, dtype=torch.float64)
    grad = torch.randn(70000, 50, generator=generator, dtype=torch.float64).to(dtype)
    on_cpu = Preconditioner.from_features(x, ridge=1e-3).apply(grad)
    on_gpu = Preconditioner.from_features(x.cuda(), ridge=1e-3).apply(grad.cuda())
    assert_close([on_gpu], [on_cpu], 10 * RTOL[dtype])


# --- large and small -----------------------------------------------------------------------------


def test_half_a_million_rows() -> None:
    rows = 524_281
    base = torch.zeros(rows, 2, device="cuda")
    targets = torch.arange(rows, device="cuda", dtype=torch.float32)[:, None]
    token = torch.tensor([[1.0, 0.0]], device="cuda")
    factor = RegularizationFactor.identity(2, device="cuda")
    (merged,) = merge_kv([base], None, [token], factor, values=[targets])
    assert torch.equal(merged[:, :1], targets)
    assert not merged[:, 1].any()


@pytest.mark.parametrize("batch", [65535, 65536, 262141])
def test_large_batches_of_tiny_solves(batch: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    chol = torch.eye(2, device="cuda", dtype=torch.float64).expand(batch, 2, 2)
    c = torch.randn(batch, 1, 2, generator=generator, device="cuda", dtype=torch.float64)
    hardness = torch.zeros(batch, 1, device="cuda", dtype=torch.float64)
    b, root, _, defect, rank = torch.ops.immunize_ext.merge_solve(chol, c, hardness, 1e-12, False)
    e = root[:, 0, 0].square()
    torch.testing.assert_close(b, e[:, None, None] * c)
    torch.testing.assert_close(e, 1 / c.square().sum((1, 2)))
    assert not defect.any()
    assert bool((rank == 1).all())


def test_layers_without_rows() -> None:
    base, targets, *rest = raw_arguments("cuda")
    expected = torch.ops.immunize_ext.merge_apply(base, targets, *rest)[0][1]
    base[0], targets[0], targets[3] = (w[:0] for w in (base[0], targets[0], targets[3]))
    merged, residual, _ = torch.ops.immunize_ext.merge_apply(base, targets, *rest)
    assert torch.equal(merged[1], expected)
    assert merged[0].shape == (0, 200)
    assert residual[0].shape == (0, 22)


# --- repeated rows and refusals ------------------------------------------------------------------


@pytest.mark.parametrize("d", [64, 200])
def test_repeated_rows(d: int) -> None:
    problem = Problem(torch.float64, d=d, rows=(3, 3))
    problem.embeddings[1][2] = problem.embeddings[0][1]
    average = {"contradictions": "average"}
    expected = problem.merge(problem.leaves("cpu"), **average)
    merged = problem.merge(problem.leaves("cuda"), **average)
    assert_close([w.detach() for w in merged], [w.detach() for w in expected], 1e-9)
    with pytest.raises(ContradictoryTargetsError, match="concept"):
        problem.merge(problem.leaves("cuda"))
    problem.concepts[1] = problem.concepts[0]
    expected = problem.merge(problem.leaves("cpu"))
    merged = problem.merge(problem.leaves("cuda"))
    assert_close([w.detach() for w in merged], [w.detach() for w in expected], 1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_named(bad: float) -> None:
    problem = Problem(torch.float32)
    problem.concepts[1][2][5, 7] = bad
    with pytest.raises(ValueError, match=r"concepts\[1\]\[2\] must be finite"):
        problem.run("cuda")
    problem = Problem(torch.float32)
    problem.base[1][5, 7] = bad
    with pytest.raises(ValueError, match=r"base\[1\] must be finite"):
        problem.run("cuda")
    problem = Problem(torch.float32)
    problem.embeddings[0][0, 0] = bad
    with pytest.raises(ValueError, match="embeddings must be finite"):
        problem.run("cuda")


def test_mixed_devices_are_refused() -> None:
    base, targets, *rest = raw_arguments("cuda")
    with pytest.raises(ValueError, match="must be on the device of c"):
        torch.ops.immunize_ext.merge_apply([base[0].cpu(), *base[1:]], targets, *rest)


def test_concepts_equal_to_the_base_change_nothing() -> None:
    problem = Problem(torch.bfloat16)
    problem.concepts = [problem.base, problem.base]
    merged, _ = problem.run("cuda")
    assert all(torch.equal(w.cpu(), w0) for w, w0 in zip(merged, problem.base, strict=True))


# --- behaviour on the device ---------------------------------------------------------------------


def test_two_runs_give_the_same_bits() -> None:
    problem = Problem(torch.float32, outputs=(1280, 640, 320), d=768)
    first = problem.run("cuda")
    for _ in range(3):
        again = problem.run("cuda")
        for one, other in zip(first[0] + first[1], again[0] + again[1], strict=True):
            assert torch.equal(one, other)


def test_the_tf32_switch_changes_nothing() -> None:
    problem = Problem(torch.float32, d=768)
    before = torch.backends.cuda.matmul.allow_tf32
    results = []
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            results.append(problem.run("cuda"))
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for one, other in zip(*(merged + grads for merged, grads in results), strict=True):
        assert torch.equal(one, other)


def test_work_goes_to_the_current_stream() -> None:
    arguments = raw_arguments("cuda")
    expected = torch.ops.immunize_ext.merge_apply(*arguments)[0]
    base = [torch.empty_like(w) for w in arguments[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would now read empty memory
        for empty, full in zip(base, arguments[0], strict=True):
            empty.copy_(full)
        merged = torch.ops.immunize_ext.merge_apply(base, *arguments[1:])[0]
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(merged, expected, strict=True))


def test_the_backward_pass_does_not_wait() -> None:
    base, targets, rows, values, c, b = raw_arguments("cuda")
    merged, residual, _ = torch.ops.immunize_ext.merge_apply(base, targets, rows, values, c, b)
    torch.cuda.synchronize()
    with no_waiting():
        torch.ops.immunize_ext.merge_apply_backward(
            merged, base, targets, rows, values, c, b, residual, True, True, True, True
        )


def test_cuda_graph() -> None:
    base, *rest = raw_arguments("cuda")
    operator = torch.ops.immunize_ext.merge_apply
    expected = [operator([factor * w for w in base], *rest)[0] for factor in (1.0, 2.0)]
    static = [w.clone() for w in base]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operator(static, *rest)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged, *_ = operator(static, *rest)
    for factor, right in zip((1.0, 2.0), expected, strict=True):
        for slot, w in zip(static, base, strict=True):
            slot.copy_(factor * w)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(merged, right, strict=True))


def test_memory_is_flat_over_1000_steps() -> None:
    problem = Problem(torch.float32, outputs=(40, 33), d=64)
    problem.run("cuda")
    torch.cuda.synchronize()
    gc.collect()  # what other tests left in cycles goes at any time
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        problem.run("cuda")
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_makes_no_float32_copy_of_the_weights(dtype: torch.dtype) -> None:
    base, targets, *rest = raw_arguments("cuda", dtype)
    base = [torch.randn(4096, 200, device="cuda").to(dtype) for _ in range(8)]
    targets = base * 2
    weights = sum(w.numel() for w in base)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.ops.immunize_ext.merge_apply(base, targets, *rest)
    residual = weights // 200 * 22 * 4
    assert torch.cuda.max_memory_allocated() - before <= 2 * weights + residual + (1 << 20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_the_device_of_the_tensors_counts() -> None:
    problem = Problem(torch.float32)
    expected, _ = problem.run("cpu")
    with torch.cuda.device(0):
        merged, _ = problem.run("cuda:1")
        assert torch.cuda.current_device() == 0
    assert all(w.device.index == 1 for w in merged)
    assert_close(merged, expected, RTOL[torch.float32])


def test_compile() -> None:
    problem = Problem(torch.float32)
    leaves = problem.leaves("cuda")
    factor = RegularizationFactor.from_embeddings(problem.c_reg.cuda())
    layers = len(problem.base)

    def merge(base: list[Tensor], targets: list[Tensor], embeddings: list[Tensor]) -> list[Tensor]:
        concepts = [targets[i : i + layers] for i in range(0, len(targets), layers)]
        return merge_kv(base, concepts, embeddings, factor)

    arguments = (leaves["base"], leaves["targets"], leaves["embeddings"])
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")(*arguments)
    expected = [w.detach().cpu() for w in merge(*arguments)]
    assert_close([w.detach() for w in compiled], expected, RTOL[torch.float32])
