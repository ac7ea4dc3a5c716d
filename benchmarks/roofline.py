"""How near the CPU operators come to what the machine can do: docs/roofline.md.

``python -m benchmarks.roofline [--quick] [--threads 2] [--write PAGE | --check PAGE]``

An operator that does W operations on Q bytes can take no less than max(W / peak, Q / bandwidth):
the roofline. Both are counted by hand here, as the least that any method with the same result
needs: what must be read once, what must be written, the products that define the result. The peaks
are measured in the same run, as the faster of torch's and numpy's product of two square matrices,
and as a copy of a large buffer.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from immunize_ext import ops
from immunize_ext.ops import regularizers

from ._environment import environment_record
from ._page import parser, run, table_row
from ._timing import copy_bandwidth, fixed_threads, refuse_fallback

FILE = "roofline.json"
SEED = 20250702
SECONDS = 2.0
# Output widths of the key and value matrices of Stable Diffusion 1.4, and what it is merged from.
WIDTHS, WIDTH, TOKENS, CONCEPTS = (320,) * 10 + (640,) * 10 + (1280,) * 12, 768, 24, 2


class Work(NamedTuple):
    """An operator and the least that it has to do.

    Attributes:
        name: In words, with the size.
        operations: Additions and multiplications.
        bytes: Read and written.
        peak: The dtype that the products are in.
        call: Does it once.
    """

    name: str
    operations: float
    bytes: float
    peak: str
    call: Callable[[], object]


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _features(count: int, n: int, p: int, dtype: torch.dtype) -> Iterator[Work]:
    """R_ill of features: one Gram product on the thin side, and one product for the gradient."""
    x = _normal(count, n, p, dtype=dtype).requires_grad_()
    t, entries = min(n, p), count * n * p
    size = x.element_size()
    word = str(dtype).removeprefix("torch.")
    name = f"R_ill, {f'{count} of ' if count > 1 else ''}{n} x {p}, {word}"
    # T of t x t takes 4/3 t^3 more; the ends and two vectors are of lower order.
    forward = t * entries + count * 4 / 3 * t**3
    # Extremes are added up in float64 whatever the dtype.
    yield Work(
        f"{name}, forward", forward, entries * size, "float64", lambda: regularizers.gram_r_ill(x)
    )
    # The gradient is a matrix of rank one and a multiple of X K, a product in the dtype of X.
    value = regularizers.gram_r_ill(x).sum()
    yield Work(
        f"{name}, backward",
        2 * t * entries,
        2 * entries * size,
        word,
        lambda: torch.autograd.grad(value, x, retain_graph=True),
    )


def _symmetric(side: int) -> Work:
    """Extremes of a symmetric matrix: its tridiagonal form, half of whose products are with A."""
    h = _normal(side, side)
    h = h + h.mT
    return Work(
        f"symmetric extremes, {side} x {side}, float64",
        4 / 3 * side**3,
        side**2 * 8,
        "float64",
        lambda: ops.symmetric_extremes(h),
    )


def _merge(widths: Sequence[int], d: int) -> Iterator[Work]:
    """A merge with its factor kept, float32: every weight read once, every result written once."""
    dtype = torch.float32
    base = [0.05 * _normal(rows, d, dtype=dtype) for rows in widths]
    concepts = [[(1.01 * w).requires_grad_() for w in base] for _ in range(CONCEPTS)]
    embeddings = [_normal(TOKENS // CONCEPTS, d, dtype=dtype) for _ in range(CONCEPTS)]
    embeddings[1] = embeddings[1].flip(-1)
    factor = ops.RegularizationFactor.from_embeddings(_normal(2 * d, d, dtype=dtype))
    leaves = [w for layers in concepts for w in layers]
    incoming = [torch.ones_like(w) for w in base]
    weights = sum(widths) * d

    def forward() -> list[Tensor]:
        return ops.merge_kv(base, concepts, embeddings, factor)

    # (W_n - W0) C^T and R B, both of `tokens` columns; float32 is added up in float32 here.
    yield Work(
        f"merge of {len(widths)} matrices, {sum(widths)} rows of {d}, forward",
        4 * weights * TOKENS,
        (CONCEPTS + 2) * weights * 4,
        "float32",
        forward,
    )
    merged = forward()
    yield Work(
        f"merge of {len(widths)} matrices, {sum(widths)} rows of {d}, backward",
        4 * weights * TOKENS,
        (CONCEPTS + 1) * weights * 4,
        "float32",
        lambda: torch.autograd.grad(merged, leaves, incoming, retain_graph=True),
    )


def works(quick: bool) -> Iterator[Work]:
    """All that is measured."""
    shapes = ((1, 4, 9), (3, 4, 5)) if quick else ((1, 64, 784), (90, 64, 784), (1, 1000, 2048))
    for count, n, p in shapes:
        for dtype in (torch.float64, torch.float32):
            yield from _features(count, n, p, dtype)
    yield from _features(7 if quick else 1000, 8, 8, torch.float64)
    for side in (6,) if quick else (64, 768):
        yield _symmetric(side)
    yield from _merge((8, 12) if quick else WIDTHS, 24 if quick else WIDTH)


def _times(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of a call, again and again."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def product_rate(dtype: torch.dtype, side: int, seconds: float) -> float:
    """Operations a second of the fastest product of two square matrices, torch's or numpy's."""
    a = _normal(side, side, dtype=dtype)
    out = torch.empty_like(a)
    array, into = a.numpy(), out.numpy()
    by_torch = min(_times(lambda: torch.mm(a, a, out=out), seconds))
    by_numpy = min(_times(lambda: np.matmul(array, array, out=into), seconds))
    return 2 * side**3 / min(by_torch, by_numpy)


def measure(quick: bool, threads: int) -> dict[str, Any]:
    """Peaks, and every operator beside its roof."""
    refuse_fallback("benchmarks.roofline", torch.device("cpu"))
    seconds = 0.0 if quick else SECONDS
    with fixed_threads(threads):
        side = 64 if quick else 1536
        peaks = {
            word: product_rate(dtype, side, seconds)
            for word, dtype in (("float64", torch.float64), ("float32", torch.float32))
        }
        bandwidth = copy_bandwidth(torch.device("cpu"), 4 if quick else 256)
        rows = []
        for work in works(quick):
            times = sorted(_times(work.call, seconds))
            q25, _, q75 = statistics.quantiles(times, n=4)
            rows.append(
                {
                    "name": work.name,
                    "operations": work.operations,
                    "bytes": work.bytes,
                    "peak": work.peak,
                    "seconds": statistics.median(times),
                    "q25": q25,
                    "q75": q75,
                    "roof": max(work.operations / peaks[work.peak], work.bytes / bandwidth),
                }
            )
    return {
        "schema": 1,
        "environment": environment_record(
            torch.device("cpu"), threads, "benchmarks.roofline", [f"--threads {threads}"]
        ),
        "quick": quick,
        "peaks": peaks,
        "bandwidth": bandwidth,
        "rows": rows,
    }


def _line(row: dict[str, Any], found: dict[str, Any]) -> str:
    by_bytes = row["bytes"] / found["bandwidth"] > row["operations"] / found["peaks"][row["peak"]]
    cells = [
        row["name"],
        f"{row['operations'] / 1e6:.3g}",
        f"{row['bytes'] / 1e6:.3g}",
        f"{row['roof'] * 1e3:.3g}",
        "bytes" if by_bytes else "operations",
        f"{row['seconds'] * 1e3:.3g}",
        f"{row['q25'] * 1e3:.3g} to {row['q75'] * 1e3:.3g}",
        f"{row['roof'] / row['seconds']:.0%}",
    ]
    return table_row(cells)


def page(found: dict[str, Any]) -> str:
    """docs/roofline.md from what was measured."""
    environment = found["environment"]
    peaks = found["peaks"]
    whole = sorted(found["rows"], key=lambda row: -row["roof"] / row["seconds"])
    best, worst = whole[0], whole[-1]
    return "\n".join(
        [
            "# How near to what the machine can do",
            "",
            f"From {worst['roof'] / worst['seconds']:.0%} ({worst['name']})",
            f"to {best['roof'] / best['seconds']:.0%} ({best['name']})",
            "of what the operations and the bytes of an operator allow, whichever take longer.",
            "",
            "Made by `python -m benchmarks.roofline --write docs/roofline.md` with torch",
            f"{environment['torch']} on {environment['device_name']}, {environment['threads']} "
            "threads. Peaks, measured in the same run: the faster of",
            f"torch's and numpy's matrix product, {peaks['float64'] / 1e9:.0f} Gflop/s in float64 "
            f"and {peaks['float32'] / 1e9:.0f} in float32; a copy,",
            f"{found['bandwidth'] / 1e9:.0f} GB/s, read and written bytes counted. Extremes are "
            "added up in float64 whatever the dtype of",
            "the features. Counted is the least that the result needs. A call takes some 20 us "
            "whatever it",
            "does, which is all that tiny works show; a form that fits into the caches is faster "
            "than a copy.",
            "",
            "| operator | Mflop | MB | roof, ms | set by | median, ms | quartiles | of the roof |",
            "|---|---|---|---|---|---|---|---|",
            *(_line(row, found) for row in found["rows"]),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser((__doc__ or "").partition("\n")[0])
    flags.add_argument("--threads", type=int, default=2)
    return run(FILE, page, lambda chosen: measure(chosen.quick, chosen.threads), flags, argv)


if __name__ == "__main__":
    sys.exit(main())
