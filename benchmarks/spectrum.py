"""Claim: extremes of a spectrum and their gradients cost little more than the products they need.

``python -m benchmarks.spectrum [--quick] [--threads 2] [--out benchmarks/results]``

Rows: R_well and R_ill of features at the sizes of the published experiments, log kappa of a square
Hessian, and tiny matrices, one or many (``_tiny``). Sweeps: samples, number of matrices, side of
the Hessian, condition number.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from immunize_ext import ops
from immunize_ext.ops import fallback
from immunize_ext.ops.arguments import spectrum_policy
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well

from . import _baselines as baselines
from . import _expected as expected
from . import _tiny
from ._results import Target
from ._session import Case, Options, run
from ._timing import Budget, Contender, Tensors

SEED = 20250701
ITERATIVE_TOLERANCE = 1e-4  # what a rival that iterates has to reach
Regularizer = Callable[[Tensor], Tensor]
Extremes = Callable[[Tensor], baselines.GramValues]


class Way(NamedTuple):
    """One way to compute both regularizers of features x (*, n, p)."""

    name: str
    label: str
    role: Any
    r_well: Regularizer
    r_ill: Regularizer
    published: bool = False


def features(options: Options, *shape: int, kappa: float | None = None, variant: int = 0) -> Tensor:
    """Standard normal features (*, n, p) in float64; with ``kappa``, of that condition number."""
    generator = torch.Generator().manual_seed(SEED + variant)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kappa is not None:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        decay = torch.logspace(0, -np.log10(kappa), s.shape[-1], dtype=s.dtype)
        x = (u * decay) @ vt * s[..., :1, None]
    return x.to(options.device)


class Deficient(NamedTuple):
    """Features as real ones are: columns of zeros, others that depend on each other, a spectrum.

    The spectrum goes through the points (share of the rank, log10 sigma_i / sigma_1).
    """

    samples: int
    columns: int
    occupied: int
    rank: int
    spectrum: tuple[tuple[float, float], ...]


# One digit of MNIST, raw: 233 pixels are never set, one is set in a single image and to 1 of 255.
DIGIT = Deficient(5949, 784, 551, 535, ((0, 0), (0.901, -3), (0.985, -4), (0.998, -5), (1, -6.73)))
# House Prices: columns that are constant, and codes of the same thing.
HOUSES = Deficient(200, 79, 76, 74, ((0, 0), (0.08, -0.25), (0.55, -0.5), (0.95, -1.5), (1, -2.7)))


def deficient_features(options: Options, kind: Deficient) -> Tensor:
    """Features (samples, columns) in float64 with that spectrum and otherwise random."""
    generator = torch.Generator().manual_seed(SEED + kind.columns)

    def vectors(side: int) -> Tensor:
        normal = torch.randn(side, kind.rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal)[0]

    shares, exponents = zip(*kind.spectrum, strict=True)
    share = np.linspace(0, 1, kind.rank)
    decay = torch.from_numpy(10.0 ** np.interp(share, shares, exponents))
    x = torch.zeros(kind.samples, kind.columns, dtype=torch.float64)
    kept = torch.randperm(kind.columns, generator=generator)[: kind.occupied]
    x[:, kept] = (vectors(kind.samples) * (decay * kind.samples**0.5)) @ vectors(kind.occupied).mT
    return x.to(options.device)


# --- ways -------------------------------------------------------------------------------------


class _Composite(torch.autograd.Function):
    """The torch-only operator and its backward, past the dispatcher, which would take kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *policy: Any) -> tuple[Tensor, ...]:
        outputs = fallback.gram_extremes(x, *policy)
        ctx.save_for_backward(x, *outputs[:2], *outputs[4:])
        ctx.policy = policy
        ctx.mark_non_differentiable(outputs[3])
        return outputs[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = fallback.gram_extremes_backward(*grads[:3], *ctx.saved_tensors, *ctx.policy)
        return grad, *(None,) * len(ctx.policy)


def _composite_values(x: Tensor) -> baselines.GramValues:
    policy = spectrum_policy("gram_extremes", "x", x, "numerical", None, None)
    return baselines.GramValues(*_Composite.apply(x, *policy))


def _from_values(name: str, label: str, role: str, values: Extremes) -> Way:
    return Way(
        name,
        label,
        role,
        lambda x: baselines.r_well_of(values(x), x.shape[-1]),
        lambda x: baselines.r_ill_of(values(x)),
    )


OURS = Way("ours", "immunize_ext.ops.regularizers", "ours", gram_r_well, gram_r_ill)
PUBLISHED = Way(
    "published",
    "A: p x p Gram matrix, eigvalsh in float64 with autograd, one matrix at a time",
    "baseline",
    baselines.published_r_well,
    baselines.published_r_ill,
    published=True,
)
PUBLISHED_SVD = Way(
    "published_svd",
    "A with singular values of the p x p Gram matrix in place of eigenvalues",
    "baseline",
    lambda x: baselines.published_r_well(x, method="svd"),
    lambda x: baselines.published_r_ill(x, method="svd"),
    published=True,
)
COMPOSITE = _from_values(
    "composite", "B: immunize_ext.ops.fallback, torch.linalg alone", "baseline", _composite_values
)
BARE = _from_values(
    "bare",
    "a few lines of torch: eigvalsh of the thin Gram matrix, no checks, no clusters",
    "rival",
    baselines.bare_gram_values,
)
SVDVALS = _from_values(
    "svdvals",
    "torch.linalg.svdvals of the features with autograd",
    "rival",
    baselines.svd_gram_values,
)


def _bare_compiled() -> Way:
    compiled = torch.compile(baselines.bare_gram_values, fullgraph=True)
    return _from_values("bare_compiled", "torch.compile of the bare composition", "rival", compiled)


def _ways(options: Options, *ways: Way) -> tuple[Way, ...]:
    return (*ways, _bare_compiled()) if options.compiled_baseline else ways


# --- contenders -------------------------------------------------------------------------------


def _contender(
    way: Way,
    inputs: Sequence[Tensor],
    forward: Callable[[], Tensors],
    right: expected.Expected,
    tolerance: float,
    items: int,
) -> Contender:
    def backward(values: Tensors) -> Tensors:
        return torch.autograd.grad([value.sum() for value in values], list(inputs))

    def check(values: Tensors, gradients: Tensors) -> float:
        return max(
            expected.relative_error(values, right.values),
            expected.relative_error(gradients, right.gradients),
        )

    return Contender(
        way.name, way.label, way.role, forward, backward, check, tolerance, items=items
    )


def _floor(inputs: Sequence[Tensor], items: int) -> Contender:
    detached = [x.detach() for x in inputs]

    def forward() -> Tensors:
        return tuple(baselines.gram_floor(x) for x in detached)

    def backward(values: Tensors) -> Tensors:
        return tuple(
            baselines.gram_floor_backward(x, thin) for x, thin in zip(detached, values, strict=True)
        )

    label = "one Gram product and one gradient product on the thin side"
    return Contender("floor", label, "floor", forward, backward, items=items)


def _expected_r_ill(x: Tensor, published: bool, rank: int | None = None) -> expected.Expected:
    if x.dim() == 3:
        return expected.stacked([_expected_r_ill(matrix, published) for matrix in x])
    array = expected.as_float64(x)
    n, p = array.shape
    if published:
        return expected.gram_r_ill(array, width=p, floor_smallest=n < p or rank is not None)
    return expected.gram_r_ill(array, rank=rank)


def _tolerance(x: Tensor, published: bool) -> float:
    if published:
        return 1e-6  # its ridge moves every eigenvalue by 1e-6
    return 1e-8 if x.dtype == torch.float64 else 1e-4


def pair_contenders(primary: Tensor, harmful: Tensor, ways: Sequence[Way]) -> list[Contender]:
    """R_well of the primary and R_ill of the harmful features, as one training step has them."""
    primary, harmful = primary.requires_grad_(), harmful.requires_grad_()
    well = expected.gram_r_well(expected.as_float64(primary))
    right_ill = {flag: _expected_r_ill(harmful, flag) for flag in {way.published for way in ways}}
    contenders = []
    for way in ways:
        ill = right_ill[way.published]
        right = expected.Expected(well.values + ill.values, well.gradients + ill.gradients)

        def forward(way: Way = way) -> Tensors:
            return way.r_well(primary), way.r_ill(harmful)

        contenders.append(
            _contender(
                way, (primary, harmful), forward, right, _tolerance(primary, way.published), 2
            )
        )
    return [*contenders, _floor((primary, harmful), 2)]


def r_ill_contenders(x: Tensor, ways: Sequence[Way], rank: int | None = None) -> list[Contender]:
    """R_ill of features x (n, p) of that rank, or of each matrix of a batch (b, n, p)."""
    x = x.requires_grad_()
    right = {flag: _expected_r_ill(x, flag, rank) for flag in {way.published for way in ways}}
    contenders = []
    for way in ways:

        def forward(way: Way = way) -> Tensors:
            return (way.r_ill(x),)

        contenders.append(
            _contender(way, (x,), forward, right[way.published], _tolerance(x, way.published), 1)
        )
    return [*contenders, _floor((x,), 1)]


def svds_contender(x: Tensor) -> Contender:
    """ARPACK on the features: extreme singular values, no gradient."""
    array = expected.as_float64(x)
    right = np.asarray(np.linalg.svd(array, compute_uv=False)[[0, -1]], dtype=np.float64)

    def forward() -> Tensors:
        return (torch.tensor(baselines.svds_extremes(array), dtype=torch.float64),)

    return Contender(
        "svds",
        "scipy.sparse.linalg.svds, largest and smallest; no gradient",
        "rival",
        forward,
        check=lambda values, _: expected.relative_error(values, [right]),
        tolerance=ITERATIVE_TOLERANCE,
    )


# --- square Hessian ---------------------------------------------------------------------------

HESSIAN_KAPPA = 1e4
TRACKED_STEP = 1e-5
# Full decompositions of larger ones take half a minute a call.
LARGEST_DECOMPOSED = 2048


def _log_ratio(extremes: ops.SymmetricExtremes) -> Tensor:
    return extremes.lambda_max.log() - extremes.lambda_min.log()


def _our_log_condition_number(h: Tensor) -> Tensor:
    return _log_ratio(ops.symmetric_extremes(h))


def _tracked_log_condition_number(h: Tensor) -> Regularizer:
    """Log kappa of h from the state that a tracker has after the matrix one training step before.

    The step is a congruence (I + E) h (I + E)^T with |E| = 2 TRACKED_STEP, as an update of theta
    makes one. With eigenvalues as dense as these at the bottom, a step ten times as large mixes the
    last vector with its neighbours and ends in a cold call. Every call starts from that same state:
    h itself is never what the tracker saw last.
    """
    p = h.shape[0]
    generator = torch.Generator().manual_seed(SEED + p + 1)
    noise = torch.randn(p, p, generator=generator, dtype=torch.float64).to(h.device)
    step = torch.eye(p, dtype=torch.float64, device=h.device) + TRACKED_STEP * noise / p**0.5
    before = step @ h.detach() @ step.mT
    tracker = ops.SpectrumTracker()
    tracker((before + before.mT) / 2)
    state = dict(tracker._buffers)

    def tracked(matrix: Tensor) -> Tensor:
        tracker._buffers.update(state)  # a call makes new tensors and leaves these alone
        warm = tracker.warm_calls
        value = _log_ratio(tracker(matrix))
        if tracker.warm_calls == warm:
            raise RuntimeError("the tracker fell back to a decomposition")
        return value

    return tracked


def hessian_contenders(options: Options, p: int) -> list[Contender]:
    """Log kappa of a positive definite h (p, p) with eigenvalues graded from 1 to 1e-4."""
    generator = torch.Generator().manual_seed(SEED + p)
    vectors, _ = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(-np.log10(HESSIAN_KAPPA), 0, p, dtype=torch.float64)
    matrix = (vectors * eigenvalues) @ vectors.mT
    h = ((matrix + matrix.mT) / 2).to(options.device).requires_grad_()
    right = expected.log_condition_number(
        expected.as_float64(eigenvalues), expected.as_float64(vectors)
    )

    def bare(matrix: Tensor) -> Tensor:
        spectrum_of = torch.linalg.eigh(matrix)[0]
        return spectrum_of[-1].log() - spectrum_of[0].log()

    # The gradient of the smallest eigenvalue is as accurate as its gap allows: neighbours differ by
    # a factor kappa^(1/p), so the vector carries eps * kappa / (kappa^(1/p) - 1). The published
    # ridge moves lambda_min = 1e-4 by one percent.
    tracked = []
    if h.device.type == "cpu":  # elsewhere every call of the tracker is a cold one
        label = f"immunize_ext, SpectrumTracker after a relative step of {TRACKED_STEP:.0e}"
        tracked = [("tracked", label, "ours", _tracked_log_condition_number(h), 1e-6)]
    ways = [
        ("ours", "immunize_ext, cold", "ours", _our_log_condition_number, 1e-6),
        *tracked,
        (
            "published",
            "A: eigvalsh of h + 1e-6 I in float64 with autograd",
            "baseline",
            baselines.published_log_condition_number,
            2e-2,
        ),
        ("composite", "B: torch.linalg.eigh with autograd", "baseline", bare, 1e-6),
    ]

    def contender(
        name: str, label: str, role: Any, function: Regularizer, tolerance: float
    ) -> Contender:
        way = Way(name, label, role, function, function)
        return _contender(way, (h,), lambda: (function(h),), right, tolerance, 1)

    plain = h.detach()
    array = expected.as_float64(plain)
    extremes = [np.asarray(eigenvalues[-1]), np.asarray(eigenvalues[0])]

    def floor_forward() -> Tensors:
        return baselines.hessian_floor(plain)

    def floor_backward(values: Tensors) -> Tensors:
        return (baselines.hessian_floor_backward(*values),)

    def eigsh_forward() -> Tensors:
        return tuple(
            torch.tensor(value, dtype=torch.float64) for value in baselines.eigsh_extremes(array)
        )

    def check_extremes(values: Tensors, _: Tensors) -> float:
        return expected.relative_error(values, extremes)

    return [
        *(contender(*way) for way in ways),
        Contender(
            "lobpcg",
            "torch.lobpcg, 100 iterations for each extreme; no gradient",
            "rival",
            lambda: baselines.lobpcg_extremes(plain),
            check=check_extremes,
            tolerance=ITERATIVE_TOLERANCE,
        ),
        Contender(
            "eigsh",
            "scipy.sparse.linalg.eigsh, the smallest by shift-invert; no gradient",
            "rival",
            eigsh_forward,
            check=check_extremes,
            tolerance=ITERATIVE_TOLERANCE,
        ),
        Contender(
            "floor",
            "one Cholesky factorisation, eight products, eight solves, one rank-two matrix",
            "floor",
            floor_forward,
            floor_backward,
        ),
    ]


# --- rows -------------------------------------------------------------------------------------


def cases(options: Options) -> list[Case]:
    """All rows; with ``--quick`` the same rows at tiny sizes."""
    quick = options.quick
    all_ways = _ways(options, OURS, PUBLISHED, PUBLISHED_SVD, COMPOSITE, BARE, SVDVALS)
    usual = _ways(options, OURS, PUBLISHED, COMPOSITE, BARE, SVDVALS)
    n, p = (6, 20) if quick else (64, 784)
    on_gpu = options.device.type == "cuda"
    pair_targets = (
        (Target("faster", "composite", 5.0),)
        if on_gpu
        else (
            Target("faster", "published", 200.0),
            Target("faster", "composite", 2.2),
            Target("within", "floor", 1.6),
        )
    )
    rows = [
        Case(
            "pair-64x784",
            "R_well of primary and R_ill of harmful features, 64 x 784 each",
            {"matrices": 2, "n": n, "p": p},
            "float64",
            "matrix",
            lambda: pair_contenders(
                features(options, n, p), features(options, n, p, variant=1), all_ways
            ),
            pair_targets,
        ),
        Case(
            "pair-64x784-float32",
            "the same in float32",
            {"matrices": 2, "n": n, "p": p},
            "float32",
            "matrix",
            lambda: pair_contenders(
                features(options, n, p).float(),
                features(options, n, p, variant=1).float(),
                usual,
            ),
        ),
        Case(
            "single-64x784-kappa-1e9",
            "R_ill of features 64 x 784 with condition number 1e9: no Gram matrix will do",
            {"matrices": 1, "n": n, "p": p},
            "float64",
            "matrix",
            lambda: [
                *r_ill_contenders(
                    features(options, n, p, kappa=1e9), (OURS, COMPOSITE, BARE, SVDVALS)
                ),
                svds_contender(features(options, n, p, kappa=1e9)),
            ],
            note="the extremes of a Gram matrix cannot be right here; what is not timed was wrong",
        ),
        _cliff_case(options),
        _batch_case(
            options,
            "groups-20x100x768",
            "R_ill of 20 groups of 100 x 768",
            (3, 8, 20) if quick else (20, 100, 768),
            _cpu_targets(options, 130.0, 2.7, 1.6),
            usual,
            Budget(30.0, 5, 100),
        ),
        _batch_case(
            options,
            "batch-90x64x784",
            "R_ill of 90 matrices of 64 x 784",
            (5, 6, 20) if quick else (90, 64, 784),
            _cpu_targets(options, 180.0, 1.7, 1.6),
            usual,
            Budget(60.0, 5, 100),
        ),
        _tall_case(options),
        _wide_features_case(options),
        _deficient_case(
            options,
            "digit-5949x784",
            "R_ill of 5949 x 784 features of rank 535, with the spectrum of one digit of MNIST",
            Deficient(40, 24, 17, 15, DIGIT.spectrum) if quick else DIGIT,
            (Target("faster", "published", 4.0),),
        ),
        _deficient_case(
            options,
            "houses-200x79",
            "R_ill of 200 x 79 features of rank 74, with the spectrum of House Prices",
            Deficient(20, 9, 8, 6, HOUSES.spectrum) if quick else HOUSES,
            (Target("faster", "published", 1.0),),
        ),
        *(_hessian_case(options, side) for side in ((24, 32) if quick else (768, 2048))),
        *_tiny.cases(options),
    ]
    return [*rows, *sweep_cases(options)]


def _cliff_case(options: Options) -> Case:
    """Side 33 against side 32, where batched GPU solvers change their route."""
    count, p = (4, 40) if options.quick else (128, 784)

    def build() -> list[Contender]:
        contenders = r_ill_contenders(features(options, count, 33, p), (OURS, COMPOSITE))
        at_32 = r_ill_contenders(features(options, count, 32, p), (OURS, COMPOSITE))
        return [
            *contenders,
            *(
                dataclasses.replace(
                    contender,
                    name=f"{contender.name}_32",
                    label=f"{contender.label}; side 32 in place of 33",
                )
                for contender in at_32
            ),
        ]

    return Case(
        "side-32-33",
        "R_ill of 128 matrices of 33 x 784, and of 32 x 784",
        {"matrices": count, "n": 33, "p": p},
        "float64",
        "call",
        build,
        (Target("within", "ours_32", 1.5),),
    )


def _cpu_targets(
    options: Options, published: float, composite_ratio: float, floor: float
) -> tuple[Target, ...]:
    if options.device.type != "cpu":
        return ()
    return (
        Target("faster", "published", published),
        Target("faster", "composite", composite_ratio),
        Target("within", "floor", floor),
    )


def _batch_case(
    options: Options,
    identifier: str,
    title: str,
    shape: tuple[int, int, int],
    targets: tuple[Target, ...],
    ways: Sequence[Way],
    budget: Budget,
) -> Case:
    return Case(
        identifier,
        title,
        {"matrices": shape[0], "n": shape[1], "p": shape[2]},
        "float64",
        "call",
        lambda: r_ill_contenders(features(options, *shape), ways),
        targets,
        budget=budget,
    )


def _tall_case(options: Options) -> Case:
    n, p = (60, 12) if options.quick else (12000, 784)

    def build() -> list[Contender]:
        x = features(options, n, p)
        return [
            *r_ill_contenders(x, (OURS, PUBLISHED, COMPOSITE, BARE, SVDVALS)),
            _streamed_contender(x.detach(), max(1, n // 12)),
            svds_contender(x.detach()),
        ]

    targets = (Target("faster", "published", 2.2),) if options.device.type == "cpu" else ()
    return Case(
        "tall-12000x784",
        "R_ill of features 12000 x 784",
        {"matrices": 1, "n": n, "p": p},
        "float64",
        "matrix",
        build,
        targets,
        budget=Budget(40.0, 5, 50),
    )


def _streamed_contender(x: Tensor, rows: int) -> Contender:
    """R_ill of x from blocks of so many rows, and the gradient block by block."""
    right = _expected_r_ill(x, published=False)
    blocks = x.split(rows)
    states: list[ops.StreamedGram] = []

    def r_ill(extremes: ops.GramExtremes) -> Tensor:
        return baselines.r_ill_of(baselines.GramValues(*extremes[:4]))

    def forward() -> Tensors:
        states[:] = [ops.StreamedGram(blocks)]
        return (r_ill(states[0].extremes),)

    def backward(values: Tensors) -> Tensors:
        del values
        _, derivative = states[0].derivative(r_ill)
        return (torch.cat([2.0 * (block @ derivative) for block in blocks]),)

    def check(values: Tensors, gradients: Tensors) -> float:
        return max(
            expected.relative_error(values, right.values),
            expected.relative_error(gradients, right.gradients),
        )

    return Contender(
        "streamed",
        f"immunize_ext.ops.StreamedGram, blocks of {rows} rows; its kappa is not squared",
        "ours",
        forward,
        backward,
        check,
        tolerance=1e-8,
    )


def _wide_features_case(options: Options) -> Case:
    n, p = (30, 24) if options.quick else (4096, 2048)
    return Case(
        "features-4096x2048",
        "R_ill of features 4096 x 2048, as deep networks give them",
        {"matrices": 1, "n": n, "p": p},
        "float64",
        "matrix",
        lambda: r_ill_contenders(features(options, n, p), (OURS, PUBLISHED, COMPOSITE)),
        budget=Budget(30.0, 3, 20),
    )


def _deficient_case(
    options: Options,
    identifier: str,
    title: str,
    kind: Deficient,
    targets: tuple[Target, ...],
) -> Case:
    ways = (OURS, PUBLISHED, COMPOSITE, BARE, SVDVALS)
    return Case(
        identifier,
        title,
        {"matrices": 1, "n": kind.samples, "p": kind.columns},
        "float64",
        "matrix",
        lambda: r_ill_contenders(deficient_features(options, kind), ways, kind.rank),
        targets if options.device.type == "cpu" else (),
        note="published code divides by p and takes rounding noise for the smallest eigenvalue",
        budget=Budget(20.0, 3, 100),
    )


def _hessian_case(options: Options, side: int) -> Case:
    targets = (
        (Target("faster", "published", 4.0), Target("faster", "published", 20.0, "tracked"))
        if options.device.type == "cpu"
        else ()
    )
    return Case(
        f"hessian-{side}",
        f"log kappa of a {side} x {side} Hessian, kappa 1e4",
        {"matrices": 1, "p": side},
        "float64",
        "matrix",
        lambda: hessian_contenders(options, side),
        targets,
        budget=Budget(30.0, 3, 50),
    )


def sweep_cases(options: Options) -> list[Case]:
    """Rows for the plots of cost against size."""
    quick = options.quick
    samples = (4, 8) if quick else (16, 31, 32, 33, 64, 128, 256, 512)
    counts = (1, 3) if quick else (1, 4, 16, 64, 256)
    sides = (8, 12) if quick else (128, 256, 512, 1024, 2048, 4096)
    if options.device.type != "cpu":
        sides = tuple(side for side in sides if side <= 1024)  # scipy's eigsh stays on the CPU
    kappas = (1e1, 1e9) if quick else (1e1, 1e3, 1e5, 1e6, 1e7, 1e9, 1e12)
    return [
        *(_samples_case(options, n, 20 if quick else 784) for n in samples),
        *(_matrices_case(options, count, (6, 20) if quick else (64, 784)) for count in counts),
        *(_side_case(options, side) for side in sides),
        *(_kappa_case(options, kappa, (6, 20) if quick else (64, 784)) for kappa in kappas),
        *grid_cases(options),
    ]


# What a user may have: a small layer to a whole digit of MNIST.
GRID = (
    *((4, 8), (8, 8), (16, 32), (32, 64), (64, 128), (64, 784), (256, 256), (256, 1024)),
    *((512, 784), (1000, 2048), (5000, 784)),
)


def grid_cases(options: Options) -> list[Case]:
    """Ours against a few lines, from one tiny matrix to a large one and for many tiny ones."""
    shapes = ((3, 4), (4, 8)) if options.quick else GRID
    sides = (2, 3) if options.quick else (2, 4, 8, 16, 32)
    count = 5 if options.quick else 1000
    return [
        case
        for dtype in (torch.float64, torch.float32)
        for case in (
            *(_grid_case(options, 1, shape, shape[0] * shape[1], dtype) for shape in shapes),
            *(_grid_case(options, count, (side, 2 * side), side, dtype) for side in sides),
        )
    ]


def _grid_case(
    options: Options, count: int, shape: tuple[int, int], size: int, dtype: torch.dtype
) -> Case:
    n, p = shape
    word = str(dtype).removeprefix("torch.")
    one = count == 1
    name, x = ("one n x p matrix", "entries n p") if one else (f"{count} of n x 2 n", "n")
    return Case(
        f"grid-{'' if one else f'{count}x'}{n}x{p}-{word}",
        f"R_ill of {'one matrix' if one else f'{count} matrices'} of {n} x {p} in {word}",
        {"matrices": count, "n": n, "p": p},
        word,
        "call",
        lambda: r_ill_contenders(
            features(options, *(() if one else (count,)), n, p).to(dtype), (OURS, BARE)
        ),
        sweep={"name": f"R_ill of {name}, {word}", "x": x, "value": size},
        budget=Budget(1.5, 3, 100),
    )


def _samples_case(options: Options, n: int, p: int) -> Case:
    ways = (OURS, PUBLISHED, COMPOSITE, BARE, SVDVALS)
    return Case(
        f"samples-{n}",
        f"R_ill of features {n} x {p}",
        {"matrices": 1, "n": n, "p": p},
        "float64",
        "matrix",
        lambda: r_ill_contenders(features(options, n, p), ways),
        sweep={"name": f"R_ill of features n x {p}", "x": "n", "value": n},
        budget=Budget(2.0, 3, 50),
    )


# The published loop over more matrices than this takes seconds a call and shows nothing new.
MOST_PUBLISHED_MATRICES = 16


def _matrices_case(options: Options, count: int, shape: tuple[int, int]) -> Case:
    n, p = shape
    ways: tuple[Way, ...] = (OURS, COMPOSITE, BARE, SVDVALS)
    if count <= MOST_PUBLISHED_MATRICES:
        ways = (OURS, PUBLISHED, COMPOSITE, BARE, SVDVALS)
    return Case(
        f"matrices-{count}",
        f"R_ill of {count} matrices of {n} x {p}",
        {"matrices": count, "n": n, "p": p},
        "float64",
        "call",
        lambda: r_ill_contenders(features(options, count, n, p), ways),
        sweep={"name": f"R_ill of b matrices of {n} x {p}", "x": "matrices", "value": count},
        budget=Budget(3.0, 3, 50),
    )


def _kappa_case(options: Options, kappa: float, shape: tuple[int, int]) -> Case:
    n, p = shape
    return Case(
        f"kappa-{kappa:.0e}".replace("+", ""),
        f"R_ill of features {n} x {p} with condition number {kappa:.0e}",
        {"matrices": 1, "n": n, "p": p},
        "float64",
        "matrix",
        lambda: [
            *r_ill_contenders(features(options, n, p, kappa=kappa), (OURS, COMPOSITE, SVDVALS)),
            svds_contender(features(options, n, p, kappa=kappa)),
        ],
        note="beyond about 4e6 the extremes of a Gram matrix are not proven, and ours decomposes",
        sweep={"name": f"R_ill of features {n} x {p} against kappa", "x": "kappa", "value": kappa},
        budget=Budget(2.0, 3, 50),
    )


def _side_case(options: Options, side: int) -> Case:
    return Case(
        f"side-{side}",
        f"log kappa of a {side} x {side} Hessian",
        {"matrices": 1, "p": side},
        "float64",
        "matrix",
        lambda: [
            contender
            for contender in hessian_contenders(options, side)
            if side <= LARGEST_DECOMPOSED or contender.name not in ("published", "composite")
        ],
        sweep={"name": "log kappa of a p x p Hessian", "x": "p", "value": side},
        budget=Budget(3.0, 3, 50),
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run("spectrum", "benchmarks.spectrum", cases, argv, __doc__.partition("\n")[0])


if __name__ == "__main__":
    sys.exit(main())
