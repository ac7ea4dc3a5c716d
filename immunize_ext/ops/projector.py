"""The projector onto leading eigenvectors as two raw operators with derivatives in each other.

lora_merge.py has the derivation: K(F), the sum of v_j (v_j^T F v_i) v_i^T / (l_i - l_j) over
i <= r < j, solves X H - H X = (I - P) F P, and dP = K(dH) + K(dH)^T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from immunize_ext.ops.derivatives import below_autograd, primals_of


def leading_projector(h: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P (*, p, p) onto the ``rank`` leading eigenvectors of h, all of them, and their values."""
    if h.dim() < 2 or h.shape[-1] != h.shape[-2] or h.dtype != torch.float64:
        raise ValueError(
            f"leading_projector: h must have shape [*, p, p] and be float64, got {list(h.shape)} "
            f"{h.dtype}"
        )
    if not 1 <= rank <= h.shape[-1]:
        raise ValueError(f"leading_projector: rank must be 1 to {h.shape[-1]}, got {rank}")
    values, vectors = torch.linalg.eigh(0.5 * (h + h.mT))
    values, vectors = values.flip(-1).contiguous(), vectors.flip(-1).contiguous()
    leading = vectors[..., :rank]
    return (leading @ leading.mT).contiguous(), vectors, values


def projector_solve(f: Tensor, h: Tensor, vectors: Tensor, values: Tensor, rank: int) -> Tensor:
    """K(F) (*, p, p) of f (*, p, p); h is where the derivatives go, vectors and values are its."""
    p = f.shape[-1]
    for name, tensor in (("h", h), ("vectors", vectors)):
        if tensor.shape != f.shape or tensor.dtype != torch.float64 or f.dtype != torch.float64:
            raise ValueError(
                f"projector_solve: f and {name} must have one shape [*, p, p] and be float64, got "
                f"{list(f.shape)} {f.dtype} and {list(tensor.shape)} {tensor.dtype}"
            )
    if values.shape != f.shape[:-1]:
        raise ValueError(f"projector_solve: values must have shape [*, {p}], got {values.shape}")
    leading, rest = vectors[..., :rank], vectors[..., rank:]
    gaps = values[..., None, :rank] - values[..., rank:, None]
    return (rest @ ((rest.mT @ f @ leading) / gaps) @ leading.mT).contiguous()


def _solve(f: Tensor, *rest: Any) -> Tensor:
    """K(F), for h, vectors, values and rank."""
    found: Tensor = torch.ops.immunize_ext.projector_solve(f, *rest)
    return found


def _symmetric(m: Tensor) -> Tensor:
    return 0.5 * (m + m.mT)


class _Projector(_SingleLevelFunction):
    """P; vectors and values carry no graph."""

    @staticmethod
    def forward(h: Tensor, rank: int) -> Any:
        return below_autograd(torch.ops.immunize_ext.leading_projector, h, rank)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, ctx.rank = inputs
        _, vectors, values = output
        ctx.mark_non_differentiable(vectors, values)
        ctx.save_for_backward(h, vectors, values)
        ctx.save_for_forward(h, vectors, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return _symmetric(_solve(grad + grad.mT, *ctx.saved_tensors, ctx.rank)), None

    @staticmethod
    def jvp(ctx: Any, dh: Tensor, _: Any) -> Any:
        with _set_fwd_grad_enabled(True):
            moved = _solve(_symmetric(dh), *primals_of(ctx.saved_tensors), ctx.rank)
            return moved + moved.mT, None, None


class _ProjectorSolve(_SingleLevelFunction):
    """X = K(F)."""

    @staticmethod
    def forward(f: Tensor, h: Tensor, vectors: Tensor, values: Tensor, rank: int) -> Any:
        operator = torch.ops.immunize_ext.projector_solve
        return below_autograd(operator, f, h, vectors, values, rank)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.rank = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        f, h, vectors, values, x = ctx.saved_tensors
        y = _solve(grad, h, vectors, values, ctx.rank)
        of_h = None
        if ctx.needs_input_grad[1]:
            p = torch.ops.immunize_ext.leading_projector(h, ctx.rank)[0]
            fp, rest = f @ p, f - p @ f
            of_p = rest.mT @ y - y @ fp.mT - grad @ x.mT + x.mT @ grad
            through_p = _solve(of_p + of_p.mT, h, vectors, values, ctx.rank)
            of_h = _symmetric(through_p + y @ x.mT - x.mT @ y)
        return y, of_h, None, None, None

    @staticmethod
    def jvp(ctx: Any, df: Any, dh: Any, *_: Any) -> Tensor:
        with _set_fwd_grad_enabled(True):
            f, h, vectors, values, x = primals_of(ctx.saved_tensors)
            right = torch.zeros_like(x) if df is None else df
            beside = torch.zeros_like(x)
            if dh is not None:
                dh = _symmetric(dh)
                p = torch.ops.immunize_ext.leading_projector(h, ctx.rank)[0]
                dp = _solve(dh, h, vectors, values, ctx.rank)
                dp = dp + dp.mT
                right = right - dp @ f @ p + (f - p @ f) @ dp - x @ dh + dh @ x
                beside = x @ dp - dp @ x
            return _solve(right, h, vectors, values, ctx.rank) + beside


RULES = {"leading_projector": _Projector, "projector_solve": _ProjectorSolve}
