r"""The preconditioned-gradient layer: identity forward, K^-1 on the input side backward.

Algorithm 1 of condition-number immunization multiplies the gradient of a regularizer by K^-1, with
K = X^T X of the layer's own inputs. For an extractor x -> x theta that is K^-1 grad_theta; PyTorch
stores theta^T as ``nn.Linear.weight``, so there it is a multiplication from the RIGHT:

.. math:: G \mapsto G\, K^{-1}, \qquad K = X^\top X + \text{ridge}\, I

With n < p samples everything happens within the n-dimensional row space of X, where K is an n x n
matrix; beside it K is the ridge. The textbook form of the Woodbury identity,
K^-1 = (I - X^T S^-1 X) / ridge with S = X X^T + ridge I, cancels on the very gradients that come
from the data: they lie in the row space. For G = dY^T X the layer uses G K^-1 = dY^T S^-1 X.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor, nn

from immunize_ext.errors import NotPositiveDefiniteError, NumericalWarning
from immunize_ext.ops.arguments import require_finite, require_floating_matrix, require_same_device
from immunize_ext.ops.derivatives import carries_tangent, payload
from immunize_ext.ops.fallback import rounding_beside

Side: TypeAlias = Literal["input", "output"]
"""On which side of a weight (o, p) K^-1 multiplies its gradient."""

_EPS = torch.finfo(torch.float64).eps


class Preconditioner:
    r"""Applies K^-1, K = x^T x + ridge I, from the right.

    Attributes:
        factor: Lower Cholesky factor, float64: (p, p) of K, or (n, n) of basis K basis^T.
        basis: Orthonormal basis (n, p) of the rows of x, float64, where n < p; (0, p) otherwise.
        ridge: The absolute ridge.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import Preconditioner
        >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> Preconditioner.from_features(x).apply(torch.ones(1, 2, dtype=torch.float64))
        tensor([[1.0000, 0.2500]], dtype=torch.float64)
    """

    def __init__(self, factor: Tensor, basis: Tensor, *, ridge: float) -> None:
        """Wrap a factor that exists already; :meth:`from_features` computes one."""
        self.factor = factor
        self.basis = basis
        self.ridge = ridge

    def __repr__(self) -> str:
        width, device = self.basis.shape[1], self.factor.device
        return f"Preconditioner(features={width}, ridge={self.ridge:.3g}, device={device})"

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
            ValueError: If x is not a finite (n, p) tensor, if its squares leave the range of
                float64, or if ridge is negative.

        Note:
            Deterministic; another number of threads may change the last bits of the factor, which
            LAPACK computes.

        Source:
            Zheng et al., ICML 2025, Algorithm 1, theorem 4.3. The released code multiplies on the
            output side, which only runs because its layer is square.
        """
        return cls._from("Preconditioner.from_features", "x", x, ridge, relative)

    @classmethod
    def _from(
        cls, function: str, name: str, x: Tensor, ridge: float, relative: bool
    ) -> Preconditioner:
        """:meth:`from_features` with errors in the names of the function that was called."""
        # What is kept for backward passes must be no inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            x, absolute = _checked_features(function, name, x, ridge, relative)
            n, p = x.shape
            if n < p:
                q, r = torch.linalg.qr(x.mT)
                k, basis = r @ r.mT, q.mT.contiguous()
            else:
                k, basis = torch.ops.immunize_ext.merge_gram(x), x.new_empty(0, p)
            return cls(_factor_of(function, name, k, absolute), basis, ridge=absolute)

    def apply(self, grad: Tensor) -> Tensor:
        """Return grad K^-1.

        With n < p samples K is the ridge beside the row space of x. What a row of grad has there
        counts as rounding up to ``8 sqrt(p) eps`` of the row's norm, eps that of grad's dtype, and
        is cut: gradients that come from the data lie in the row space, and what rounding put
        beside it, divided by the ridge, would drown the rest. A ``NumericalWarning`` tells where
        what is cut, divided by the ridge, would have been larger than what is kept and is more
        than the last digit of grad; and where what is kept there is hardly more than rounding.

        Args:
            grad: (*, o, p), real floating point.

        Returns:
            (*, o, p) in grad's dtype; solved in float64.

        Raises:
            ValueError: If the width or device of grad does not fit.
        """
        function = "Preconditioner.apply"
        require_floating_matrix(function, "grad", grad)
        width = self.basis.shape[1]
        if grad.shape[-1] != width:
            raise ValueError(
                f"{function}: grad must have shape (*, o, {width}), the features on the last axis, "
                f"got {tuple(grad.shape)}; an nn.Linear weight is stored that way"
            )
        require_same_device(function, [("factor", self.factor), ("grad", grad)])
        require_finite(function, "grad", grad)
        result: Tensor = torch.ops.immunize_ext.precondition(
            grad, self.factor, self.basis, self.ridge
        )
        if self.basis.shape[0] > 0:
            self._warn_of_rounding(grad, result)
        return result

    def _warn_of_rounding(self, grad: Tensor, result: Tensor) -> None:
        """Warn where the part of grad beside the row space may be rounding, and matters."""
        numbers, kept = payload(grad), payload(result)
        if numbers is None or kept is None:
            return
        wide = numbers.to(torch.float64).reshape(-1, self.basis.shape[1])
        # In units of the row, whose square may be out of range.
        unit = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        wide = wide / unit
        beside = (wide - (wide @ self.basis.mT) @ self.basis).norm(dim=1)
        share = rounding_beside(grad)
        size = wide.norm(dim=1)
        cut = beside <= share * size
        # Rounding an exact row to its dtype leaves half an eps; what is cut beyond may be meant.
        missed = cut & (beside > torch.finfo(grad.dtype).eps * size)
        result = kept.to(torch.float64).reshape(wide.shape) / unit
        missed &= beside > self.ridge * result.norm(dim=1)
        # A share of a hundredth and more is no rounding, whatever the dtype.
        doubtful = ~cut & (beside < min(100.0 * share, 1e-2) * size)
        for rows, what in (
            (doubtful, "little more than their rounding, which is divided by the ridge"),
            (missed, "what counts as rounding and is cut, but would rule divided by the ridge"),
        ):
            if bool(rows.any()):
                warnings.warn(
                    f"Preconditioner.apply: {int(rows.sum())} rows of grad lie beside the rows of "
                    f"the features by {what}, {self.ridge:.3g}; use a wider dtype, a larger ridge, "
                    "or PreconditionedLinear, which knows what its gradient is made of",
                    NumericalWarning,
                    stacklevel=3,
                )


