"""The operators on resolvents in torch alone, and the compositions behind their higher derivatives.

Compositions are made of inverses, which torch differentiates to every order and in every mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

Three = tuple[Tensor, Tensor, Tensor]


# --- compositions ---------------------------------------------------------------------------------


def _resolvents(a: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K and B = (A + k I)^-1 for the symmetric part of A: (*, s, 1, 1) and (*, s, p, p); tr B."""
    wide = a.to(torch.float64)
    k = shifts.to(torch.float64)[..., None, None]
    identity = torch.eye(a.shape[-1], dtype=torch.float64, device=a.device)
    b = torch.linalg.inv(((wide + wide.mT) / 2)[..., None, :, :] + k * identity)
    return k, b, _trace(b)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def composed_values(a: Tensor, shifts: Tensor, vectors: Tensor) -> Three:
    """Tr A B, tr A^2 B^2 and b^T B^2 b, float64."""
    _, b, once = _resolvents(a, shifts)
    k, p = shifts.to(torch.float64), a.shape[-1]
    twice = (b * b).sum((-2, -1))
    energies = (b @ vectors.to(torch.float64)[..., None, :, :]).square().sum(-2)
    return p - k * once, p - 2 * k * once + k.square() * twice, energies


def composed_gradient(
    grad_first: Tensor,
    grad_second: Tensor,
    grad_energies: Tensor,
    a: Tensor,
    shifts: Tensor,
    vectors: Tensor,
    *_: Tensor,
) -> Three:
    """Their gradients; formulas in ops/resolvent.py."""
    k, b, once = _resolvents(a, shifts)
    squared = b @ b
    cubed = squared @ b
    x = b @ vectors.to(torch.float64)[..., None, :, :]
    y = b @ x
    f, h = grad_first[..., None, None], grad_second[..., None, None]
    g = grad_energies[..., None, :]
    half = (y * g) @ x.mT
    matrix = (k * (f + 2 * h) * squared - 2 * h * k.square() * cubed - half - half.mT).sum(-3)
    k = shifts.to(torch.float64)
    first = once - k * _trace(squared)
    of_shifts = (
        -grad_first * first
        - 2 * grad_second * (first - k * _trace(squared) + k.square() * _trace(cubed))
        - 2 * (grad_energies[..., None, :] * x * y).sum((-2, -1))
    )
    return (
        matrix.to(a.dtype),
        of_shifts.to(shifts.dtype),
        (2 * y * g).sum(-3).to(vectors.dtype),
    )


# --- the operators --------------------------------------------------------------------------------


def _checked(name: str, argument: str, value: Tensor) -> Tensor:
    wide = value.to(torch.float64)
    bad = ~torch.isfinite(wide)
    if bool(bad.any()):
        raise ValueError(f"{name}: {argument} must be finite, got NaN or infinity")
    return wide


def resolvent_traces(a: Tensor, shifts: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
    """Values by eigendecomposition, which is a tridiagonal form without off-diagonal entries."""
    name = "resolvent_traces"
    wide = _checked(name, "a", a)
    k = _checked(name, "shifts", shifts)
    b = _checked(name, "vectors", vectors)
    largest = wide.abs().amax((-2, -1))
    allowed = 8.0 * a.shape[-1] ** 0.5 * torch.finfo(a.dtype).eps
    if bool(((wide - wide.mT).abs().amax((-2, -1)) > allowed * largest).any()):
        raise ValueError(
            f"{name}: a must be symmetric, got entries that differ from their mirror image; pass "
            "(a + a.mT) / 2 if the difference has no meaning"
        )
    # A power of two: no bit changes, and no square overflows.
    scale = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest)[1].clamp(-1000, 1000))
    scale = torch.where(largest > 0, scale, 1.0)[..., None]
    half = wide * scale[..., None] / 2
    values, columns = torch.linalg.eigh(half + half.mT)
    values = values / scale
    shifted = values[..., None, :] + k[..., None]  # (*, s, p)
    if bool((shifted <= 0.0).any()):
        raise ValueError(
            f"{name}: shifts must make a + shift I positive definite, got a sum with the smallest "
            f"eigenvalue of {float(shifted.min()):.3g}; take a larger shift"
        )
    share = values[..., None, :] / shifted
    energies = ((columns.mT @ b)[..., None, :, :] / shifted[..., None]).square().sum(-2)
    return (
        share.sum(-1),
        share.square().sum(-1),
        energies,
        values,
        torch.zeros_like(values),
        columns.mT.contiguous(),
    )


def resolvent_traces_backward(
    grad_first: Tensor,
    grad_second: Tensor,
    grad_energies: Tensor,
    a: Tensor,
    shifts: Tensor,
    vectors: Tensor,
    diagonal: Tensor,
    offdiagonal: Tensor,
    basis: Tensor,
) -> Three:
    """Gradients; of an eigendecomposition in O(p) a shift beside one product."""
    name = "resolvent_traces_backward"
    s, m = shifts.shape[-1], vectors.shape[-1]
    for argument, value, shape in (
        ("grad_first", grad_first, (*a.shape[:-2], s)),
        ("grad_second", grad_second, (*a.shape[:-2], s)),
        ("grad_energies", grad_energies, (*a.shape[:-2], s, m)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name}: {argument} must have shape {shape}, got {value.shape}")
    if bool((offdiagonal != 0.0).any()):  # of the kernel
        rest = (grad_first, grad_second, grad_energies, a, shifts, vectors)
        return composed_gradient(*rest)
    k = shifts.to(torch.float64)
    inverse = 1.0 / (diagonal[..., None, :] + k[..., None])  # (*, s, p)
    f, h, shift = grad_first[..., None], grad_second[..., None], k[..., None]
    squared = inverse.square()
    along = (shift * (f + 2 * h * diagonal[..., None, :] * inverse) * squared).sum(-2)
    b = (basis @ vectors.to(torch.float64))[..., None, :, :]
    x = b * inverse[..., None]
    y = x * inverse[..., None]
    weighted = y * grad_energies[..., None, :]
    # Over shifts and vectors at once: (*, p, s m) times (*, s m, p).
    half = weighted.movedim(-3, -1).flatten(-2) @ x.movedim(-3, -1).flatten(-2).mT
    inner = torch.diag_embed(along) - half - half.mT
    matrix = basis.mT @ inner @ basis
    share = diagonal[..., None, :] * squared
    of_shifts = -(f * share + 2 * h * share * diagonal[..., None, :] * inverse).sum(-1) - 2 * (
        weighted * x
    ).sum((-2, -1))
    return (
        ((matrix + matrix.mT) / 2).to(a.dtype).contiguous(),
        of_shifts.to(shifts.dtype).contiguous(),
        (basis.mT @ (2 * weighted).sum(-3)).to(vectors.dtype).contiguous(),
    )
