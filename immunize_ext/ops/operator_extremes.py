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
from torch import Tensor

from immunize_ext.errors import NotConvergedError
from immunize_ext.ops.arguments import cluster_resolution, resolution
from immunize_ext.ops.derivatives import carries_tangent, refuse_derivative
from immunize_ext.ops.spectrum import SymmetricExtremes

_NAME = "operator_extremes"

DENSE_SIDE = 64
"""Up to this side the operator is written out: as many products as a search would take."""

CLUSTER_LIMIT = 16
"""Vectors of a cluster that are searched for: some 40 products each, even where all are alike."""

CLUSTER_SIDE = 512
"""Up to this side a larger cluster is written out: fewer products than the search has taken."""

_STARTS = 3  # of one search, where a residual is too large

# Before it ARPACK draws the vectors that it goes on with from a state of its own.
_TAKES_RNG = (1, 17)


class _Pairs(NamedTuple):
    """Eigenvalues of one end, the extreme first, and their vectors as columns."""

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]
    whole: bool = True  # whether the vectors span the cluster


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
            function of the tensors and linear in v. A has to be symmetric. It is called with
            gradients enabled, on copies of the tensors that require them: products of a Hessian by
            ``torch.autograd.grad`` work; for a gradient of lambda with ``create_graph=True``.
        side: Number of rows of A.
        tensors: What A is a function of: everything that shall have a gradient.
        dtype: Of the vectors that ``product`` is given, float32 or float64.
        device: Where they are.
        cluster_rtol: Eigenvalues within ``cluster_rtol * max |lambda|`` of an extreme are one
            cluster. Default as in :func:`symmetric_extremes`, but at least 4 rtol.
        rtol: Largest residual \|A v - lambda v\| relative to \|A\|; default ``64 eps`` of the dtype
            times the root of the side.
        restarts: Of Lanczos' method before it is given up.
        seed: Of the vectors that it starts with.

    Returns:
        ``lambda_max``, ``lambda_min`` in the dtype, and how many eigenvalues equal them; above
        side 512 a count of 17 stands for that many or more.

    Raises:
        ValueError: If an argument is out of range, or ``product`` returns another shape, numbers
            that are not finite, or no symmetric operator.
        NotConvergedError: If the residuals did not fall to rtol.
        NotImplementedError: On second derivatives, in forward mode, and from backward on the
            gradient of an extreme that more than 16 eigenvalues equal, above side 512.

    Note:
        Deterministic for a seed, as far as ``product`` is; clusters with scipy 1.17 or later only.
        After each vector that is found another is searched for beside it, until one is no more of
        the cluster, or there are 17: then the operator is written out, up to side 512, or the
        gradient of that extreme is refused. A null space is such a cluster: of J J^T and J^T J give
        the smaller one. A small end that is crowded
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
        self.rtol, self.width, self.restarts = rtol, width, restarts
        self.count = 0
        self.rng = np.random.default_rng(seed)

    def apply(self, vector: Any, tensors: Sequence[Tensor]) -> NDArray[np.float64]:
        """A v on the host."""
        self.count += 1
        given = torch.as_tensor(np.asarray(vector).reshape(-1), dtype=self.dtype)
        with torch.enable_grad():  # the product may be a derivative itself
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
        x, y = self.rng.standard_normal((2, self.side))
        ax, ay = self.apply(x, tensors), self.apply(y, tensors)
        scale = max(np.linalg.norm(ax) / np.linalg.norm(x), np.linalg.norm(ay) / np.linalg.norm(y))
        noise = self.side * resolution(self.dtype) * scale * np.linalg.norm(x) * np.linalg.norm(y)
        self._require_symmetric(abs(float(y @ ax - x @ ay)), float(noise))
        # Of largest magnitude, roughly: residuals are judged relative to it. ARPACK takes them
        # relative to each eigenvalue, so each end is moved away from 0, to 1 to 3 times that much.
        if scale > 0.0:
            size = abs(self._lanczos(0.0, "LM", 1e-2, tensors)[0])
            ends = self._end(size, "LA", tensors), self._end(size, "SA", tensors)
        else:  # the zero operator, almost surely
            units = np.eye(self.side, CLUSTER_LIMIT + 1)
            ends = (_Pairs(np.zeros(CLUSTER_LIMIT + 1), units, whole=False),) * 2
        if self.side <= CLUSTER_SIDE and not (ends[0].whole and ends[1].whole):
            return self._written_out(tensors)
        return ends

    def _end(self, size: float, which: Any, tensors: Sequence[Tensor]) -> _Pairs:
        """The cluster of one end and what comes next, each search beside what was found before."""
        shift = 2.0 * size if which == "LA" else -2.0 * size
        values: list[float] = []
        vectors = np.zeros((self.side, 0))
        while len(values) <= CLUSTER_LIMIT:
            value, vector = self._pair(shift, which, size, tensors, vectors)
            values.append(value)
            vectors = np.column_stack([vectors, vector])
            if abs(value - values[0]) > self.width * size:
                return _Pairs(np.array(values), vectors)
        return _Pairs(np.array(values), vectors, whole=False)

    def _pair(
        self,
        shift: float,
        which: Any,
        size: float,
        tensors: Sequence[Tensor],
        known: NDArray[np.float64],
    ) -> tuple[float, NDArray[np.float64]]:
        """The next pair; what is returned is known by its own residual, whatever ARPACK thinks."""
        residual = 0.0
        for _ in range(_STARTS):
            # Values of 1 to 3 sizes: half of what is asked is left for rounding.
            value, vector = self._lanczos(shift, which, self.rtol / 6.0, tensors, known)
            vector = vector - known @ (known.T @ vector)
            vector /= np.linalg.norm(vector)
            rest = self.apply(vector, tensors) - value * vector
            residual = float(np.linalg.norm(rest)) / size
            if residual <= self.rtol:
                return value, vector
        raise NotConvergedError.after(_NAME, residual, rtol=self.rtol, products=self.count)

    def _lanczos(
        self,
        shift: float,
        which: Any,
        tolerance: float,
        tensors: Sequence[Tensor],
        known: NDArray[np.float64] | None = None,
    ) -> tuple[float, NDArray[np.float64]]:
        """The pair of A at one end of A + shift I, with known vectors moved past the other end."""

        def shifted(vector: Any) -> NDArray[np.float64]:
            v = np.asarray(vector).reshape(-1)
            moved = self.apply(v, tensors) + shift * v
            return moved if known is None else moved - 3.0 * shift * (known @ (known.T @ v))

        import scipy  # here: the operators are there sooner than it is
        from scipy.sparse import linalg

        shape = self.side, self.side
        operator: Any = linalg.LinearOperator(shape, matvec=shifted, dtype=np.float64)
        release = tuple(map(int, scipy.__version__.split(".")[:2]))
        drawn: Any = {"rng": self.rng} if release >= _TAKES_RNG else {}
        try:
            values, vectors = linalg.eigsh(
                operator,
                k=1,
                which=which,
                v0=self.rng.standard_normal(self.side),
                ncv=min(self.side, 32),
                tol=tolerance,
                maxiter=self.restarts,
                **drawn,
            )
        except linalg.ArpackError as failure:
            raise NotConvergedError.after(
                _NAME, None, rtol=self.rtol, products=self.count
            ) from failure
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


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies without history, of which derivatives can be taken."""
    return [
        t.detach().requires_grad_(
            (t.is_floating_point() or t.is_complex()) and not t.is_inference()
        )
        for t in tensors
    ]


class _Extremes(torch.autograd.Function):
    """Values of both ends; their gradient through one product each cluster vector."""

    @staticmethod
    def forward(ctx: Any, search: _Search, *tensors: Tensor) -> Any:
        top, bottom = search.ends(_leaves(tensors))
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
        ctx.product, ctx.whole = search.product, (top.whole, bottom.whole)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*counts)
        return (*outputs, *counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        with torch.enable_grad():
            leaves = _leaves(tensors)
            total: Any = 0.0
            for grad, cluster, whole in zip(grads[:2], ctx.clusters, ctx.whole, strict=True):
                if bool(grad == 0.0) and not grad.requires_grad:
                    continue
                if not whole:
                    raise NotImplementedError(
                        f"{_NAME}: the gradient of an extreme is not implemented where more than "
                        f"{CLUSTER_LIMIT} eigenvalues equal it, above side {CLUSTER_SIDE}; of "
                        "J J^T and J^T J give the smaller one, or detach that extreme"
                    )
                for vector in cluster:
                    value = vector @ ctx.product(vector, *leaves)
                    total = total + (grad.detach() / len(cluster)) * value
        asked = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found: list[Tensor | None] = [None] * len(asked)
        if isinstance(total, Tensor):
            if not total.requires_grad:
                raise ValueError(
                    f"{_NAME}: product must be differentiable by the tensors, got one without "
                    "history; derivatives that it takes itself need create_graph=True"
                )
            found = [*torch.autograd.grad(total, asked, allow_unused=True)]
        rest = iter(found)
        results: list[Tensor | None] = []
        for need in needed:
            part = next(rest) if need else None
            if part is not None and torch.is_grad_enabled():
                # By every tensor it is made of, and by what comes in.
                for cause in (*tensors, *grads[:2]):
                    part = refuse_derivative(
                        f"{_NAME}: second derivatives are not implemented", part, cause
                    )
            results.append(part)
        return None, *results
