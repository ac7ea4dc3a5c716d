"""How fast an attacker converges: steps to a threshold, slow-down, norm ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.quantities import Slowdown, slowdown


def norm_ratio(weights: Tensor, optimum: Tensor) -> Tensor:
    """Squared distance to the optimum relative to the start (eq 16): |w_t - w*|^2 / |w_0 - w*|^2.

    Args:
        weights: Iterates of an attack, shape ``(steps + 1, p)``, the start first; with k outputs
            ``(steps + 1, p, k)``.
        optimum: What they converge to, shape ``(p,)`` or ``(p, k)``.

    Returns:
        Ratios, shape ``(steps + 1,)``; the first is 1. Zeros if the start is the optimum.

    Example:
        >>> weights = torch.tensor([[0.0], [1.0], [1.5]])
        >>> norm_ratio(weights, torch.tensor([2.0])).tolist()
        [1.0, 0.25, 0.0625]
    """
    distance = (weights - optimum).square().flatten(1).sum(-1)
    return torch.zeros_like(distance) if float(distance[0]) == 0.0 else distance / distance[0]


def _probe_spectrum(
    function: str, x: Tensor, y: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """Singular values that count, y in the left singular basis (r, k), and the excess loss allowed.

    The excess is that of |x w - y|^2 over its least value, tolerance times the latter.
    """
    if x.dim() != 2 or y.shape[:1] != x.shape[:1] or y.dim() > 2:
        raise ValueError(
            f"{function}: y must have shape (n,) or (n, k) for features of shape (n, p), got "
            f"{tuple(y.shape)} and {tuple(x.shape)}"
        )
    if not tolerance >= 0.0:
        raise ValueError(f"{function}: tolerance must be at least 0, got {tolerance}")
    x, y = x.detach().to(torch.float64), y.detach().to(torch.float64)
    left, sigma, _ = torch.linalg.svd(x, full_matrices=False)
    counted = sigma > max(x.shape) * torch.finfo(torch.float64).eps * sigma[0]
    coordinates = left[:, counted].mT @ y.reshape(len(y), -1)
    unexplained = float(y.square().sum() - coordinates.square().sum())
    return sigma[counted], coordinates, tolerance * max(unexplained, 0.0)


def first_step_within(excess: Callable[[float], float], gap: float) -> float:
    """The least whole number of steps with ``excess(steps) <= gap``, for what falls towards 0."""
    if excess(0.0) <= gap:
        return 0.0
    # Whole numbers throughout: excess(low) is too much, excess(high) is not.
    low, high = 0.0, 1.0
    while excess(high) > gap:
        low, high = high, 2.0 * high
    while high - low > 1.0:
        middle = float(math.floor((low + high) / 2.0))
        low, high = (middle, high) if excess(middle) > gap else (low, middle)
    return high


def gradient_descent_steps(x: Tensor, y: Tensor, *, tolerance: float = 0.1) -> float:
    """Steps that gradient descent needs on a linear probe, from the spectrum, without a run.

    Minimising f(w) = |x w - y|^2 / 2 from w = 0 with step 1/L, L = sigma_max(x)^2, in the basis of
    x's right singular vectors each coordinate contracts on its own, so with U the left ones

        f(w_t) - f* = 1/2 sum_i (1 - sigma_i^2 / L)^(2 t) (u_i^T y)^2.

    Args:
        x: Features of the probe, shape ``(n, p)``.
        y: Targets, shape ``(n,)``, or ``(n, k)`` for a head of k outputs.
        tolerance: The threshold is ``(1 + tolerance)`` times the least training loss.

    Returns:
        The number of steps, a whole number, or infinity if the least training loss is 0 and is
        never reached exactly.

    Raises:
        ValueError: If shapes do not fit or ``tolerance`` is negative.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> gradient_descent_steps(torch.cat([x, x]), torch.tensor([1.0, 1.0, -2.0, 1.0]))
        3.0
    """
    sigma, coordinates, gap = _probe_spectrum("gradient_descent_steps", x, y, tolerance)
    if len(sigma) == 0:
        return 0.0
    shares = coordinates.square().sum(1)
    log_rate = torch.log1p(-(sigma / sigma[0]).square())

    def excess(steps: float) -> float:
        # 0 * -inf would be NaN: the top direction is exact after one step, and untouched before.
        decay = torch.ones_like(log_rate) if steps == 0.0 else torch.exp(2.0 * steps * log_rate)
        return float((decay * shares).sum())

    if gap == 0.0 and excess(0.0) > 0.0 and excess(1.0) > 0.0:
        return math.inf
    return first_step_within(excess, gap)


def conjugate_gradient_steps(x: Tensor, y: Tensor, *, tolerance: float = 0.1) -> float:
    """Steps that conjugate gradients need on a linear probe, from the spectrum, without a run.

    From w = 0, the residual after t steps is the smallest in the Krylov space of that order. With
    s_i = u_i^T y in the left singular basis of x and L = diag(sigma_i^2),

        2 (f(w_t) - f*) = min over c in span{L s, L^2 s, ..., L^t s} of |s - c|^2,

    which needs an orthonormal basis of that space alone: p numbers a step, and no data.

    Args:
        x: Features of the probe, shape ``(n, p)``.
        y: Targets, shape ``(n,)``, or ``(n, k)`` for a head of k outputs.
        tolerance: The threshold is ``(1 + tolerance)`` times the least training loss.

    Returns:
        The number of steps in exact arithmetic, a whole number of at most p. Rounding costs a run
        on ill-conditioned features more.

    Raises:
        ValueError: If shapes do not fit or ``tolerance`` is negative.

    Note:
        Deterministic; computed in float64, with the basis orthogonalised twice. Above kappa of
        about 1e12 the smallest eigenvalues are lost to rounding and the count is a lower bound.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> conjugate_gradient_steps(torch.cat([x, x]), torch.tensor([1.0, 1.0, -2.0, 1.0]))
        2.0
    """
    sigma, residual, gap = _probe_spectrum("conjugate_gradient_steps", x, y, tolerance)
    if len(sigma) == 0:
        return 0.0
    eigenvalues = (sigma / sigma[0]).square()[:, None]
    noise = len(sigma) * torch.finfo(torch.float64).eps
    # Coordinates that are rounding errors of y are none: an eigenvalue without a share costs no
    # step.
    residual = residual.where(residual.abs() > noise * float(y.to(torch.float64).norm()), 0.0)
    basis = residual.new_zeros(residual.numel(), 0)
    direction = residual
    for step in range(len(sigma)):
        if float(residual.square().sum()) <= gap or not bool(residual.any()):
            return float(step)
        # All outputs are one head, so one long vector.
        following = (eigenvalues * direction).flatten()
        size = float(following.norm())
        for _ in range(2):
            following = following - basis @ (basis.mT @ following)
        if float(following.norm()) <= noise * size:
            return float(step)  # the space is exhausted: w is the optimum
        following = following / following.norm()
        basis = torch.cat([basis, following[:, None]], dim=1)
        direction = following.reshape(residual.shape)
        residual = residual - direction * (following @ residual.flatten())
    return float(len(sigma))


def spectral_slowdown(
    x: Tensor,
    y: Tensor,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    attacker: Literal["gradient_descent", "conjugate_gradients"] = "gradient_descent",
    tolerance: float = 0.1,
) -> Slowdown:
    """How many times more steps an attacker needs on its training loss, without a run.

    Args:
        x: Inputs, shape ``(n, p)``.
        y: Targets, shape ``(n,)``, or ``(n, k)`` for a head of k outputs.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The extractor before; the identity when omitted.
        attacker: Whose steps are counted.
        tolerance: The threshold is ``(1 + tolerance)`` times the least training loss.

    Returns:
        The ratio. NaN where gradient descent never gets there in either case, which happens when
        the least training loss is 0.

    Raises:
        ValueError: If the attacker is unknown, shapes do not fit or ``tolerance`` is negative.

    Note:
        Each side has its own least loss; an invertible theta leaves it as it is. Deterministic.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64).repeat(2, 1)
        >>> theta = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> y = torch.tensor([1.0, 1.0, -2.0, 1.0])
        >>> str(spectral_slowdown(x, y, theta))
        '3.0x'
    """
    counts = {
        "gradient_descent": gradient_descent_steps,
        "conjugate_gradients": conjugate_gradient_steps,
    }
    if attacker not in counts:
        raise ValueError(
            f"spectral_slowdown: attacker must be one of {', '.join(counts)}, got {attacker!r}"
        )
    x = x.detach().to(torch.float64)
    steps, base = (
        counts[attacker](
            x if extractor is None else x @ extractor.detach().to(torch.float64),
            y,
            tolerance=tolerance,
        )
        for extractor in (theta, theta0)
    )
    return Slowdown(max(steps, 1.0) / max(base, 1.0), False)


def line_search_norm_ratio(x: Tensor, y: Tensor, *, steps: int = 100) -> Tensor:
    """|w_t - w*|^2 / |w_0 - w*|^2 of gradient descent with exact line search (eq 16).

    Exact line search leaves no step size to hide behind. w* is the optimum that descent from 0
    converges to: the least-squares solution of least norm, over the numerical rank.

    Args:
        x: Features of the probe, ``inputs @ theta``, shape ``(n, p)``.
        y: Targets, shape ``(n,)``, or ``(n, k)`` for a head of k outputs.
        steps: Number of steps, at least 1.

    Returns:
        Ratios, shape ``(steps + 1,)``, float64; the first is 1, or all are 0 if 0 is the optimum.

    Raises:
        ValueError: If ``steps`` is below 1 or shapes do not fit.

    Note:
        Deterministic; computed in float64. A change of basis of the features that is not
        orthogonal changes the norm, so compare the decay and not the value of single ratios.

    Source:
        Zheng et al., ICML 2025, eq. 16.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> ratios = line_search_norm_ratio(x, torch.tensor([1.0, 1.0]), steps=2)
        >>> [round(ratio, 4) for ratio in ratios.tolist()]
        [1.0, 0.4048, 0.0701]
    """
    if steps < 1:
        raise ValueError(f"line_search_norm_ratio: steps must be at least 1, got {steps}")
    if x.dim() != 2 or y.shape[:1] != x.shape[:1] or y.dim() > 2:
        raise ValueError(
            f"line_search_norm_ratio: y must have shape (n,) or (n, k) for features of shape "
            f"(n, p), got {tuple(y.shape)} and {tuple(x.shape)}"
        )
    x, y = x.detach().to(torch.float64), y.detach().to(torch.float64)
    left, sigma, _ = torch.linalg.svd(x, full_matrices=False)
    counted = sigma > max(x.shape) * torch.finfo(torch.float64).eps * sigma[0]
    # Coordinates of w - w* in the right singular basis: H is diagonal there, and from w = 0 no
    # other coordinate ever moves.
    sigma = sigma[counted] / sigma[0]  # no ratio of distances sees the scale of the features
    eigenvalues = sigma.square()[:, None]
    distance = (left[:, counted].mT @ y.reshape(len(y), -1)) / sigma[:, None]
    iterates = [distance]
    for _ in range(steps):
        gradient = eigenvalues * distance
        curvature = (eigenvalues * gradient.square()).sum()
        step = torch.where(curvature > 0, gradient.square().sum() / curvature, 0.0)
        distance = distance - step * gradient
        iterates.append(distance)
    return norm_ratio(torch.stack(iterates), torch.zeros_like(distance))


class AttackerSteps(NamedTuple):
    """Steps of one attacker.

    Attributes:
        base_steps: Without immunization.
        steps: With it; ``None`` if the budget ran out.
        budget: Steps that it was given with immunization.
    """

    base_steps: int
    steps: int | None
    budget: int


class WorstCase(NamedTuple):
    """What is left of a protection when the attacker may choose how to attack.

    Attributes:
        least_slowed: The attacker whose own number of steps grows least.
        least_slowdown: By how much it grows.
        fastest_base: The attacker who needs fewest steps without immunization.
        fastest: The attacker who needs fewest steps with it.
        slowdown: Steps of ``fastest`` with immunization over steps of ``fastest_base`` without:
            what a free choice of attacker costs. Never above ``fastest_base``'s own slow-down.
    """

    least_slowed: str
    least_slowdown: Slowdown
    fastest_base: str
    fastest: str
    slowdown: Slowdown


def worst_case(attackers: Mapping[str, AttackerSteps]) -> WorstCase:
    """Find the attackers that a protection does worst against.

    Steps of different attackers are counted alike, although a step of one may cost more time than
    a step of another.

    Args:
        attackers: Steps by name; of a comparison c of :mod:`immunize_ext.probing.attacks`,
            ``AttackerSteps(c.base_steps, c.steps, c.immunized.steps[-1])``.

    Returns:
        The worst cases. A slow-down cut off by the budget is a lower bound and counts as such.

    Raises:
        ValueError: If there is no attacker.

    Example:
        >>> case = worst_case(
        ...     {"gd": AttackerSteps(100, 3000, 10000), "cg": AttackerSteps(10, 20, 1000)}
        ... )
        >>> case.least_slowed, str(case.least_slowdown), case.fastest, str(case.slowdown)
        ('cg', '2.0x', 'cg', '2.0x')
    """
    if not attackers:
        raise ValueError("worst_case: attackers must hold at least one attacker, got none")
    ratios = {name: slowdown(a.steps, a.base_steps, a.budget) for name, a in attackers.items()}
    least = min(ratios, key=lambda name: (ratios[name].ratio, ratios[name].censored))
    fastest_base = min(attackers, key=lambda name: attackers[name].base_steps)

    def reach(name: str) -> tuple[int, bool]:
        attacker = attackers[name]
        censored = attacker.steps is None
        return (attacker.budget if attacker.steps is None else attacker.steps), censored

    # One who ran out of budget may have needed any number above it.
    fastest = min(attackers, key=reach)
    with_immunization = attackers[fastest]
    return WorstCase(
        least_slowed=least,
        least_slowdown=ratios[least],
        fastest_base=fastest_base,
        fastest=fastest,
        slowdown=slowdown(
            with_immunization.steps, attackers[fastest_base].base_steps, with_immunization.budget
        ),
    )
