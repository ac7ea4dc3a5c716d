"""Keep kappa_P inside a corridor: project the spectrum of the primary Hessian after each step.

With H_P = theta^T K_P theta = V diag(sigma) V^T, the update theta' = theta V diag(sqrt(t)) V^T has
H_P' = V diag(t sigma) V^T: every spectrum can be had without touching its eigenvectors, and theta'
is invertible if theta is. A kappa above the corridor has its eigenvalues clipped to a window of the
right width, centred on a logarithmic axis; one below has their logarithms spread from that centre.

A multiplier on kappa_P instead of a projection oscillates around its target (module ``control``,
which is for extractors that cannot be projected).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_corridor(function: str, corridor: tuple[float, float] | None) -> None:
    """Refuse a corridor that is none.

    Args:
        function: Who asks; stands in the error.
        corridor: Lower and upper end of kappa_P, or ``None`` for no corridor.

    Raises:
        ValueError: If not 1 <= lower <= upper < infinity.

    Example:
        >>> check_corridor("fit", (1.0, 30.0))
    """
    if corridor is None:
        return
    if len(corridor) != 2 or not 1.0 <= corridor[0] <= corridor[1] < math.inf:
        raise ValueError(
            f"{function}: corridor must be two numbers 1 <= low <= high, got "
            f"{' and '.join(map(str, corridor))}; they are the least and the largest kappa_P "
            "allowed"
        )


def project_to_corridor(theta: Tensor, x: Tensor, corridor: tuple[float, float]) -> Tensor:
    """The extractor with kappa_P brought into a corridor, and itself if it is there already.

    Args:
        theta: The extractor, shape ``(p, p)``.
        x: Inputs of the primary task whose K = x^T x is regular, shape ``(n, p)``; append a ridge
            with :func:`immunize_ext.probing.metrics.with_ridge` otherwise.
        corridor: The least and the largest condition number of theta^T K theta.

    Returns:
        The projected extractor, shape ``(p, p)``.

    Raises:
        ValueError: If the corridor is none, theta^T K theta is singular, or all of its eigenvalues
            are equal and the corridor starts above 1.

    Note:
        Deterministic; not differentiable.

    Example:
        >>> x = torch.diag(torch.tensor([10.0, 2.0, 1.0], dtype=torch.float64))
        >>> theta = project_to_corridor(torch.eye(3, dtype=torch.float64), x, (1.0, 4.0))
        >>> sigma = torch.linalg.svdvals(x @ theta)
        >>> round(float(sigma[0] / sigma[-1]) ** 2, 9)
        4.0
    """
    check_corridor("project_to_corridor", corridor)
    _, sigma, right = torch.linalg.svd(x @ theta, full_matrices=False)
    if len(sigma) < theta.shape[1] or not float(sigma[-1]) > 0.0:
        raise ValueError(
            "project_to_corridor: theta^T K theta must be regular, got a singular one; "
            "append a ridge to x with immunize_ext.probing.metrics.with_ridge"
        )
    logs = 2.0 * sigma.log()
    spread = float(logs[0] - logs[-1])
    low, high = (math.log(end) for end in corridor)
    middle = (logs[0] + logs[-1]) / 2.0
    if spread > high:
        wanted = logs.clamp(middle - high / 2.0, middle + high / 2.0)
    elif spread < low:
        if spread == 0.0:
            raise ValueError(
                "project_to_corridor: eigenvalues must differ to be spread, got equal ones; "
                "let the corridor start at 1"
            )
        wanted = middle + (logs - middle) * (low / spread)
    else:
        return theta
    factors = ((wanted - logs) / 2.0).exp()
    return theta @ (right.mT * factors) @ right
