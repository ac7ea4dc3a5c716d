r"""Solves with I + gamma A for a symmetric A known by its products, and norms of such maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor

from immunize_ext.bilevel.trees import Parameters, axpy, dot, norm, scaled
from immunize_ext.errors import NegativeCurvatureError

Apply: TypeAlias = Callable[[Parameters], Parameters]
"""A linear map of tables of tensors."""


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
        x: The solution.
        products: Products with A that it took.
        residual: |b - (I + gamma A) x| / |b|; of Neumann's series that of the sum without its last
            term, which is known without another product.
    """

    x: Parameters
    products: int
    residual: float


def neumann(apply: Apply, b: Mapping[str, Tensor], *, gamma: float, terms: int) -> Solution:
    r"""Partial sum of Neumann's series.

    .. math:: x = \sum_{j=0}^{terms} (-\gamma A)^j b \approx (I + \gamma A)^{-1} b

    It converges if and only if gamma |A| < 1; where it does not, the residual grows with every
    term, and the sum is what it is.

    Args:
        apply: A.
        b: The right-hand side.
        gamma: Positive.
        terms: Products with A.

    Returns:
        The sum.

    Example:
        >>> import torch
        >>> b = {"x": torch.tensor([1.0])}
        >>> neumann(lambda v: scaled(0.5, v), b, gamma=1.0, terms=2).x  # 1 - 1/2 + 1/4
        {'x': tensor([0.7500])}
    """
    total = term = dict(b)
    for _ in range(terms):
        term = scaled(-gamma, apply(term))
        total = axpy(1.0, term, total)
    size = norm(b)
    return Solution(total, terms, norm(term) / size if size > 0.0 else 0.0)


def conjugate_gradients(
    apply: Apply, b: Mapping[str, Tensor], *, gamma: float, steps: int, tolerance: float
) -> Solution:
    r"""Conjugate gradients on (I + gamma A) x = b, from x = 0.

    Args:
        apply: A, symmetric.
        b: The right-hand side.
        gamma: Positive.
        steps: Most products with A.
        tolerance: Relative residual that is enough.

    Returns:
        The solution, within the steps that were allowed.

    Raises:
        NegativeCurvatureError: If a direction p with p^T (I + gamma A) p <= 0 is met: there is no
            minimum that the system could be the equation of.

    Source:
        Hestenes and Stiefel, 1952.

    Example:
        >>> import torch
        >>> b = {"x": torch.tensor([3.0])}
        >>> conjugate_gradients(lambda v: scaled(3.0, v), b, gamma=1.0, steps=5, tolerance=1e-6).x
        {'x': tensor([0.7500])}
    """
    x, r = scaled(0.0, b), dict(b)
    start = rr = dot(r, r)
    p, products = r, 0
    while products < steps and rr > tolerance * tolerance * start:
        q = axpy(gamma, apply(p), p)
        products += 1
        curvature = dot(p, q)
        if curvature <= 0.0:
            raise NegativeCurvatureError.along(
                "conjugate_gradients", curvature / dot(p, p), gamma=gamma, products=products
            )
        alpha = rr / curvature
        x, r = axpy(alpha, p, x), axpy(-alpha, q, r)
        before, rr = rr, dot(r, r)
        p = axpy(rr / before, p, r)
    return Solution(x, products, (rr / start) ** 0.5 if start > 0.0 else 0.0)


def operator_norm(
    apply: Apply, transposed: Apply, start: Mapping[str, Tensor], *, pairs: int
) -> float:
    r"""A lower bound of the spectral norm, by power iteration on A^T A.

    Args:
        apply: A.
        transposed: Its transpose.
        start: Where the iteration starts; no direction of the answer should be missing.
        pairs: Products with A and A^T.

    Returns:
        The largest |A v| or |A^T u| of unit vectors that were met: never above the norm, and it
        grows to it with the number of pairs.

    Example:
        >>> import torch
        >>> v = {"x": torch.ones(1)}
        >>> operator_norm(lambda v: scaled(-3.0, v), lambda u: scaled(-3.0, u), v, pairs=1)
        3.0
    """
    found, v = 0.0, dict(start)
    for _ in range(pairs):
        for product in (apply, transposed):
            size = norm(v)
            if size == 0.0:
                return found
            v = product(scaled(1.0 / size, v))
            found = max(found, norm(v))
    return found
