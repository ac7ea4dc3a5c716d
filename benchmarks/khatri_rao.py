"""Claim: inner products of per-sample gradients cost little more than the products they need.

``python -m benchmarks.khatri_rao [--quick] [--threads 2] [--out benchmarks/results]``

K = sum over pairs of tokens of (A A^T) o (G G^T) of one linear layer, and the gradients of <W, K>
in A and G: layers of a perceptron, and of transformers with few and with many tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor

from immunize_ext import reference
from immunize_ext.ops import khatri_rao_gram
from immunize_ext.ops.khatri_rao_fallback import composed_gram

from . import _expected as expected
from ._results import Target
from ._session import Case, Options, run
from ._timing import Budget, Contender, Tensors

SEED = 20261128
Way = Callable[[Tensor, Tensor], Tensor]


def published(a: Tensor, g: Tensor) -> Tensor:
    """Jacobian of the layer's weight, sample by sample, and its Gram matrix."""
    weight = a.new_zeros(g.shape[-1], a.shape[-1])

    def output(w: Tensor, tokens: Tensor, back: Tensor) -> Tensor:
        return (torch.nn.functional.linear(tokens, w) * back).sum()

    of_samples = torch.func.vmap(torch.func.jacrev(output), in_dims=(None, 0, 0))
    j = of_samples(weight, a, g).flatten(1)
    return j @ j.mT


def bare(a: Tensor, g: Tensor) -> Tensor:
    """The few lines: two products where a sample is one token, else per-sample gradients."""
    if a.shape[1] == 1:
        a, g = a[:, 0], g[:, 0]
        return (a @ a.mT) * (g @ g.mT)
    j = (a.mT @ g).flatten(1)
    return j @ j.mT


def symmetric_product(x: np.ndarray) -> Tensor:
    """One triangle of x x^T."""
    return torch.from_numpy(dsyrk(1.0, x.T, trans=1, lower=1))


def contenders(
    options: Options, n: int, t: int, d: int, o: int, dtype: torch.dtype
) -> list[Contender]:
    """All ways to K and its gradients."""
    generator = torch.Generator().manual_seed(SEED + t)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, g = (draw(n, t, side).to(dtype).to(options.device).requires_grad_() for side in (d, o))
    weights = draw(n, n).to(options.device)
    arrays = [expected.as_float64(x.detach()) for x in (a, g)]
    right = [
        reference.khatri_rao_gram(*arrays),
        *reference.khatri_rao_gram_gradient(*arrays, expected.as_float64(weights)),
    ]

    def contender(name: str, label: str, role: str, way: Way) -> Contender:
        def backward(values: Tensors) -> Tensors:
            return torch.autograd.grad(values, (a, g), [weights.to(values[0].dtype)])

        def check(values: Tensors, grads: Tensors) -> float:
            return expected.relative_error((*values, *grads), right)

        tolerance = 1e-11 if dtype == torch.float64 else 1e-4
        return Contender(
            name,
            label,
            role,
            lambda: (way(a, g),),
            backward,
            check,
            tolerance,  # type: ignore[arg-type]
        )

    outer = t > 1 and d * o < t * t * (d + o)
    tokens = [x.reshape(n * t, -1) for x in arrays]
    wide_a, wide_g = (torch.from_numpy(x) for x in arrays)
    j = (wide_a.mT @ wide_g).flatten(1)
    pairs = draw(n * t, n * t)

    def floor_forward() -> Tensors:
        if outer:
            return (symmetric_product((wide_a.mT @ wide_g).flatten(1).numpy()),)
        return tuple(symmetric_product(x) for x in tokens)

    def floor_backward(_: Tensors) -> Tensors:
        if outer:
            dj = (pairs[:n, :n] @ j).unflatten(1, (d, o))
            return wide_g @ dj.mT, wide_a @ dj
        return tuple(pairs @ torch.from_numpy(x) for x in tokens)

    return [
        contender("ours", "immunize_ext", "ours", khatri_rao_gram),
        contender("published", "A: vmap(jacrev) of torch.func, J J^T", "baseline", published),
        contender(
            "composite",
            "B: the torch-only route, autograd",
            "baseline",
            lambda a, g: composed_gram(a, g, False).to(a.dtype),
        ),
        contender("bare", "a few lines, autograd", "baseline", bare),
        Contender(
            "floor",
            "symmetric products (dsyrk) of the cheaper route, and two products back, float64",
            "floor",
            floor_forward,
            floor_backward,
        ),
    ]


LAYERS = {
    "perceptron": ("a layer of a perceptron", (256, 1, 256, 256)),
    "few-tokens": ("a layer of a transformer, few tokens: by pairs of tokens", (64, 4, 512, 512)),
    "many-tokens": ("a layer of a small ViT: by outer products", (64, 50, 192, 192)),
}


def cases(options: Options) -> list[Case]:
    """All rows; with ``--quick`` the same rows at tiny sizes."""
    rows = []
    for name, (title, sizes) in LAYERS.items():
        n, t, d, o = (5, min(sizes[1], 6), 4, 3) if options.quick else sizes
        for dtype in (torch.float64, torch.float32):
            suffix = "" if dtype == torch.float64 else "-float32"
            rows.append(
                Case(
                    name + suffix,
                    title,
                    {"n": n, "t": t, "d": d, "o": o},
                    str(dtype).removeprefix("torch."),
                    "call",
                    lambda sizes=(n, t, d, o), dtype=dtype: contenders(options, *sizes, dtype),
                    (Target("faster", "published", 2.0), Target("within", "floor", 2.0)),
                    budget=Budget(8.0, 5, 200),
                )
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    return run("khatri_rao", "benchmarks.khatri_rao", cases, argv, __doc__.partition("\n")[0])


if __name__ == "__main__":
    sys.exit(main())
