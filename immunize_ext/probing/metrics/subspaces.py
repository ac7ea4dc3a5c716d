"""Principal angles between what matters to the primary and to the harmful task.

The leading subspace of a task is spanned by the eigenvectors of the k largest eigenvalues of its
Hessian. If those of two tasks agree (and all others do, in order), no theta can raise one condition
number and lower the other (proposition 3.2 of "Model Immunization from a Condition Number
Perspective"); the angles between them say how far apart the tasks are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SubspaceAngles(NamedTuple):
    """Angles between the leading subspaces of H_P and H_H, before and after.

    Attributes:
        before: Principal angles in radians with theta_0, ascending, shape ``(k,)``.
        after: The same with theta, shape ``(k,)``.
        gap_before: The smaller of lambda_k / lambda_{k+1} over the two tasks with theta_0. Near 1
            the subspace is a matter of rounding and its angles mean nothing.
        gap_after: The same with theta. Whitening makes it 1.
    """

    before: Tensor
    after: Tensor
    gap_before: float
    gap_after: float


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles between two subspaces.

    Equivalent to ``scipy.linalg.subspace_angles`` in reversed order, for orthonormal bases.

    Args:
        first: Orthonormal basis, shape ``(p, k)``.
        second: Orthonormal basis, shape ``(p, k)``.

    Returns:
        Angles in radians, ascending, shape ``(k,)``; small ones are exact to rounding too.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> basis = torch.eye(3, dtype=torch.float64)
        >>> principal_angles(basis[:, :2], basis[:, 1:]).tolist()
        [0.0, 1.5707963267948966]
    """
    if first.dim() != 2 or first.shape != second.shape:
        raise ValueError(
            f"principal_angles: second must have the shape (p, k) of first, got "
            f"{tuple(second.shape)} and {tuple(first.shape)}"
        )
    overlap = first.mT @ second
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(second - first @ overlap).clamp(max=1.0).flip(0)
    # The cosine loses the digits of small angles, the sine those of large ones.
    sines = sines[: len(cosines)]
    return torch.where(cosines.square() < 0.5, torch.arccos(cosines), torch.arcsin(sines))


def _leading(x: Tensor, theta: Tensor | None, count: int) -> tuple[Tensor, float]:
    """Orthonormal basis of a leading subspace, and its gap."""
    features = x.detach().to(torch.float64)
    if theta is not None:
        features = features @ theta.detach().to(torch.float64)
    _, sigma, right = torch.linalg.svd(features, full_matrices=False)
    if len(sigma) < count:
        raise ValueError(
            f"leading_subspace_angles: count must be at most {len(sigma)}, the smaller of samples "
            f"and features, got {count}"
        )
    following = float(sigma[count]) if len(sigma) > count else 0.0
    gap = float("inf") if following == 0.0 else (float(sigma[count - 1]) / following) ** 2
    return right[:count].mT, gap


def leading_subspace_angles(
    x_primary: Tensor,
    x_harmful: Tensor,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    count: int = 5,
) -> SubspaceAngles:
    """Angles between the leading subspaces of the two Hessians, before and after immunization.

    A ridge on K changes no eigenvector of K, and none is added.

    Args:
        x_primary: Inputs of the primary task, shape ``(n, p)``.
        x_harmful: Inputs of the harmful task, shape ``(m, p)``.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The extractor before; the identity when omitted.
        count: Dimension k of the subspaces.

    Returns:
        Angles and gaps. A rotation of the features changes neither.

    Raises:
        ValueError: If ``count`` is out of range.

    Note:
        Deterministic; computed in float64.

    Example:
        >>> primary = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> theta = torch.diag(torch.tensor([1.0, 5.0], dtype=torch.float64))
        >>> angles = leading_subspace_angles(primary, primary.flip(0, 1), theta, count=1)
        >>> round(float(angles.before), 4), round(float(angles.after), 4)
        (1.5708, 0.0)
    """
    if count < 1:
        raise ValueError(f"leading_subspace_angles: count must be at least 1, got {count}")
    angles, gaps = [], []
    for extractor in (theta0, theta):
        (primary, gap_p), (harmful, gap_h) = (
            _leading(x, extractor, count) for x in (x_primary, x_harmful)
        )
        angles.append(principal_angles(primary, harmful))
        gaps.append(min(gap_p, gap_h))
    return SubspaceAngles(angles[0], angles[1], gaps[0], gaps[1])
