"""Attackers without a learning rate to tune: for any loss of the scores, then the squared alone.

Each is handed features Z (n, p) and targets y (n,) or (n, k), starts at w = 0, (p,) or (p, k), and
yields w after 0, 1, 2, ... steps. One step is one gradient; steps are sized by
L = sup l'' lambda_max(Z^T Z) or by a search along the line, so that no scale of the features helps
the defender: the curves of Z and of c Z are the same. The special forms for the squared loss need
the Hessian Z^T Z alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.attacks.losses import ProbeLoss, dot

# Pairs of (step, change of gradient) that L-BFGS remembers, as scipy and torch do.
_MEMORY = 10


# Weak Wolfe conditions: sufficient decrease and curvature, the usual constants.
_DECREASE, _CURVATURE = 1e-4, 0.9


_LINE_TRIALS = 30


def safe_step(z: Tensor, loss: ProbeLoss) -> Tensor:
    """1 / L with L = sup l'' lambda_max(z^T z); 0 for features that are all zero."""
    bound = loss.curvature * gram_extremes(z).lambda_max
    return torch.where(bound > 0, 1.0 / bound, 0.0)


def _rounding(z: Tensor) -> float:
    """Gradients below this times |l'| are rounding errors."""
    return 4.0 * torch.finfo(z.dtype).eps * float(torch.linalg.matrix_norm(z))


