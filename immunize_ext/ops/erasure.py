r"""Concept erasure by closed-form edits, as thin uses of the key/value merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.merge import merge_kv
from immunize_ext.ops.merge_problem import require_floating

__all__ = ["uce"]


def uce(
    base: Sequence[Tensor],
    erase: Tensor,
    replace: Tensor,
    *,
    preserve: Tensor | None = None,
    ridge: float = 0.1,
    erase_scale: float = 1.0,
    preserve_scale: float = 0.1,
) -> list[Tensor]:
    r"""Erase concepts by Unified Concept Editing: map their tokens to where others go.

    .. math:: W = \Bigl(\lambda W_0 + \sum_j \mu_j v_j c_j^\top\Bigr)
                  \Bigl(\lambda I + \sum_j \mu_j c_j c_j^\top\Bigr)^{-1},
              \qquad v_j = W_0\, r_j

    which is the soft form of the merge with Q = ridge I. Erased tokens c_j are paired with the
    tokens r_j that replace them; preserved tokens are paired with themselves.

    Args:
        base: W0, one (o_l, d) tensor a layer: the cross-attention key and value projections.
        erase: Text features (n, d) of the tokens to erase.
        replace: Text features (n, d), row by row what they shall be taken for.
        preserve: Text features (m, d) of tokens that shall keep their outputs.
        ridge: lambda, how strongly W is held to W0, in the units of a squared text feature.
        erase_scale: mu of erased tokens.
        preserve_scale: mu of preserved tokens.

    Returns:
        The edited weights, one a layer, dtype of base. Where replace equals erase, base itself;
        with no tokens at all, a copy of it.

    Raises:
        ValueError: If shapes do not fit, a scale or the ridge is not positive, or an input is not
            finite.

    Note:
        Deterministic. Differentiable like :func:`~immunize_ext.ops.merge_kv`. One s x s system for
        all layers, where the published code inverts a d x d matrix for each.

    Source:
        Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024, eq. 7.

    Example:
        >>> import torch
        >>> from immunize_ext.ops.erasure import uce
        >>> base = torch.eye(2, dtype=torch.float64)
        >>> cat, dog = torch.eye(2, dtype=torch.float64).split(1)
        >>> uce([base], cat, dog, ridge=1.0)[0]  # halfway: as much ridge as evidence
        tensor([[0.5000, 0.0000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    if len(base) == 0:
        raise ValueError("uce: base must hold at least one layer, got none")
    named = [("erase", erase), ("replace", replace)]
    if preserve is not None:
        named.append(("preserve", preserve))
    for name, tokens in named:
        require_floating("uce", name, tokens)
        if tokens.dim() != 2 or tokens.shape[1] != base[0].shape[-1]:
            raise ValueError(
                f"uce: {name} must have shape (n, {base[0].shape[-1]}), the width of base, got "
                f"{tuple(tokens.shape)}"
            )
    if erase.shape != replace.shape:
        raise ValueError(
            f"uce: replace must have the shape of erase, {tuple(erase.shape)}, got "
            f"{tuple(replace.shape)}; repeat one replacement with .expand"
        )
    for name, scale in (
        ("ridge", ridge),
        ("erase_scale", erase_scale),
        ("preserve_scale", preserve_scale),
    ):
        if not 0 < scale < torch.inf:
            raise ValueError(f"uce: {name} must be positive and finite, got {scale}")

    kept = erase[:0] if preserve is None else preserve
    tokens = torch.cat([erase, kept.to(erase.dtype)])
    outputs = torch.cat([replace, kept.to(replace.dtype)])
    accumulate = torch.float64 if base[0].dtype == torch.float64 else torch.float32
    values = [w.to(accumulate) @ outputs.to(accumulate).mT for w in base]
    hardness = torch.full((tokens.shape[0],), erase_scale, dtype=torch.float64)
    hardness[erase.shape[0] :] = preserve_scale
    # Q = ridge I: no captions, the ridge alone.
    factor = RegularizationFactor.identity(tokens.shape[1], scale=ridge, device=tokens.device)
    return merge_kv(
        base, None, [tokens], factor, values=values, hardness=hardness.to(tokens.device)
    )
