"""Extremes of K = x^T x for features that do not fit in memory, and right gradients of their rows.

The rows of x come in blocks and are seen twice. The first pass keeps the R factor of x = Q R alone
(p x p): K = R^T R, so everything about K follows from R, and unlike a sum of x^T x it does not
square the condition number. The second pass gives each block its gradient. With dK the derivative
with respect to K,

    dx = 2 x dK,   dK = g_max mean(v v^T) + g_min mean(v v^T) + 2 g_F K,

row by row, with the means over the clusters of the extremes and v the right singular vectors of R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from immunize_ext.ops.arguments import (
    RankPolicy,
    cluster_resolution,
    not_finite,
    resolution,
    spectrum_policy,
)
from immunize_ext.ops.spectrum import GramExtremes

Blocks = Iterable[Tensor] | Callable[[], Iterable[Tensor]]
_OPERATOR = "StreamedGram"


def _checked(blocks: Blocks) -> Iterator[Tensor]:
    """The blocks of one pass: matrices (n_i, p) of one width, finite."""
    if callable(blocks):
        source: Iterable[Tensor] = blocks()
    else:
        source = blocks
        if iter(source) is source:
            raise ValueError(
                f"{_OPERATOR}: blocks must be iterable twice, got a {type(source).__name__} that "
                "is used up by the first pass; pass a list, a loader or a function that starts anew"
            )
    width = None
    for index, block in enumerate(source):
        if not isinstance(block, Tensor) or block.dim() != 2 or not block.dtype.is_floating_point:
            got = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
            raise ValueError(
                f"{_OPERATOR}: blocks must be floating-point tensors of shape (n_i, p), got {got} "
                f"at block {index}"
            )
        width = block.shape[1] if width is None else width
        if block.shape[1] != width or width == 0:
            raise ValueError(
                f"{_OPERATOR}: blocks must have one width p >= 1, got {block.shape[1]} after "
                f"{width} at block {index}"
            )
        if not_finite(block):
            raise ValueError(
                f"{_OPERATOR}: blocks must be finite, got NaN or infinity at block {index}"
            )
        yield block


class StreamedGram:
    r"""Extremes of K = x^T x from row blocks of x, and gradients of the rows in a second pass.

    .. math:: \partial x_b = 2\, x_b\, \frac{\partial L}{\partial K}

    Equivalent to :func:`~immunize_ext.ops.gram_extremes` of all rows together, with memory for one
    block and two p x p matrices.

    Args:
        blocks: Row blocks (n_i, p), floating point: a list, a loader, or a function that starts a
            new pass, such as one that sends the images of a data set through a network.
        rank: As in :func:`~immunize_ext.ops.gram_extremes`.
        rank_rtol: As there; the default counts all rows.
        cluster_rtol: As there; the default counts all rows.

    Attributes:
        rows: Number of rows seen.
        factor: R of x = Q R, shape (min(rows, p), p), float64: its singular values are those of x.
        extremes: The result, in float64, without a graph.

    Raises:
        ValueError: If the blocks are not finite floating-point matrices of one width, if there is
            no row, or if they can be iterated only once.

    Note:
        Deterministic. A second pass must give the same blocks: dropout and random augmentation
        would make the gradient that of another matrix. What autograd does is left to the blocks.

    Source:
        Demmel, Grigori, Hoemmen, Langou 2012 (QR of tall matrices by blocks).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import StreamedGram
        >>> theta = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> inputs = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> streamed = StreamedGram(lambda: (block @ theta for block in inputs))
        >>> streamed.extremes.lambda_max.item()
        9.0
        >>> streamed.backward(lambda extremes: extremes.lambda_max).item()
        9.0
        >>> theta.grad
        tensor([[18.,  0.],
                [ 0.,  0.]])
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        rank: RankPolicy = "numerical",
        rank_rtol: float | None = None,
        cluster_rtol: float | None = None,
    ) -> None:
        self._blocks = blocks
        self.rows = 0
        dtype = None
        factor: Tensor | None = None
        with torch.no_grad():
            for block in _checked(blocks):
                self.rows += block.shape[0]
                dtype = block.dtype if dtype is None else dtype
                wide = block.detach().to(torch.float64)
                stacked = wide if factor is None else torch.cat([factor, wide])
                factor = torch.linalg.qr(stacked, mode="r").R
            if factor is None or dtype is None or self.rows == 0:
                raise ValueError(f"{_OPERATOR}: blocks must hold at least one row, got none")
            side = max(self.rows, factor.shape[1])
            if rank_rtol is None:
                rank_rtol = min(side * resolution(dtype), 0.5)
            if cluster_rtol is None:
                cluster_rtol = cluster_resolution(side, dtype)
            policy = spectrum_policy(_OPERATOR, "blocks", factor, rank, rank_rtol, cluster_rtol)
            self._full = policy.full_rank
            *values, _, v_max, _, v_min, _ = torch.ops.immunize_ext.gram_extremes(factor, *policy)
            self.extremes = GramExtremes(*values)
            # The right vectors of both extremes, which are all there is to simple ones.
            self._pair = (v_max, v_min)
            self.factor = factor

    def derivative(self, objective: Callable[[GramExtremes], Tensor]) -> tuple[Tensor, Tensor]:
        """Value of an objective of the extremes, and its derivative with respect to K.

        Args:
            objective: Function of :attr:`extremes`, differentiable in ``lambda_max``,
                ``lambda_min`` and ``squared_frobenius``; it returns a scalar.

        Returns:
            The value () and dK (p, p), symmetric, both float64. A block x of rows has the gradient
            ``2 x dK``.

        Raises:
            ValueError: If the objective does not return a scalar.
        """
        leaves = [value.detach().clone().requires_grad_() for value in self.extremes[:3]]
        with torch.enable_grad():
            value = objective(
                self.extremes._replace(
                    lambda_max=leaves[0], lambda_min=leaves[1], squared_frobenius=leaves[2]
                )
            )
        if value.numel() != 1:
            raise ValueError(
                f"{_OPERATOR}: objective must return a scalar, got shape {tuple(value.shape)}"
            )
        found = torch.autograd.grad(value.reshape(()), leaves, allow_unused=True)
        g_max, g_min, g_frobenius = (
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, found, strict=True)
        )
        derivative = 2.0 * g_frobenius * (self.factor.mT @ self.factor)
        rank = int(self.extremes.rank)
        if rank > 0:
            top, bottom = self._vectors(rank)
            derivative += g_max / len(top) * (top.mT @ top)
            if not (self._full and rank < len(derivative)):  # a zero eigenvalue: gradient 0
                derivative += g_min / len(bottom) * (bottom.mT @ bottom)
        return value.detach().reshape(()), (derivative + derivative.mT) / 2

    def _vectors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Orthonormal right singular vectors of either extreme, one a row."""
        most = min(int(self.extremes.multiplicity_max), rank)
        least = min(int(self.extremes.multiplicity_min), rank)
        if most == least == 1:
            top, bottom = self._pair
            return top[None], bottom[None]
        vectors = torch.linalg.svd(self.factor, full_matrices=False).Vh
        return vectors[:most], vectors[rank - least : rank]

    def backward(self, objective: Callable[[GramExtremes], Tensor]) -> Tensor:
        """Backpropagate an objective of the extremes through every block, in a second pass.

        Args:
            objective: As in :meth:`derivative`.

        Returns:
            Its value (). Gradients are added to the leaves of the blocks' graphs, one block's graph
            at a time.

        Raises:
            ValueError: If the second pass has another number of rows than the first, or no block
                has a graph.
        """
        value, derivative = self.derivative(objective)
        rows, graphs = 0, 0
        for block in _checked(self._blocks):
            rows += block.shape[0]
            if block.requires_grad:
                graphs += 1
                grad = 2.0 * (block.detach().to(torch.float64) @ derivative)
                block.backward(grad.to(block.dtype))
        if rows != self.rows:
            raise ValueError(
                f"{_OPERATOR}: blocks must give the same rows in each pass, got {rows} after "
                f"{self.rows}"
            )
        if graphs == 0:
            raise ValueError(
                f"{_OPERATOR}: blocks must require gradients for backward, got none that does; "
                "use derivative and 2 x dK"
            )
        return value
