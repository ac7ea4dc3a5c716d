"""One set of inputs per raw operator, shared by the tests of every layer and device.

``sample_inputs(operator)`` gives named argument tuples of ``torch.ops.immunize_ext.<operator>``:
simple and repeated extremes, wide, tall and square, batched and empty, column-major, half types.
The backward operators get what the forward operators return, so the samples are valid by
construction and the forward kernels need no second description here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from immunize_ext import _load
from immunize_ext.ops import operators
from immunize_ext.testing.samples import matrix_from_spectrum

# A property that is asked of both routes shares the examples of the profile between them; one that
# calls many operators an example makes do with a quarter.
half_examples = settings(max_examples=max(10, settings().max_examples // 2))
fewer_examples = settings(max_examples=max(10, settings().max_examples // 4))

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

# What only the compiled operators promise or have.
compiled_only = pytest.mark.skipif(
    not _load.available(), reason="the compiled part is not loaded, and this is about its kernels"
)

# rank_rtol, cluster_rtol, full_rank as the public functions fill them in for small float64 input.
POLICY = (10 * EPS, 10 * EPS, False)
FULL = (10 * EPS, 10 * EPS, True)


class Sample(NamedTuple):
    """Arguments of one call, and what is special about them."""

    name: str
    arguments: tuple[Any, ...]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that no other test changes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(sigma: Sequence[float], n: int, p: int, *, seed: int = 0) -> Tensor:
    """A float64 matrix (n, p) with these singular values."""
    return matrix_from_spectrum(np.random.default_rng(seed), n, p, sigma).matrix


def diagonal(*values: float) -> Tensor:
    """The diagonal matrix of these numbers, float64."""
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def column_major(a: Tensor) -> Tensor:
    """The same numbers, matrices stored by columns, as LAPACK returns them."""
    return a.mT.contiguous().mT


def symmetric_clusters() -> Tensor:
    """diag(1, 1, 2, 3, 3): both extremes are double."""
    return diagonal(1.0, 1.0, 2.0, 3.0, 3.0)


def _matrices(device: str) -> list[tuple[str, Tensor]]:
    samples = [
        ("wide", gaussian(3, 5)),
        ("tall", gaussian(5, 3, seed=1)),
        ("square", gaussian(4, 4, seed=2)),
        ("one", gaussian(1, 1, seed=3)),
        ("row", gaussian(1, 4, seed=4)),
        ("batch", gaussian(2, 3, 4, 3, seed=5)),
        ("empty", gaussian(0, 3, 4)),
        ("clusters", symmetric_clusters()),
        ("deficient", with_spectrum([2.0, 1.0, 0.0], 4, 3)),
        ("zero", torch.zeros(3, 2, dtype=torch.float64)),
        ("column major", column_major(gaussian(2, 3, 4, seed=6))),
        ("float32", gaussian(3, 4, seed=7, dtype=torch.float32)),
        ("bfloat16", gaussian(3, 4, seed=8, dtype=torch.bfloat16)),
    ]
    return [(name, a.to(device)) for name, a in samples]


def _spectrum(device: str) -> list[Sample]:
    samples = [Sample(name, (a, *POLICY)) for name, a in _matrices(device)]
    samples += [
        Sample(f"{name}, full", (a, *FULL))
        for name, a in _matrices(device)
        if name in ("wide", "deficient")
    ]
    return samples


def _batch_gradient(a: Tensor, seed: int) -> Tensor:
    return gaussian(*a.shape[:-2], seed=seed).to(a.device)


def _extremal_backward(device: str) -> list[Sample]:
    samples = []
    for name, (a, *policy) in _spectrum(device):
        outputs = torch.ops.immunize_ext.extremal_singular_values(a, *policy)
        grads = (_batch_gradient(a, 21), _batch_gradient(a, 22))
        samples.append(Sample(name, (*grads, a, *outputs[3:], *policy)))
    return samples


def _double_backward(gradients: int, device: str) -> list[Sample]:
    # Repeated extremes have no second derivative, the zero matrix neither.
    samples = []
    for name, (a, *policy) in _spectrum(device):
        if name in ("clusters", "zero"):
            continue
        cotangent = gaussian(*a.shape, seed=31).to(a)
        grads = [_batch_gradient(a, 32 + k) for k in range(gradients)]
        samples.append(Sample(name, (cotangent, *grads, a, *policy)))
    return samples


def _extremal_double_backward(device: str) -> list[Sample]:
    return _double_backward(2, device)


def _gram_backward(device: str) -> list[Sample]:
    samples = []
    for name, (x, *policy) in _spectrum(device):
        largest, smallest, _, _, *rest = torch.ops.immunize_ext.gram_extremes(x, *policy)
        grads = tuple(_batch_gradient(x, 23 + k) for k in range(3))
        samples.append(Sample(name, (*grads, x, largest, smallest, *rest, *policy)))
    return samples


def _gram_double_backward(device: str) -> list[Sample]:
    return _double_backward(3, device)


def _regularizer(device: str) -> list[Sample]:
    samples = []
    for name, (x, *policy) in _spectrum(device):
        if name in ("square", "column major", "wide, full"):
            continue
        # R_ill of equal values raises without a floor.
        floor = 1e-3 if name in ("zero", "one", "row") else None
        for gram, of in ((True, " of K"), (False, "")):
            samples.append(Sample(f"well{of}, {name}", (x, gram, False, None, None, *policy)))
            samples.append(Sample(f"ill{of}, {name}", (x, gram, True, None, floor, *policy)))
    x, *policy = samples[0].arguments[0], *POLICY
    samples.append(Sample("well, p given", (x, True, False, 7.0, None, *policy)))
    samples.append(Sample("ill, k given", (x, False, True, 2.0, 0.1, *policy)))
    return samples


def _regularizer_backward(device: str) -> list[Sample]:
    samples = []
    for name, arguments in _regularizer(device):
        x, gram, ill, normaliser, _, *policy = arguments
        value, *saved = torch.ops.immunize_ext.regularizer(*arguments)
        grad = gaussian(*value.shape, seed=24).to(value)
        samples.append(Sample(name, (grad, x, *saved, gram, ill, normaliser, *policy)))
    return samples


def _condition_number(device: str) -> list[Sample]:
    return [
        Sample(f"{'log, ' if logarithm else ''}{name}", (a, logarithm, *policy))
        for logarithm in (False, True)
        for name, (a, *policy) in _spectrum(device)
    ]


def _condition_number_backward(device: str) -> list[Sample]:
    samples = []
    for name, arguments in _condition_number(device):
        a, _, *policy = arguments
        value, *saved = torch.ops.immunize_ext.condition_number(*arguments)
        grad = gaussian(*value.shape, seed=24).to(value)
        samples.append(Sample(name, (grad, a, *saved, *policy)))
    return samples


def symmetric(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random symmetric, in general indefinite matrices (*, p, p)."""
    a = gaussian(*shape, shape[-1], seed=seed)
    return ((a + a.mT) / 2).to(dtype)


