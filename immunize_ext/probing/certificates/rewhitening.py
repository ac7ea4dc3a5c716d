r"""What it costs to take theta away again: unlabelled inputs.

With m >= p unlabelled inputs of regular scatter C_m, features whitened by their own scatter have
the Gram matrix X C_m^-1 X^T, in which theta does not occur (``metrics.optimizers``). Whatever
condition number was designed, what an attacker is left with is that of his sample Hessian in the
metric of C_m. For Gaussian inputs of one covariance the extreme eigenvalues of that are those of
Marchenko and Pastur, and

.. math:: \kappa \approx \left(\frac{1 + \sqrt{p/m}}{1 - \sqrt{p/m}}\right)^2 .

The price is p unlabelled inputs and p^3 / 3 operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_kappa_left(inputs: int, features: int) -> float:
    """Kappa left after whitening by the scatter of Gaussian inputs, for many features.

    Args:
        inputs: m, unlabelled inputs.
        features: p.

    Returns:
        The condition number; infinite where ``inputs`` does not exceed ``features``.

    Raises:
        ValueError: If a number is below 1.

    Source:
        Marchenko and Pastur, Mathematics of the USSR 1 (1967).

    Example:
        >>> [round(gaussian_kappa_left(m, 100), 1) for m in (150, 200, 1000)]
        [98.0, 34.0, 3.7]
    """
    if inputs < 1 or features < 1:
        raise ValueError(
            f"gaussian_kappa_left: inputs and features must be at least 1, got {inputs} and "
            f"{features}"
        )
    if inputs <= features:
        return math.inf
    root = math.sqrt(features / inputs)
    return ((1 + root) / (1 - root)) ** 2


def whitening_map(
    unlabelled: Tensor, *, ridge: float = 1e-9, power: float = 1.0, centre: bool = True
) -> Tensor:
    r"""(C + ridge tr(C)/q I)^(-power/2) for the scatter C of unlabelled features.

    Power 1 whitens; a smaller one keeps a part of what the variances say.

    Args:
        unlabelled: Features, shape ``(m, q)``.
        ridge: Relative to the mean eigenvalue of C.
        power: Between 0, which changes nothing, and 1.
        centre: Whether their mean is taken off, as for a probe with an intercept; a probe without
            one sees second moments.

    Returns:
        The map, symmetric, shape ``(q, q)``, float64.

    Raises:
        ValueError: If all features are constant.

    Example:
        >>> z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> z = z * torch.tensor([30.0, 1.0])
        >>> white = (z - z.mean(0)) @ whitening_map(z)
        >>> torch.allclose(white.T @ white / 500, torch.eye(2, dtype=torch.float64), atol=1e-5)
        True
    """
    z = unlabelled.detach().to(torch.float64)
    if centre:
        z = z - z.mean(0)
    scatter = z.mT @ z / len(z)
    values, vectors = torch.linalg.eigh(scatter)
    mean = float(values.clamp(min=0.0).mean())
    if not mean > 0.0:
        raise ValueError("whitening_map: unlabelled must vary, got constant features")
    damped = values.clamp(min=0.0) + ridge * mean
    return vectors @ (vectors / damped.pow(power / 2.0)).mT


def rewhitened(
    theta: Tensor,
    unlabelled: Tensor,
    *,
    ridge: float = 1e-9,
    power: float = 1.0,
    centre: bool = True,
) -> Tensor:
    """An extractor followed by the whitening of what it makes of unlabelled inputs.

    At power 1, up to the ridge and a rotation, it is the same for every invertible theta.

    Args:
        theta: The extractor, shape ``(p, q)``.
        unlabelled: Inputs, shape ``(m, p)``.
        ridge: As in :func:`whitening_map`.
        power: As in :func:`whitening_map`.
        centre: As in :func:`whitening_map`.

    Returns:
        theta times the map, shape ``(p, q)``, float64.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]).double()
        >>> theta = torch.tensor([[1.0, 0.0], [5.0, 1e-3]]).double()
        >>> z = x @ rewhitened(theta, x, ridge=0.0)
        >>> torch.allclose(z.mT @ z, 4 * torch.eye(2).double())
        True
    """
    wide = theta.detach().to(torch.float64)
    features = unlabelled.to(torch.float64) @ wide
    return wide @ whitening_map(features, ridge=ridge, power=power, centre=centre)


def aligned(theta: Tensor, theta0: Tensor, unlabelled: Tensor) -> Tensor:
    r"""Features mapped onto those of a public model by unlabelled inputs that went through both.

    The map of least squares, :math:`Z^+ S`, Z and S the features of the immunized and of the public
    model. Where theta is invertible and there are as many inputs as features, it is the inverse:
    the variances of the public model are back, and with them the prior that few samples need. What
    a singular theta has taken away does not come back.

    Args:
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The public one, shape ``(p, s)``.
        unlabelled: Inputs, shape ``(m, p)``.

    Returns:
        theta times the map, shape ``(p, s)``, float64.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]).double()
        >>> theta = torch.tensor([[1.0, 3.0], [0.0, 1e-3]]).double()
        >>> back = aligned(theta, torch.eye(2).double(), x)
        >>> torch.allclose(back, torch.eye(2).double(), atol=1e-6)
        True
    """
    wide = theta.detach().to(torch.float64)
    x = unlabelled.to(torch.float64)
    z, s = x @ wide, x @ theta0.detach().to(torch.float64)
    left, sigma, right = torch.linalg.svd(z, full_matrices=False)
    kept = sigma > max(z.shape) * torch.finfo(torch.float64).eps * sigma[:1]
    return wide @ (right[kept].mT @ ((left[:, kept].mT @ s) / sigma[kept, None]))


def raised(theta: Tensor, unlabelled: Tensor, first: int, last: int, gain: float) -> Tensor:
    """An extractor followed by a guess: some directions of its features are made larger.

    A direction that was made small to hide it is among those of small variance. Who looks for it
    raises one part of the spectrum after the other, and keeps what validates best.

    Args:
        theta: The extractor, shape ``(p, q)``.
        unlabelled: Inputs, shape ``(m, p)``.
        first: The first principal direction that is raised, counted from the largest variance.
        last: The first that is not any more.
        gain: By how much their standard deviation is multiplied.

    Returns:
        theta times the map, shape ``(p, q)``, float64.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
        >>> (raised(torch.eye(2).double(), x, 1, 2, 10.0).abs() + 0.0).tolist()
        [[1.0, 0.0], [0.0, 10.0]]
    """
    wide = theta.detach().to(torch.float64)
    z = unlabelled.to(torch.float64) @ wide
    z = z - z.mean(0)
    columns = torch.linalg.eigh(z.mT @ z).eigenvectors.flip(-1)[:, first:last]
    return wide + (gain - 1.0) * (wide @ columns) @ columns.mT
