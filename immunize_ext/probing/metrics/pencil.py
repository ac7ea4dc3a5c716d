"""The pencil (K_H, K_P): coordinates in which both Hessians are diagonal, and the ceiling of RIR.

With K_P = R^T R (R from a QR factorisation of the primary features, no Gram matrix formed) and the
singular value decomposition X_H R^{-1} = U S V^T, the matrix W = R^{-1} V satisfies

    W^T K_P W = I,        W^T K_H W = diag(l),   l = S^2.

For every invertible theta and every vector x, l_min x^T K_P x <= x^T K_H x <= l_max x^T K_P x, so

    kappa(theta^T K_H theta) / kappa(theta^T K_P theta) <= l_max / l_min,

and theta = W attains it: RIR has the exact ceiling (l_max / l_min) kappa(K_P) / kappa(K_H).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.data.scale import unit_scale
from immunize_ext.probing.metrics.hessian import with_ridge


class Pencil(NamedTuple):
    """Generalized eigenvalues of (K_H, K_P), largest first, and their vectors.

    Attributes:
        values: Generalized eigenvalues l, shape ``(p,)``.
        basis: W with W^T K_P W = I and W^T K_H W = diag(l), shape ``(p, p)``.
    """

    values: Tensor
    basis: Tensor


def pencil(x_primary: Tensor, x_harmful: Tensor, *, ridge: float = 1e-4) -> Pencil:
    """Solve K_H w = l K_P w for K = x^T x + ridge * lambda_max(x^T x) * I.

    Equivalent to ``scipy.linalg.eigh(K_H, K_P)`` in reversed order, without squaring the condition
    of the features.

    Args:
        x_primary: Features of the primary task, shape ``(n, p)``.
        x_harmful: Features of the harmful task, shape ``(m, p)``.
        ridge: Ridge on each K, relative to its largest eigenvalue.

    Returns:
        Values, shape ``(p,)`` descending, and basis, shape ``(p, p)``, float64.

    Raises:
        ValueError: If the numbers of features differ or ``ridge`` is out of range.
        NotPositiveDefiniteError: If K_P is numerically singular; a ridge makes it regular.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> pencil(x, x @ torch.diag(torch.tensor([1.0, 2.0]).double()), ridge=0.0).values.tolist()
        [4.0, 1.0]
    """
    if x_primary.dim() != 2 or x_harmful.dim() != 2 or x_primary.shape[1] != x_harmful.shape[1]:
        raise ValueError(
            f"pencil: x_harmful must have shape (m, p) with the p of x_primary, got "
            f"{tuple(x_harmful.shape)} and {tuple(x_primary.shape)}; use features of one model"
        )
    inputs = [x.detach().to(torch.float64) for x in (x_primary, x_harmful)]
    units = [unit_scale(x) for x in inputs]
    primary, harmful = (with_ridge(x * u, ridge) for x, u in zip(inputs, units, strict=True))
    p = primary.shape[1]
    extremes = gram_extremes(primary)
    rank = int(extremes.rank)
    if rank < p:
        raise NotPositiveDefiniteError.for_matrix(
            "pencil",
            "K_P",
            dim=p,
            rank=rank,
            needed_ridge=max(primary.shape) ** 2
            * torch.finfo(torch.float64).eps ** 2
            * float(extremes.lambda_max / units[0] / units[0]),
        )
    triangle = torch.linalg.qr(primary, mode="r").R
    whitened = torch.linalg.solve_triangular(triangle, harmful, upper=True, left=False)
    _, sigma, right = torch.linalg.svd(whitened, full_matrices=harmful.shape[0] < p)
    values = torch.zeros(p, dtype=torch.float64, device=sigma.device)
    values[: sigma.shape[0]] = (sigma * (units[0] / units[1])).square()
    basis = torch.linalg.solve_triangular(triangle, right.mT, upper=True) * units[0]
    return Pencil(values, basis)


def log_rir_ceiling(
    x_primary: Tensor, x_harmful: Tensor, theta0: Tensor | None = None, *, ridge: float = 1e-4
) -> float:
    """Natural logarithm of the largest RIR that any invertible theta can reach.

    RIR_max = (l_max / l_min)(K_H, K_P) * kappa(H_P(theta_0)) / kappa(H_H(theta_0)). Without its
    ridge the number means nothing: on rank-deficient data it grows without bound as the ridge
    falls.

    Args:
        x_primary: Features of the primary task, shape ``(n, p)``.
        x_harmful: Features of the harmful task, shape ``(m, p)``.
        theta0: What RIR compares with, shape ``(p, p)``; the identity when omitted.
        ridge: Ridge on each K, relative to its largest eigenvalue.

    Returns:
        log RIR_max; at least 0, since theta_0 itself has RIR 1.

    Raises:
        ValueError: If the numbers of features differ or ``ridge`` is out of range.
        NotPositiveDefiniteError: If K_P is numerically singular at this ridge.

    Example:
        >>> primary = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
        >>> harmful = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> round(math.exp(log_rir_ceiling(primary, harmful, ridge=0.0)), 9)
        16.0
    """
    inputs = [x.detach().to(torch.float64) for x in (x_primary, x_harmful)]
    inputs = [x * unit_scale(x) for x in inputs]  # no part below sees the scale of either
    values = pencil(*inputs, ridge=ridge).values
    log_spread = float(values[0].log() - values[-1].log())
    logs = []
    for x in inputs:
        rows = with_ridge(x, ridge)
        if theta0 is not None:
            extractor = theta0.detach().to(torch.float64)
            rows = rows @ (extractor * unit_scale(extractor))
        extremes = gram_extremes(rows, rank="full")
        logs.append(float(extremes.lambda_max.log() - extremes.lambda_min.log()))
    # Where K_H is singular its log is infinite, before and after: the ratio says nothing.
    return math.inf if math.isinf(logs[1]) else log_spread + logs[0] - logs[1]
