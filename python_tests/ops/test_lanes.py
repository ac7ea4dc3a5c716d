"""Tiny matrices, solved side by side in the lanes of vectors: no lane looks at another.

What a matrix gets may depend on nothing but itself, whatever stands beside it and whichever
instruction set computes. Values, vectors and counts against other routes are asked of the same
kernels in test_singular_triplets.py and test_spectrum_routes.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import (
    EPS,
    compiled_only,
    diagonal,
    fewer_examples,
    gaussian,
    symmetric,
    with_spectrum,
)
from spectrum_bounds import VALUE_UNITS, assert_within, same_bits
from torch import Tensor

from immunize_ext import _load, reference
from immunize_ext.ops import (
    condition_number,
    extremal_singular_values,
    gram_extremes,
    log_condition_number,
    symmetric_extremes,
)
from immunize_ext.ops.regularizers import r_ill, r_well

SHAPES = [(1, 1), (1, 6), (2, 2), (3, 2), (4, 8), (8, 8), (17, 5), (32, 32), (16, 64), (64, 15)]
# Beyond the lanes on either side.
BORDERS = [(33, 33), (32, 33), (65, 16)]


def outputs_of(a: Tensor) -> list[Tensor]:
    """Everything that is computed of a batch, gradients included."""
    found = []
    for function in (condition_number, log_condition_number, r_well):
        leaf = a.clone().requires_grad_()
        value = function(leaf)
        found += [value.detach(), *torch.autograd.grad(value.sum(), leaf)]
    return [*found, *extremal_singular_values(a), *gram_extremes(a)]


def of_symmetric(h: Tensor) -> list[Tensor]:
    leaf = h.clone().requires_grad_()
    found = symmetric_extremes(leaf)
    (grad,) = torch.autograd.grad((found.lambda_max + 2.0 * found.lambda_min).sum(), leaf)
    return [*(value.detach() for value in found), grad]


def equal_bits(alone: list[Tensor], together: list[Tensor], index: int) -> bool:
    return all(torch.equal(a, b[index]) for a, b in zip(alone, together, strict=True))


# --- independence ---------------------------------------------------------------------------------


@same_bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES + BORDERS)
def test_a_matrix_alone_and_anywhere_in_a_batch(shape, dtype):
    """Batches that fill no whole number of vectors; float32 is widened, not solved in float32."""
    a = gaussian(19, *shape, dtype=dtype)
    together = outputs_of(a)
    for index in (0, 7, 8, 18):
        assert equal_bits(outputs_of(a[index]), together, index)
    moved = outputs_of(a[5:16])
    assert all(torch.equal(x[5:16], y) for x, y in zip(together, moved, strict=True))


@same_bits
@pytest.mark.parametrize("side", [1, 2, 3, 8, 31, 32, 33])
def test_a_symmetric_matrix_alone_and_anywhere_in_a_batch(side):
    h = symmetric(19, side)
    together = of_symmetric(h)
    for index in (0, 7, 8, 18):
        assert equal_bits(of_symmetric(h[index]), together, index)


@same_bits
@fewer_examples
@given(data=st.data())
def test_neighbours_of_every_kind_change_nothing(data):
    """Zero, deficient, repeated, graded and badly scaled ones; some of them leave the lanes."""
    n, p = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 9))
    t = min(n, p)
    seed = data.draw(st.integers(0, 1000))
    neighbours = [
        torch.zeros(n, p, dtype=torch.float64),
        torch.ones(n, p, dtype=torch.float64),
        torch.eye(n, p, dtype=torch.float64),
        with_spectrum(np.logspace(0, -14, t), n, p, seed=seed),
        1e-308 * gaussian(n, p, seed=seed),
        1e300 * gaussian(n, p, seed=seed),
    ]
    a = gaussian(n, p, seed=seed + 1)
    place = data.draw(st.integers(0, len(neighbours)))
    batch = torch.stack([*neighbours[:place], a, *neighbours[place:]])
    assert equal_bits(
        list(extremal_singular_values(a)), list(extremal_singular_values(batch)), place
    )
    found, truth = extremal_singular_values(a), np.linalg.svd(a.numpy(), compute_uv=False)
    assert_within(found.sigma_min, truth[-1], VALUE_UNITS * max(n, p) * EPS * truth[0])


@same_bits
def test_threads_change_no_bit():
    a, h = gaussian(5000, 5, 4), symmetric(5000, 6)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append([*outputs_of(a), *of_symmetric(h)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 5, 5)])
def test_empty_batches(shape):
    a = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    value = log_condition_number(a)
    assert value.shape == shape[:-2]
    assert torch.autograd.grad(value.sum(), a)[0].shape == shape


# --- accuracy -------------------------------------------------------------------------------------


@fewer_examples
@given(data=st.data())
def test_known_spectra(data):
    """Values to a few eps sigma_max and counts of repeated values, from chosen spectra."""
    n, p = data.draw(st.integers(1, 32)), data.draw(st.integers(1, 40))
    t = min(n, p)
    kind = data.draw(st.sampled_from(["graded", "top", "bottom", "all"]))
    sigma = np.logspace(0, -data.draw(st.floats(0.1, 12)), t) if t > 1 else np.ones(1)
    if kind in ("top", "all") and t > 2:
        sigma[1] = sigma[0]
    if kind in ("bottom", "all") and t > 4:
        sigma[-2] = sigma[-1]
    exponent = data.draw(st.integers(-800, 800))
    a = with_spectrum(sigma, n, p, seed=data.draw(st.integers(0, 1000)))
    found = extremal_singular_values(torch.ldexp(a, torch.tensor(exponent)))
    # The matrix itself is a product of rounded factors.
    bound = 2 * VALUE_UNITS * max(n, p) * EPS
    assert_within(torch.ldexp(found.sigma_max, torch.tensor(-exponent)), sigma[0], bound)
    assert_within(torch.ldexp(found.sigma_min, torch.tensor(-exponent)), sigma[-1], bound)
    assert found.rank == t
    if t > 4 and sigma[-3] > 1.01 * sigma[-2] + 1e-6:
        assert found.multiplicity_min == (2 if kind in ("bottom", "all") else 1)


@pytest.mark.parametrize("gap", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("side", [2, 3, 8])
def test_all_values_near_each_other(side, gap):
    """From afar they are one root t times, and a step must not end between two of them."""
    values = 1.0 + gap * np.linspace(-1, 1, side)
    q, _ = np.linalg.qr(gaussian(side, side).numpy())
    h = (q * values) @ q.T
    h = torch.from_numpy((h + h.T) / 2)
    found = symmetric_extremes(h)
    assert_within(found.lambda_max, values[-1], 20 * EPS)
    assert_within(found.lambda_min, values[0], 20 * EPS)
    singular = extremal_singular_values(h)
    assert_within(singular.sigma_max, values[-1], 20 * EPS)
    assert_within(singular.sigma_min, values[0], 20 * EPS)


def test_values_just_within_a_cluster_keep_their_distance():
    """The vector of a cluster is a mixture; the value stays that of the extreme.

    LAPACK, which the torch-only route calls, promises no more than the class of every value.
    """
    units = 16 if _load.available() else 5 * VALUE_UNITS
    sigma = [1.0, 1.0 - 50 * EPS, 0.5, 0.1 + 10 * EPS, 0.1]
    a = torch.stack([with_spectrum(sigma, 5, 5, seed=seed) for seed in range(20)])
    found = extremal_singular_values(a)
    assert found.multiplicity_max.tolist() == [2] * 20
    assert_within(found.sigma_max, 1.0, units * EPS)
    assert_within(found.sigma_min, 0.1, units * EPS)


@pytest.mark.parametrize("function", [condition_number, log_condition_number, r_well, r_ill])
def test_gradients_of_a_batch_against_the_reference(function):
    a = torch.stack(
        [with_spectrum([3.0, 2.0, 1.0, 0.2], 6, 4, seed=k) for k in range(11)]
        + [diagonal(3.0, 3.0, 1.0, 0.5, 0.5)[:4].repeat(2, 1)[:6, :4]]
    )
    leaf = a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).sum(), leaf)
    truth = getattr(reference, f"{function.__name__}_gradient")(a.numpy())
    np.testing.assert_allclose(grad.numpy(), truth, rtol=1e-10, atol=1e-12)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_its_place(bad):
    a = gaussian(11, 3, 4)
    a[9, 1, 2] = bad
    with pytest.raises(ValueError, match=r"a must be finite, got NaN or infinity at batch index 9"):
        extremal_singular_values(a)
    h = symmetric(11, 3)
    h[9, 1, 1] = bad
    with pytest.raises(ValueError, match=r"h must be finite, got NaN or infinity at batch index 9"):
        symmetric_extremes(h)


def test_what_is_not_symmetric_is_refused_with_its_place():
    h = symmetric(11, 3)
    h[9, 0, 1] += 1e-9
    with pytest.raises(ValueError, match=r"h must be symmetric, .* at batch index 9"):
        symmetric_extremes(h)


# --- instruction sets -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]

DUMP = """
import sys, torch
from immunize_ext import ops
g = torch.Generator().manual_seed(0)
found = []
for shape in [(19, 2, 2), (19, 4, 8), (9, 17, 5), (9, 32, 32), (1, 41, 60), (1, 217, 230)]:
    a = torch.randn(*shape, generator=g, dtype=torch.float64)
    found += [*ops.extremal_singular_values(a)]
    if shape[1] == shape[2]:
        found += [*ops.symmetric_extremes(a + a.mT)]
    else:
        found += [*ops.symmetric_extremes(a @ a.mT)]
torch.save(found, sys.argv[1])
"""


def computed_with(instructions: str, path: Path) -> list[Tensor] | None:
    """The extremes of some batches; None where the processor has no such instructions."""
    environment = {
        **os.environ,
        "IMMUNIZE_EXT_INSTRUCTIONS": instructions,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", DUMP, str(path)], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        assert "must name what this processor has" in done.stderr, done.stderr
        return None
    return torch.load(path)


@compiled_only
@pytest.mark.slow
def test_every_instruction_set_gives_the_same_extremes(tmp_path):
    """To rounding: widths differ, and the baseline has no fused multiply-add."""
    baseline = computed_with("baseline", tmp_path / "baseline.pt")
    assert baseline is not None
    for wider in ("avx2", "avx512"):
        found = computed_with(wider, tmp_path / f"{wider}.pt")
        if found is None:
            continue
        for one, other in zip(baseline, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
