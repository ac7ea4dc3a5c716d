"""Inner products of per-sample gradients in torch alone; the compositions of higher derivatives.

Formulas: csrc/khatri_rao.cpp. All in float64 and by products of matrices, which torch
differentiates to every order and in every mode. On CUDA this is the route: cuBLAS on blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from immunize_ext.ops.arguments import any_true, not_finite

_MOST_NUMBERS = 1 << 24  # of one block of products or of per-sample gradients


def _by_outer_products(a: Tensor, g: Tensor) -> bool:
    """Whether per-sample gradients have fewer numbers than a pair of samples costs."""
    t, d, o = a.shape[-2], a.shape[-1], g.shape[-1]
    return t > 1 and d * o < t * t * (d + o)


def _wide(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """In float64; a bias is the weight of a token's last number, 1."""
    a, g = a.to(torch.float64), g.to(torch.float64)
    return (functional.pad(a, (0, 1), value=1.0) if bias else a), g


def _blocks(side: int, numbers: int) -> list[slice]:
    """Slices of a side whose elements make up so many numbers each."""
    step = max(1, _MOST_NUMBERS // max(numbers, 1))
    return [slice(k, k + step) for k in range(0, side, step)]


def composed_gram(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """K (*, n, n) of a (*, n, t, d) and g (*, n, t, o), finite."""
    k = _gram(a, g, bias)
    # What is not finite in a sample is not in its own entry.
    if any_true(~torch.isfinite(k.detach().diagonal(dim1=-2, dim2=-1))):
        name = "khatri_rao_gram"
        for argument, x in (("activations", a), ("gradients", g)):
            if not_finite(x):
                raise ValueError(f"{name}: {argument} must be finite, got NaN or infinity")
        raise ValueError(
            f"{name}: activations and gradients must have products below 1e308, got an overflow; "
            "scale them"
        )
    return k


def _gram(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    by_outer = _by_outer_products(a, g)
    a, g = _wide(a, g, bias)
    n, t = a.shape[-3:-1]
    many = math.prod(a.shape[:-3]) * n  # samples
    if by_outer:
        total = a.new_zeros((*a.shape[:-3], n, n))
        for part in _blocks(a.shape[-1], many * g.shape[-1]):
            j = (a[..., part].mT @ g).flatten(-2)
            total = total + j @ j.mT
        return total
    x, y = a.flatten(-3, -2), g.flatten(-3, -2)  # (*, n t, sides)
    rows = []
    for part in _blocks(n, many * t * t):
        left = slice(part.start * t, part.stop * t)
        pairs = (x[..., left, :] @ x.mT) * (y[..., left, :] @ y.mT)
        rows.append(pairs.unflatten(-1, (n, t)).sum(-1).unflatten(-2, (-1, t)).sum(-2))
    return torch.cat(rows, dim=-2)


def composed_gradient(
    grad: Tensor, a: Tensor, g: Tensor, bias: bool, need_a: bool, need_g: bool
) -> tuple[Tensor, Tensor]:
    """Its gradients in the shapes and dtypes of a and g; empty where not needed."""
    by_outer = _by_outer_products(a, g)
    x, y = _wide(a, g, bias)
    h = grad + grad.mT
    none = grad.new_empty(0)
    n, t = x.shape[-3:-1]
    many = math.prod(x.shape[:-3]) * n
    if by_outer:
        of_x, of_y = [], torch.zeros_like(y)
        for part in _blocks(x.shape[-1], many * y.shape[-1]):
            columns = x[..., part]
            j = columns.mT @ y  # (*, n, columns, o)
            dj = (h @ j.flatten(-2)).unflatten(-1, j.shape[-2:])
            if need_a:
                of_x.append(y @ dj.mT)
            if need_g:
                of_y = of_y + columns @ dj
        of_a = torch.cat(of_x, dim=-1) if need_a else none
        of_g = of_y if need_g else none
    else:
        u, v = x.flatten(-3, -2), y.flatten(-3, -2)
        parts_a, parts_g = [], []
        for part in _blocks(n, many * t * t):
            left = slice(part.start * t, part.stop * t)
            weights = h[..., part, :].repeat_interleave(t, -2).repeat_interleave(t, -1)
            if need_a:
                parts_a.append((weights * (v[..., left, :] @ v.mT)) @ u)
            if need_g:
                parts_g.append((weights * (u[..., left, :] @ u.mT)) @ v)
        of_a = torch.cat(parts_a, dim=-2).unflatten(-2, (n, t)) if need_a else none
        of_g = torch.cat(parts_g, dim=-2).unflatten(-2, (n, t)) if need_g else none
    if need_a:
        of_a = of_a[..., : a.shape[-1]]
    return of_a.to(a.dtype), of_g.to(g.dtype)


def _check(name: str, a: Tensor, g: Tensor) -> None:
    for argument, x in (("activations", a), ("gradients", g)):
        if x.dim() < 3 or 0 in x.shape[-3:]:
            raise ValueError(
                f"{name}: {argument} must have shape [*, n, t, d], no side 0, got {list(x.shape)}"
            )
    if a.shape[:-1] != g.shape[:-1]:
        raise ValueError(
            f"{name}: gradients must have the samples and tokens of activations, got "
            f"{list(g.shape)} and {list(a.shape)}"
        )


def khatri_rao_gram(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """K, finite and symmetric to the bit."""
    _check("khatri_rao_gram", a, g)
    k = composed_gram(a, g, bias)
    return ((k + k.mT) / 2).contiguous()


def khatri_rao_gram_backward(
    grad: Tensor, a: Tensor, g: Tensor, bias: bool, need_a: bool, need_g: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of K."""
    name = "khatri_rao_gram_backward"
    _check(name, a, g)
    expected = (*a.shape[:-3], a.shape[-3], a.shape[-3])
    if grad.shape != expected:
        raise ValueError(f"{name}: grad must have shape {list(expected)}, got {list(grad.shape)}")
    of_a, of_g = composed_gradient(grad, a, g, bias, need_a, need_g)
    return of_a.contiguous(), of_g.contiguous()
