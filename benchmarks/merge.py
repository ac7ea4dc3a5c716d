"""Claim: merging adapted key/value projections costs one pass over the weights and one Gram matrix.

``python -m benchmarks.merge [--quick] [--threads 2] [--out benchmarks/results]``

Rows: all cross-attention K and V matrices of Stable Diffusion 1.4 and SDXL, two concepts, with the
gradients of all weights, and with those of C and C_reg. Sweeps: concept tokens, captions, concepts,
text width, matrices.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.ops import merge_fallback as composite

from . import _baselines as baselines
from . import _expected as expected
from ._results import Target
from ._session import Case, Options, run
from ._timing import Budget, Contender, Role, Tensors

SEED = 20250702

# Output widths of the cross-attention layers, each with one K and one V matrix. Stable Diffusion
# 1.4: two layers in each of three down blocks, one in the middle, three in each of three up blocks.
# SDXL: blocks of width 640 hold 2 transformer layers, blocks of width 1280 and the middle hold 10;
# two attention positions per down block, three per up block.
SD14_WIDTHS = (320,) * 5 + (640,) * 5 + (1280,) * 6
SDXL_WIDTHS = (640,) * (2 * 2 + 3 * 2) + (1280,) * (2 * 10 + 10 + 3 * 10)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a merge.

    Attributes:
        widths: Output width of each matrix.
        d: Width of the text features.
        rows: Tokens of each concept.
        m: Tokens of the regularization captions.
    """

    widths: tuple[int, ...]
    d: int
    rows: tuple[int, ...]
    m: int

    def record(self) -> dict[str, int]:
        """The numbers that define the work."""
        return {
            "matrices": len(self.widths),
            "output_rows": sum(self.widths),
            "d": self.d,
            "concepts": len(self.rows),
            "s": sum(self.rows),
            "m": self.m,
        }


