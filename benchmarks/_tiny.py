"""Rows of ``benchmarks.spectrum`` on tiny matrices: batches of them, and the cost of one call.

Each against the few lines of torch that a user would write: a full spectrum with autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from immunize_ext import ops
from immunize_ext.ops.regularizers import r_well

from . import _expected as expected
from ._results import Target
from ._session import Case, Options
from ._timing import Budget, Contender, Tensors

SEED = 20250701
Function = Callable[[Tensor], Tensor]

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def _normal(options: Options, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.to(options.device, dtype)


# --- a few lines of torch -------------------------------------------------------------------------


def bare_log_condition_number(a: Tensor) -> Tensor:
    """By all singular values."""
    sigma = torch.linalg.svdvals(a)
    return sigma[..., 0].log() - sigma[..., -1].log()


def bare_log_condition_number_of_gram(a: Tensor) -> Tensor:
    """By all eigenvalues of the thin Gram matrix, which squares the condition number."""
    gram = a @ a.mT if a.shape[-2] <= a.shape[-1] else a.mT @ a
    eigenvalues = torch.linalg.eigvalsh(gram)
    return (eigenvalues[..., -1].log() - eigenvalues[..., 0].log()) / 2


def bare_r_well(a: Tensor) -> Tensor:
    """By all singular values."""
    sigma = torch.linalg.svdvals(a)
    return sigma[..., 0].square() / 2 - a.square().sum((-2, -1)) / (2 * min(a.shape[-2:]))


def bare_spread(h: Tensor) -> Tensor:
    """lambda_max - lambda_min by all eigenvalues."""
    eigenvalues = torch.linalg.eigvalsh(h)
    return eigenvalues[..., -1] - eigenvalues[..., 0]


def our_spread(h: Tensor) -> Tensor:
    """lambda_max - lambda_min."""
    extremes = ops.symmetric_extremes(h)
    return extremes.lambda_max - extremes.lambda_min


# --- rows -----------------------------------------------------------------------------------------


def _contender(
    name: str, label: str, function: Function, x: Tensor, right: expected.Expected, tolerance: float
) -> Contender:
    def backward(values: Tensors) -> Tensors:
        return torch.autograd.grad([value.sum() for value in values], [x])

    def check(values: Tensors, gradients: Tensors) -> float:
        return max(
            expected.relative_error(values, right.values),
            expected.relative_error(gradients, right.gradients),
        )

    role = "ours" if name == "ours" else "rival"
    return Contender(name, label, role, lambda: (function(x),), backward, check, tolerance)


def _tolerance(x: Tensor, kappa: float) -> float:
    """What a full spectrum in the dtype of x can reach: eps kappa, and the gaps of the vectors."""
    return min(1e3 * torch.finfo(x.dtype).eps * kappa, 0.1)


def _log_condition_contenders(x: Tensor) -> list[Contender]:
    x = x.requires_grad_()
    array = expected.as_float64(x)
    right = expected.log_condition_numbers(array)
    tolerance = _tolerance(x, float(np.linalg.cond(array).max()))
    ways: list[tuple[str, str, Function]] = [
        ("ours", "immunize_ext.ops.log_condition_number", ops.log_condition_number),
        ("svdvals", "torch.linalg.svdvals with autograd", bare_log_condition_number),
        (
            "bare",
            "a few lines of torch: eigvalsh of the thin Gram matrix, no checks",
            bare_log_condition_number_of_gram,
        ),
    ]
    return [_contender(name, label, way, x, right, tolerance) for name, label, way in ways]


def _values_contenders(x: Tensor) -> list[Contender]:
    sigma = np.linalg.svd(expected.as_float64(x), compute_uv=False)
    right = [np.asarray(sigma[:, 0]), np.asarray(sigma[:, -1])]

    def ours() -> Tensors:
        extremes = ops.extremal_singular_values(x)
        return extremes.sigma_max, extremes.sigma_min

    def theirs() -> Tensors:
        values = torch.linalg.svdvals(x)
        return values[:, 0], values[:, -1]

    def check(values: Tensors, _: Tensors) -> float:
        return expected.relative_error(values, right)

    tolerance = 1e-8 if x.dtype == torch.float64 else 1e-4
    return [
        Contender(
            "ours",
            "immunize_ext.ops.extremal_singular_values",
            "ours",
            ours,
            check=check,
            tolerance=tolerance,
        ),
        Contender(
            "svdvals", "torch.linalg.svdvals", "rival", theirs, check=check, tolerance=tolerance
        ),
    ]


def _r_well_contenders(x: Tensor) -> list[Contender]:
    x = x.requires_grad_()
    right = expected.r_well(expected.as_float64(x))
    tolerance = _tolerance(x, 1.0)
    return [
        _contender("ours", "immunize_ext.ops.regularizers.r_well", r_well, x, right, tolerance),
        _contender(
            "svdvals", "torch.linalg.svdvals with autograd", bare_r_well, x, right, tolerance
        ),
    ]


def _spread_contenders(x: Tensor) -> list[Contender]:
    h = ((x + x.mT) / 2).requires_grad_()
    right = expected.spread(expected.as_float64(h))
    tolerance = _tolerance(h, 1.0)
    return [
        _contender("ours", "immunize_ext.ops.symmetric_extremes", our_spread, h, right, tolerance),
        _contender(
            "eigvalsh", "torch.linalg.eigvalsh with autograd", bare_spread, h, right, tolerance
        ),
    ]


Build = Callable[[Tensor], list[Contender]]


def cases(options: Options) -> list[Case]:
    """All rows, in float64 and float32."""
    count, many = (5, 9) if options.quick else (1000, 200_000)
    log_kappa, values = _log_condition_contenders, _values_contenders
    rows: list[tuple[str, str, tuple[int, ...], Build, str, float]] = [
        ("tiny-2x2", "extreme singular values", (many, 2, 2), values, "svdvals", 5.0),
        ("tiny-8x8", "log kappa", (count, 8, 8), log_kappa, "svdvals", 10.0),
        ("tiny-32x32", "log kappa", (count, 32, 32), log_kappa, "svdvals", 12.0),
        ("one-4x8", "log kappa", (4, 8), log_kappa, "svdvals", 1.0),
        ("one-8x8", "log kappa", (8, 8), log_kappa, "svdvals", 1.0),
        ("one-10x10", "R_well", (10, 10), _r_well_contenders, "svdvals", 1.0),
        ("one-symmetric-8", "lambda_max - lambda_min", (8, 8), _spread_contenders, "eigvalsh", 1.0),
        (
            "one-symmetric-64",
            "lambda_max - lambda_min",
            (64, 64),
            _spread_contenders,
            "eigvalsh",
            2.0,
        ),
    ]
    return [
        _case(options, name, what, shape, dtype, build, Target("faster", against, ratio))
        for name, what, shape, build, against, ratio in rows
        for dtype in DTYPES
    ]


def _case(
    options: Options,
    name: str,
    what: str,
    shape: tuple[int, ...],
    dtype: str,
    build: Build,
    target: Target,
) -> Case:
    *batch, n, p = shape
    matrices = math.prod(batch)
    many = f"{matrices} matrices of" if batch else "one matrix of"
    return Case(
        name if dtype == "float64" else f"{name}-{dtype}",
        f"{what} of {many} {n} x {p}",
        {"matrices": matrices, "n": n, "p": p},
        dtype,
        "call",
        lambda: build(_normal(options, *shape, dtype=DTYPES[dtype])),
        (target,) if options.device.type == "cpu" else (),
        budget=Budget(3.0, 5, 200),
    )