def _symmetric(device: str) -> list[Sample]:
    samples = [
        ("square", symmetric(4)),
        ("one", symmetric(1, seed=1)),
        ("batch", symmetric(2, 3, 4, seed=2)),
        ("empty", symmetric(0, 3)),
        ("clusters", diagonal(1.0, 1.0, 2.0, -3.0, -3.0)),
        ("zero", torch.zeros(3, 3, dtype=torch.float64)),
        ("column major", column_major(symmetric(2, 4, seed=3))),
        ("float32", symmetric(4, seed=4, dtype=torch.float32)),
        ("bfloat16", symmetric(4, seed=5, dtype=torch.bfloat16)),
    ]
    return [Sample(name, (h.to(device), 10 * EPS)) for name, h in samples]


def _symmetric_backward(device: str) -> list[Sample]:
    samples = []
    for name, (h, cluster_rtol) in _symmetric(device):
        saved = torch.ops.immunize_ext.symmetric_extremes(h, cluster_rtol)[2:]
        grads = (_batch_gradient(h, 25), _batch_gradient(h, 26))
        samples.append(Sample(name, (*grads, h, *saved, cluster_rtol)))
    return samples


def _symmetric_double_backward(device: str) -> list[Sample]:
    samples = []
    for name, (h, cluster_rtol) in _symmetric(device):
        if name not in ("clusters", "zero"):
            grads = (_batch_gradient(h, 27), _batch_gradient(h, 28))
            cotangent = gaussian(*h.shape, seed=29).to(h)
            samples.append(Sample(name, (cotangent, *grads, h, cluster_rtol)))
    return samples