def descent(z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
    """Gradient descent with the constant step 1/L."""
    step = safe_step(z, loss)
    w = starting_weights(z, y)
    while True:
        yield w
        w = w - step * (z.mT @ loss.slope(z @ w, y))


def line_search(z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
    """Gradient descent with exact line search."""
    w, scores = starting_weights(z, y), torch.zeros_like(y)
    while True:
        yield w
        direction = -(z.mT @ loss.slope(scores, y))
        image = z @ direction
        step = loss.exact_step(scores, image, y)
        w, scores = w + step * direction, scores + step * image


def nesterov(z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
    """Nesterov's accelerated gradient for convex functions, step 1/L and momentum (t - 1)/(t + 2).

    f(w_t) - f* <= 2 L |w_0 - w*|^2 / (t + 1)^2 whatever the condition number is, which is why
    immunization has less of a hold on it than on gradient descent.
    """
    step = safe_step(z, loss)
    w = point = starting_weights(z, y)
    count = 0
    while True:
        yield w
        count += 1
        following = point - step * (z.mT @ loss.slope(z @ point, y))
        point = following + (count - 1.0) / (count + 2.0) * (following - w)
        w = following


def nonlinear_conjugate_gradients(z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
    """Conjugate gradients of Polak and Ribiere, exact line search, restart where beta < 0.

    On the squared loss these are the conjugate gradients of
    :func:`immunize_ext.probing.attacks.probes.conjugate_gradients`.
    """
    w, scores = starting_weights(z, y), torch.zeros_like(y)
    noise = _rounding(z)
    slope = loss.slope(scores, y)
    gradient = z.mT @ slope
    direction = -gradient
    while True:
        yield w
        if not float(gradient.norm()) > noise * float(slope.norm()):
            continue  # w is the optimum to rounding, and stays
        image = z @ direction
        step = loss.exact_step(scores, image, y)
        w, scores = w + step * direction, scores + step * image
        slope = loss.slope(scores, y)
        renewed = z.mT @ slope
        beta = (dot(renewed, renewed - gradient) / dot(gradient, gradient)).clamp(min=0.0)
        direction = beta * direction - renewed
        if not float(dot(direction, renewed)) < 0.0:
            direction = -renewed
        gradient = renewed


def lbfgs(z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
    """L-BFGS with ten pairs of memory and a weak Wolfe search that tries the unit step first.

    With an exact search it would take the steps of conjugate gradients on the squared loss; with
    the unit step, as libraries run it, it does not. One step is one new w, which may have cost more
    than one evaluation.
    """
    w, scores = starting_weights(z, y), torch.zeros_like(y)
    noise, first = _rounding(z), safe_step(z, loss)
    slope = loss.slope(scores, y)
    gradient = z.mT @ slope
    memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
    while True:
        yield w
        if not float(gradient.norm()) > noise * float(slope.norm()):
            continue
        direction = -_inverse_hessian(gradient, memory, first)
        if not float(dot(direction, gradient)) < 0.0:
            memory.clear()
            direction = -first * gradient
        image = z @ direction
        step = _wolfe_step(scores, image, y, loss)
        if step == 0.0 and memory:
            memory.clear()  # a direction gone stale to rounding: steepest descent next
            continue
        w, scores = w + step * direction, scores + step * image
        slope = loss.slope(scores, y)
        renewed = z.mT @ slope
        pair = step * direction, renewed - gradient
        if float(dot(*pair)) > 0.0:
            memory.append(pair)
        gradient = renewed


def _inverse_hessian(
    gradient: Tensor, memory: deque[tuple[Tensor, Tensor]], first: Tensor
) -> Tensor:
    """The two-loop recursion: the inverse Hessian of the memory times a gradient."""
    result = gradient
    kept = []
    for move, change in reversed(memory):
        rho = 1.0 / dot(move, change)
        alpha = rho * dot(move, result)
        result = result - alpha * change
        kept.append((rho, alpha, move, change))
    scale = first
    if memory:
        move, change = memory[-1]
        scale = dot(move, change) / dot(change, change)
    result = scale * result
    for rho, alpha, move, change in reversed(kept):
        result = result + (alpha - rho * dot(change, result)) * move
    return result


def _wolfe_step(scores: Tensor, image: Tensor, y: Tensor, loss: ProbeLoss) -> float:
    """A step with sufficient decrease and curvature, by doubling and bisection; 0 if none."""
    value = float(loss.total(scores, y))
    start = float(dot(loss.slope(scores, y), image))
    low, high, step, best = 0.0, float("inf"), 1.0, 0.0
    for _ in range(_LINE_TRIALS):
        moved = scores + step * image
        if not float(loss.total(moved, y)) <= value + _DECREASE * step * start:
            high = step
        else:
            best = step
            if float(dot(loss.slope(moved, y), image)) >= _CURVATURE * start:
                break
            low = step
        step = 2.0 * low if high == float("inf") else (low + high) / 2.0
    return best


def standardised_descent(z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
    """Gradient descent with step 1/L after dividing each feature by its root mean square.

    The cheapest preconditioner there is. Features are not centred: the probe has no intercept, and
    centring would let it fit other functions.
    """
    spread = z.square().mean(0).sqrt()
    scale = torch.where(spread > 0, 1.0 / spread, 0.0)
    for u in descent(z * scale, y, loss):
        yield scaled_rows(scale, u)


def whitened_general(z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
    """Gradient descent with step 1/L after whitening the features, whatever the loss.

    With Z = U S V^T its iterates are those on U, so no invertible theta changes the curve.
    """
    whitened, unwhiten = whitening(z)
    step = 1.0 / loss.curvature
    u = starting_weights(whitened, y)
    while True:
        yield unwhiten @ u
        u = u - step * (whitened.mT @ loss.slope(whitened @ u, y))


def low_rank_preconditioner(z: Tensor, rank: int) -> Tensor:
    """M, symmetric, such that the leading directions of (Z M)^T Z M are as long as the next one.

    What a Nystrom sketch of Z^T Z is an approximation of: the attacker's best. Shape ``(p, p)``.
    """
    _, sigma, right = torch.linalg.svd(z, full_matrices=False)
    rank = min(rank, len(sigma) - 1)
    scale = sigma[rank : rank + 1]
    shrink = torch.where(sigma[:rank] > 0, scale / sigma[:rank], 1.0) - 1.0
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return identity + (right[:rank].mT * shrink) @ right[:rank]


def starting_weights(z: Tensor, y: Tensor) -> Tensor:
    """The head that every attack starts from: zeros, one per feature and output."""
    return torch.zeros(z.shape[1], *y.shape[1:], dtype=z.dtype, device=z.device)


def scaled_rows(scale: Tensor, head: Tensor) -> Tensor:
    """A head with the weights of each feature multiplied by a number."""
    return (scale * head.mT).mT if head.dim() > 1 else scale * head


def gradient_descent(z: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Gradient descent with the constant step 1/L, L = lambda_max(Z^T Z).

    Contracts the squared distance to the optimum by 1 - 1/kappa or better per step (eq 2), which is
    what raising kappa is meant to slow down.
    """
    hessian, linear = z.mT @ z, z.mT @ y
    largest = gram_extremes(z).lambda_max
    # Features that are all zero have no gradient to follow.
    step = torch.where(largest > 0, 1.0 / largest, 0.0)
    w = starting_weights(z, y)
    while True:
        yield w
        w = w - step * (hessian @ w - linear)


def line_search_descent(z: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Gradient descent with exact line search: step g^T g / (g^T H g) along -g.

    The attacker that the papers measure with: no step size for the defender to hide behind.
    """
    hessian, linear = z.mT @ z, z.mT @ y
    w = starting_weights(z, y)
    while True:
        yield w
        gradient = hessian @ w - linear
        curvature = dot(hessian @ gradient, gradient)
        step = torch.where(curvature > 0, dot(gradient, gradient) / curvature, 0.0)
        w = w - step * gradient


def conjugate_gradients(z: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Conjugate gradients on the normal equations, in the least-squares form (CGLS).

    The best that any method can do with the gradients it has seen. Needs about the square root of
    the steps of gradient descent, so immunization has less of a hold on it.
    """
    w = starting_weights(z, y)
    residual = y.clone()
    gradient = z.mT @ residual
    direction = gradient
    squared = dot(gradient, gradient)
    noise = 4.0 * torch.finfo(z.dtype).eps * torch.linalg.matrix_norm(z)
    while True:
        yield w
        # A gradient within its own rounding error has no direction: w is the optimum and stays.
        if not bool(squared.sqrt() > noise * residual.norm()):
            continue
        image = z @ direction
        step = squared / dot(image, image)
        w = w + step * direction
        residual = residual - step * image
        gradient = z.mT @ residual
        renewed = dot(gradient, gradient)
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
    u = starting_weights(whitened, y)
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
    explained = dot(coefficients, coefficients)
    unexplained = (dot(y, y) - explained).clamp(min=0.0)
    shrinkage = torch.ones_like(explained)
    # With rank n every sample is fitted exactly, and nothing is left to validate with.
    if 0 < rank < n:
        ratio = torch.where(explained > 0, rank * unexplained / (explained * (n - rank)), 0.0)
        shrinkage = (1.0 - ratio).clamp(min=0.0)
    yield starting_weights(z, y)
    solution = unwhiten @ (shrinkage * coefficients)
    while True:
        yield solution