# Sums of squares beyond these are about to overflow, or have lost digits.
_MOST_SQUARES, _LEAST_SQUARES = 1e300, 1e-290


def _checked_features(
    function: str, name: str, x: Tensor, ridge: float, relative: bool
) -> tuple[Tensor, float]:
    """The features (n, p) in float64, a copy, and the absolute ridge."""
    require_floating_matrix(function, name, x)
    if x.dim() != 2:
        raise ValueError(f"{function}: {name} must have shape (n, p), got {tuple(x.shape)}")
    require_finite(function, name, x)
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"{function}: ridge must be finite and not negative, got {ridge}")
    x = x.detach().to(torch.float64, copy=True)
    n, p = x.shape
    squares = float(x.square().sum())
    absolute = ridge * squares / p if relative else ridge
    # Beside an absolute ridge it does not matter how small they are.
    if squares > _MOST_SQUARES or max(squares, absolute) < _LEAST_SQUARES:
        largest = float(x.abs().max())
        if largest > 0.0:
            raise ValueError(
                f"{function}: {name} must have squares that float64 holds, between "
                f"{_LEAST_SQUARES:.0e} and {_MOST_SQUARES:.0e} in all, got entries as large as "
                f"{largest:.3g}; divide {name} by that, which multiplies what is preconditioned by "
                "its square"
            )
    if squares == 0.0 and absolute == 0.0:
        raise NotPositiveDefiniteError(
            f"{function}: K = {name}^T {name} must be positive definite, got zero: {name} holds "
            "only zeros, and a relative ridge is a share of them; pass features, or relative=False "
            "with a positive ridge",
            rank=0,
        )
    if n < p and absolute == 0.0:
        raise NotPositiveDefiniteError(
            f"{function}: K = {name}^T {name} must be positive definite, got {n} samples for {p} "
            "features; pass a positive ridge, 1e-6 for instance",
            rank=n,
        )
    return x, absolute