def _symmetric_reference(device: str) -> list[Sample]:
    samples = [
        ("square", symmetric(4)),
        ("one", symmetric(1, seed=1)),
        ("longer than a panel", symmetric(15, seed=2)),
        ("clusters", diagonal(1.0, 1.0, 2.0, -3.0, -3.0)),
        ("float32", symmetric(4, seed=4, dtype=torch.float32)),
        ("column major", column_major(symmetric(4, seed=5))),
    ]
    return [Sample(name, (h.to(device), 10 * EPS)) for name, h in samples]


def _symmetric_track(device: str) -> list[Sample]:
    samples = []
    for name, (h, cluster_rtol) in _symmetric_reference(device):
        _, _, *state = torch.ops.immunize_ext.symmetric_reference(h, cluster_rtol)
        moved = h + 1e-3 * symmetric(h.shape[-1], seed=6).to(h)
        samples.append(Sample(name, (moved, cluster_rtol, *state)))
    return samples


def cholesky_of_gram(d: int, *batch: int, seed: int = 40) -> Tensor:
    """Lower Cholesky factor (*, d, d) of a well-conditioned Gram matrix."""
    rows = gaussian(*batch, 4 * d, d, seed=seed)
    return torch.linalg.cholesky(rows.mT @ rows).contiguous()


REPEATED_ROW_RTOL = 1e-12


def _merge_gram(device: str) -> list[Sample]:
    cases = [
        ("tall", gaussian(9, 5, seed=44)),
        ("wide", gaussian(3, 14, seed=45)),
        ("longer than a block", gaussian(300, 25, seed=46)),
        ("empty", gaussian(0, 3)),
        ("column major", column_major(gaussian(4, 3, seed=47))),
        ("float32", gaussian(6, 13, seed=48, dtype=torch.float32)),
        ("bfloat16", gaussian(6, 4, seed=49, dtype=torch.bfloat16)),
    ]
    return [Sample(name, (c_reg.to(device),)) for name, c_reg in cases]


def _merge_solve(device: str) -> list[Sample]:
    d, rows = 5, gaussian(3, 5, seed=41)
    repeated = torch.cat([rows, rows[:1]])
    hard, soft = torch.zeros(3).double(), torch.tensor([0.0, 0.5, 2.0]).double()
    chol, batched = cholesky_of_gram(d), cholesky_of_gram(d, 2)
    cases = [
        ("hard", (chol, rows, hard), False),
        ("soft", (chol, rows, soft), False),
        ("repeated", (chol, repeated, torch.zeros(4).double()), False),
        ("averaged", (chol, repeated, torch.zeros(4).double()), True),
        ("more rows than columns", (chol, gaussian(7, 5, seed=42), torch.zeros(7).double()), True),
        ("batch", (batched, gaussian(2, 3, 5, seed=43), torch.zeros(2, 3).double()), False),
        ("empty", (batched[:0], gaussian(0, 3, 5), torch.zeros(0, 3).double()), False),
        ("column major", (column_major(chol), column_major(rows), hard), False),
    ]
    return [
        Sample(name, (*(t.to(device) for t in tensors), REPEATED_ROW_RTOL, average))
        for name, tensors, average in cases
    ]


def _merge_saddle(device: str, first_rows: str = "") -> list[Sample]:
    """c, inverse_hardness, source, ridge, chol, root, basis, b; after a right-hand side, or not."""
    samples = []
    for name, (chol, c, hardness, *rest) in _merge_solve(device):
        b, root, basis, *_ = torch.ops.immunize_ext.merge_solve(chol, c, hardness, *rest)
        batch, (s, d) = c.shape[:-2], c.shape[-2:]
        source = gaussian(*batch, 4, d, seed=55).to(device)
        ridge = torch.full(batch, 0.5, dtype=torch.float64, device=device)
        saddle = (c, hardness, source, ridge, chol, root, basis, b)
        if first_rows:
            rows = {"d": d, "s": s}[first_rows]
            saddle = (gaussian(*batch, rows, 2, seed=56).to(device), *saddle)
        samples.append(Sample(name, saddle))
    return samples


