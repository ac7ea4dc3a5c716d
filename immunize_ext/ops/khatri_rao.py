r"""The kernel of gradients (NTK) of linear layers, and the extremes of their K-FAC factors.

Sample i sends tokens a_it into a layer and gets output gradients g_it back. Its gradient in the
weight is J_i = sum_t g_it a_it^T, and

.. math:: K_{ij} = \langle J_i, J_j \rangle
          = \sum_{ts} (a_{it} \cdot a_{js} + b)\,(g_{it} \cdot g_{js}),

b = 1 with a bias: a Gram matrix of n samples, whatever the number of weights. Layers add up. With
H = dK + dK^T and one token a sample,

.. math:: \bar A = (H \circ G G^\top) A, \qquad \bar G = (H \circ (A A^\top + b)) G .
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from immunize_ext.ops import operators as operators  # defines what is called here
from immunize_ext.ops.arguments import (
    cluster_resolution,
    not_finite,
    require_finite,
    require_floating_matrix,
    require_same_device,
    resolution,
)
from immunize_ext.ops.spectrum import GramExtremes, gram_extremes


def khatri_rao_gram(
    activations: Tensor | Sequence[Tensor],
    gradients: Tensor | Sequence[Tensor],
    *,
    bias: bool | Sequence[bool] = False,
) -> Tensor:
    r"""Inner products of the gradients of samples in linear layers, summed over the layers.

    .. math:: K = \sum_l \sum_{ts} (A_l A_l^\top + b_l) \circ (G_l G_l^\top)

    Equivalent to ``J @ J.T`` for the Jacobian J of one output a sample in all weights of the
    layers, of which nothing of the size n x weights is ever stored.

    Args:
        activations: What goes into the layer, ``(n, d)``, or ``(*, n, t, d)`` with t tokens a
            sample; or one such tensor a layer. Real floating point.
        gradients: What comes back at its output, ``(n, o)`` or ``(*, n, t, o)``.
        bias: Whether the layer has a bias that counts; one for all, or one a layer.

    Returns:
        K, shape ``(*, n, n)``, symmetric positive semidefinite, in the dtype of ``activations``;
        computed in float64. Give float64 where the small end of its spectrum matters.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If shapes, devices or numbers of layers do not fit, a number is not finite, or
            K overflows its dtype.

    Note:
        Deterministic, for any number of threads. Differentiable in both to every order and in both
        modes. Of two routes the cheaper is taken: by pairs of tokens, t^2 (d + o) products for
        two samples, or by blocks of per-sample gradients, d o. Composed of torch operators on CUDA.

    Source:
        Jacot, Gabriel, Hongler, NeurIPS 2018; for layers: Novak, Sohl-Dickstein, Schoenholz, ICML
        2022 ("structured derivatives").

    Example:
        >>> import torch
        >>> from immunize_ext.ops import khatri_rao_gram
        >>> layer, x = torch.nn.Linear(3, 2).double(), torch.eye(3, dtype=torch.float64)[:2]
        >>> g = torch.ones(2, 2, dtype=torch.float64)  # of the sum of both outputs
        >>> khatri_rao_gram(x, g, bias=True)
        tensor([[4., 2.],
                [2., 4.]], dtype=torch.float64)
    """
    name = "khatri_rao_gram"
    inputs: list[Any] = (
        [activations] if not isinstance(activations, (list, tuple)) else list(activations)
    )
    backs: list[Any] = [gradients] if not isinstance(gradients, (list, tuple)) else list(gradients)
    biases = [bool(bias)] * len(inputs) if not isinstance(bias, Sequence) else list(bias)
    if not inputs or not len(inputs) == len(backs) == len(biases):
        raise ValueError(
            f"{name}: activations, gradients and bias must have one entry a layer, got "
            f"{len(inputs)}, {len(backs)} and {len(biases)}"
        )
    total: Tensor | None = None
    for a, g, b in zip(inputs, backs, biases, strict=True):
        a, g = _layer(name, a, g)
        k: Tensor = torch.ops.immunize_ext.khatri_rao_gram(a, g, b)
        if total is not None and total.shape != k.shape:
            raise ValueError(
                f"{name}: activations must have the same samples in every layer, got "
                f"{tuple(k.shape[:-1])} after {tuple(total.shape[:-1])}"
            )
        total = k if total is None else total + k
    assert total is not None
    return _narrow(name, total, inputs[0].dtype)


def _narrow(name: str, found: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype, where it fits."""
    narrow = found.to(dtype)
    if not_finite(narrow):
        raise ValueError(
            f"{name}: activations and gradients must have products within {dtype}, got an "
            "overflow; scale them, or give float64"
        )
    return narrow


