r"""The preconditioned-gradient layer: identity forward, K^-1 on the input side backward.

Algorithm 1 of condition-number immunization multiplies the gradient of a regularizer by K^-1, with
K = X^T X of the layer's own inputs. For an extractor x -> x theta that is K^-1 grad_theta; PyTorch
stores theta^T as ``nn.Linear.weight``, so there it is a multiplication from the RIGHT:

.. math:: G \mapsto G\, K^{-1}, \qquad K = X^\top X + \text{ridge}\, I

With fewer samples than features the Woodbury identity needs only an n x n factor:
K^-1 = (I - X^T S^-1 X) / ridge with S = X X^T + ridge I.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops.arguments import require_finite, require_floating_matrix, require_same_device

_EPS = torch.finfo(torch.float64).eps


class Preconditioner:
    r"""Applies K^-1, K = x^T x + ridge I, from the right.

    Attributes:
        factor: Lower Cholesky factor, float64: (p, p) of K, or (n, n) of x x^T + ridge I.
        x: Features (n, p), float64, where the Woodbury identity is used; (0, p) otherwise.
        ridge: The absolute ridge.
        woodbury: Which of the two.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import Preconditioner
        >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> Preconditioner.from_features(x).apply(torch.ones(1, 2, dtype=torch.float64))
        tensor([[1.0000, 0.2500]], dtype=torch.float64)
    """

    def __init__(self, factor: Tensor, x: Tensor, *, ridge: float, woodbury: bool) -> None:
        """Wrap a factor that exists already; :meth:`from_features` computes one."""
        self.factor = factor
        self.x = x
        self.ridge = ridge
        self.woodbury = woodbury

    @classmethod
    def from_features(
        cls, x: Tensor, *, ridge: float = 0.0, relative: bool = True
    ) -> Preconditioner:
        """Factor K = x^T x + ridge I, on the thin side.

        Args:
            x: Features (n, p), real floating point. No gradient flows to them.
            ridge: What is added to the diagonal of K; positive where n < p.
            relative: If true, in units of the mean diagonal of x^T x; otherwise in units of K.

        Returns:
            The preconditioner, in float64 on x's device.

        Raises:
            NotPositiveDefiniteError: If K is numerically singular.
            ValueError: If x is not a finite (n, p) tensor or ridge is negative.

        Note:
            Deterministic.

        Source:
            Zheng et al., ICML 2025, Algorithm 1, theorem 4.3. The released code multiplies on the
            output side, which only runs because its layer is square.
        """
        function = "Preconditioner.from_features"
        require_floating_matrix(function, "x", x)
        if x.dim() != 2:
            raise ValueError(f"{function}: x must have shape (n, p), got {tuple(x.shape)}")
        require_finite(function, "x", x)
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"{function}: ridge must be finite and not negative, got {ridge}")
        x = x.detach().to(torch.float64)
        n, p = x.shape
        squares = float(x.square().sum())
        absolute = ridge * squares / p if relative else ridge
        woodbury = n < p
        if squares == 0.0 and absolute == 0.0:
            raise NotPositiveDefiniteError(
                f"{function}: K = x^T x must be positive definite, got zero: x holds only zeros, "
                "and a relative ridge is a share of them; pass features, or relative=False with a "
                "positive ridge",
                rank=0,
            )
        if woodbury and absolute == 0.0:
            raise NotPositiveDefiniteError(
                f"{function}: K = x^T x must be positive definite, got {n} samples for {p} "
                "features; pass a positive ridge, 1e-6 for instance",
                rank=n,
            )
        k = x @ x.mT if woodbury else x.mT @ x
        k.diagonal().add_(absolute)
        factor, info = torch.linalg.cholesky_ex(k)
        side = k.shape[0]
        tolerance = side * _EPS * float(k.diagonal().max())
        if int(info) > 0 or float(factor.diagonal().square().min()) <= tolerance:
            eigenvalues = torch.linalg.eigvalsh(k)
            top = float(eigenvalues[-1])
            rank = int((eigenvalues > side * _EPS * top).sum())
            needed = max(0.0, 10 * side * _EPS * top - float(eigenvalues[0]))
            raise NotPositiveDefiniteError.for_matrix(
                function, "K = x^T x + ridge I", dim=side, rank=rank, needed_ridge=needed
            )
        # A copy, so that later changes of the features do not reach one half of the inverse.
        kept = x.clone() if woodbury else x[:0].clone()
        return cls(factor, kept, ridge=absolute, woodbury=woodbury)

    def apply(self, grad: Tensor) -> Tensor:
        """Return grad K^-1.

        Args:
            grad: (*, o, p), real floating point.

        Returns:
            (*, o, p) in grad's dtype; solved in float64.

        Raises:
            ValueError: If the width or device of grad does not fit.
        """
        function = "Preconditioner.apply"
        require_floating_matrix(function, "grad", grad)
        width = self.x.shape[1]
        if grad.shape[-1] != width:
            raise ValueError(
                f"{function}: grad must have shape (*, o, {width}), the features on the last axis, "
                f"got {tuple(grad.shape)}; an nn.Linear weight is stored that way"
            )
        require_same_device(function, [("factor", self.factor), ("grad", grad)])
        result: Tensor = _Precondition.apply(grad, self.factor, self.x, self.ridge, self.woodbury)
        return result


class _Precondition(torch.autograd.Function):
    """grad K^-1: linear in grad and self-adjoint, so it is its own derivative. K is a constant."""

    @staticmethod
    def forward(grad: Tensor, factor: Tensor, x: Tensor, ridge: float, woodbury: bool) -> Tensor:
        result: Tensor = torch.ops.immunize_ext.precondition(grad, factor, x, ridge, woodbury)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, factor, x, ctx.ridge, ctx.woodbury = inputs
        ctx.save_for_backward(factor, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        factor, x = ctx.saved_tensors
        grad = _Precondition.apply(cotangent, factor, x, ctx.ridge, ctx.woodbury)
        return grad, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], grad: Tensor, *rest: Any) -> tuple[Tensor, int]:
        # The factor is shared: only the gradient carries the vmapped axis.
        return _Precondition.apply(grad.movedim(in_dims[0], 0), *rest), 0


class _PreconditionGradient(torch.autograd.Function):
    """Identity whose backward is :class:`_Precondition`."""

    @staticmethod
    def forward(weight: Tensor, factor: Tensor, x: Tensor, ridge: float, woodbury: bool) -> Tensor:
        return weight.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, factor, x, ctx.ridge, ctx.woodbury = inputs
        ctx.save_for_backward(factor, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        factor, x = ctx.saved_tensors
        return _Precondition.apply(grad, factor, x, ctx.ridge, ctx.woodbury), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], weight: Tensor, *rest: Any) -> tuple[Tensor, int]:
        return _PreconditionGradient.apply(weight.movedim(in_dims[0], 0), *rest), 0


def precondition_gradient(weight: Tensor, preconditioner: Preconditioner) -> Tensor:
    r"""Return weight itself; its gradient will arrive multiplied by K^-1 from the right.

    .. math:: W \mapsto W, \qquad \frac{\partial L}{\partial W} \mapsto
              \frac{\partial L}{\partial W} K^{-1}

    Args:
        weight: (*, o, p), an ``nn.Linear`` weight for instance: p is the input side.
        preconditioner: Of the layer's input features.

    Returns:
        A copy of weight with the preconditioned backward.

    Raises:
        ValueError: If the width or device of weight does not fit the preconditioner.

    Note:
        Deterministic. What comes out is no gradient of any function, on purpose; K counts as a
        constant. Double backward and ``torch.func`` work; forward mode raises.

    Source:
        Zheng et al., ICML 2025, Algorithm 1, line 6 ("dummy layer").

    Example:
        >>> import torch
        >>> from immunize_ext.ops import Preconditioner, precondition_gradient
        >>> x = torch.diag(torch.tensor([1.0, 2.0]))
        >>> weight = torch.ones(1, 2, requires_grad=True)
        >>> precondition_gradient(weight, Preconditioner.from_features(x)).sum().backward()
        >>> weight.grad
        tensor([[1.0000, 0.2500]])
    """
    function = "precondition_gradient"
    require_floating_matrix(function, "weight", weight)
    width = preconditioner.x.shape[1]
    if weight.shape[-1] != width:
        raise ValueError(
            f"{function}: weight must have shape (*, o, {width}), the input side on the last axis, "
            f"got {tuple(weight.shape)}"
        )
    require_same_device(function, [("preconditioner", preconditioner.factor), ("weight", weight)])
    result: Tensor = _PreconditionGradient.apply(
        weight,
        preconditioner.factor,
        preconditioner.x,
        preconditioner.ridge,
        preconditioner.woodbury,
    )
    return result


class PreconditionedLinear(nn.Linear):
    """``nn.Linear`` whose weight gradient is multiplied by K^-1 on the input side.

    K is that of ``preconditioner`` if one is set, else of the batch at hand, with ``ridge``.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import PreconditionedLinear
        >>> layer = PreconditionedLinear(3, 2, bias=False, ridge=1e-3)
        >>> layer(torch.eye(3)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        ridge: float = 0.0,
        preconditioner: Preconditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layer.

        Args:
            in_features: p.
            out_features: o.
            bias: Whether there is a bias; its gradient is left alone.
            ridge: Relative ridge of a batch K; needed where batches have fewer than p rows.
            preconditioner: Of the full data, so that K does not change from batch to batch.
            device: As in ``nn.Linear``.
            dtype: As in ``nn.Linear``.
        """
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.ridge = ridge
        self.preconditioner = preconditioner

    def _is_differentiated(self) -> bool:
        tangent = forward_ad.unpack_dual(self.weight).tangent
        return tangent is not None or (torch.is_grad_enabled() and self.weight.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (*, p) features.

        Where nothing differentiates the weight, K is not needed: any batch will do.
        """
        preconditioner = self.preconditioner
        if preconditioner is None and not self._is_differentiated():
            return super().forward(input)
        if preconditioner is None:
            rows = input.detach().reshape(-1, self.in_features)
            preconditioner = Preconditioner.from_features(rows, ridge=self.ridge)
        weight = precondition_gradient(self.weight, preconditioner)
        return nn.functional.linear(input, weight, self.bias)
