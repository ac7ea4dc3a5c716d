r"""A rotation after which every coordinate has the same curvature.

Adam, Adagrad and standardised features rescale coordinates. Where diag(H) is constant, no rescaling
helps much: van der Sluis's theorem says that for every diagonal D > 0

.. math:: \kappa(D H D) \ge \kappa(H) / p.

The rotation always exists (Schur and Horn), and p - 1 plane rotations give it. Each takes the
smallest diagonal entry a below the mean t and the largest one b above, with h between them, and
solves a + 2 h x + b x^2 = t (1 + x^2) for the tangent x: since (b - t)(a - t) <= 0, both roots are
real. The first of the two entries is t from then on and is left alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from immunize_ext.ops.arguments import require_floating_matrix


def equal_diagonal_rotation(h: Tensor) -> Tensor:
    r"""An orthogonal Q with all diagonal entries of :math:`Q^\top H Q` equal.

    .. math:: (Q^\top H Q)_{ii} = \mathrm{tr}(H) / p

    Args:
        h: A symmetric matrix, shape ``(p, p)``, floating point; the symmetric part counts.

    Returns:
        Q, shape ``(p, p)``, float64, on the device of ``h``.

    Raises:
        ValueError: If ``h`` is not square, or not finite.

    Note:
        Deterministic. Q is one choice among many and a step function of ties between diagonal
        entries, so no derivative flows through it. O(p^2) operations.

    Source:
        van der Sluis, Numerische Mathematik 14 (1969), for the bound; Horn (1954) for existence.

    Example:
        >>> import torch
        >>> from immunize_ext.ops import equal_diagonal_rotation
        >>> h = torch.diag(torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64))
        >>> q = equal_diagonal_rotation(h)
        >>> [round(v, 9) for v in (q.mT @ h @ q).diagonal().tolist()]
        [37.0, 37.0, 37.0]
    """
    require_floating_matrix("equal_diagonal_rotation", "h", h)
    if h.dim() != 2 or h.shape[0] != h.shape[1]:
        raise ValueError(
            f"equal_diagonal_rotation: h must have shape (p, p), got {tuple(h.shape)}; for "
            "features x that is x.mT @ x"
        )
    wide = h.detach().to(torch.float64)
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("equal_diagonal_rotation: h must be finite, got NaN or infinity")
    p = len(wide)
    # Exact powers of two: nothing overflows on the way, and no bit of the angles changes.
    largest = float(wide.abs().max())
    if largest > 0.0:
        wide = torch.ldexp(wide, torch.tensor(-math.frexp(largest)[1]))
    # Rows of work: those of H, which are those of its columns too, and those of Q^T beside them.
    work = torch.cat([(wide + wide.mT) / 2.0, torch.eye(p, dtype=torch.float64).to(wide)], -1)
    mean = float(work[:, :p].diagonal().mean())
    left = torch.ones(p, dtype=torch.bool, device=wide.device)
    for _ in range(p - 1):
        diagonal = work.diagonal()[:p]
        i = int(torch.where(left, diagonal, torch.inf).argmin())
        j = int(torch.where(left, diagonal, -torch.inf).argmax())
        a, b, cross = (float(work[k]) for k in ((i, i), (j, j), (i, j)))
        if i == j or not (a < mean < b):
            break  # all that are left are equal, up to rounding
        root = math.sqrt(cross * cross - (b - mean) * (a - mean))
        tangent = -(a - mean) / (cross + math.copysign(root, cross))
        cosine = 1.0 / math.hypot(1.0, tangent)
        sine = tangent * cosine
        _rotate(work, i, j, cosine, sine)
        _rotate(work[:, :p].mT, i, j, cosine, sine)
        work[i, i] = mean
        left[i] = False
    return work[:, p:].mT.contiguous()


def _rotate(rows: Tensor, i: int, j: int, cosine: float, sine: float) -> None:
    """Rows i and j become cosine * i + sine * j and cosine * j - sine * i."""
    first, second = rows[i].clone(), rows[j].clone()
    rows[i] = cosine * first + sine * second
    rows[j] = cosine * second - sine * first
