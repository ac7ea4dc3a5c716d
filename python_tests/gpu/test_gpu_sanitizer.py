"""One small call of every kernel, for ``make sanitizer``, which slows a kernel by a factor of 100.

Values are compared with the CPU here as well, so that a run under the sanitizer that computes
nonsense does not pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from immunize_ext.ops import (
    Preconditioner,
    RegularizationFactor,
    extremal_singular_values,
    gram_extremes,
    merge_kv,
)
from immunize_ext.ops.operators import has_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not has_kernel("merge_apply", "cuda"), reason="built without CUDA kernels"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def doublets(n: int, p: int) -> Tensor:
    """A matrix whose extremes are double: the kernels for clusters have work."""
    t = min(n, p)
    u, _ = torch.linalg.qr(normal(n, t))
    v, _ = torch.linalg.qr(normal(p, t, seed=1))
    sigma = torch.linspace(3.0, 1.0, t, dtype=torch.float64)
    sigma[1], sigma[-1] = sigma[0], sigma[-2]
    return (u * sigma) @ v.mT


def run(operator: Any, a: Tensor) -> list[Tensor]:
    leaf = a.detach().clone().requires_grad_()
    fields = [field for field in operator(leaf) if field.is_floating_point()]
    (gradient,) = torch.autograd.grad(sum((k + 1) * f.sum() for k, f in enumerate(fields)), leaf)
    return [*(field.detach() for field in fields), gradient]


# The last side is beyond the shared memory of every card: the blocked route.
@pytest.mark.parametrize("operator", [extremal_singular_values, gram_extremes])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (33, 40), (140, 141)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sanitizer_spectrum(operator: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rtol = 1e-9 if dtype == torch.float64 else 1e-3
    for a in (normal(*shape, seed=2), doublets(*shape)):
        for one, other in zip(run(operator, a.to(dtype).cuda()), run(operator, a), strict=True):
            scale = float(other.abs().max())
            torch.testing.assert_close(one.cpu().double(), other, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("d", [24, 33, 136])  # packs, no packs, the solve by cuBLAS
def test_sanitizer_merge(dtype: torch.dtype, d: int) -> None:
    def merged(device: str) -> list[Tensor]:
        base = [normal(o, d, seed=o).to(device, dtype).requires_grad_() for o in (17, 3)]
        concepts = [
            [normal(*w.shape, seed=n + 5).to(device, dtype).requires_grad_() for w in base]
            for n in range(2)
        ]
        embeddings = [normal(3 + n, d, seed=9 + n).to(device).requires_grad_() for n in range(2)]
        factor = RegularizationFactor.from_embeddings(normal(3 * d, d, seed=20).to(device))
        result = merge_kv(base, concepts, embeddings, factor)
        inputs = [*base, *(w for layers in concepts for w in layers), *embeddings]
        return [*result, *torch.autograd.grad([w.sum() for w in result], inputs)]

    rtol = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
    for one, other in zip(merged("cuda"), merged("cpu"), strict=True):
        scale = float(other.detach().double().abs().max())
        error = (one.detach().cpu().double() - other.detach().double()).abs().max()
        assert float(error) <= rtol * scale


@pytest.mark.parametrize("side", [1, 33, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sanitizer_precondition(side: int, dtype: torch.dtype) -> None:
    cpu = Preconditioner.from_features(normal(2 * side, side), ridge=0.1)
    gpu = Preconditioner(cpu.factor.cuda(), cpu.basis.cuda(), ridge=cpu.ridge)
    grad = normal(19, side, seed=1).to(dtype)
    expected = cpu.apply(grad).double()
    error = (gpu.apply(grad.cuda()).cpu().double() - expected).abs().max()
    assert float(error) <= 2e-2 * float(expected.abs().max())
