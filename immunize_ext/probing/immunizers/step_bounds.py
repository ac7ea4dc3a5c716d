"""The largest steps for which the condition numbers are guaranteed to move the right way.

A step theta' = theta - eta K^{-1} grad_theta R(H), H = theta^T K theta, equals theta (I - 2 eta G)
with G = dR/dH, because grad_theta R = 2 K theta G. G shares its eigenvectors with H, so

    sigma_i' = sigma_i (1 - 2 eta g_i)^2        for each eigenvalue of H.

R_well: g_1 = (1 - 1/p) sigma_1 and g_i = -sigma_i / p below, so the largest eigenvalue shrinks and
all others grow in order. kappa falls as long as sigma_1' does not go below sigma_k' and sigma_2'
not above sigma_1:

    eta < min{ (sqrt(sigma_1) - sqrt(sigma_k)) / (2 (g_1 sqrt(sigma_1) + sigma_k^{3/2} / p)),
               (sqrt(sigma_1 sigma_2) - sigma_2) / ((2/p) sigma_2^2) }.

Theorem 4.3, part 1, prints the second term and 1 / g_1 for the first. That keeps sigma_1' below
sigma_1, but at half of it sigma_1' is 0 and kappa infinite: with p = 2, gaps are rarely so small
that the second term would prevent it. Where sigma_1 is repeated m times the gradient is the mean
over the cluster: g_1 = (1/m - 1/p) sigma_1, and sigma_{m+1} takes the place of sigma_2.

R_ill, D = |H|_F^2 / (2k) - sigma_k^2 / 2: g_k = (1 - 1/k) sigma_k / D^2, g_i = -sigma_i / (k D^2)
above. kappa rises as long as sigma_k' < sigma_k:

    eta < D^2 / ((1 - 1/k) sigma_k),

and is infinite at half of it, where theta becomes singular. (The bracket printed in theorem 4.3,
part 2, has another form and does not follow from this derivation.)

Both hold for one regularizer alone with K^{-1}; nothing is guaranteed for their sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _spectrum(function: str, features: Tensor) -> tuple[Tensor, int]:
    """Eigenvalues of H = F^T F, descending, and the numerical rank."""
    if features.dim() != 2:
        raise ValueError(
            f"{function}: features must have shape (n, p), got {tuple(features.shape)}; "
            "give one matrix at a time"
        )
    sigma = torch.linalg.svdvals(features.detach().to(torch.float64))
    tolerance = max(features.shape) * torch.finfo(torch.float64).eps * sigma[0]
    return sigma.square(), int((sigma > tolerance).sum())


def well_step_bound(features: Tensor) -> float:
    """Largest step of a preconditioned descent on R_well that is sure to lower kappa.

    Args:
        features: F = X theta, shape ``(n, p)``; H = F^T F.

    Returns:
        The bound on eta; infinity if all p eigenvalues are equal, where R_well has no gradient.

    Raises:
        ValueError: If ``features`` is not a matrix.

    Example:
        >>> well_step_bound(torch.eye(3, dtype=torch.float64))
        inf
    """
    eigenvalues, rank = _spectrum("well_step_bound", features)
    p = features.shape[1]
    if rank == 0:
        return math.inf
    largest = float(eigenvalues[0])
    equal = eigenvalues >= largest * (1.0 - 1e-12)
    multiplicity = int(equal.sum())
    shrinking = (1.0 / multiplicity - 1.0 / p) * largest
    if multiplicity >= rank:
        # kappa is 1 already; up to here theta keeps its rank.
        return 0.5 / shrinking if shrinking > 0.0 else math.inf
    second, smallest = float(eigenvalues[multiplicity]), float(eigenvalues[rank - 1])
    meeting = (math.sqrt(largest) - math.sqrt(smallest)) / (
        2.0 * (shrinking * math.sqrt(largest) + smallest**1.5 / p)
    )
    return min(meeting, (math.sqrt(largest * second) - second) * p / (2.0 * second * second))


def ill_step_bound(features: Tensor) -> float:
    """Largest step of a preconditioned descent on R_ill that is sure to raise kappa.

    Args:
        features: F = X theta, shape ``(n, p)``; H = F^T F.

    Returns:
        The bound on eta; kappa is infinite at half of it. Infinity if H has rank 1 or less.

    Raises:
        ValueError: If ``features`` is not a matrix.

    Example:
        >>> ill_step_bound(torch.ones(3, 1, dtype=torch.float64))
        inf
    """
    eigenvalues, rank = _spectrum("ill_step_bound", features)
    if rank <= 1:
        return math.inf
    smallest = float(eigenvalues[rank - 1])
    denominator = float(eigenvalues.square().sum()) / (2.0 * rank) - smallest**2 / 2.0
    return denominator**2 / ((1.0 - 1.0 / rank) * smallest)
