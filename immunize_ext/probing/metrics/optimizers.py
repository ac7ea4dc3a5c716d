r"""Which condition number each kind of optimizer pays for, and to which power.

The steps of an optimizer on a quadratic of Hessian H grow like a power of a condition number:

- gradient descent: kappa(H); momentum, Nesterov and conjugate gradients: its square root (the last
  never more than p steps);
- Adagrad with the full matrix preconditions by H^(-1/2) and leaves kappa(H)^(1/2) for gradient
  descent to pay;
- Adam, diagonal Adagrad and standardised features: kappa(D H D), D = diag(H)^(-1/2);
- a rank-r Nystrom preconditioner takes the r leading directions away: lambda_{r+1} / lambda_p;
- whitening, Newton, natural gradient, K-FAC of a linear probe and the closed form: 1.

The last line is a theorem. Let C be any scatter estimate of the features X theta that is affine
equivariant, C(X theta) = theta^T C(X) theta, and A any matrix with A^T C A = I. The Gram matrix of
the mapped features is

.. math:: X\theta A A^\top \theta^\top X^\top
          = X\theta (\theta^\top C \theta)^{-1} \theta^\top X^\top = X C^{-1} X^\top,

in which theta does not occur. What a learner sees through inner products is what it sees without
theta, step by step, for every invertible theta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from immunize_ext.ops.spectrum import symmetric_extremes

Optimizer = Literal[
    "gradient_descent",
    "momentum",
    "conjugate_gradients",
    "full_matrix_adagrad",
    "diagonal",
    "nystrom",
]
"""Optimizers that a condition number slows; ``diagonal`` is Adam, Adagrad and standardising."""

WHITENING = ("whitening", "newton", "natural_gradient", "kfac", "closed_form")
"""Those that none slows."""

EXPONENT: Mapping[str, float] = {
    "gradient_descent": 1.0,
    "momentum": 0.5,
    "conjugate_gradients": 0.5,
    "full_matrix_adagrad": 0.5,
    "diagonal": 1.0,
    "nystrom": 1.0,
    **dict.fromkeys(WHITENING, 0.0),
}
"""The power of :func:`kappa_under` by which steps grow."""

IMPOSSIBLE = (
    "for every invertible theta, a learner that whitens its features takes the very steps it takes "
    "without theta; no condition number can slow it"
)
"""What the theorem says, in one sentence."""


def check_optimizer(function: str, optimizer: str) -> None:
    """Refuse an optimizer that no condition number slows, with the theorem, and unknown ones.

    Args:
        function: Who asks; stands in the error.
        optimizer: The name.

    Raises:
        ValueError: If it is not one of :data:`Optimizer`.
    """
    if optimizer in WHITENING:
        raise ValueError(
            f"{function}: optimizer must be one that kappa slows, got {optimizer!r}: {IMPOSSIBLE}"
        )
    if optimizer not in get_args(Optimizer):
        raise ValueError(
            f"{function}: optimizer must be one of {', '.join(get_args(Optimizer))}, got "
            f"{optimizer!r}"
        )


def kappa_under(optimizer: str, h: Tensor, *, rank: int = 0) -> Tensor:
    r"""The condition number that an optimizer pays for on a quadratic of Hessian ``h``.

    .. math:: \kappa(H), \qquad \kappa(D H D),\ D = \mathrm{diag}(H)^{-1/2}, \qquad
              \lambda_{r+1}(H) / \lambda_p(H)

    Args:
        optimizer: ``gradient_descent``, ``momentum``, ``conjugate_gradients`` and
            ``full_matrix_adagrad`` (the first form), ``diagonal`` (the second), ``nystrom`` (the
            third).
        h: A symmetric positive definite matrix, shape ``(p, p)``.
        rank: r, for ``nystrom``; 0 takes nothing away.

    Returns:
        The condition number, a scalar of the dtype of ``h``. Steps grow like its power
        :data:`EXPONENT`.

    Raises:
        ValueError: If the optimizer is unknown, whitens (no condition number slows it), or ``h``
            is no positive definite matrix, or ``rank`` is not below p.

    Note:
        Deterministic. Differentiable in ``h``; at repeated eigenvalues the gradient of the first
        two forms is the least-norm subgradient.

    Example:
        >>> import torch
        >>> h = torch.diag(torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64))
        >>> [float(kappa_under(name, h)) for name in ("gradient_descent", "diagonal")]
        [100.0, 1.0]
        >>> float(kappa_under("nystrom", h, rank=1))
        10.0
    """
    check_optimizer("kappa_under", optimizer)
    p = h.shape[-1]
    if h.dim() != 2 or h.shape[0] != p:
        raise ValueError(f"kappa_under: h must have shape (p, p), got {tuple(h.shape)}")
    if not 0 <= rank < p:
        raise ValueError(f"kappa_under: rank must be between 0 and {p - 1}, got {rank}")
    if optimizer == "diagonal":
        diagonal = h.diagonal()
        _check_positive(float(diagonal.detach().min()))
        scale = diagonal.rsqrt()
        h = scale.unsqueeze(-1) * h * scale
    if optimizer == "nystrom" and rank:
        values = torch.linalg.eigvalsh(h)
        _check_positive(float(values[0].detach()))
        return values[p - 1 - rank] / values[0]
    extremes = symmetric_extremes(h)
    _check_positive(float(extremes.lambda_min.detach()))
    return extremes.lambda_max / extremes.lambda_min


def _check_positive(smallest: float) -> None:
    if not smallest > 0.0:
        raise ValueError(
            f"kappa_under: h must be positive definite, got a smallest eigenvalue or diagonal "
            f"entry of {smallest:.3g}; add a ridge"
        )