def _factor_of(function: str, name: str, k: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of k + ridge I, or what it lacks."""
    k.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(k)
    side = k.shape[0]
    tolerance = side * _EPS * float(k.diagonal().max())
    if int(info) > 0 or float(factor.diagonal().square().min()) <= tolerance:
        eigenvalues = torch.linalg.eigvalsh(k)
        top = float(eigenvalues[-1])
        rank = int((eigenvalues > side * _EPS * top).sum())
        needed = max(0.0, 10 * side * _EPS * top - float(eigenvalues[0]))
        raise NotPositiveDefiniteError.for_matrix(
            function, f"K = {name}^T {name} + ridge I", dim=side, rank=rank, needed_ridge=needed
        )
    return factor


def precondition_gradient(
    weight: Tensor, preconditioner: Preconditioner, *, side: Side = "input"
) -> Tensor:
    r"""Return weight itself; its gradient will arrive multiplied by K^-1, from the right.

    .. math:: W \mapsto W, \qquad \frac{\partial L}{\partial W} \mapsto
              \frac{\partial L}{\partial W} K^{-1}

    Args:
        weight: (*, o, p), an ``nn.Linear`` weight for instance: p is the input side.
        preconditioner: Of the layer's input features.
        side: ``"output"``: K^-1 multiplies from the left, as in the released code. The width of K
            is then o.

    Returns:
        A copy of weight with the preconditioned backward.

    Raises:
        ValueError: If the width or device of weight does not fit the preconditioner.

    Note:
        Deterministic. What comes out is no gradient of any function, on purpose; K counts as a
        constant. Both modes of differentiation multiply by K^-1. A gradient that is not finite is
        passed on, row by row: a scaler of losses looks for it behind the backward pass.

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
    _check_side(function, side)
    width = preconditioner.basis.shape[1]
    if weight.shape[-1 if side == "input" else -2] != width:
        expected = (
            f"(*, o, {width}), the input side on the last axis"
            if side == "input"
            else f"(*, {width}, p), the output side on the last but one"
        )
        raise ValueError(
            f"{function}: weight must have shape {expected}, got {tuple(weight.shape)}"
        )
    require_same_device(function, [("preconditioner", preconditioner.factor), ("weight", weight)])
    turned = weight if side == "input" else weight.mT
    result: Tensor = torch.ops.immunize_ext.precondition_gradient(
        turned, preconditioner.factor, preconditioner.basis, preconditioner.ridge
    )
    return result if side == "input" else result.mT


def _check_side(function: str, side: str) -> None:
    if side not in get_args(Side):
        raise ValueError(f"{function}: side must be 'input' or 'output', got {side!r}")


_STATE = ("preconditioner_factor", "preconditioner_basis", "preconditioner_ridge")


class PreconditionedLinear(nn.Linear):
    """``nn.Linear`` whose weight gradient is multiplied by K^-1, on the input side unless said.

    K is that of ``preconditioner`` if one is set, else of the batch at hand, with ``ridge``. A
    preconditioner is part of the module: it moves and is saved with it, in float64 throughout.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import PreconditionedLinear
        >>> layer = PreconditionedLinear(3, 2, bias=False, ridge=1e-3)
        >>> layer(torch.eye(3)).shape
        torch.Size([3, 2])
    """

    preconditioner_factor: Tensor | None
    preconditioner_basis: Tensor | None
    preconditioner_ridge: Tensor | None
    # Of modules that were pickled before there were these.
    relative: bool = True
    side: Side = "input"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        ridge: float = 0.0,
        relative: bool = True,
        side: Side = "input",
        preconditioner: Preconditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layer.

        Args:
            in_features: p.
            out_features: o.
            bias: Whether there is a bias; its gradient is left alone.
            ridge: Ridge of a batch K; needed where batches have fewer than p rows.
            relative: Whether it is in units of the mean diagonal of x^T x, else of K.
            side: ``"output"``: K^-1 multiplies from the left, as in the released code; o is then
                p.
            preconditioner: Of the full data, so that K does not change from batch to batch.
            device: As in ``nn.Linear``.
            dtype: As in ``nn.Linear``.
        """
        _check_side("PreconditionedLinear", side)
        if side == "output" and in_features != out_features:
            raise ValueError(
                f"PreconditionedLinear: side='output' must have as many outputs as inputs, K is "
                f"that of the inputs, got {in_features} and {out_features}"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.ridge, self.relative, self.side = ridge, relative, side
        for name in _STATE:
            self.register_buffer(name, None)
        self._absolute_ridge = 0.0  # the number in the buffer: compiled code cannot read that
        self.preconditioner = preconditioner

    @property
    def preconditioner(self) -> Preconditioner | None:
        """That of the full data, or None."""
        if self.preconditioner_factor is None or self.preconditioner_basis is None:
            return None
        return Preconditioner(
            self.preconditioner_factor, self.preconditioner_basis, ridge=self._absolute_ridge
        )

    @preconditioner.setter
    def preconditioner(self, value: Preconditioner | None) -> None:
        self.preconditioner_factor = None if value is None else value.factor
        self.preconditioner_basis = None if value is None else value.basis
        self.preconditioner_ridge = None if value is None else value.factor.new_tensor(value.ridge)
        self._absolute_ridge = 0.0 if value is None else value.ridge

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in _STATE}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            # .half() and the like are about weights; a factor has no digits to lose.
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in _STATE:
            given = state_dict.get(prefix + name)
            if given is not None:
                self._buffers[name] = torch.empty_like(given, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.preconditioner_ridge is not None:
            self._absolute_ridge = float(self.preconditioner_ridge)

    def _is_differentiated(self) -> bool:
        recorded = torch.is_grad_enabled() and self.weight.requires_grad
        return recorded or carries_tangent(self.weight)

    def forward(
        self, input: Tensor, *, ridge: float | None = None, precondition: bool = True
    ) -> Tensor:
        """Apply the layer to (*, p) features.

        Where nothing differentiates the weight, K is not needed: any batch will do.

        Args:
            input: The features.
            ridge: Another ridge for this batch, of a task with a K of its own for instance.
            precondition: Whether the gradient of this call is multiplied by K^-1; off for a loss
                that is not to be preconditioned.

        Raises:
            NotPositiveDefiniteError: If K of the batch is numerically singular.
            ValueError: If ``ridge`` is given although a preconditioner is set, which has its own;
                if K of the batch is wanted and it has no rows, or none that float64 can square.
            NotImplementedError: If K of the batch is wanted under a ``vmap`` over it.

        Note:
            Derivatives of every order and mode by input, weight and bias; whatever is one by the
            weight is multiplied by K^-1, K a constant.
        """
        preconditioner = self.preconditioner
        if ridge is not None and preconditioner is not None:
            raise ValueError(
                "PreconditionedLinear: ridge must not be given where a preconditioner is set, "
                f"which has its own, got {ridge}"
            )
        if not precondition or not self._is_differentiated():
            return super().forward(input)
        ridge = self.ridge if ridge is None else ridge
        function = "PreconditionedLinear"
        if preconditioner is None:
            features = _features_of(function, input, self.in_features)
            if len(features) < self.in_features and self.side == "input":
                return self._of_few_rows(function, input, features, ridge)
            preconditioner = Preconditioner._from(function, "input", features, ridge, self.relative)
        weight = precondition_gradient(self.weight, preconditioner, side=self.side)
        return nn.functional.linear(input, weight, self.bias)

    def _of_few_rows(self, function: str, input: Tensor, features: Tensor, ridge: float) -> Tensor:
        """The output with the inverse on the side of the samples, where nothing cancels."""
        with torch.inference_mode(False), torch.no_grad():
            x, absolute = _checked_features(function, "input", features, ridge, self.relative)
            s = torch.ops.immunize_ext.merge_gram(x.mT)
            factor = _factor_of(function, "input", s, absolute)
        rows = input.reshape(-1, self.in_features)
        rows, weight, bias = _autocast(rows, self.weight, self.bias)
        outputs: Tensor = torch.ops.immunize_ext.few_rows_linear(
            rows, weight, bias, factor, absolute
        )
        return outputs.reshape(*input.shape[:-1], outputs.shape[-1])


def _features_of(function: str, input: Tensor, width: int) -> Tensor:
    """The rows (n, p) that K is made of, as numbers."""
    if input.dim() < 1 or input.shape[-1] != width or input.numel() == 0:
        raise ValueError(
            f"{function}: input must have shape (*, {width}) with at least one row, K is made of "
            f"its rows, got {tuple(input.shape)}; skip a batch without rows"
        )
    numbers = payload(input)
    numbers = input.detach() if numbers is None else numbers
    if numbers.numel() != input.numel():
        raise NotImplementedError(
            f"{function}: input must be no batch of vmap, each element of which has a K of its "
            "own; set a preconditioner of the full data, or loop over the batch"
        )
    return numbers.reshape(-1, width)


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype that a linear layer is computed in here."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