class MergeShapes(NamedTuple):
    """Sizes of one merge: layers of ``out`` rows, ``rows`` tokens a concept, width ``d``."""

    out: tuple[int, ...]
    rows: tuple[int, ...]
    d: int
    batch: tuple[int, ...] = ()


def _merge_arguments(
    shapes: MergeShapes, dtype: torch.dtype, values: bool, device: str
) -> tuple[Any, ...]:
    out, rows, d, batch = shapes
    s = sum(rows)
    base = [gaussian(*batch, o, d, seed=50 + k, dtype=dtype) for k, o in enumerate(out)]
    if values:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        targets = [gaussian(*batch, o, s, seed=60 + k, dtype=wide) for k, o in enumerate(out)]
    else:
        targets = [
            gaussian(*batch, o, d, seed=70 + 10 * n + k, dtype=dtype)
            for n in range(len(rows))
            for k, o in enumerate(out)
        ]
    c = gaussian(*batch, s, d, seed=80)
    chol = cholesky_of_gram(d, *batch)
    b, *_ = torch.ops.immunize_ext.merge_solve(
        chol, c, torch.zeros(*batch, s).double(), REPEATED_ROW_RTOL, False
    )
    return (
        [w.to(device) for w in base],
        [t.to(device) for t in targets],
        list(rows),
        values,
        c.to(device),
        b.to(device),
    )


_MERGES: list[tuple[str, MergeShapes, torch.dtype, bool]] = [
    ("concepts", MergeShapes((3, 2), (2, 1), 5), torch.float64, False),
    ("values", MergeShapes((3, 2), (2, 1), 5), torch.float64, True),
    ("one row", MergeShapes((1,), (1,), 1), torch.float64, False),
    ("longer than a block", MergeShapes((70,), (2,), 4), torch.float64, False),
    ("batch", MergeShapes((3, 2), (2, 1), 4, (2, 2)), torch.float64, False),
    ("empty", MergeShapes((3,), (2,), 4, (0,)), torch.float64, False),
    ("float32", MergeShapes((3, 2), (2, 1), 6), torch.float32, False),
    ("float32 values", MergeShapes((3,), (3,), 6), torch.float32, True),
    ("bfloat16", MergeShapes((3,), (1, 1), 6), torch.bfloat16, False),
]


def _merge_apply(device: str) -> list[Sample]:
    samples = [Sample(name, _merge_arguments(*case, device)) for name, *case in _MERGES]
    base, targets, *rest = samples[0].arguments
    turned = [column_major(w) for w in base], [column_major(t) for t in targets]
    samples.append(Sample("column major", (*turned, *rest)))
    return samples


def _merge_apply_backward(device: str) -> list[Sample]:
    samples = []
    for name, arguments in _merge_apply(device):
        base, targets, rows, values, c, b = arguments
        merged, residual, _ = torch.ops.immunize_ext.merge_apply(*arguments)
        grads = [gaussian(*w.shape, seed=90 + k).to(w) for k, w in enumerate(merged)]
        common = (grads, base, targets, rows, values, c, b, residual)
        samples.append(Sample(name, (*common, True, True, True, True)))
        if name == "concepts":
            for number in range(16):
                needs = tuple(bool(number >> bit & 1) for bit in range(4))
                samples.append(Sample(f"needs {needs}", (*common, *needs)))
    return samples


