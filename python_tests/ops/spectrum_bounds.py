"""Bounds of the spectrum tests, with their reasons.

The kernels promise the accuracy class of LAPACK's gesdd: a backward error of a small multiple of
eps sigma_max per singular value (VALUE_UNITS max(n, p) of them here), whatever kappa is, so
sigma_min has the relative error of that times kappa.  A singular vector pair moves by the backward
error over the gap to its neighbours, and so does a gradient made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from sample_inputs import EPS
from torch import Tensor

from immunize_ext import _load

VALUE_UNITS = 8.0


def assert_within(found: Tensor, truth: object, bound: object) -> None:
    """|found - truth| <= bound, entry by entry."""
    error = (found.detach().double() - torch.as_tensor(truth, dtype=torch.float64)).abs()
    # Not >, so that NaN counts as wrong.
    if not bool((error <= torch.as_tensor(bound, dtype=torch.float64)).all()):
        raise AssertionError(f"expected {truth}, got {found}: error {error} > bound {bound}")


def value_rounding(a: Tensor, sigma_max: object) -> Tensor:
    """Backward error of one singular value in float64, plus the cast to the dtype of a."""
    top = torch.as_tensor(sigma_max, dtype=torch.float64)
    kind = torch.finfo(a.dtype)
    cast = 0.0 if a.dtype == torch.float64 else kind.eps
    return (VALUE_UNITS * max(a.shape[-2:]) * EPS + cast) * top + kind.tiny * kind.eps


def gradient_rtol(a: Tensor, gap: float) -> float:
    """Relative error of u v^T where the nearest other singular value is gap sigma_max away."""
    return 100 * max(a.shape[-2:]) * EPS / gap


# BLAS and LAPACK add up in an order that depends on the threads, and in batches in another one.
same_bits = pytest.mark.skipif(
    not _load.available(), reason="the torch-only fallback promises no bits over threads or batches"
)


def assert_same_bits_alone_and_together(
    function: Callable[[Tensor], Sequence[Tensor]], matrix: Tensor, other: Tensor
) -> None:
    """Neither threads, nor the rest of a batch, nor the random state change a result of matrix."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    alone = function(matrix)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = function(torch.stack([other, matrix]))
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first, second[1])
