"""What only the CUDA build composes of torch operators, run on CPU tensors.

What is composed around the kernels of features can be called on any tensor: no GPU is needed. On a
CPU tensor the engine of the CPU stands in for the kernels. What every build registers for CUDA is
tested by
python_tests/ops/test_compositions.py. Run by cuda_build.py with the Python of the CUDA environment
and the built package in its path.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import immunize_ext.ops  # noqa: F401  registers the operators

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refused(what: str, operator: str, *arguments: object) -> None:
    """Both devices must refuse, in the same words."""
    call = getattr(torch.ops.immunize_ext, operator).default.redispatch
    messages = []
    for keys in (CPU, CUDA):
        try:
            call(keys, *arguments)
        except (ValueError, NotImplementedError) as error:
            messages.append(str(error).partition(", got")[0].partition(" (")[0])
    if len(messages) != 2 or messages[0] != messages[1]:
        sys.exit(f"cuda_compositions: {operator}, {what}: refusals differ: {messages}")
    print(f"  {operator}: {what}: refused alike")


def spectra(t: int) -> list[Tensor]:
    """Singular values that the thin Gram matrix can be trusted with, to kappa 1e6."""
    wide = {"dtype": torch.float64}
    return [
        torch.linspace(1.0, 0.1, t, **wide),
        torch.logspace(0, -3, t, **wide),
        torch.logspace(0, -6, t, **wide),
        torch.cat([torch.logspace(0, -2, t - 1, **wide), torch.tensor([1e-6], **wide)]),
        # Clusters beyond its resolution of 4 t eps in units of the largest squared.
        torch.cat([torch.full((3,), 1.0), torch.linspace(0.9, 0.2, t - 5), torch.full((2,), 0.1)]),
    ]


def large_features(t: int, k: int) -> None:
    """Sides beyond the kernels': extremes proven by the library's eigenvectors, and refined."""
    eps = torch.finfo(torch.float64).eps
    tolerance = 100 * t * eps  # of clusters and of the rank
    u, _ = torch.linalg.qr(normal(t, t, seed=5))
    v, _ = torch.linalg.qr(normal(k, t, seed=6))
    known = [sigma.double() for sigma in spectra(t)]
    scales = [1.0, 2.0**100, 2.0**-300, 2.0**300, 1.0]
    a = torch.stack([(u * sigma) @ v.mT * c for sigma, c in zip(known, scales, strict=True)])
    bound = 8 * (t + k) ** 0.5 * eps
    for tall in (False, True):
        for gram in (False, True):
            x = (a.mT if tall else a).contiguous()
            if gram:
                x = x[:2]  # the square of 2^300 squared would overflow in |K|_F^2, 2^-300 vanish
            name = "gram_extremes" if gram else "extremal_singular_values"
            call = getattr(torch.ops.immunize_ext, name).default.redispatch
            found = list(call(CUDA, x, tolerance, tolerance, False))
            if gram:
                thin = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
                for field, right in ((10, thin), (2, thin.square().sum((1, 2)))):
                    if not torch.allclose(found[field], right, rtol=1e-12, atol=0):
                        sys.exit(f"cuda_compositions: {name}, output {field} is off")
                found = [found[0].sqrt(), found[1].sqrt(), *found[3:10]]
            for number in range(len(x)):
                sigma, c = known[number], scales[number]
                most = int((sigma[0] - sigma <= tolerance).sum())
                least = int((sigma - sigma[-1] <= tolerance).sum())
                what = f"{name}, tall {tall}, matrix {number}"
                if [int(f[number]) for f in found[2:5]] != [t, most, least]:
                    sys.exit(f"cuda_compositions: {what}: rank or multiplicities")
                for value, left, right, truth in (
                    (found[0], found[5], found[6], sigma[0]),
                    (found[1], found[7], found[8], sigma[-1]),
                ):
                    m, s = x[number] / c, value[number] / c
                    one, two = left[number], right[number]
                    errors = [
                        float((s - truth).abs()),
                        float((m @ two - s * one).norm()),
                        float((m.mT @ one - s * two).norm()),
                    ]
                    if not max(errors) <= bound:
                        sys.exit(f"cuda_compositions: {what}: {errors} beyond {bound:.1e}")
            print(f"  {name}, {tuple(x.shape[1:])}: proven and refined")
    if k > t:
        short = torch.ops.immunize_ext.gram_extremes.default.redispatch(
            CUDA, a[:1], tolerance, tolerance, True
        )
        if float(short[1]) != 0.0 or int(short[5]) != k - t or bool(short[8].any()):
            sys.exit("cuda_compositions: gram_extremes, full rank of fewer samples than features")
    bad = torch.stack([a[0], a[0]])
    bad[1, 3, 4] = torch.nan
    refused("NaN in large features", "extremal_singular_values", bad, tolerance, tolerance, False)


def short_of_rank() -> None:
    """A tolerance of the rank far above the noise of the Gram matrix, as float32 features have."""
    t, k, lost = 150, 170, 30
    u, _ = torch.linalg.qr(normal(t, t, seed=5))
    v, _ = torch.linalg.qr(normal(k, t, seed=6))
    known = torch.linspace(1.0, 0.1, t - lost, dtype=torch.float64)
    sigma = torch.cat([known, torch.zeros(lost, dtype=torch.float64)])
    x = ((u * sigma) @ v.mT).unsqueeze(0)
    call = torch.ops.immunize_ext.extremal_singular_values.default.redispatch
    for full in (False, True):
        expected, found = (call(keys, x, 1e-4, 1e-9, full) for keys in (CPU, CUDA))
        for number, (right, ours) in enumerate(zip(expected, found, strict=True)):
            if number >= 5:  # vectors up to their common sign
                right, ours = right.abs(), ours.abs()
            if not torch.allclose(ours.double(), right.double(), rtol=0, atol=1e-10):
                sys.exit(f"cuda_compositions: short of rank, full {full}: output {number} differs")
    print("  features short of rank: as on the CPU")


class Watched(TorchDispatchMode):
    """Sees whether some matrix goes on to Jacobi's method: its results are put in place."""

    jacobi = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.jacobi |= func is torch.ops.aten.index_copy_.default
        return func(*args, **(kwargs or {}))


