r"""Extreme eigenvalues of a symmetric operator that is given by its products with vectors.

The search is ARPACK's (scipy), on the host. The derivative is that of ``symmetric_extremes``: with
the vectors found held fixed,

.. math:: d\lambda = \frac1m \sum_{i \in \text{cluster}} v_i^\top (dA)\, v_i ,

one vector-Jacobian product of the function that multiplies, and no matrix of the operator's side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from immunize_ext.errors import NotConvergedError
from immunize_ext.ops.arguments import cluster_resolution, resolution
from immunize_ext.ops.derivatives import carries_tangent, refuse_derivative
from immunize_ext.ops.spectrum import SymmetricExtremes

_NAME = "operator_extremes"

DENSE_SIDE = 64
"""Up to this side the operator is written out: as many products as a search would take."""


class _Pairs(NamedTuple):
    """Eigenvalues of one end, the extreme first, and their vectors as columns."""

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]


def operator_extremes(
    product: Callable[..., Tensor],
    side: int,
    tensors: Sequence[Tensor] = (),
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    cluster_rtol: float | None = None,
    rtol: float | None = None,
    restarts: int = 300,
    seed: int = 0,
) -> SymmetricExtremes:
    r"""Largest and smallest eigenvalue of a symmetric operator known by its products.

    .. math:: \partial\lambda = \frac1m \sum_{i \in \text{cluster}} v_i v_i^\top

    Equivalent to ``symmetric_extremes`` of the matrix of the operator, without that matrix.

    Args:
        product: ``product(v, *tensors)`` is A v for v of shape ``(side,)``, a differentiable
            function of the tensors and linear in v. A has to be symmetric.
        side: Number of rows of A.
        tensors: What A is a function of: everything that shall have a gradient.
        dtype: Of the vectors that ``product`` is given, float32 or float64.
        device: Where they are.
        cluster_rtol: Eigenvalues within ``cluster_rtol * max |lambda|`` of an extreme are one
            cluster. Default as in :func:`symmetric_extremes`, but at least 4 rtol.
        rtol: Largest residual \|A v - lambda v\| relative to \|A\|; default ``64 eps`` of the dtype
            times the root of the side.
        restarts: Of Lanczos' method before it is given up.
        seed: Of the vector that it starts with.

    Returns:
        ``lambda_max``, ``lambda_min`` in the dtype, and how many eigenvalues equal them.

    Raises:
        ValueError: If an argument is out of range, or ``product`` returns another shape, numbers
            that are not finite, or no symmetric operator.
        NotConvergedError: If the residuals did not fall to rtol.
        NotImplementedError: On second derivatives, and in forward mode.

    Note:
        Deterministic for a seed, as far as ``product`` is. After each vector that is found another
        is searched for beside it, until one is no more of the cluster. A small end that is crowded
        (a gap below about ``1 / restarts^2`` of the spectrum) costs many products: give it a ridge.
        Residuals bound the error of eigenvalues; that no further extreme exists is as sure as that
        a random start is not orthogonal to its vector.

    Source:
        Lehoucq, Sorensen, Yang, ARPACK Users' Guide, 1998; derivative: Overton 1992.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import operator_extremes
        >>> a = torch.linspace(1, 3, 200, dtype=torch.float64, requires_grad=True)
        >>> found = operator_extremes(lambda v, a: a * v, 200, [a])
        >>> round(found.lambda_max.item(), 9), round(found.lambda_min.item(), 9)
        (3.0, 1.0)
        >>> found.lambda_max.backward()
        >>> round(a.grad[-1].item(), 6)
        1.0
    """
    if side < 1 or restarts < 1:
        raise ValueError(
            f"{_NAME}: side and restarts must be at least 1, got {side} and {restarts}"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{_NAME}: dtype must be float32 or float64, got {dtype}")
    accuracy = 64.0 * resolution(dtype) * side**0.5 if rtol is None else rtol
    width = cluster_rtol
    if width is None:
        width = max(cluster_resolution(side, dtype), 4.0 * accuracy)
    if not (0.0 < accuracy < 1.0 and 0.0 <= width < 1.0):
        raise ValueError(
            f"{_NAME}: rtol must be in (0, 1) and cluster_rtol in [0, 1), got {accuracy} and "
            f"{width}"
        )
    if any(carries_tangent(tensor) for tensor in tensors):
        raise NotImplementedError(f"{_NAME}: forward-mode derivatives are not implemented")
    search = _Search(product, side, dtype, torch.device(device), accuracy, width, restarts, seed)
    return SymmetricExtremes(*_Extremes.apply(search, *tensors))


class _Search:
    """Products of one operator, counted, and the pairs at its ends."""

    def __init__(
        self,
        product: Callable[..., Tensor],
        side: int,
        dtype: torch.dtype,
        device: torch.device,
        rtol: float,
        width: float,
        restarts: int,
        seed: int,
    ) -> None:
        self.product, self.side, self.dtype, self.device = product, side, dtype, device
        self.rtol, self.width, self.restarts, self.seed = rtol, width, restarts, seed
        self.count = 0

    def apply(self, vector: Any, tensors: Sequence[Tensor]) -> NDArray[np.float64]:
        """A v on the host."""
        self.count += 1
        given = torch.as_tensor(np.asarray(vector).reshape(-1), dtype=self.dtype)
        found = self.product(given.to(self.device), *tensors)
        if not isinstance(found, Tensor) or found.shape != (self.side,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{_NAME}: product must return a tensor of shape {(self.side,)}, got {got}"
            )
        numbers: NDArray[np.float64] = found.detach().to("cpu", torch.float64).numpy()
        if not np.isfinite(numbers).all():
            raise ValueError(f"{_NAME}: product must be finite, got NaN or infinity")
        return numbers

    def ends(self, tensors: Sequence[Tensor]) -> tuple[_Pairs, _Pairs]:
        """Pairs at the top and at the bottom."""
        if self.side <= DENSE_SIDE:
            return self._written_out(tensors)
        rng = np.random.default_rng(self.seed)
        x, y, start = rng.standard_normal((3, self.side))
        ax, ay = self.apply(x, tensors), self.apply(y, tensors)
        scale = max(np.linalg.norm(ax) / np.linalg.norm(x), np.linalg.norm(ay) / np.linalg.norm(y))
        noise = self.side * resolution(self.dtype) * scale * np.linalg.norm(x) * np.linalg.norm(y)
        self._require_symmetric(abs(float(y @ ax - x @ ay)), float(noise))
        if scale == 0.0:  # the zero operator, almost surely
            return (_Pairs(np.zeros(1), np.eye(self.side, 1)),) * 2
        # Of largest magnitude, roughly: residuals are judged relative to it. ARPACK takes them
        # relative to each eigenvalue, so each end is moved away from 0 by that much.
        size = abs(self._lanczos(0.0, "LM", 1e-2, start, tensors)[0])
        return self._end(size, "LA", start, tensors), self._end(-size, "SA", start, tensors)

    def _end(
        self, shift: float, which: Any, start: NDArray[np.float64], tensors: Sequence[Tensor]
    ) -> _Pairs:
        """The cluster of one end and what comes next, each search beside what was found before."""
        values: list[float] = []
        vectors = np.zeros((self.side, 0))
        while len(values) < self.side:
            value, vector = self._lanczos(shift, which, self.rtol, start, tensors, vectors)
            # What is returned is known by its own residual, whatever the search believed.
            rest = self.apply(vector, tensors) - value * vector
            size = max(abs(shift), abs(value))
            residual = float(np.linalg.norm(rest)) / size
            if residual > self.rtol:
                raise NotConvergedError.after(_NAME, residual, rtol=self.rtol, products=self.count)
            values.append(value)
            vectors = np.column_stack([vectors, vector])
            if abs(value - values[0]) > self.width * size:
                break
            start = np.roll(start, 1)  # another vector, as random as the first
        return _Pairs(np.array(values), vectors)

    def _lanczos(
        self,
        shift: float,
        which: Any,
        rtol: float,
        start: NDArray[np.float64],
        tensors: Sequence[Tensor],
        known: NDArray[np.float64] | None = None,
    ) -> tuple[float, NDArray[np.float64]]:
        """The pair of A at one end of A + shift I, with known vectors moved past the other end."""

        def shifted(vector: Any) -> NDArray[np.float64]:
            v = np.asarray(vector).reshape(-1)
            moved = self.apply(v, tensors) + shift * v
            return moved if known is None else moved - 3.0 * shift * (known @ (known.T @ v))

        operator: Any = LinearOperator((self.side, self.side), matvec=shifted, dtype=np.float64)
        try:
            values, vectors = eigsh(
                operator,
                k=1,
                which=which,
                v0=start,
                ncv=min(self.side, 32),
                tol=rtol / 4.0,
                maxiter=self.restarts,
            )
        except ArpackNoConvergence:
            raise NotConvergedError.after(
                _NAME, None, rtol=self.rtol, products=self.count
            ) from None
        return float(values[0]) - shift, vectors[:, 0]

    def _written_out(self, tensors: Sequence[Tensor]) -> tuple[_Pairs, _Pairs]:
        matrix = np.stack([self.apply(unit, tensors) for unit in np.eye(self.side)], axis=1)
        size = float(np.abs(matrix).max())
        noise = 64.0 * self.side**0.5 * resolution(self.dtype) * size
        self._require_symmetric(float(np.abs(matrix - matrix.T).max()), noise)
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2.0)
        return _Pairs(values[::-1], vectors[:, ::-1]), _Pairs(values, vectors)

    def _require_symmetric(self, difference: float, allowed: float) -> None:
        if difference > allowed:
            raise ValueError(
                f"{_NAME}: product must be that of a symmetric operator, got x^T A y and y^T A x "
                f"that differ by {difference:.3g} where rounding allows {allowed:.3g}"
            )


class _Extremes(torch.autograd.Function):
    """Values of both ends; their gradient through one product each cluster vector."""

    @staticmethod
    def forward(ctx: Any, search: _Search, *tensors: Tensor) -> Any:
        top, bottom = search.ends(tensors)
        size = max(abs(float(top.values[0])), abs(float(bottom.values[0])))
        outputs, ctx.clusters = [], []
        for end in (top, bottom):
            inside = np.abs(end.values - end.values[0]) <= search.width * size
            cluster = np.ascontiguousarray(end.vectors[:, inside].T)
            ctx.clusters.append(
                torch.from_numpy(cluster).to(device=search.device, dtype=search.dtype)
            )
            outputs.append(torch.tensor(end.values[0], dtype=search.dtype, device=search.device))
        counts = [
            torch.tensor(len(cluster), device=search.device, dtype=torch.int64)
            for cluster in ctx.clusters
        ]
        ctx.product = search.product
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*counts)
        return (*outputs, *counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)
            ]
            total: Any = 0.0
            for grad, cluster in zip(grads[:2], ctx.clusters, strict=True):
                if bool(grad == 0.0):
                    continue
                for vector in cluster:
                    value = vector @ ctx.product(vector, *leaves)
                    total = total + (grad.detach() / len(cluster)) * value
        asked = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found: list[Tensor | None] = [None] * len(asked)
        if isinstance(total, Tensor) and total.requires_grad:
            found = [*torch.autograd.grad(total, asked, allow_unused=True)]
        rest = iter(found)
        results: list[Tensor | None] = []
        for tensor, need in zip(tensors, needed, strict=True):
            part = next(rest) if need else None
            if part is not None and torch.is_grad_enabled():
                part = refuse_derivative(
                    f"{_NAME}: second derivatives are not implemented", part, tensor
                )
            results.append(part)
        return None, *results
