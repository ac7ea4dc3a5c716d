"""What the operators cost on a GPU, call by call: time, launches, and the slowest kernels.

Prints for each call the time of forward and backward, how many kernels were launched and how long
the host was busy with launching and waiting. Beside it stand the few lines of torch that do the
same without checks. Run by gpu.py; to be read before a kernel is changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from immunize_ext.ops import (
    RegularizationFactor,
    extremal_singular_values,
    gram_extremes,
    merge_kv,
    symmetric_extremes,
)
from immunize_ext.ops.regularizers import gram_r_ill

KERNELS = 6  # as many are listed for each call
CALLS = 10
# Output widths of the key and value matrices of cross-attention: Stable Diffusion 1.4 and SDXL.
WIDTHS = {
    "SD 1.4": (768, [320] * 10 + [640] * 10 + [1280] * 12),
    "SDXL": (2048, [640] * 20 + [1280] * 120),
}
FEATURES = [
    (1000, 8, 8),
    (1000, 32, 32),
    (64, 784),
    (90, 64, 784),
    (20, 100, 768),
    (256, 256),
    (16, 256, 256),
    (17, 256, 256),
    (1000, 2048),
    (5000, 784),
]
Call = Callable[[], object]


def bare_extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of the thin Gram matrix, no checks, no clusters."""
    values = torch.linalg.eigvalsh(x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x)
    return values[..., -1], values[..., 0]


def both_ways(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> Call:
    """Forward and backward through the first two outputs."""
    leaf = x.detach().requires_grad_()

    def call() -> object:
        first, second, *_ = function(leaf)
        return torch.autograd.grad(first.sum() + second.sum(), leaf)

    return call


def deficient(device: str) -> Tensor:
    """5000 x 784 features of rank 535 and condition number 1e5, as raw images are."""
    wide = {"dtype": torch.float64, "device": device}
    left, right = torch.randn(5000, 535, **wide), torch.randn(535, 784, **wide)
    return (left * torch.logspace(0, -5, 535, **wide)) @ right


def merge(widths: list[int], d: int, dtype: torch.dtype, device: str) -> tuple[Call, Call]:
    """A merge of two concepts with a cached factor and its gradient, and the factor."""
    base = [0.05 * torch.randn(out, d, device=device, dtype=dtype) for out in widths]
    concepts = [[(w + 0.01 * torch.randn_like(w)).requires_grad_() for w in base] for _ in range(2)]
    embeddings = [torch.randn(12, d, device=device) for _ in range(2)]
    captions = torch.randn(4000, d, device=device)
    factor = RegularizationFactor.from_embeddings(captions)
    leaves = [w for layers in concepts for w in layers]
    # Dense gradients, as those of a loss are: the sum of a result would give expanded ones.
    incoming = [torch.randn_like(w) for w in base]

    def call() -> object:
        merged = merge_kv(base, concepts, embeddings, factor)
        return torch.autograd.grad(merged, leaves, incoming)

    return call, lambda: RegularizationFactor.from_embeddings(captions)


def calls(device: str, quick: bool) -> Iterator[tuple[str, Call]]:
    """All calls with their names."""
    features = [shape for shape in FEATURES if not quick or max(shape) <= 1000]
    for dtype in (torch.float64, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for shape in features:
            x = torch.randn(*shape, dtype=dtype, device=device)
            name = f"{' x '.join(map(str, shape))} {kind}"
            yield f"gram_extremes {name}", both_ways(gram_extremes, x)
            yield f"few lines {name}", both_ways(bare_extremes, x)
        x = torch.randn(64, 784, dtype=dtype, device=device)
        leaf = x.clone().requires_grad_()
        yield (
            f"gram_r_ill 64 x 784 {kind}",
            lambda leaf=leaf: torch.autograd.grad(gram_r_ill(leaf), leaf),
        )
        yield f"extremal_singular_values 64 x 784 {kind}", both_ways(extremal_singular_values, x)
        h = torch.randn(512, 512, dtype=dtype, device=device)
        yield f"symmetric_extremes 512 {kind}", both_ways(symmetric_extremes, h + h.mT)
    if quick:
        return
    yield "gram_extremes 5000 x 784, rank 535", both_ways(gram_extremes, deficient(device))
    for model, (d, widths) in WIDTHS.items():
        for dtype in (torch.float32, torch.float16):
            kind = str(dtype).removeprefix("torch.")
            call, factor = merge(widths, d, dtype, device)
            yield f"merge {model}, factor cached, {kind}", call
        yield f"factor of {model}", factor


def measure(name: str, call: Call, device: str) -> None:
    """Print the time of a call and, on a GPU, what it launched."""
    for _ in range(3):
        call()
    if device == "cpu":
        print(f"== {name}: runs", flush=True)
        return
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    print(f"== {name}: {start.elapsed_time(end) / CALLS * 1000:.1f} us", flush=True)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    events = recorded.key_averages()
    kernels = [event for event in events if "CUDA" in str(event.device_type)]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    launched = sum(event.count for event in kernels)
    busy = sum(event.self_device_time_total for event in kernels)
    host = [event for event in events if event.key.startswith("cuda")]
    spent = sum(event.self_cpu_time_total for event in host)
    print(f"   {launched} launches, {busy:.1f} us on the GPU, {spent:.1f} us in the CUDA runtime")
    for event in kernels[:KERNELS]:
        print(f"   {event.self_device_time_total:10.1f} us x {event.count:4d}  {event.key[:120]}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    for name, call in calls(chosen.device, quick=chosen.device == "cpu"):
        measure(name, call, chosen.device)


if __name__ == "__main__":
    main()
