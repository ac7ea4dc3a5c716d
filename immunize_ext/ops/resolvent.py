r"""Traces and energies of resolvents, for many ridges at once.

With B = (A + k I)^-1, a symmetric A and a shift k,

.. math:: \operatorname{tr} A B, \qquad \operatorname{tr} A^2 B^2, \qquad b^\top B^2 b

are what learning curves, effective dimensions, generalised cross-validation, leverage and ridge
paths are made of. One reduction of A to tridiagonal form serves every shift in O(p), and the
derivatives are

.. math::
    d \operatorname{tr} A B &= k \operatorname{tr}(B^2 dA)
        - (\operatorname{tr} B - k \operatorname{tr} B^2)\, dk, \\
    d \operatorname{tr} A^2 B^2 &= 2 k \operatorname{tr}\big((B^2 - k B^3)\, dA\big)
        - 2 (\operatorname{tr} B - 2 k \operatorname{tr} B^2 + k^2 \operatorname{tr} B^3)\, dk, \\
    d\, b^\top B^2 b &= -2\, b^\top B^2\, dA\, B b + 2\, b^\top B^2 db - 2\, b^\top B^3 b\, dk .

No gap between eigenvalues divides anything: these are smooth wherever A + k I is positive definite,
at repeated eigenvalues as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops import operators as operators  # defines what is called here
from immunize_ext.ops.arguments import require_floating_matrix, require_same_device


class ResolventTraces(NamedTuple):
    """What :func:`resolvent_traces` returns.

    Attributes:
        first: tr A B by shift, shape ``(*, s)``: the effective dimension.
        second: tr A^2 B^2 by shift, shape ``(*, s)``.
        energies: b^T B^2 b by shift and vector, shape ``(*, s, m)``.
    """

    first: Tensor
    second: Tensor
    energies: Tensor


def resolvent_traces(a: Tensor, shifts: Tensor, vectors: Tensor | None = None) -> ResolventTraces:
    r"""Traces and energies of B = (A + k I)^-1 for every shift k.

    .. math:: \operatorname{tr} A B = \sum_i \frac{\lambda_i}{\lambda_i + k}, \qquad
              \operatorname{tr} A^2 B^2 = \sum_i \Big(\frac{\lambda_i}{\lambda_i + k}\Big)^2,
              \qquad b^\top B^2 b

    Args:
        a: Symmetric matrices ``(*, p, p)``, real floating point. Computed in float64; where the
            triangles differ by rounding, their mean counts.
        shifts: k, shape ``(s,)`` for all matrices or ``(*, s)``, floating point; each has to make
            ``a + k I`` positive definite.
        vectors: b as columns, shape ``(*, p, m)``, floating point; none when omitted.

    Returns:
        :class:`ResolventTraces` in the dtype of ``a``. The traces are between 0 and p for a
        positive semidefinite ``a``, and right to a small multiple of p eps.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If shapes or devices do not fit, a number is not finite, ``a`` is not symmetric,
            or ``a + k I`` is not positive definite.

    Note:
        Deterministic, for any number of threads. Differentiable in all arguments and to every
        order; gradients in ``a`` are symmetric. The first derivative costs O(p^2) a shift beside
        two products of p x p matrices; where it is differentiated again it is composed of inverses,
        O(p^3) a shift.

    Source:
        Derivatives of pivots of a tridiagonal matrix: Golub and Van Loan, 4.3 and 8.4; the
        quantities: Hastie, Montanari, Rosset, Tibshirani (2022), and Simon et al. (2023).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import resolvent_traces
        >>> a = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
        >>> found = resolvent_traces(a, torch.tensor([1.0], dtype=torch.float64))
        >>> [round(float(v), 6) for v in (found.first, found.second)]
        [1.25, 0.8125]
    """
    name = "resolvent_traces"
    require_floating_matrix(name, "a", a)
    batch, p = a.shape[:-2], a.shape[-1]
    if a.shape[-2] != p:
        raise ValueError(f"{name}: a must have shape (*, p, p), got {tuple(a.shape)}")
    for argument, value in (("shifts", shifts), ("vectors", vectors)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: {argument} must be a torch.Tensor, got {type(value).__name__}; convert "
                "it with torch.as_tensor"
            )
        if not value.dtype.is_floating_point:
            raise ValueError(
                f"{name}: {argument} must have a real floating-point dtype, got {value.dtype}"
            )
        require_same_device(name, [("a", a), (argument, value)])
    if shifts.dim() == 1:
        shifts = shifts.expand(*batch, -1)
    if shifts.shape[:-1] != batch:
        raise ValueError(
            f"{name}: shifts must have shape (s,) or {(*batch, 's')}, got {tuple(shifts.shape)}"
        )
    if vectors is None:
        vectors = a.new_zeros((*batch, p, 0))
    if vectors.shape[:-1] != (*batch, p):
        raise ValueError(
            f"{name}: vectors must have shape {(*batch, p, 'm')}, b as columns, got "
            f"{tuple(vectors.shape)}"
        )
    outputs: Any = torch.ops.immunize_ext.resolvent_traces(a, shifts, vectors)
    return ResolventTraces(*(value.to(a.dtype) for value in outputs[:3]))
