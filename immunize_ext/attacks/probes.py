"""Linear probes as attackers run them: each yields its weights, step by step.

A probe is handed features Z (n, p) and targets y (n,), starts at w = 0 and yields w after 0, 1, 2,
... steps for as long as it is asked. All of them minimise f(w) = |Z w - y|^2 / 2 and see nothing
but Z and y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from immunize_ext.ops.spectrum import gram_extremes

Probe = Callable[[Tensor, Tensor], Iterator[Tensor]]


def starting_weights(z: Tensor) -> Tensor:
    """The head that every attack starts from: zeros, one per feature."""
    return torch.zeros(z.shape[1], dtype=z.dtype, device=z.device)


def gradient_descent(z: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Gradient descent with the constant step 1/L, L = lambda_max(Z^T Z).

    Contracts the squared distance to the optimum by 1 - 1/kappa or better per step (eq 2), which is
    what raising kappa is meant to slow down.
    """
    hessian, linear = z.mT @ z, z.mT @ y
    largest = gram_extremes(z).lambda_max
    # Features that are all zero have no gradient to follow.
    step = torch.where(largest > 0, 1.0 / largest, 0.0)
    w = starting_weights(z)
    while True:
        yield w
        w = w - step * (hessian @ w - linear)


def line_search_descent(z: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Gradient descent with exact line search: step g^T g / (g^T H g) along -g.

    The attacker that the papers measure with: no step size for the defender to hide behind.
    """
    hessian, linear = z.mT @ z, z.mT @ y
    w = starting_weights(z)
    while True:
        yield w
        gradient = hessian @ w - linear
        curvature = gradient @ hessian @ gradient
        step = torch.where(curvature > 0, gradient @ gradient / curvature, 0.0)
        w = w - step * gradient


def conjugate_gradients(z: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Conjugate gradients on the normal equations, in the least-squares form (CGLS).

    The best that any method can do with the gradients it has seen. Needs about the square root of
    the steps of gradient descent, so immunization has less of a hold on it.
    """
    w = starting_weights(z)
    residual = y.clone()
    gradient = z.mT @ residual
    direction = gradient
    squared = gradient @ gradient
    noise = 4.0 * torch.finfo(z.dtype).eps * torch.linalg.matrix_norm(z)
    while True:
        yield w
        # A gradient within its own rounding error has no direction: w is the optimum and stays.
        if not bool(squared.sqrt() > noise * residual.norm()):
            continue
        image = z @ direction
        step = squared / (image @ image)
        w = w + step * direction
        residual = residual - step * image
        gradient = z.mT @ residual
        renewed = gradient @ gradient
        direction = gradient + (renewed / squared) * direction
        squared = renewed


def whitening(z: Tensor) -> tuple[Tensor, Tensor]:
    """U and the map from weights of U to weights of Z = U S V^T, over the numerical rank."""
    left, sigma, right = torch.linalg.svd(z, full_matrices=False)
    counted = sigma > max(z.shape) * torch.finfo(z.dtype).eps * sigma[0]
    return left[:, counted], right[counted].mT / sigma[counted]


def whitened_descent(z: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Gradient descent with step 1/L after whitening the features.

    With Z = U S V^T over the numerical rank, the features U have the identity as Hessian: L = 1 and
    one step is the optimum, whatever theta was.
    """
    whitened, unwhiten = whitening(z)
    u = torch.zeros(whitened.shape[1], dtype=z.dtype, device=z.device)
    while True:
        yield unwhiten @ u
        u = u - whitened.mT @ (whitened @ u - y)


def closed_form_ridge(z: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Ridge regression on whitened features by a direct solve. Counts as one step.

    The penalty r |u|^2 on weights u of the whitened features does not depend on theta either. It
    shrinks all of them alike, u = U^T y / (1 + r), and generalized cross-validation has the minimum

        GCV(s) = n (e + (1 - s)^2 b) / (n - k s)^2,   s = 1 / (1 + r),
        s* = 1 - k e / (b (n - k)),                   b = |U^T y|^2, e = |y|^2 - b, k = rank.
    """
    n = z.shape[0]
    whitened, unwhiten = whitening(z)
    rank = whitened.shape[1]
    coefficients = whitened.mT @ y
    explained = coefficients @ coefficients
    unexplained = (y @ y - explained).clamp(min=0.0)
    shrinkage = torch.ones_like(explained)
    # With rank n every sample is fitted exactly, and nothing is left to validate with.
    if 0 < rank < n:
        ratio = torch.where(explained > 0, rank * unexplained / (explained * (n - rank)), 0.0)
        shrinkage = (1.0 - ratio).clamp(min=0.0)
    yield starting_weights(z)
    solution = unwhiten @ (shrinkage * coefficients)
    while True:
        yield solution


PROBES: dict[str, Probe] = {
    "gradient_descent": gradient_descent,
    "line_search": line_search_descent,
    "conjugate_gradients": conjugate_gradients,
    "whitened": whitened_descent,
    "closed_form_ridge": closed_form_ridge,
}