def model_sizes(
    layer_widths: Sequence[int], d: int, s: int = 24, m: int = 4000, concepts: int = 2
) -> Sizes:
    """Sizes for a model whose layers have a K and a V matrix each."""
    widths = tuple(width for width in layer_widths for _ in range(2))
    return Sizes(widths, d, (s // concepts,) * concepts, m)


@dataclass(frozen=True)
class Problem:
    """Inputs of a merge and the cotangents of the merged weights, all float32."""

    base: list[Tensor]
    concepts: list[list[Tensor]]
    embeddings: list[Tensor]
    c_reg: Tensor
    grads: list[Tensor]

    def weights(self) -> list[Tensor]:
        """All weight matrices: base first, then concept by concept."""
        return [*self.base, *(weight for weights in self.concepts for weight in weights)]


def problem(sizes: Sizes, options: Options, text_gradients: bool) -> Problem:
    """Random weights and embeddings; with ``text_gradients`` C and C_reg take part in autograd."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).to(options.device)

    d = sizes.d
    base = [normal(width, d, scale=d**-0.5) for width in sizes.widths]
    concepts = [
        [weight + normal(*weight.shape, scale=0.02 * d**-0.5) for weight in base]
        for _ in sizes.rows
    ]
    embeddings = [normal(rows, d) for rows in sizes.rows]
    c_reg = normal(sizes.m, d)
    grads = [normal(width, d) for width in sizes.widths]
    result = Problem(base, concepts, embeddings, c_reg, grads)
    for weight in result.weights():
        weight.requires_grad_()
    for text in (*embeddings, c_reg):
        text.requires_grad_(text_gradients)
    return result


# Layers whose weights are compared; with gradients of C and C_reg, which sum over layers, all.
CHECKED_LAYERS = 8


def right_answer(task: Problem, text_gradients: bool) -> tuple[list[int], expected.Expected]:
    """The layers to look at, and values and gradients there."""
    count = len(task.base)
    step = 1 if text_gradients else max(1, count // CHECKED_LAYERS)
    layers = list(range(0, count, step))
    answer = expected.merge(
        [expected.as_float64(task.base[layer]) for layer in layers],
        [[expected.as_float64(weights[layer]) for layer in layers] for weights in task.concepts],
        [expected.as_float64(rows) for rows in task.embeddings],
        expected.as_float64(task.c_reg),
        [expected.as_float64(task.grads[layer]) for layer in layers],
    )
    gradients = [*answer.grad_base, *(array for arrays in answer.grad_concepts for array in arrays)]
    if text_gradients:
        gradients += [*answer.grad_embeddings, answer.grad_c_reg]
    return layers, expected.Expected(answer.merged, gradients)


Merge = Callable[[], Sequence[Tensor]]


def contender(
    task: Problem,
    text_gradients: bool,
    right: tuple[list[int], expected.Expected],
    name: str,
    label: str,
    role: Role,
    merge: Merge,
) -> Contender:
    """A way to merge, with the gradients of all weights, or of the text features as well."""
    weights = task.weights()
    count = len(task.base)
    inputs = [*weights, *task.embeddings, task.c_reg] if text_gradients else weights
    layers, answer = right

    def backward(values: Tensors) -> Tensors:
        return torch.autograd.grad(values, inputs, task.grads)

    def check(values: Tensors, gradients: Tensors) -> float:
        seen = [
            gradients[group * count + layer]
            for group in range(1 + len(task.concepts))
            for layer in layers
        ]
        seen.extend(gradients[len(weights) :])
        return max(
            expected.relative_error([values[layer] for layer in layers], answer.values),
            expected.relative_error(seen, answer.gradients),
        )

    # float32 weights; a float32 factor of a Gram matrix with kappa near 40 adds a little.
    return Contender(name, label, role, lambda: tuple(merge()), backward, check, tolerance=1e-3)


def floor(task: Problem, name: str, *, gram: bool, text_gradients: bool) -> Contender:
    """Memory traffic by copies, and the float64 products with C_reg.

    Forward reads W0 and every W_n and writes W; backward reads G and writes the gradients of W0 and
    of every W_n. With gradients of the text features it reads W0 and every W_n again. A copy of all
    weights of one model is a read and a write.
    """
    concepts = len(task.concepts)
    source = [weight.detach() for weight in task.base]
    target = [torch.empty_like(weight) for weight in source]
    c_reg = task.c_reg.detach().to(torch.float64)
    square = torch.zeros(c_reg.shape[-1], c_reg.shape[-1], dtype=torch.float64, device=c_reg.device)

    def move(passes: int) -> None:
        whole, half = divmod(passes, 2)
        for _ in range(whole):
            for to, origin in zip(target, source, strict=True):
                to.copy_(origin)
        # Half a copy: every other layer is copied, which is half of the bytes up to rounding.
        for to, origin in list(zip(target, source, strict=True))[::2] if half else ():
            to.copy_(origin)

    def forward() -> Tensors:
        move(concepts + 2)
        return (c_reg.mT @ c_reg,) if gram else ()

    def backward(values: Tensors) -> Tensors:
        move(concepts + 2 + (concepts + 1 if text_gradients else 0))
        return (c_reg @ square,) if text_gradients else ()

    products = ("one float64 Gram product" if gram else "no product") + (
        ", one float64 product with C_reg" if text_gradients else ""
    )
    return Contender(
        name, f"the weights moved through memory by copies, {products}", "floor", forward, backward
    )


def _contenders(
    task: Problem, text_gradients: bool, *, published: bool, cached: bool
) -> list[Contender]:
    """The ways to merge, with the factor of Q made in the call, and with a cached one."""
    make = functools.partial(contender, task, text_gradients, right_answer(task, text_gradients))
    base, concepts, embeddings, c_reg = task.base, task.concepts, task.embeddings, task.c_reg

    def ours() -> Sequence[Tensor]:
        factor = RegularizationFactor.from_embeddings(c_reg)
        return merge_kv(base, concepts, embeddings, factor)

    def composed() -> Sequence[Tensor]:
        return composite.merge_kv(base, concepts, embeddings, c_reg)

    def bare() -> Sequence[Tensor]:
        return baselines.bare_merge(base, concepts, embeddings, baselines.bare_factor(c_reg))

    result = [
        make("ours", "immunize_ext, float64 factor made in the call", "ours", ours),
        make(
            "composite",
            "B: immunize_ext.ops.merge_fallback, float64 factor made in the call",
            "baseline",
            composed,
        ),
        make("bare", "a few lines of torch, float32 factor made in the call", "baseline", bare),
        floor(task, "floor", gram=True, text_gradients=text_gradients),
    ]
    if cached:
        kept = RegularizationFactor.from_embeddings(c_reg)
        kept_bare = baselines.bare_factor(c_reg)

        def ours_cached() -> Sequence[Tensor]:
            return merge_kv(base, concepts, embeddings, kept)

        def bare_cached() -> Sequence[Tensor]:
            return baselines.bare_merge(base, concepts, embeddings, kept_bare)

        result += [
            make("ours_cached", "immunize_ext, factor cached", "ours", ours_cached),
            make("bare_cached", "a few lines of torch, factor cached", "baseline", bare_cached),
            floor(task, "floor_cached", gram=False, text_gradients=text_gradients),
        ]
    if published:

        def published_merge() -> Sequence[Tensor]:
            return baselines.published_merge(base, concepts, embeddings, c_reg)

        label = "A: Gram matrix, LU, solve and inverse for each layer, float32 with autograd"
        result.append(make("published", label, "baseline", published_merge))
    return result


# --- rows -------------------------------------------------------------------------------------


def _build(
    sizes: Sizes, options: Options, text_gradients: bool, *, published: bool, cached: bool
) -> Callable[[], list[Contender]]:
    def build() -> list[Contender]:
        task = problem(sizes, options, text_gradients)
        return _contenders(task, text_gradients, published=published, cached=cached)

    return build


CACHED_TARGETS = (
    Target("faster", "composite", 3.0, challenger="ours_cached"),
    Target("faster", "bare_cached", 3.0, challenger="ours_cached"),
)


def cases(options: Options) -> list[Case]:
    """All rows; with ``--quick`` the same rows at tiny sizes."""
    if options.quick:
        sd14 = model_sizes((8, 16), d=12, s=4, m=40)
        sdxl = model_sizes((8, 16, 16), d=16, s=4, m=40)
    else:
        sd14 = model_sizes(SD14_WIDTHS, d=768)
        sdxl = model_sizes(SDXL_WIDTHS, d=2048)
    on_cpu = options.device.type == "cpu"
    # Eight passes at 80 % of the bandwidth of a copy take 1.25 times what the copies take.
    bandwidth = () if on_cpu else (Target("within", "floor_cached", 1.25, "ours_cached"),)
    rows = [
        Case(
            "sd14-weights",
            "K/V merge of Stable Diffusion 1.4, two concepts, gradients of all weights",
            sd14.record(),
            "float32",
            "call",
            _build(sd14, options, False, published=True, cached=True),
            (
                (
                    Target("faster", "published", 18.0),
                    Target("faster", "composite", 1.5),
                    Target("faster", "bare", 1.5),
                    *CACHED_TARGETS,
                )
                if on_cpu
                else bandwidth
            ),
            note="ours_cached against bare_cached compares like with like: neither forms Q",
            budget=Budget(60.0, 5, 60),
        ),
        Case(
            "sd14-embeddings",
            "the same with the gradients of C and C_reg too",
            sd14.record(),
            "float32",
            "call",
            _build(sd14, options, True, published=True, cached=False),
            (
                (
                    Target("faster", "published", 150.0),
                    Target("faster", "composite", 1.5),
                    Target("faster", "bare", 1.5),
                )
                if on_cpu
                else ()
            ),
            budget=Budget(60.0, 5, 60),
        ),
        Case(
            "sdxl-weights",
            "K/V merge of SDXL, two concepts, gradients of all weights",
            sdxl.record(),
            "float32",
            "call",
            _build(sdxl, options, False, published=False, cached=True),
            (
                (
                    Target("faster", "composite", 1.5),
                    Target("faster", "bare", 1.5),
                    *CACHED_TARGETS,
                )
                if on_cpu
                else bandwidth
            ),
            note="the published procedure is left out: 140 factorisations of 2048 x 2048 a call",
            budget=Budget(90.0, 5, 30),
        ),
    ]
    return [*rows, *sweep_cases(options)]


def sweep_cases(options: Options) -> list[Case]:
    """Rows for the plots of cost against size: one size varies, the others are those of the row."""
    quick = options.quick
    widths, d, m, per_concept = ((8,), 12, 40, 2) if quick else (SD14_WIDTHS, 768, 4000, 12)
    middle = 2 * per_concept

    def model(layers: Sequence[int] = widths, d: int = d, **sizes: int) -> Sizes:
        return model_sizes(layers, d=d, **{"s": middle, "m": m, **sizes})

    by_tokens = {s: model(s=s) for s in ((2, 4) if quick else (4, 12, 24, 48, 96))}
    by_captions = {count: model(m=count) for count in ((40, 80) if quick else (1000, 4000, 16000))}
    by_concepts = {
        count: model(s=per_concept * count, concepts=count)
        for count in ((2, 3) if quick else (2, 4, 6, 8, 10))
    }
    by_width = {width: model(d=width) for width in ((8, 12) if quick else (768, 1024, 2048))}
    by_layers = {
        2 * layers: model((8 if quick else 640,) * layers)
        for layers in ((1, 2) if quick else (4, 16, 64))
    }
    return [
        *_sweep(options, "Stable Diffusion 1.4", "tokens", "s", "concept tokens s", by_tokens),
        *_sweep(options, "Stable Diffusion 1.4", "captions", "m", "caption tokens m", by_captions),
        *_sweep(
            options,
            "Stable Diffusion 1.4",
            "concepts",
            "concepts",
            "concepts of 12 tokens",
            by_concepts,
        ),
        *_sweep(options, "Stable Diffusion 1.4", "width", "d", "text width d", by_width),
        *_sweep(
            options,
            "K and V projections",
            "matrices",
            "matrices",
            "matrices of 640 rows",
            by_layers,
        ),
    ]


def _sweep(
    options: Options, model: str, prefix: str, x: str, what: str, by_value: Mapping[int, Sizes]
) -> list[Case]:
    return [
        Case(
            f"{prefix}-{value}",
            f"K/V merge of {model}, {x} = {value}, gradients of all weights",
            sizes.record(),
            "float32",
            "call",
            _build(sizes, options, False, published=False, cached=True),
            sweep={"name": f"merge of {model} against {what}", "x": x, "value": value},
            budget=Budget(8.0, 3, 30),
        )
        for value, sizes in by_value.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return run("merge", "benchmarks.merge", cases, argv, __doc__.partition("\n")[0])


if __name__ == "__main__":
    sys.exit(main())