@contextmanager
def rough_library(side: int) -> Iterator[None]:
    """Decomposes Gram matrices of this side as badly as thin_gram_eigenpairs.h still allows.

    What cuSOLVER brings is much better. Proofs must not live on that.
    """
    error = normal(side, side, seed=9)
    error = error + error.mT
    error *= 0.9 * 4 * side * torch.finfo(torch.float64).eps / torch.linalg.matrix_norm(error, 2)

    def decompose(a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        given = a.numpy()
        if a.shape[-1] == side:
            given = given + error.numpy() * np.linalg.norm(given, 2, (-2, -1), keepdims=True)
        values, vectors = np.linalg.eigh(given)
        return torch.from_numpy(values), torch.from_numpy(vectors)

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_linalg_eigh", decompose, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def compare(
    what: str,
    x: Tensor,
    full: bool,
    *,
    jacobi: bool,
    library: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Values, rank, multiplicities, vectors and gradients are those of the CPU operator."""
    tolerance = max(x.shape[1:]) * torch.finfo(x.dtype).eps
    arguments = (tolerance, tolerance, full)
    for name in ("extremal_singular_values", "gram_extremes"):
        call = getattr(torch.ops.immunize_ext, name).default.redispatch
        expected = call(CPU, x, *arguments)
        with library(), Watched() as watched:
            found = call(CUDA, x, *arguments)
        if watched.jacobi != jacobi:
            sys.exit(f"cuda_compositions: {name}, {what}: Jacobi was {'not ' * jacobi}started")
        gram = name == "gram_extremes"
        values = 3 if gram else 2
        for number in range(values, values + 3):
            if not torch.equal(found[number], expected[number]):
                sys.exit(f"cuda_compositions: {name}, {what}: output {number} differs")
        sigma = [[o.sqrt() if gram else o for o in out[:2]] for out in (expected, found)]
        eps = torch.finfo(torch.float64).eps
        bound = 8 * sum(x.shape[1:]) ** 0.5 * eps * sigma[0][0]
        for ours, right in zip(sigma[1], sigma[0], strict=True):
            if not bool(((ours - right).abs() <= bound).all()):
                sys.exit(f"cuda_compositions: {name}, {what}: {ours} is not {right}")
        if not gram:
            for end, left, right in ((0, 5, 6), (1, 7, 8)):
                one, two = found[left].unsqueeze(2), found[right].unsqueeze(2)
                size = found[end].view(-1, 1, 1)
                for off in (
                    x.double() @ two - size * one,
                    x.double().mT @ one - size * two,
                ):
                    if not bool((off.norm(dim=(1, 2)) <= bound).all()):
                        sys.exit(f"cuda_compositions: {name}, {what}: vectors of end {end}")
        back = getattr(torch.ops.immunize_ext, name + "_backward").default.redispatch
        ones = [torch.ones(len(x), dtype=torch.float64)] * values
        saved = [0, 1, *range(4, 11)] if gram else list(range(3, 9))
        right, ours = (
            back(CPU, *ones, x, *(out[n] for n in saved), *arguments) for out in (expected, found)
        )
        # Vectors of the smallest hang on the gap beside it, a tenth of its own size here.
        smallest = sigma[0][1][sigma[0][1] > 0]
        gap = float((smallest / sigma[0][0][sigma[0][1] > 0]).min()) / 30 if len(smallest) else 1.0
        if not float((ours - right).norm()) <= max(1e-11, 100 * eps / gap) * float(right.norm()):
            sys.exit(f"cuda_compositions: {name}, {what}: gradients differ")


def small_ends() -> None:
    """What the Gram matrix cannot tell from zero is found without Jacobi's method."""
    wide = {"dtype": torch.float64}

    def graded(t: int, decades: float) -> Tensor:
        return torch.logspace(0, -decades, t, **wide)

    def joined(*parts: Tensor | float) -> Tensor:
        return torch.cat(
            [p if isinstance(p, Tensor) else torch.full((1,), p, **wide) for p in parts]
        )

    for t, k in ((150, 170), (140, 140)):
        u, _ = torch.linalg.qr(normal(t, t, seed=5))
        v, _ = torch.linalg.qr(normal(k, t, seed=6))
        none, flat = torch.zeros(40, **wide), torch.linspace(1, 0.5, t - 40, **wide)
        cases = {
            "of low rank": joined(flat, none),
            "of low rank, graded": joined(graded(t - 40, 5), none),
            "of low rank, kappa 1e10": joined(graded(t - 40, 10), none),
            "graded, kappa 1e8": graded(t, 8),
            "graded, kappa 1e12": graded(t, 12),
            "one small value": joined(flat, graded(39, 1) / 3, 1e-9),
            "clusters": joined(flat, torch.full((4,), 1e-5, **wide), none[4:]),
            "a cluster below the noise": joined(flat, graded(37, 1) / 3, *[1e-9] * 3),
            "groups": joined(flat, 1e-6 * flat[:15], 1e-10 * flat[:15], none[30:]),
            "of rank one": joined(1.0, none[:1].expand(t - 1)),
            "zero": none[:1].expand(t),
        }
        a = {name: ((u * sigma) @ v.mT).unsqueeze(0) for name, sigma in cases.items()}
        for name, x in a.items():
            for full in (False, True):
                compare(f"{name}, full {full}", x, full, jacobi=False)
        tall = a["of low rank, graded"].mT.contiguous()
        compare("tall", tall, False, jacobi=False)
        compare("float32", tall.float(), False, jacobi=False)
        compare("scaled up", tall * 2.0**230, False, jacobi=False)
        compare("scaled down", tall * 2.0**-230, False, jacobi=False)
        # Just above the gap that the subspace is cut at, where its first step is a long one.
        cut = joined(flat[:-10], torch.full((47,), 2e-6, **wide), *[1e-7] * 3)
        for name, sigma in {"cut": cut, **cases}.items():
            if name not in ("clusters", "zero"):
                x = ((u * sigma) @ v.mT).unsqueeze(0)
                library = functools.partial(rough_library, t)
                compare(f"{name}, roughly", x, False, jacobi=False, library=library)
        # Below the threshold of the rank, but not by what a product may be rounded by.
        below = joined(flat, graded(39, 3) / 3, 0.7 * k * 2.2e-16)
        compare("hardly below", ((u * below) @ v.mT).unsqueeze(0), False, jacobi=True)
        # In the cluster of the smallest, but closer to its edge than a value of S is known.
        member = joined(flat, graded(38, 1) / 3, 1e-9 + 0.5 * k * 2.2e-16, 1e-9)
        compare("hardly a member", ((u * member) @ v.mT).unsqueeze(0), False, jacobi=True)
        # At the threshold of the rank nothing is proven; the others of a batch are not held up.
        doubtful = joined(flat, graded(39, 3) / 3, k * 2.2e-16)
        compare("doubtful", ((u * doubtful) @ v.mT).unsqueeze(0), False, jacobi=True)
        several = [(u * doubtful) @ v.mT, *(x[0] for name, x in a.items() if "cluster" not in name)]
        compare("a batch", torch.stack(several), False, jacobi=True)
        compare("a batch, proven", torch.stack(several[1:]), False, jacobi=False)
        print(f"  small ends, {t} x {k}: as on the CPU, without Jacobi")


def unproven_features() -> None:
    """What the Gram matrix cannot decide goes on from its eigenvectors, and comes back in place."""
    t, k = 150, 170
    u, _ = torch.linalg.qr(normal(t, t, seed=5))
    v, _ = torch.linalg.qr(normal(k, t, seed=6))
    wide = {"dtype": torch.float64}
    graded = torch.logspace(0, -10, t, **wide)
    deficient = torch.cat([torch.linspace(1, 0.5, t - 30, **wide), torch.zeros(30, **wide)])
    known = [graded, torch.linspace(2, 1, t, **wide), deficient, torch.ones(t, **wide)]
    a = torch.stack([(u * sigma) @ v.mT * 2.0**9 for sigma in known])
    arguments = (1e-12, 1e-12, False)
    for tall in (False, True):
        x = (a.mT if tall else a).contiguous()
        for name in ("extremal_singular_values", "gram_extremes"):
            call = getattr(torch.ops.immunize_ext, name).default.redispatch
            expected, found = (call(keys, x, *arguments) for keys in (CPU, CUDA))
            values = 3 if name == "gram_extremes" else 2
            for number, (right, ours) in enumerate(zip(expected, found, strict=True)):
                if number < values:
                    same = torch.allclose(ours, right, rtol=1e-9, atol=1e-12)
                elif number < values + 3:
                    same = torch.equal(ours, right)
                else:  # vectors: of clusters any will do
                    same = ours.shape == right.shape
                if not same:
                    sys.exit(f"cuda_compositions: {name}, tall {tall}: output {number} differs")
            back = getattr(torch.ops.immunize_ext, name + "_backward").default.redispatch
            ones = [torch.ones(len(x), **wide)] * values
            saved = [0, 1, *range(4, 11)] if name == "gram_extremes" else list(range(3, 9))
            grads = [
                back(CPU, *ones, x, *(out[n] for n in saved), *arguments)
                for out in (expected, found)
            ]
            # The smallest of the graded one hangs on a gap of its own size.
            if not torch.allclose(grads[1][1:], grads[0][1:], rtol=1e-7, atol=1e-7):
                sys.exit(f"cuda_compositions: {name}, tall {tall}: gradients differ")
    print("  features that go on: as on the CPU")


def regularizers() -> None:
    """Value, coefficients and gradient around the kernels, as on the CPU."""
    for shape in ((6, 9), (9, 6), (3, 5, 5)):
        for gram in (False, True):
            for ill in (False, True):
                for dtype in (torch.float64, torch.float32, torch.float16):
                    x = normal(*shape, seed=3).to(dtype)
                    arguments = (gram, ill, None, None, 1e-12, 1e-12, False)
                    call = torch.ops.immunize_ext.regularizer.default.redispatch
                    back = torch.ops.immunize_ext.regularizer_backward.default.redispatch
                    results = []
                    for keys in (CPU, CUDA):
                        found = call(keys, x, *arguments)
                        grad = back(
                            keys,
                            torch.ones_like(found[0]),
                            x,
                            *found[1:],
                            gram,
                            ill,
                            None,
                            *arguments[-3:],
                        )
                        results.append([*found[:3], grad])
                    for number, (right, ours) in enumerate(zip(*results, strict=True)):
                        bound = max(4 * torch.finfo(dtype).eps, 1e-10) * float(right.abs().max())
                        same = ours.dtype == right.dtype and ours.shape == right.shape
                        if not (same and float((ours - right).abs().max()) <= bound):
                            sys.exit(
                                f"cuda_compositions: regularizer {arguments}: {number} differs"
                            )
    print("  regularizers: as on the CPU")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for shape in ((150, 170), (200, 200), (300, 900)):
        large_features(*shape)
    short_of_rank()
    small_ends()
    unproven_features()
    regularizers()
