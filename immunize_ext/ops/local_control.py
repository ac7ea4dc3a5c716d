r"""Changes of one layer that a task does not see, hardly sees, or pays a known price for.

A layer W (o, d) receives rows h, n of them; E[h h^T] has eigenvalues l_1 >= l_2 >= ... and V_r
holds the leading r eigenvectors. With the projector P = I - V_r V_r^T,

    null space    Delta = Delta P, r = rank:  Delta h = 0 for each of the n rows (as far as float64
                  tells directions apart: |Delta h| <= sqrt(n d) eps |Delta|_2 |H|_2);
    certified     Delta = Delta P, |Delta|_2 <= c:  |Delta h| <= c |P h| for every h whatever, and
                  E |Delta h|^2 <= c^2 (l_{r+1} + ... + l_{r+k}),  k = min(o, d - r),

since Delta has rank k at most (Ky Fan). Delta = c U V_k^T with V_k the next k eigenvectors has
equality: no smaller bound holds for the whole ball.

    Gauss-Newton  Delta that lowers <g, Delta> most at <Delta, B Delta A> = eps:

                  Delta = -sqrt(eps / q) B^-1 g A^-1,   q = <g, B^-1 g A^-1>,

where B (x) A is a layer's block of the Gauss-Newton matrix of the loss to keep (K-FAC), which this
change raises by eps / 2 to second order. sqrt(eps q) is what it is worth: q ranks layers by harm
done for damage taken.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops.arguments import require_finite, require_floating_matrix
from immunize_ext.ops.derivatives import carries_tangent

__all__ = [
    "GaussNewtonStep",
    "InputSubspace",
    "clip_spectral_norm",
    "gauss_newton_step",
    "project_out",
]


class InputSubspace(NamedTuple):
    """The leading directions of what a layer receives, and how much is left beside them.

    Attributes:
        basis: V_r, shape ``(d, r)``, orthonormal columns, float64.
        tail: l_{r+1} >= l_{r+2} >= ..., eigenvalues of E[h h^T], shape ``(d - r,)``, float64.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import InputSubspace
        >>> rows = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
        >>> one = InputSubspace.of(rows, explained=0.7)
        >>> InputSubspace.of(rows).basis.shape, one.basis.shape, round(one.drift(3.0, 5), 6)
        (torch.Size([3, 2]), torch.Size([3, 1]), 1.732051)
    """

    basis: Tensor
    tail: Tensor

    @classmethod
    def of(cls, rows: Tensor, *, explained: float = 1.0, count: int | None = None) -> InputSubspace:
        r"""The directions that explain a share of the mean square of some rows.

        .. math:: \min r : l_1 + \dots + l_r \ge s\, \mathrm{tr}\, E[h h^\top]

        Args:
            rows: H, shape ``(n, d)``; or, with ``count``, their Gram matrix, shape ``(d, d)``.
            explained: s, above 0; 1 takes all of the numerical rank.
            count: n where a Gram matrix is given. It tells directions apart down to
                sqrt(d eps) of the largest, eps that of its own dtype; rows do down to sqrt(n d)
                eps, eps that of float64, since they count as exact.

        Returns:
            Basis and tail; the basis is no function that could be differentiated.

        Raises:
            ValueError: If shapes do not fit, or something is not finite.
            NotImplementedError: If rows carry a derivative.

        Note:
            Deterministic; computed in float64.

        Example:
            >>> import torch
            >>> from immunize_ext.ops import InputSubspace
            >>> InputSubspace.of(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), explained=0.9).tail
            tensor([0.5000], dtype=torch.float64)
        """
        name = "InputSubspace.of"
        require_floating_matrix(name, "rows", rows)
        _refuse_derivative(name, "rows", rows)
        require_finite(name, "rows", rows)
        if rows.dim() != 2 or (count is not None and (rows.shape[0] != rows.shape[1] or count < 1)):
            wanted = "(n, d)" if count is None else "(d, d) for a count of at least 1"
            raise ValueError(
                f"{name}: rows must have shape {wanted}, got {tuple(rows.shape)}"
                + ("" if count is None else f" and {count}")
            )
        if not 0.0 < explained <= 1.0:
            raise ValueError(f"{name}: explained must be above 0 and at most 1, got {explained}")
        wide = rows.to(torch.float64)
        d = wide.shape[1]
        if count is None:
            # A triangle of the same Gram matrix, so that no (n, n) factor is made.
            triangle = torch.linalg.qr(wide, mode="r").R if len(wide) > d else wide
            _, sigma, right = torch.linalg.svd(triangle, full_matrices=True)
            values = torch.cat([sigma, sigma.new_zeros(d - len(sigma))]).square() / len(wide)
            # Rounding of a triangle gives rows of lower rank a singular value of 0.04 sqrt(n) eps
            # for 2 columns and 0.2 for 64 (measured to n = 1e5), which min(n, d) eps would count
            # as a direction; max(n, d) eps would drop directions that are there.
            resolved = wide.numel() * torch.finfo(torch.float64).eps ** 2
        else:
            found, vectors = torch.linalg.eigh((wide + wide.mT) / 2.0)
            values, right = found.flip(0).clamp_min(0.0) / count, vectors.flip(1).mT
            # Below 1, so that narrow dtypes keep at least the leading direction.
            resolved = min(d * torch.finfo(rows.dtype).eps, 0.5)
        rank = int((values > resolved * values[0]).sum())
        if explained < 1.0:
            reached = values.cumsum(0) >= explained * values.sum()
            rank = min(rank, int((~reached).sum()) + 1)
        return cls(right[:rank].mT.contiguous(), values[rank:].contiguous())

    def drift(self, limit: float, outputs: int) -> float:
        """The most that sqrt(E |Delta h|^2) can be for |Delta|_2 <= ``limit``, (outputs, d)."""
        return limit * math.sqrt(float(self.tail[:outputs].sum()))

    def rest(self, rows: Tensor) -> Tensor:
        """|P h| of rows, shape ``(*, d)``: how far they reach out of the subspace."""
        return torch.linalg.vector_norm(project_out(rows, self.basis), dim=-1)


def project_out(gradient: Tensor, basis: Tensor) -> Tensor:
    r"""Take a subspace of inputs out of a gradient or an update.

    .. math:: G \mapsto G - (G V) V^\top

    Args:
        gradient: G, shape ``(*, o, d)``, or rows ``(*, d)``; floating point.
        basis: V, shape ``(d, r)`` with orthonormal columns; ``r = 0`` takes nothing out.

    Returns:
        What is left, of the shape and dtype of ``gradient``.

    Raises:
        ValueError: If shapes do not fit.

    Note:
        Differentiable in both arguments, to any order; its own adjoint in ``gradient``. Computed in
        the wider of both dtypes and done twice, after which rounding leaves nothing of V but one
        unit of the last place.

    Source:
        GPM (Saha, Garg, Roy, ICLR 2021), AlphaEdit (Fang et al., ICLR 2025).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import project_out
        >>> project_out(torch.ones(2, 2), torch.tensor([[1.0], [0.0]]))
        tensor([[0., 1.],
                [0., 1.]])
    """
    if basis.dim() != 2 or gradient.dim() < 1 or gradient.shape[-1] != basis.shape[0]:
        raise ValueError(
            f"project_out: basis must have shape (d, r) with the {gradient.shape[-1:]} columns of "
            f"gradient, got {tuple(basis.shape)}; it acts on the input side"
        )
    wide = torch.promote_types(gradient.dtype, basis.dtype)
    left, basis = gradient.to(wide), basis.to(wide)
    for _ in range(2):
        left = left - (left @ basis) @ basis.mT
    return left.to(gradient.dtype)


def clip_spectral_norm(change: Tensor, limit: float) -> Tensor:
    r"""The nearest matrix whose singular values are at most a limit.

    .. math:: U \min(S, c) V^\top = \arg\min_{\|X\|_2 \le c} \|X - \Delta\|_F

    Args:
        change: Delta, shape ``(*, o, d)``.
        limit: c, not negative.

    Returns:
        The projection, in the dtype of ``change``; where a matrix fits already, its own entries.
        Right singular vectors stay, so a change without part in a subspace gets none.

    Raises:
        ValueError: If limit is negative, or entries are not finite.
        NotImplementedError: If change carries a derivative.

    Note:
        Deterministic; computed in float64.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import clip_spectral_norm
        >>> clip_spectral_norm(torch.diag(torch.tensor([3.0, 0.5])), 1.0)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    name = "clip_spectral_norm"
    require_floating_matrix(name, "change", change)
    _refuse_derivative(name, "change", change)
    require_finite(name, "change", change)
    if not limit >= 0.0:
        raise ValueError(f"{name}: limit must not be negative, got {limit}")
    wide = change.to(torch.float64)
    if bool((torch.linalg.matrix_norm(wide) <= limit).all()):
        return change  # the larger norm fits: no decomposition
    left, sigma, right = torch.linalg.svd(wide, full_matrices=False)
    clipped = ((left * sigma.clamp_max(limit)[..., None, :]) @ right).to(change.dtype)
    return torch.where((sigma <= limit).all(-1)[..., None, None], change, clipped)


