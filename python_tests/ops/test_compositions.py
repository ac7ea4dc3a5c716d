"""What CUDA composes of torch operators, called on CPU tensors: no GPU is needed.

Symmetric extremes and the library route of the preconditioned gradient hold no code for a device,
so every build registers them for CUDA, and the dispatcher hands them any tensor when asked to.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
EPS = torch.finfo(torch.float64).eps
RTOL = 1e-12


def call(keys: torch._C.DispatchKeySet, operator: str, *arguments: object) -> tuple[Tensor, ...]:
    """The outputs of the function that is registered for a device."""
    out = getattr(torch.ops.immunize_ext, operator).default.redispatch(keys, *arguments)
    return (out,) if isinstance(out, Tensor) else out


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_alike(operator: str, *arguments: object) -> None:
    """Both devices return the same shapes, types and, to rounding, values."""
    expected, got = (call(keys, operator, *arguments) for keys in (CPU, CUDA))
    for number, (right, ours) in enumerate(zip(expected, got, strict=True)):
        assert ours.shape == right.shape
        assert ours.dtype == right.dtype
        right, ours = right.double(), ours.double()
        if operator == "symmetric_extremes" and number >= 4:  # vectors: up to sign
            right, ours = (v.unsqueeze(-1) * v.unsqueeze(-2) for v in (right, ours))
        if right.numel():
            assert (ours - right).abs().max() <= 1e-9 * right.abs().max().clamp_min(1e-300)


def assert_refused_alike(operator: str, *arguments: object) -> None:
    """Both devices refuse in the same words, but for the number they found."""
    messages = []
    for keys in (CPU, CUDA):
        with pytest.raises(ValueError, match=r", got") as caught:
            call(keys, operator, *arguments)
        messages.append(str(caught.value).partition(", got")[0])
    assert messages[0] == messages[1]


def symmetric(eigenvalues: list[float]) -> Tensor:
    """Two matrices with these eigenvalues."""
    basis, _ = torch.linalg.qr(gaussian(2, len(eigenvalues), len(eigenvalues)))
    h = (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT
    return (h + h.mT) / 2


INDEFINITE = [-3.0, -1.0, 0.5, 1.0, 2.0, 4.0]
CLUSTERS = [-2.0, -2.0, 0.0, 1.0, 3.0, 3.0]


@pytest.mark.parametrize("scale", [1.0, 2.0**-300, 2.0**300])
@pytest.mark.parametrize("eigenvalues", [INDEFINITE, [1e-3, 1.0, 1.1, 1.2, 1.3, 2.0], CLUSTERS])
def test_symmetric_extremes(eigenvalues, scale):
    """Values, multiplicities, vectors where there is one, and the first derivative."""
    h = symmetric(eigenvalues) * scale
    forward = call(CPU, "symmetric_extremes", h, RTOL)
    if eigenvalues is not CLUSTERS:
        assert_alike("symmetric_extremes", h, RTOL)
    grads = gaussian(2, seed=1), gaussian(2, seed=2)
    assert_alike("symmetric_extremes_backward", *grads, h, *forward[2:], RTOL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_symmetric_extremes_in_other_types(dtype):
    """Values are float64, gradients of the type of h."""
    h = torch.diag(torch.tensor([1.0, -2.0, 5.0], dtype=dtype))
    assert_alike("symmetric_extremes", h, 1e-5)
    forward = call(CPU, "symmetric_extremes", h, 1e-5)
    one = torch.ones((), dtype=torch.float64)
    assert_alike("symmetric_extremes_backward", one, one, h, *forward[2:], 1e-5)


def test_empty_batches():
    """No matrices."""
    assert_alike("symmetric_extremes", gaussian(0, 4, 4), RTOL)


def test_results_share_no_memory():
    """Not even of a side of 1, where both vectors are the same number."""
    found = call(CUDA, "symmetric_extremes", gaussian(3, 1, 1), RTOL)
    places = [one.untyped_storage().data_ptr() for one in found]
    assert len(set(places)) == len(places)


def test_refusals_of_symmetric_extremes():
    """What is not symmetric, and what is not finite."""
    assert_refused_alike("symmetric_extremes", gaussian(2, 4, 4), RTOL)
    for bad in (torch.inf, torch.nan):
        h = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
        h[1, 2, 2] = bad
        assert_refused_alike("symmetric_extremes", h, RTOL)


def between(low: list[float], high: list[float], start: float, end: float, count: int) -> Tensor:
    """Eigenvalues: ``count`` in all, evenly from start to end but for the lowest and highest."""
    inner = torch.linspace(start, end, count - len(low) - len(high), dtype=torch.float64)
    return torch.cat([torch.tensor(low), inner, torch.tensor(high)]).double()


LARGE = 1030
LARGE_SPECTRA = {
    "graded": torch.logspace(-4, 0, LARGE, dtype=torch.float64),
    "negative": -torch.logspace(0, -4, LARGE, dtype=torch.float64),
    "indefinite": between([-1.0], [], -0.9, 2.0, LARGE),
    "repeated ends": between([0.5] * 3, [3.0] * 2, 1.0, 2.0, LARGE),
    "an outlier": between([], [50.0], 1.0, 1.5, LARGE),
    "a null space": between([0.0] * 600, [], 1.0, 2.0, LARGE),
    "one value": torch.ones(LARGE, dtype=torch.float64),
    "zero": torch.zeros(LARGE, dtype=torch.float64),
}


@pytest.mark.slow
def test_large_symmetric_matrices():
    """Sides beyond every route for small matrices."""
    basis, _ = torch.linalg.qr(gaussian(LARGE, LARGE, seed=5))
    h = torch.stack([(basis * values) @ basis.mT for values in LARGE_SPECTRA.values()])
    h = (h + h.mT) / 2
    found = call(CUDA, "symmetric_extremes", h, LARGE * EPS)
    for number, (name, values) in enumerate(LARGE_SPECTRA.items()):
        bound = 8 * LARGE * EPS * float(values.abs().max())
        ends = values.max(), values.min()
        for end, value, count, vector in zip(ends, found[:2], found[2:4], found[4:], strict=True):
            v = vector[number]
            assert abs(value[number] - end) <= bound, name
            assert count[number] == int((values == end).sum()), name
            assert (h[number] @ v - value[number] * v).norm() <= bound, name
    again = call(CUDA, "symmetric_extremes", h, LARGE * EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_precondition():
    """Few samples, the factor of K, and more rows than one call of a library takes."""
    x = gaussian(8, 20)
    eye = torch.eye(20, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(x.mT)
    small = torch.linalg.cholesky(triangle @ triangle.mT + 0.1 * eye[:8, :8])
    full = torch.linalg.cholesky(x.mT @ x + 0.1 * eye)
    grad = gaussian(2, 7, 20, seed=1)
    assert_alike("precondition", grad, small, basis.mT, 0.1)
    assert_alike("precondition", grad, full, x[:0], 0.1)
    many = gaussian(70000, 20, seed=2)
    (found,) = call(CUDA, "precondition", many, full, x[:0], 0.1)
    assert (found @ (x.mT @ x + 0.1 * eye) - many).abs().max() <= 1e-10