def _moment_solve(device: str) -> list[Sample]:
    samples = []
    for name, batch, o, d in (
        ("matrix", (), 3, 4),
        ("one", (), 1, 1),
        ("batch", (2, 2), 3, 4),
        ("empty", (0,), 3, 4),
        ("no rows", (), 0, 4),
    ):
        x = gaussian(*batch, 9, d, seed=110)
        s = x.mT @ x
        arguments = (gaussian(*batch, o, d, seed=111), s, torch.linalg.cholesky(s).contiguous())
        samples.append(Sample(name, tuple(t.to(device) for t in arguments)))
    n, s, chol = samples[0].arguments
    samples.append(Sample("column major", (column_major(n), column_major(s), column_major(chol))))
    return samples


def _moment_product(device: str) -> list[Sample]:
    samples = []
    for name, batch, dtype in (
        ("matrix", (), torch.float64),
        ("batch", (2, 2), torch.float64),
        ("empty", (0,), torch.float64),
        ("float32", (), torch.float32),
    ):
        a = gaussian(*batch, 3, 4, seed=112, dtype=dtype).to(device)
        samples.append(Sample(name, (a, gaussian(*batch, 4, 2, seed=113, dtype=dtype).to(device))))
    a, b = samples[0].arguments
    samples.append(Sample("column major", (column_major(a), column_major(b))))
    return samples


def _leading_projector(device: str) -> list[Sample]:
    samples = []
    for name, batch in (("matrix", ()), ("batch", (2, 2)), ("empty", (0,))):
        x = gaussian(*batch, 6, 4, seed=114).to(device)
        samples.append(Sample(name, (x.mT @ x, 2)))
    samples.append(Sample("everything", (samples[0].arguments[0], 4)))
    samples.append(Sample("column major", (column_major(samples[0].arguments[0]), 1)))
    return samples


def _projector_solve(device: str) -> list[Sample]:
    samples = []
    for name, (h, rank) in _leading_projector(device):
        _, vectors, values = torch.ops.immunize_ext.leading_projector(h, rank)
        f = gaussian(*h.shape, seed=115).to(device)
        samples.append(Sample(name, (f, h, vectors, values, rank)))
    return samples


def _precondition(device: str) -> list[Sample]:
    x = gaussian(9, 4, seed=100)
    few = gaussian(2, 4, seed=101)
    ridge = 0.3
    factor = torch.linalg.cholesky(x.mT @ x + ridge * torch.eye(4))
    q, r = torch.linalg.qr(few.mT)
    basis, thin = q.mT, torch.linalg.cholesky(r @ r.mT + ridge * torch.eye(2))
    cases: list[tuple[str, tuple[Any, ...]]] = []
    for name, grad in (
        ("matrix", gaussian(3, 4, seed=102)),
        ("batch", gaussian(2, 3, 4, seed=103)),
        ("empty", gaussian(0, 3, 4)),
        ("column major", column_major(gaussian(3, 4, seed=104))),
        ("float32", gaussian(3, 4, seed=105, dtype=torch.float32)),
        ("float16", gaussian(3, 4, seed=106, dtype=torch.float16)),
    ):
        cases.append((name, (grad, factor, x[:0], ridge)))
        cases.append((f"{name}, few samples", (grad, thin, basis, ridge)))
    return [
        Sample(name, tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments))
        for name, arguments in cases
    ]


def _few_rows(device: str, *constants: str) -> list[Sample]:
    """Of x, or with a weight; ``constants`` after it, by name."""
    cases: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        ("matrix", (), torch.float64),
        ("batch", (2, 3), torch.float64),
        ("empty", (0,), torch.float64),
        ("float32", (), torch.float32),
        ("float16", (), torch.float16),
    ]
    samples = []
    for name, batch, dtype in cases:
        x = gaussian(*batch, 2, 4, seed=110, dtype=dtype)
        s = x.double() @ x.double().mT + 0.3 * torch.eye(2)
        given = {
            "x": x,
            "samples": x.clone(),
            "weight": gaussian(*batch, 3, 4, seed=111, dtype=dtype),
            # Fewer outputs than rows, and more of them: the order of the product.
            "grad": gaussian(*batch, 2, 3 if batch else 1, seed=113, dtype=dtype),
            "bias": gaussian(*batch, 3, seed=112, dtype=dtype) if name != "float32" else None,
            "factor": torch.linalg.cholesky(s),
        }
        arguments = [None if given[c] is None else given[c].to(device) for c in constants]
        samples.append(Sample(name, (*arguments, 0.3)))
    return samples