class GaussNewtonStep(NamedTuple):
    """A step of a budget.

    Attributes:
        change: Delta, shape ``(*, o, d)``.
        worth: sqrt(eps q), by how much <g, .> falls, shape ``(*,)``.
    """

    change: Tensor
    worth: Tensor


def gauss_newton_step(
    gradient: Tensor, inputs: Tensor, outputs: Tensor, budget: float | Tensor
) -> GaussNewtonStep:
    r"""The change of a layer that lowers one loss most for a budget of damage to another.

    .. math:: \Delta = -\sqrt{\epsilon / q}\, B^{-1} g A^{-1}, \qquad
              q = \langle g, B^{-1} g A^{-1} \rangle

    Args:
        gradient: g of what shall fall, shape ``(*, o, d)``.
        inputs: A = E[h h^T] of the task to keep, shape ``(*, d, d)``, positive definite; the
            symmetric part counts.
        outputs: B, the second moment of its loss by the outputs, shape ``(*, o, o)``, alike.
        budget: eps > 0, one or shape ``(*,)``: what <Delta, B Delta A> shall be. The loss to keep
            rises by half of it, to second order and as far as B (x) A is its curvature.

    Returns:
        The change, and what it is worth. Both are 0 where the gradient is.

    Raises:
        ValueError: If shapes do not fit, budget is not positive, or something is not finite.
        NotPositiveDefiniteError: If A or B are not; add a ridge.

    Note:
        Differentiable in all tensors; at a gradient of 0 the derivative is taken as 0. Computed in
        float64, returned in the dtype of ``gradient``.

    Source:
        Trust region in the metric of K-FAC (Martens, Grosse, ICML 2015).

    Example:
        >>> import torch
        >>> from immunize_ext.ops import gauss_newton_step
        >>> g, a = torch.tensor([[2.0, 2.0]]), torch.diag(torch.tensor([1.0, 4.0]))
        >>> change, worth = gauss_newton_step(g, a, torch.eye(1), 5.0)
        >>> change, worth
        (tensor([[-2.0000, -0.5000]]), tensor(5.))
    """
    name = "gauss_newton_step"
    require_floating_matrix(name, "gradient", gradient)
    require_finite(name, "gradient", gradient)
    o, d = gradient.shape[-2:]
    for argument, matrix, side in (("inputs", inputs, d), ("outputs", outputs, o)):
        require_floating_matrix(name, argument, matrix)
        require_finite(name, argument, matrix)
        if matrix.shape[-2:] != (side, side):
            raise ValueError(
                f"{name}: {argument} must have shape (*, {side}, {side}) for a gradient of shape "
                f"{tuple(gradient.shape)}, got {tuple(matrix.shape)}"
            )
    eps = torch.as_tensor(budget, dtype=torch.float64, device=gradient.device)
    if not bool(((eps.detach() > 0.0) & eps.detach().isfinite()).all()):
        raise ValueError(f"{name}: budget must be positive and finite, got {eps.detach().tolist()}")
    batches = [tuple(one.shape[:-2]) for one in (gradient, inputs, outputs)] + [tuple(eps.shape)]
    try:
        torch.broadcast_shapes(*batches)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: gradient, inputs, outputs and budget must have batches that broadcast, got "
            + ", ".join(map(str, batches))
        ) from error
    g = gradient.to(torch.float64)
    # The change does not depend on the length of g, whose square may underflow.
    peak = g.detach().abs().amax((-2, -1))
    peak = torch.where(peak > 0.0, peak, 1.0)
    g = g / peak[..., None, None]
    by_inputs = torch.cholesky_solve(g.mT, _factor(name, "inputs", inputs)).mT
    natural = torch.cholesky_solve(by_inputs, _factor(name, "outputs", outputs))
    q = (g * natural).sum((-2, -1))
    # The root has no slope at 0: where q = 0 nothing may flow through it.
    some = q > 0.0
    root = (eps * torch.where(some, q, 1.0)).sqrt()
    worth = peak * torch.where(some, root, 0.0)
    length = torch.where(some, eps / root, 0.0)
    change = -length[..., None, None] * natural
    return GaussNewtonStep(change.to(gradient.dtype), worth.to(gradient.dtype))


def _factor(name: str, argument: str, matrix: Tensor) -> Tensor:
    wide = matrix.to(torch.float64)
    factor, status = torch.linalg.cholesky_ex((wide + wide.mT) / 2.0)
    if bool((status > 0).any()):
        raise NotPositiveDefiniteError.for_matrix(name, argument, dim=matrix.shape[-1])
    return factor


def _refuse_derivative(name: str, argument: str, value: Tensor) -> None:
    recorded = torch.is_grad_enabled() and value.requires_grad
    if recorded or carries_tangent(value):
        raise NotImplementedError(
            f"{name}: the derivative in {argument} does not exist where singular values meet or "
            "the rank changes; pass it detached"
        )
