r"""When the first-order hypergradient may be trusted.

Let M be an adaptation map (steps, and a merge of what they end at), F(theta) = L(M(theta)) and
g = grad L(M(theta)) the first-order hypergradient. With E = I - DM,

.. math:: \nabla F = (I - E)^\top g, \qquad
          \langle g, \nabla F \rangle \ge (1 - \lVert E \rVert) \lVert g \rVert^2,

so where |E| < 1 a step along g raises the loss after adaptation. For one step of rate alpha on each
of several losses and a linear merge, E = alpha J with :math:`J = \sum_n P_n H_n`, P_n the part of
the merge that copy n has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from immunize_ext.bilevel.solvers import operator_norm
from immunize_ext.bilevel.trees import Parameters, axpy, norm


def displacement_norm(
    adaptation: Callable[[Parameters], Parameters],
    at: Mapping[str, Tensor],
    *,
    pairs: int = 3,
    seed: int = 0,
) -> float:
    r"""Spectral norm of E = I - DM at a point, from below.

    Above 1, the first-order hypergradient need not be a direction in which the loss after
    adaptation grows.

    Args:
        adaptation: M. Its derivative must be complete: that of :func:`~immunize_ext.bilevel.adapt`
            with ``Hypergradient("unrolled")``, whose operator ``"secant"`` needs no second
            derivatives.
        at: theta, by name.
        pairs: Iterations of the power method on E^T E; each takes one call of M and one derivative.
        seed: Of the direction that it starts from.

    Returns:
        A lower bound that grows to the norm with ``pairs``, as accurate as differences of M are:
        one or two digits in float32.

    Source:
        DERIVED; the inequality is Cauchy and Schwarz's.

    Example:
        >>> from immunize_ext.bilevel import SGD, Hypergradient, adapt
        >>> loss = lambda p: 1.5 * p["x"].square().sum()  # H = 3
        >>> move = lambda p: adapt(p, [loss], SGD(0.1), Hypergradient("unrolled")).parameters
        >>> theta = {"x": torch.ones(2, dtype=torch.float64)}
        >>> round(displacement_norm(move, theta), 6)  # alpha |H|
        0.3
    """
    leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
    with torch.enable_grad():
        ends = adaptation(leaves)
    size = 1.0 + norm(leaves)
    eps = torch.finfo(next(iter(leaves.values())).dtype).eps
    # Longer than rounding of M asks for: what autocast rounds is coarser than the parameters.
    h = eps ** (1.0 / 3.0) * size

    def apply(v: Parameters) -> Parameters:
        with torch.no_grad():
            moved = adaptation(axpy(h, v, {n: x.detach() for n, x in leaves.items()}))
        return {n: v[n] - (moved[n] - ends[n].detach()) / h for n in v}

    def transposed(u: Parameters) -> Parameters:
        found = torch.autograd.grad(
            list(ends.values()),
            list(leaves.values()),
            [u[name] for name in ends],
            retain_graph=True,
        )
        return {n: u[n] - part for n, part in zip(leaves, found, strict=True)}

    generator = torch.Generator().manual_seed(seed)
    start = {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        for name, x in leaves.items()
    }
    return operator_norm(apply, transposed, start, pairs=pairs)