def _resolvents(device: str) -> list[Sample]:
    """Shifts that make a + shift I positive definite, also of a repeated and an indefinite a."""
    cases = [
        ("matrix", symmetric(4, seed=110), gaussian(4, 2, seed=111)),
        ("batch", symmetric(2, 3, 4, seed=112), gaussian(2, 3, 4, 1, seed=113)),
        ("one", symmetric(1, seed=114), gaussian(1, 1, seed=115)),
        ("empty", symmetric(0, 3, seed=116), gaussian(0, 3, 2)),
        ("no vectors", symmetric(3, seed=117), gaussian(3, 0)),
        ("clusters", symmetric_clusters(), gaussian(5, 2, seed=118)),
        ("column major", column_major(symmetric(4, seed=119)), column_major(gaussian(4, 2))),
        ("float32", symmetric(4, seed=120).float(), gaussian(4, 2, seed=121).float()),
        ("bfloat16", symmetric(4, seed=122).bfloat16(), gaussian(4, 2, seed=123).bfloat16()),
    ]
    samples = []
    for name, a, vectors in cases:
        shifts = torch.tensor([8.0, 9.5, 30.0], dtype=a.dtype).expand(*a.shape[:-2], 3)
        samples.append(Sample(name, tuple(t.to(device) for t in (a, shifts, vectors))))
    return samples


def _resolvents_backward(device: str) -> list[Sample]:
    samples = []
    for name, arguments in _resolvents(device):
        outputs = torch.ops.immunize_ext.resolvent_traces(*arguments)
        grads = (gaussian(*y.shape, seed=124 + k).to(device) for k, y in enumerate(outputs[:3]))
        samples.append(Sample(name, (*grads, *arguments, *outputs[3:])))
    return samples


def _khatri_rao(device: str) -> list[Sample]:
    """Both routes: pairs of tokens, and outer products of many tokens with few numbers."""
    cases = [
        ("pairs", gaussian(3, 2, 4, seed=130), gaussian(3, 2, 5, seed=131)),
        ("outer products", gaussian(3, 5, 2, seed=132), gaussian(3, 5, 2, seed=133)),
        ("batch", gaussian(2, 3, 2, 1, 3, seed=134), gaussian(2, 3, 2, 1, 2, seed=135)),
        ("empty", gaussian(0, 2, 1, 3), gaussian(0, 2, 1, 3)),
        ("float32", *(gaussian(2, 1, 3, seed=136 + k).float() for k in range(2))),
        ("bfloat16", *(gaussian(2, 3, 2, seed=138 + k).bfloat16() for k in range(2))),
        ("column major", *(column_major(gaussian(3, 2, 4, seed=140 + k)) for k in range(2))),
    ]
    return [Sample(name, (a.to(device), g.to(device), name != "batch")) for name, a, g in cases]


def _khatri_rao_backward(device: str) -> list[Sample]:
    samples = []
    for k, (name, arguments) in enumerate(_khatri_rao(device)):
        value = torch.ops.immunize_ext.khatri_rao_gram(*arguments)
        grad = gaussian(*value.shape, seed=142).to(device)
        # The first has both gradients; then one of them.
        samples.append(Sample(name, (grad, *arguments, k % 3 != 1, k % 3 != 2)))
    return samples


