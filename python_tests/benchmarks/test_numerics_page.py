"""The accuracy page: its references are exact, and it says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

numerics = pytest.importorskip("benchmarks.numerics")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("n", "p"), [(8, 8), (8, 16)])
def test_the_spectrum_of_an_exact_matrix_is_known(n: int, p: int) -> None:
    values = numerics.graded(n, 1e4, 2**40)
    matrix, factor = numerics.exact_matrix(values, n, p)
    assert (matrix == matrix.round()).all()
    with mpmath.workdps(40):
        exact = mpmath.matrix(matrix.tolist())
        found = sorted(mpmath.eigsy(exact * exact.T, eigvals_only=True), reverse=True)
        wanted = [mpmath.mpf(n * p) * value**2 for value in values]
        assert max(abs(a - b) / b for a, b in zip(found, wanted, strict=True)) < 1e-30
    assert factor == pytest.approx(float(n * p) ** 0.5, rel=1e-15)


def test_values_that_float64_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="below 2"):
        numerics.exact_matrix([2**51, 1, 1, 1], 4, 4)


def test_the_reference_of_the_merge_meets_its_constraints() -> None:
    tensors = numerics.merge_problem(1e6)
    with mpmath.workdps(numerics.DIGITS):
        exact = numerics._Merge(tensors)
        merged = exact.merged(exact.inputs)
        for weights, rows in zip(exact.inputs[1:3], exact.inputs[4:], strict=True):
            assert mpmath.norm((merged - weights) * rows.T) < 1e-35


def test_quick_run_is_accurate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = numerics.measure(quick=True)
    errors = [e for row in found["values"] for e in row["errors"].values() if e is not None]
    # The accuracy class of LAPACK's singular values: a small multiple of eps sigma_max.
    assert len(errors) > 10
    assert max(errors) < 4.0
    for row in found["gradients"]:
        assert row["error"] < 100 * row["determined_to"]
    for row in found["merge"]:
        assert max(row["gradients"].values()) < 1e-13
    assert "| `gram_extremes` |" in numerics.page(found)


def test_the_committed_page_is_what_its_file_says() -> None:
    file = ROOT / "benchmarks" / "results" / numerics.FILE
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["quick"] is False
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    assert page == numerics.page(found)
    errors = [e for row in found["values"] for e in row["errors"].values() if e is not None]
    assert np.isfinite(errors).all()
    assert max(errors) < 4.0


def test_the_merge_problem_has_the_condition_it_is_named_for() -> None:
    c_reg = numerics.merge_problem(1e8)[3]
    sigma = torch.linalg.svdvals(c_reg)
    assert float((sigma[0] / sigma[-1]) ** 2) == pytest.approx(1e8, rel=1e-6)
