r"""How much concepts share: principal angles of their tokens in the metric of the merge.

The key/value merge meets the tokens C_n of every concept with an update of least norm in Q, so what
two concepts can be told apart by is the angle between the spaces that their rows span in the metric
of Q^-1. With Q = L L^T these are the column spaces of Z_n = L^-1 C_n^T, and T_nm = Z_n^T Z_m.

For two single tokens of one length, r their cosine there,

.. math:: \kappa(T) = \frac{1 + r}{1 - r}, \qquad
          \|\Delta\|_Q^2 = \mathrm{tr}\, R\, T^{-1} R^\top \le \frac{\|R\|_F^2}{(1 - r)\, |z|^2} .
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from immunize_ext.ops.arguments import require_finite, require_same_device
from immunize_ext.ops.derivatives import carries_derivative
from immunize_ext.ops.factor import RegularizationFactor
from immunize_ext.ops.merge_problem import REPEATED_ROW_RTOL, require_floating

__all__ = ["concept_overlap"]


def concept_overlap(embeddings: Sequence[Tensor], factor: RegularizationFactor) -> Tensor:
    r"""Largest cosine between what tokens of concepts span, in the metric of the merge.

    .. math:: \rho_{nm} = \sigma_{\max}\bigl(T_{nn}^{-1/2}\, T_{nm}\, T_{mm}^{-1/2}\bigr), \qquad
              T_{nm} = C_n Q^{-1} C_m^\top

    Args:
        embeddings: ``embeddings[n]`` (s_n, d), text features of concept n's tokens, any floating
            dtype. Rows may repeat.
        factor: Of Q.

    Returns:
        The cosines (N, N), float64, symmetric: 0 where all tokens of two concepts are orthogonal, 1
        on the diagonal and where some token, or a combination of them, is in both. 0 with a concept
        that has no tokens.

    Raises:
        NotImplementedError: If a derivative is asked for. The condition number of T has one.
        ValueError: If shapes or devices do not fit, or an argument is not finite.

    Note:
        Deterministic for a given number of threads. Concepts of large overlap cost large updates:
        |Delta|_Q^2 grows like 1 / (1 - rho).

    Source:
        Björck and Golub 1973.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import RegularizationFactor, concept_overlap
        >>> cat, tiger = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
        >>> concept_overlap([cat, tiger], RegularizationFactor.identity(2)).round(decimals=6)
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]], dtype=torch.float64)
    """
    function = "concept_overlap"
    for n, tokens in enumerate(embeddings):
        name = f"embeddings[{n}]"
        require_floating(function, name, tokens)
        if tokens.dim() != 2 or tokens.shape[1] != factor.dim:
            raise ValueError(
                f"{function}: {name} must have shape (rows, {factor.dim}), the width of the "
                f"factor, got {tuple(tokens.shape)}"
            )
        require_finite(function, name, tokens)
        require_same_device(function, [("the factor", factor.chol), (name, tokens)])
    factor.require_current(function)
    followed = [*embeddings, factor.source, factor.ridge_tensor]
    if any(tensor is not None and carries_derivative(tensor) for tensor in followed):
        raise NotImplementedError(
            f"{function}: no derivative is known to it; detach embeddings and factor, or "
            "differentiate condition_number of C Q^-1 C^T"
        )
    bases = []
    for tokens in embeddings:
        z = torch.linalg.solve_triangular(factor.chol, tokens.to(torch.float64).mT, upper=False)
        # Scaled rows: a short token spans as much as a long one.
        z = torch.nn.functional.normalize(z, dim=0)
        u, sigma, _ = torch.linalg.svd(z, full_matrices=False)
        bases.append(u[:, sigma > REPEATED_ROW_RTOL**0.5 * sigma.max() if len(sigma) else []])
    found = torch.eye(len(bases), dtype=torch.float64, device=factor.chol.device)
    for n, one in enumerate(bases):
        for m, other in enumerate(bases[:n]):
            if one.shape[1] and other.shape[1]:
                cosine = torch.linalg.svdvals(one.mT @ other)[0].clamp(max=1.0)
                found[n, m] = found[m, n] = cosine
    return found