_BUILDERS: dict[str, Callable[[str], list[Sample]]] = {
    "extremal_singular_values": _spectrum,
    "extremal_singular_values_backward": _extremal_backward,
    "extremal_singular_values_double_backward": _extremal_double_backward,
    "gram_extremes": _spectrum,
    "gram_extremes_backward": _gram_backward,
    "gram_extremes_double_backward": _gram_double_backward,
    "regularizer": _regularizer,
    "regularizer_backward": _regularizer_backward,
    "condition_number": _condition_number,
    "condition_number_backward": _condition_number_backward,
    "symmetric_extremes": _symmetric,
    "symmetric_pair": _symmetric,
    "symmetric_extremes_backward": _symmetric_backward,
    "symmetric_extremes_double_backward": _symmetric_double_backward,
    "symmetric_reference": _symmetric_reference,
    "symmetric_track": _symmetric_track,
    "resolvent_traces": _resolvents,
    "resolvent_traces_backward": _resolvents_backward,
    "khatri_rao_gram": _khatri_rao,
    "khatri_rao_gram_backward": _khatri_rao_backward,
    "merge_gram": _merge_gram,
    "merge_solve": _merge_solve,
    "merge_constraint_map": _merge_saddle,
    "merge_free_solve": lambda device: _merge_saddle(device, "d"),
    "merge_constraint_solve": lambda device: _merge_saddle(device, "s"),
    "merge_apply": _merge_apply,
    "merge_apply_backward": _merge_apply_backward,
    "moment_solve": _moment_solve,
    "moment_product": _moment_product,
    "leading_projector": _leading_projector,
    "projector_solve": _projector_solve,
    "precondition": _precondition,
    "precondition_gradient": _precondition,
    "few_rows_linear": lambda device: _few_rows(device, "x", "weight", "bias", "factor"),
    "few_rows_product": lambda device: _few_rows(device, "grad", "x", "factor", "samples"),
    "few_rows_solve": lambda device: _few_rows(device, "x", "factor", "samples"),
    "few_rows_weight": lambda device: _few_rows(device, "weight", "samples"),
    "few_rows_precondition": lambda device: _few_rows(device, "weight", "samples"),
}

RAW_OPERATORS = tuple(_BUILDERS)
DIFFERENTIABLE = (
    "extremal_singular_values",
    "gram_extremes",
    "symmetric_extremes",
    "resolvent_traces",
    "khatri_rao_gram",
    "merge_apply",
    "moment_product",
)
if _load.available():  # the rules of these are in C++; public functions do without them
    DIFFERENTIABLE += ("regularizer", "condition_number", "symmetric_pair")
# Gradients are differentiable in grad and matrix together, as a part of their operator; the
# preconditioner in grad alone, and what it holds has no gradient of a function, on purpose.
HALF_DIFFERENTIABLE = (
    "extremal_singular_values_backward",
    "gram_extremes_backward",
    "regularizer_backward",
    "precondition",
    "precondition_gradient",
    "few_rows_linear",
    "few_rows_product",
    "few_rows_solve",
    "few_rows_weight",
    "few_rows_precondition",
    "symmetric_extremes_backward",
    "resolvent_traces_backward",
    "khatri_rao_gram_backward",
    # With C, Q and the right-hand side; the rest of their arguments follows from these.
    "merge_constraint_map",
    "merge_free_solve",
    "merge_constraint_solve",
    "merge_apply_backward",
    # With N and S; the factor follows from S.
    "moment_solve",
    # With F and H; vectors and values follow from H.
    "leading_projector",
    "projector_solve",
)
# Whether it succeeds depends on the numbers, and is a bool: it cannot be traced.
WITHOUT_FAKE = ("symmetric_track",)
# These refuse to be differentiated, by name.
WITHOUT_DERIVATIVE = tuple(
    name for name in RAW_OPERATORS if name not in (*DIFFERENTIABLE, *HALF_DIFFERENTIABLE)
)


def sample_inputs(operator: str, device: str = "cpu") -> list[Sample]:
    """Argument tuples of ``torch.ops.immunize_ext.<operator>`` on a device."""
    return _BUILDERS[operator](device)


def tensors_in(arguments: Any) -> list[Tensor]:
    """Every tensor of an argument tuple or of a result, depth first."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, (tuple, list)):
        return [tensor for part in arguments for tensor in tensors_in(part)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """The same structure with every tensor replaced."""
    if isinstance(arguments, Tensor):
        return function(arguments)
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(map_tensors(function, part) for part in arguments)
    return arguments


ROUTES = ("kernel", "composite")


@contextmanager
def taking_route(route: str) -> Iterator[None]:
    """Serve the public operators by the compiled kernels or by their torch-only composites.

    A context manager and no fixture, so that hypothesis tests can use it.
    """
    with operators.fallbacks_only() if route == "composite" else nullcontext():
        yield
