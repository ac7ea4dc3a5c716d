"""Claim: as accurate as the input allows, at every condition number, on every route.

``python -m benchmarks.numerics [--quick] [--write docs/numerics.md]``  measure, and write the page
``python -m benchmarks.numerics --check docs/numerics.md``              exit status 1 where the page
                                                                       is not what the file says

Nothing here is compared with another floating-point solver. Spectra are known exactly: with H a
Hadamard matrix of side n, the matrix H diag(s) R, R being n rows of a Hadamard matrix of side p,
has the singular values sqrt(n p) s_i and vectors with entries +-1/sqrt(n) and +-1/sqrt(p), and for
integers s with n max(s) < 2^53 every entry is an integer that float64 holds. Beyond that, and for
the merge, the reference is mpmath with 50 digits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import mpmath
import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor

from immunize_ext.ops import (
    RegularizationFactor,
    extremal_singular_values,
    gram_extremes,
    merge_kv,
    symmetric_extremes,
)

from ._environment import environment_record
from ._page import parser, run, table

FILE = "numerics.json"
DIGITS = 50
SEED = 20261127
# Conditions of the input whose values are exact, and those that only 50 digits can judge.
EXACT_KAPPAS = (1e0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12)
LARGE_KAPPAS = (1e14, 1e15, 1e16)
GAPS = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-13, 3e-14, 1e-14)
MERGE_KAPPAS = (1e0, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12, 1e14)


# --- matrices whose spectrum is known -------------------------------------------------------------


def exact_matrix(values: Sequence[int], n: int, p: int) -> tuple[Tensor, float]:
    """H_n diag(values) R (n, p), exact in float64, and the factor sqrt(n p) of its spectrum."""
    if n * max(values) >= 2**53:
        raise ValueError(
            f"exact_matrix: n max(values) must be below 2^53, got {n * max(values):.3g}"
        )
    left = torch.from_numpy(hadamard(n).astype(np.float64))
    right = torch.from_numpy(hadamard(p).astype(np.float64))[:n]
    return (left * torch.tensor(values, dtype=torch.float64)) @ right, float(n * p) ** 0.5


def graded(count: int, kappa: float, largest: int) -> list[int]:
    """Integers in equal ratios, the first ``kappa`` times the last, none above ``largest``."""
    scale = max(1, min(10**6, int(largest / kappa)))
    found = [round(scale * kappa ** (1 - i / (count - 1))) for i in range(count)]
    found[-1] = scale
    return found


def _units(found: Tensor, exact: float, largest: float, dtype: torch.dtype) -> float:
    """Error in units of eps sigma_max of the dtype."""
    return abs(float(found) - exact) / (torch.finfo(dtype).eps * largest)


# --- values ---------------------------------------------------------------------------------------


def _smallest(operator: str, matrix: Tensor) -> Tensor:
    if operator == "symmetric_extremes":
        return symmetric_extremes(matrix).lambda_min
    if operator == "gram_extremes":
        return gram_extremes(matrix, rank_rtol=0.0).lambda_min.sqrt()
    return extremal_singular_values(matrix, rank_rtol=0.0).sigma_min


def value_rows(quick: bool) -> list[dict[str, Any]]:
    """Errors of the smallest value for every operator, size and precision."""
    sizes = ((8, 16),) if quick else ((16, 32), (64, 128), (256, 256), (1024, 1024))
    kappas = EXACT_KAPPAS[:2] if quick else EXACT_KAPPAS
    rows = []
    for operator in ("extremal_singular_values", "gram_extremes", "symmetric_extremes"):
        for n, p in sizes:
            square = (n, n) if operator == "symmetric_extremes" else (n, p)
            for dtype in (torch.float64, torch.float32):
                errors = {
                    f"{kappa:.0e}": _value_error(operator, *square, kappa, dtype)
                    for kappa in kappas
                }
                if operator == "extremal_singular_values" and n <= 16 and dtype == torch.float64:
                    larger = LARGE_KAPPAS[:1] if quick else LARGE_KAPPAS
                    errors |= {f"{kappa:.0e}": _large_error(n, p, kappa) for kappa in larger}
                rows.append(
                    {
                        "operator": operator,
                        "size": f"{square[0]} x {square[1]}",
                        "dtype": str(dtype).removeprefix("torch."),
                        "errors": errors,
                    }
                )
    return rows


def _value_error(operator: str, n: int, p: int, kappa: float, dtype: torch.dtype) -> float | None:
    exact = 2 ** (53 if dtype == torch.float64 else 24) // n - 1
    values = graded(n, kappa, exact)
    if max(values) > exact:
        return None  # no such matrix of this dtype is exact
    matrix, factor = exact_matrix(values, n, p)
    found = _smallest(operator, matrix.to(dtype)).double()
    return _units(found, factor * min(values), factor * max(values), dtype)


def _large_error(n: int, p: int, kappa: float) -> float:
    generator = torch.Generator().manual_seed(SEED)
    u, _, vt = torch.linalg.svd(
        torch.randn(n, p, generator=generator, dtype=torch.float64), full_matrices=False
    )
    matrix = (u * torch.logspace(0, -float(np.log10(kappa)), n, dtype=torch.float64)) @ vt
    with mpmath.workdps(DIGITS):
        exact = mpmath.matrix(matrix.tolist())
        eigenvalues = mpmath.eigsy(exact * exact.T, eigvals_only=True)
        least, largest = (mpmath.sqrt(min(eigenvalues)), mpmath.sqrt(max(eigenvalues)))
        return _units(
            _smallest("extremal_singular_values", matrix),
            float(least),
            float(largest),
            torch.float64,
        )


# --- gradients of neighbours ----------------------------------------------------------------------


def gradient_rows(quick: bool) -> list[dict[str, Any]]:
    """How far the gradient of sigma_max is from u v^T where the next singular value is near.

    The vector of a value with the relative gap g is determined to about eps / g. Below the cluster
    tolerance the two values count as one and the gradient is the mean over both.
    """
    n, p = 16, 32
    first, second = (
        np.outer(hadamard(n)[:, k], hadamard(p)[k]) / float(n * p) ** 0.5 for k in (0, 1)
    )
    top = 2**48
    rows = []
    for gap in GAPS[:2] if quick else GAPS:
        step = max(1, round(top * gap))
        values = [top, top - step, *(top // 2**k for k in range(2, n))]
        matrix, _ = exact_matrix(values, n, p)
        matrix.requires_grad_()
        extremes = extremal_singular_values(matrix, rank_rtol=0.0)
        (grad,) = torch.autograd.grad(extremes.sigma_max, matrix)
        clustered = int(extremes.multiplicity_max) > 1
        right = (first + second) / 2 if clustered else first
        error = float(np.linalg.norm(grad.numpy() - right))
        rows.append(
            {
                "gap": step / top,
                "error": error,
                "determined_to": torch.finfo(torch.float64).eps * top / step,
                "taken_as": "one cluster" if clustered else "apart",
            }
        )
    return rows


# --- merge ----------------------------------------------------------------------------------------

_D, _OUT, _TOKENS, _CAPTIONS = 8, 3, (2, 1), 12


class _Merge:
    """The merge of one layer in 50 digits, from its definition: a constrained least squares."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.inputs = [mpmath.matrix(tensor.tolist()) for tensor in tensors]

    @staticmethod
    def merged(inputs: Sequence[Any]) -> Any:
        """W = W0 + (V - W0 C^T) (C Q^-1 C^T)^-1 C Q^-1."""
        base, first, second, c_reg, *concepts = inputs
        c = mpmath.matrix(sum(_TOKENS), _D)
        values = mpmath.matrix(_OUT, sum(_TOKENS))
        at = 0
        for weights, rows in zip((first, second), concepts, strict=True):
            targets = weights * rows.T
            for row in range(rows.rows):
                for column in range(_D):
                    c[at, column] = rows[row, column]
                for out in range(_OUT):
                    values[out, at] = targets[out, row]
                at += 1
        solved = (c_reg.T * c_reg) ** -1 * c.T
        return base + (values - base * c.T) * (c * solved) ** -1 * solved.T

    def gradients(self, weight: Any) -> list[Any]:
        """D <weight, W> of every input by central differences, exact to half the digits."""
        step = mpmath.mpf(10) ** (-DIGITS // 3)
        found = []
        for index, matrix in enumerate(self.inputs):
            gradient = mpmath.matrix(matrix.rows, matrix.cols)
            for row in range(matrix.rows):
                for column in range(matrix.cols):
                    sides = []
                    for sign in (1, -1):
                        moved = [entry.copy() for entry in self.inputs]
                        moved[index][row, column] += sign * step
                        merged = self.merged(moved)
                        sides.append(
                            mpmath.fsum(
                                weight[i, j] * merged[i, j] for i in range(_OUT) for j in range(_D)
                            )
                        )
                    gradient[row, column] = (sides[0] - sides[1]) / (2 * step)
            found.append(gradient)
        return found


def _relative(found: Tensor, exact: Any) -> float:
    reference = np.array([[float(x) for x in row] for row in exact.tolist()])
    return float(np.linalg.norm(found.numpy() - reference) / np.linalg.norm(reference))


def merge_problem(kappa: float) -> list[Tensor]:
    """W0, W_1, W_2, C_reg and both concepts' rows, with kappa(Q) = ``kappa``."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, _, vt = torch.linalg.svd(normal(_CAPTIONS, _D), full_matrices=False)
    c_reg = (u * torch.logspace(0, -float(np.log10(kappa)) / 2, _D, dtype=torch.float64)) @ vt
    base = normal(_OUT, _D)
    weights = [base + 0.1 * normal(_OUT, _D) for _ in _TOKENS]
    return [base, *weights, c_reg, *(normal(rows, _D) for rows in _TOKENS)]


NAMES = ("W0", "W_1", "W_2", "C_reg", "C_1", "C_2")


def merge_rows(quick: bool) -> list[dict[str, Any]]:
    """Errors of the merged weights, their constraints and every gradient, for kappa(Q)."""
    rows = []
    for kappa in MERGE_KAPPAS[:1] if quick else MERGE_KAPPAS:
        tensors = [tensor.requires_grad_() for tensor in merge_problem(kappa)]
        base, first, second, c_reg, *concepts = tensors
        factor = RegularizationFactor.from_embeddings(c_reg, ridge=0.0)
        (merged,) = merge_kv([base], [[first], [second]], concepts, factor)
        weight = torch.linspace(-1, 1, _OUT * _D, dtype=torch.float64).reshape(_OUT, _D)
        gradients = torch.autograd.grad((merged * weight).sum(), tensors)
        with torch.no_grad():
            rows_of = torch.cat(concepts)
            wanted = torch.cat(
                [w @ c.mT for w, c in zip((first, second), concepts, strict=True)], 1
            )
            residual = float((merged @ rows_of.mT - wanted).norm() / wanted.norm())
        with mpmath.workdps(DIGITS):
            exact = _Merge([tensor.detach() for tensor in tensors])
            reference = exact.merged(exact.inputs)
            derived = exact.gradients(mpmath.matrix(weight.tolist()))
            rows.append(
                {
                    "kappa": kappa,
                    "residual": residual,
                    "merged": _relative(merged.detach(), reference),
                    "gradients": {
                        name: _relative(gradient, truth)
                        for name, gradient, truth in zip(NAMES, gradients, derived, strict=True)
                    },
                }
            )
    return rows


# --- the page -------------------------------------------------------------------------------------


def measure(quick: bool) -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(1)
    environment = environment_record(torch.device("cpu"), 1, "benchmarks.numerics", [])
    return {
        "schema": 1,
        "environment": environment,
        "quick": quick,
        "values": value_rows(quick),
        "gradients": gradient_rows(quick),
        "merge": merge_rows(quick),
    }


def _units_in_words(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def page(found: dict[str, Any]) -> str:
    """docs/numerics.md from what was measured."""
    columns = list(dict.fromkeys(kappa for row in found["values"] for kappa in row["errors"]))
    columns.sort(key=float)
    environment = found["environment"]
    values = [
        [
            f"`{row['operator']}`",
            row["size"],
            row["dtype"],
            *(_units_in_words(row["errors"].get(kappa)) for kappa in columns),
        ]
        for row in found["values"]
    ]
    gradients = [
        [f"{row['gap']:.1e}", row["taken_as"], f"{row['error']:.1e}", f"{row['determined_to']:.1e}"]
        for row in found["gradients"]
    ]
    merged = [
        [
            f"{row['kappa']:.0e}",
            f"{row['residual']:.1e}",
            f"{row['merged']:.1e}",
            *(f"{row['gradients'][name]:.1e}" for name in NAMES),
        ]
        for row in found["merge"]
    ]
    worst = max(
        value for row in found["values"] for value in row["errors"].values() if value is not None
    )
    return "\n".join(
        [
            "# How accurate",
            "",
            "Made by `python -m benchmarks.numerics --write docs/numerics.md`; the references are",
            "matrices of integers whose spectrum is known exactly, and mpmath with "
            f"{DIGITS} digits.",
            f"Measured with torch {environment['torch']}, {environment['device_name']}, 1 thread.",
            "",
            "## The smallest singular value",
            "",
            "Error in units of eps sigma_max, eps being that of the dtype, against the condition",
            "number. LAPACK promises a modest multiple of 1. Empty: no exact matrix in that dtype.",
            f"The largest entry is {worst:.2g}.",
            "",
            table(("operator", "size", "dtype", *(f"kappa {k}" for k in columns)), values),
            "",
            "## The gradient of the largest singular value beside a near neighbour",
            "",
            "A vector whose value has the relative gap g to the next is determined to about",
            "eps / g by any method. Values nearer than the cluster tolerance count as one, and the",
            "gradient is the mean over the cluster, which does not depend on the gap.",
            "",
            table(("relative gap", "taken as", "error of the gradient", "eps / gap"), gradients),
            "",
            "## The merge",
            "",
            "Relative errors against 50 digits for one layer, two concepts, hard constraints, no",
            "ridge: of the constraints W C^T = V, of the merged weights, and of the gradient of a",
            "linear function of them by every input.",
            "",
            table(("kappa(Q)", "constraints", "merged", *(f"d {name}" for name in NAMES)), merged),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser((__doc__ or "").partition("\n")[0])
    return run(FILE, page, lambda chosen: measure(chosen.quick), flags, argv)


if __name__ == "__main__":
    sys.exit(main())