def _layer(name: str, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one layer as (*, n, t, side)."""
    for argument, x in (("activations", a), ("gradients", g)):
        # A parameter of four sides is what a layer was given here, and no convolution.
        require_floating_matrix(name, argument, x.detach() if isinstance(x, Parameter) else x)
    require_same_device(name, [("activations", a), ("gradients", g)])
    if a.shape[:-1] != g.shape[:-1] or 0 in a.shape[-3:]:
        raise ValueError(
            f"{name}: gradients must have the samples and tokens of activations, at least one, got "
            f"{tuple(g.shape)} and {tuple(a.shape)}"
        )
    return (a.unsqueeze(-2), g.unsqueeze(-2)) if a.dim() == 2 else (a, g)


class KfacExtremes(NamedTuple):
    """What :func:`kfac_extremes` returns.

    Attributes:
        lambda_max: Largest eigenvalue, shape ``(*,)``.
        lambda_min: Smallest that counts, shape ``(*,)``.
        rank: How many count, int64 ``(*,)``.
    """

    lambda_max: Tensor
    lambda_min: Tensor
    rank: Tensor


def kfac_extremes(activations: Tensor, gradients: Tensor) -> KfacExtremes:
    r"""Extreme eigenvalues of a layer's K-FAC matrix, from those of its two factors.

    .. math:: F = \Big(\tfrac1n \sum a a^\top\Big) \otimes \Big(\tfrac1n \sum g g^\top\Big), \qquad
              \lambda_i(F) = \lambda_j(A)\, \lambda_k(G)

    The extremes of a Kronecker product of semidefinite factors are the products of their extremes:
    nothing of the side d o is searched.

    Args:
        activations: Tokens that go into the layer, shape ``(*, n, d)``, real floating point.
        gradients: What comes back at its output, shape ``(*, n, o)``.

    Returns:
        :class:`KfacExtremes` in the dtype of the arguments, computed in float64. Eigenvalues that
        cannot be told from 0, for what the dtype resolves, do not count, in either factor.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If shapes or devices do not fit, a number is not finite, or an eigenvalue
            overflows the dtype.

    Note:
        Deterministic. Derivatives as in :func:`gram_extremes`: where an extreme is repeated in one
        factor or in both, the gradient is the mean over all its eigenvectors, whose projector is
        the Kronecker product of those of the factors.

    Source:
        Martens and Grosse, ICML 2015.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import kfac_extremes
        >>> a = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> found = kfac_extremes(a, 2 * a)
        >>> found.lambda_max.item(), found.lambda_min.item(), found.rank.item()
        (81.0, 1.0, 4)
    """
    name = "kfac_extremes"
    require_floating_matrix(name, "activations", activations)
    require_floating_matrix(name, "gradients", gradients)
    require_same_device(name, [("activations", activations), ("gradients", gradients)])
    if activations.shape[:-1] != gradients.shape[:-1]:
        raise ValueError(
            f"{name}: gradients must have the samples of activations, got "
            f"{tuple(gradients.shape)} and {tuple(activations.shape)}"
        )
    require_finite(name, "activations", activations)
    require_finite(name, "gradients", gradients)
    of_a, of_g = _wide_extremes(activations), _wide_extremes(gradients)
    scale = float(activations.shape[-2]) ** 2
    dtype = torch.promote_types(activations.dtype, gradients.dtype)
    return KfacExtremes(
        _narrow(name, of_a.lambda_max * of_g.lambda_max / scale, dtype),
        _narrow(name, of_a.lambda_min * of_g.lambda_min / scale, dtype),
        of_a.rank * of_g.rank,
    )


def _wide_extremes(x: Tensor) -> GramExtremes:
    """In float64, as a product may fit where its factors do not; resolved as the dtype is."""
    side = max(x.shape[-2:])
    return gram_extremes(
        x.to(torch.float64),
        rank_rtol=min(side * resolution(x.dtype), 0.5),
        cluster_rtol=cluster_resolution(side, x.dtype),
    )
