"""The rotation that makes all coordinates alike: exact diagonal, orthogonal, and the guarantee."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from immunize_ext.ops import equal_diagonal_rotation


def symmetric(p: int, kappa: float, seed: int) -> torch.Tensor:
    """Eigenvalues log-uniform from 1 to kappa."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((p, p)))
    return torch.from_numpy((q * np.logspace(0, math.log10(kappa), p)) @ q.T)


@pytest.mark.parametrize("p", [1, 2, 3, 5, 64, 196])
@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e10])
@pytest.mark.parametrize("diagonal", [False, True])
def test_diagonal_orthogonality_and_eigenvalues(p: int, kappa: float, diagonal: bool) -> None:
    h = symmetric(p, kappa, seed=p)
    if diagonal:
        h = torch.diag(torch.linalg.eigvalsh(h))
    q = equal_diagonal_rotation(h)
    eps = np.finfo(float).eps
    # p - 1 rotations, each with a rounding of a few eps in two rows.
    assert np.allclose((q.mT @ q).numpy(), np.eye(p), rtol=0, atol=20 * p * eps)
    turned = (q.mT @ h @ q).numpy()
    scale = np.linalg.norm(h.numpy(), 2)
    assert np.allclose(np.diag(turned), np.trace(h.numpy()) / p, rtol=0, atol=20 * p * eps * scale)
    found, truth = np.linalg.eigvalsh(turned), np.linalg.eigvalsh(h.numpy())
    assert np.allclose(found, truth, rtol=0, atol=20 * p * eps * scale)


def test_indefinite_zero_and_huge_matrices() -> None:
    h = torch.diag(torch.tensor([3.0, -1.0, 0.0, -6.0], dtype=torch.float64))
    q = equal_diagonal_rotation(h)
    assert torch.allclose((q.mT @ h @ q).diagonal(), torch.full((4,), -1.0, dtype=torch.float64))
    assert torch.equal(equal_diagonal_rotation(torch.zeros(3, 3)), torch.eye(3).double())
    for scale in (1e300, 1e-300):
        assert torch.equal(equal_diagonal_rotation(h * 2.0 ** int(math.log2(scale))), q)


def test_half_precision_is_read_as_it_is() -> None:
    h = torch.tensor([[2.0, 1.0], [1.0, 6.0]], dtype=torch.bfloat16)
    q = equal_diagonal_rotation(h)
    assert q.dtype == torch.float64
    assert torch.allclose(
        (q.mT @ h.double() @ q).diagonal(), torch.tensor([4.0, 4.0], dtype=torch.float64)
    )


def test_no_diagonal_scaling_gets_below_kappa_over_p() -> None:
    """Jacobi scaling undoes a diagonal Hessian whole; after the rotation the bound holds."""
    p, kappa = 30, 1e8
    h = torch.diag(torch.linalg.eigvalsh(symmetric(p, kappa, seed=1)))
    kappa = float(h[-1, -1] / h[0, 0])

    def scaled(matrix: np.ndarray, d: np.ndarray) -> float:
        values = np.linalg.eigvalsh(matrix * d * d[:, None])
        return float(values[-1] / values[0])

    before = h.numpy()
    assert scaled(before, 1 / np.sqrt(np.diag(before))) == pytest.approx(1.0)
    q = equal_diagonal_rotation(h)
    turned = (q.mT @ h @ q).numpy()
    assert scaled(turned, 1 / np.sqrt(np.diag(turned))) == pytest.approx(kappa, rel=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(200):
        # Log scales of a random direction and size, to several orders of magnitude.
        d = np.exp(rng.standard_normal(p) * 10.0 ** rng.uniform(-2, 0.3))
        assert scaled(turned, d) >= kappa / p * (1 - 1e-4)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"h must have shape \(p, p\), got \(2, 3\)"):
        equal_diagonal_rotation(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="h must be finite"):
        equal_diagonal_rotation(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="h must"):
        equal_diagonal_rotation(torch.zeros(2, 2, dtype=torch.int64))
