"""The regularizers of condition-number immunization, as compositions of the spectrum operators.

R_well pulls all singular values of a matrix together, R_ill drives the smallest away from the
rest. ``r_well`` and ``r_ill`` take the matrix S itself; ``gram_r_well`` and ``gram_r_ill`` take
features x and act on K = x^T x without forming it. The Frobenius part never goes through singular
vectors, so it has no singularity at repeated or zero singular values.

For plain tensors on the CPU or a GPU each of them is one fused operator, since the Python of a
composition and its launches would cost more than its arithmetic. Under ``torch.func``, ``vmap``,
``torch.compile``, forward mode, and with tensors as normalisers they are the composition.

Gradients, with u, v the singular vectors and D the denominator of R_ill:

- R_well(S) = sigma_max^2 / 2 - |S|_F^2 / (2 p):    sigma_max u_1 v_1^T - S / p
- R_ill(S)  = 1 / D,
  D = |S|_F^2 / (2 k) - sigma_min^2 / 2:            (sigma_min u_k v_k^T - S / k) / D^2

and for S = K = x^T x they follow by d sigma_i(K) = 2 sigma_i(x) u_i^T dx v_i and
d|K|_F^2 = <4 x x^T x, dx>. All of it is formed in float64 and cast to the input's dtype at the end.

R of degree d obeys R(x) = s^d R(x / s). D^2 leaves the range of float64 long before x or the
gradient does; there both are those of x / s, s the power of two of its largest entry. So they are
infinite or zero only where the numbers themselves are. The one exception: where |S|_F^2 is beyond
the range, so that R_well is infinite, a composition has gradient zero.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor

from immunize_ext.errors import EqualSingularValuesError
from immunize_ext.ops.arguments import (
    RankPolicy,
    SpectrumPolicy,
    any_true,
    require_positive,
    spectrum_policy,
)
from immunize_ext.ops.derivatives import payload
from immunize_ext.ops.operators import is_fused
from immunize_ext.ops.spectrum import (
    GramExtremes,
    SingularExtremes,
    gram_extremes_float64,
    singular_extremes_float64,
)

__all__ = ["gram_r_ill", "gram_r_well", "r_ill", "r_well", "with_extremes"]


_Regularizer: TypeAlias = Literal["r_well", "r_ill", "gram_r_well", "gram_r_ill"]

# D is a difference of two numbers of its own size or larger; below this fraction of the first,
# times the larger side, it is rounding: singular values are known to a few max(n, p) eps of the
# largest, their squares to twice, eigenvalues of a Gram matrix squared to four times that.
_VANISHING = 4 * torch.finfo(torch.float64).eps


def _positive(function: str, name: str, value: float | Tensor | None) -> float | Tensor | None:
    """The normaliser, checked; a tensor may be one that ``torch.func`` wraps."""
    if isinstance(value, Tensor):
        if not torch.compiler.is_compiling():
            require_positive(function, name, value)
    elif value is not None and not value > 0:
        raise ValueError(f"{function}: {name} must be positive, got {value}")
    return value


def _require_floor(function: str, floor: float | None) -> None:
    if floor is not None and not 0.0 < floor < 1.0:
        raise ValueError(
            f"{function}: floor must be between 0 and 1, a fraction of |S|_F^2 / (2 k), got {floor}"
        )


def _has_fused(x: Tensor, normaliser: float | Tensor | None) -> bool:
    """Whether the operator ``regularizer`` can serve, which takes numbers as normalisers."""
    return not isinstance(normaliser, Tensor) and is_fused("regularizer", x)


def _fused(
    function: _Regularizer,
    s: Tensor,
    policy: SpectrumPolicy,
    normaliser: float | Tensor | None,
    floor: float | None = None,
) -> Tensor:
    """A regularizer by the fused operator."""
    gram, ill = function.startswith("gram_"), function.endswith("r_ill")
    value: Tensor
    value, _, multiplicity, *_ = torch.ops.immunize_ext.regularizer(
        s, gram, ill, normaliser, floor, *policy
    )
    if s.is_cuda and type(multiplicity) is Tensor:
        if torch.cuda.is_current_stream_capturing():
            return value.to(s.dtype)  # nothing can be read: held at a floor, as when compiled
        multiplicity = multiplicity.cpu()
        if bool((multiplicity < 0).any()):  # squares that leave the range of float64
            return _compose(function, s, policy, normaliser, floor)[0].to(s.dtype)
    if ill and floor is None and _any_zero(multiplicity):
        _refuse_vanishing(multiplicity == 0, function, "x" if gram else "s")
    return value.to(s.dtype)  # autocast may have widened it


def _well(sigma_max: Tensor, squared_frobenius: Tensor, p: float | Tensor) -> Tensor:
    # |S|_F^2 leaves the range of float64 first; infinity minus infinity is not what that means.
    overflows = torch.isinf(squared_frobenius)
    value = torch.where(overflows, 0.0, sigma_max).square() / 2
    return torch.where(overflows, torch.inf, value - squared_frobenius / (2 * p))


def _refuse_vanishing(vanishes: Tensor, function: str, argument: str) -> None:
    """Raise where the mask is set, if it can be read."""
    numbers = payload(vanishes)
    if numbers is not None and bool(numbers.any()):
        raise EqualSingularValuesError.for_matrix(
            function, argument, batch_index=tuple(numbers.nonzero()[0].tolist())
        )


def _any_zero(counts: Tensor) -> bool:
    """Whether a count of the fused operator is zero, for one matrix without an operator call."""
    if type(counts) is not Tensor:  # without numbers to read
        return False
    return counts.item() == 0 if counts.dim() == 0 else not bool(counts.all())


def _ill(
    function: str,
    sigma_min: Tensor,
    squared_frobenius: Tensor,
    counts: tuple[Tensor, Tensor],
    k: float | Tensor | None,
    floor: float | None,
    vanishing: float,
) -> Tensor:
    rank, multiplicity_min = counts
    mean_square = squared_frobenius / (2 * (rank.clamp(min=1) if k is None else k))
    denominator = mean_square - sigma_min.square() / 2
    smallest = mean_square.detach() * (vanishing if floor is None else floor)
    vanishes = denominator.detach() <= smallest
    if k is None and floor is None:
        # One cluster of all singular values: what D has left of itself is rounding.
        # Zeros that rank="full" counts are no cluster: D is then |S|_F^2 / (2 k).
        vanishes = vanishes | ((multiplicity_min >= rank) & (sigma_min.detach() > 0))
    if floor is None and not torch.compiler.is_compiling():
        _refuse_vanishing(vanishes, function, "x" if function.startswith("gram_") else "s")
    # Where D vanishes the value is held at 1 / smallest, with gradient 0.
    return torch.where(vanishes, smallest, denominator).reciprocal()


def _leaves_range(square: Tensor, rank: Tensor, narrow: bool) -> Tensor:
    """Where some power of |S|_F that a derivative of R_ill is made of leaves float64's range.

    narrow: or float32's, in which the two parts of the gradient by a float32 matrix are added up.
    """
    most = 2.0**64 if narrow else 2.0**256
    return ~((square >= 1 / most) & (square <= most)) & (rank > 0)


def _exponent(s: Tensor) -> Tensor:
    """The exponent (*,) of a power of two that brings |s|_F between about 1 / sqrt(n p) and 1."""
    largest = s.detach().to(torch.float64).abs().amax(dim=(-2, -1))
    count = torch.full_like(largest, s.shape[-2] * s.shape[-1])
    exponent = -torch.frexp(largest)[1] - (torch.frexp(count)[1] + 1) // 2
    # Within the range of normal numbers, where products with the power are exact.
    return exponent.clamp(-1000, 1000)


def _times_power(value: Tensor, exponent: Tensor) -> Tensor:
    """Value * 2^exponent; where that is infinite, with a finite power as its derivative.

    What that is multiplied by later overflows too, or is zero and stays so.
    """

    def scaled(value: Tensor, exponent: Tensor) -> Tensor:
        half = exponent // 2  # the power itself may leave the range where the product does not
        for part in (half, exponent - half):
            value = value * torch.ldexp(torch.ones_like(value.detach()), part.clamp(-1000, 1000))
        return value

    overflows = torch.isinf(scaled(value.detach(), exponent)) & torch.isfinite(value.detach())
    result = scaled(value, torch.where(overflows, 900, exponent))
    return torch.where(overflows, result + torch.inf, result)


def _squared_norm(s: Tensor) -> Tensor:
    """|S|_F^2 in float64. In one go torch would add up in an order that depends on the threads."""
    longer = -1 if s.shape[-2] <= s.shape[-1] else -2
    return s.to(torch.float64).square().sum(longer).sum(-1)


def _parts(
    gram: bool, s: Tensor, policy: SpectrumPolicy
) -> tuple[SingularExtremes | GramExtremes, Tensor, Tensor, Tensor]:
    """The extremes, and of them the largest and the smallest value and |S|_F^2; float64."""
    if gram:
        of_gram = gram_extremes_float64(s, policy)
        return of_gram, of_gram.lambda_max, of_gram.lambda_min, of_gram.squared_frobenius
    of_s = singular_extremes_float64(s, policy)
    return of_s, of_s.sigma_max, of_s.sigma_min, _squared_norm(s)


def _compose(
    function: _Regularizer,
    s: Tensor,
    policy: SpectrumPolicy,
    normaliser: float | Tensor | None,
    floor: float | None = None,
) -> tuple[Tensor, SingularExtremes | GramExtremes]:
    """A regularizer and the extremes it is made of, float64: one decomposition within the range."""
    gram = function.startswith("gram_")
    extremes, largest, smallest, square = _parts(gram, s, policy)
    if function.endswith("r_well"):
        width = s.shape[-1] if gram else min(s.shape[-2:])
        return _well(largest, square, width if normaliser is None else normaliser), extremes
    counts = (extremes.rank, extremes.multiplicity_min)
    vanishing = (2 if gram else 1) * _VANISHING * max(s.shape[-2:])
    narrow = not gram and s.dtype != torch.float64
    # Compiled code cannot look.
    rescaled = torch.compiler.is_compiling() or any_true(
        _leaves_range(square.detach(), extremes.rank, narrow)
    )
    if not rescaled:
        return _ill(function, smallest, square, counts, normaliser, floor, vanishing), extremes
    exponent = _exponent(s)
    power = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)[..., None, None]
    # A matrix product, as torch cannot trace forward mode twice through a product by entries.
    entries = s.to(torch.float64).reshape(*s.shape[:-2], s.shape[-2] * s.shape[-1], 1)
    y = (entries @ power).reshape(s.shape)
    of_y, _, smallest, square = _parts(gram, y, policy)
    counts = (of_y.rank, of_y.multiplicity_min)
    value = _ill(function, smallest, square, counts, normaliser, floor, vanishing)
    return _times_power(value, (4 if gram else 2) * exponent), extremes


def r_well(
    s: Tensor,
    *,
    p: float | Tensor | None = None,
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> Tensor:
    r"""Condition-number minimiser R_well of each matrix.

    .. math:: R_{well}(S) = \tfrac12 \sigma_{\max}(S)^2 - \tfrac1{2p} \|S\|_F^2

    Non-negative, and zero iff all singular values are equal.

    Args:
        s: Matrices S (*, n, m), real floating point.
        p: Normaliser, a number or a tensor (*,). Default min(n, m). Published code uses other
            widths; with a larger one than min(n, m) the value stays positive, with a smaller one it
            can be negative.
        rank_rtol: As in :func:`~immunize_ext.ops.extremal_singular_values`.
        cluster_rtol: As in :func:`~immunize_ext.ops.extremal_singular_values`.

    Returns:
        R_well (*,) in s's dtype.

    Raises:
        ValueError: As :func:`~immunize_ext.ops.extremal_singular_values`, or if p is not positive.

    Note:
        Deterministic. Gradient sigma_max u v^T - S / p, averaged over a repeated sigma_max, so
        that multiples of an orthogonal matrix have gradient 0. Double backward where sigma_max is
        simple.

    Source:
        Nenov, Haider, Balazs 2024, eq. for r(S); Zheng et al., ICML 2025, eq. 3.

    Example:
        >>> import torch
        >>> from immunize_ext.ops.regularizers import r_well
        >>> s = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
        >>> value = r_well(s)
        >>> value.backward()
        >>> round(value.item(), 6), [round(g, 6) for g in s.grad.diagonal().tolist()]
        (2.166667, [2.0, -0.666667, -0.333333])
    """
    policy = spectrum_policy("r_well", "s", s, "numerical", rank_rtol, cluster_rtol)
    p = _positive("r_well", "p", p)
    if _has_fused(s, p):
        return _fused("r_well", s, policy, p)
    return _compose("r_well", s, policy, p)[0].to(s.dtype)


def r_ill(
    s: Tensor,
    *,
    k: float | Tensor | None = None,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
    floor: float | None = None,
) -> Tensor:
    r"""Condition-number maximiser R_ill of each matrix.

    .. math:: R_{ill}(S) = \Bigl(\tfrac1{2k} \|S\|_F^2 - \tfrac12 \sigma_{\min}(S)^2\Bigr)^{-1}

    Args:
        s: Matrices S (*, n, m), real floating point.
        k: Normaliser, a number or a tensor (*,). Default the numerical rank of S.
        rank: Which sigma_min: the smallest that counts, or with ``"full"`` the min(n, m)-th.
        rank_rtol: As in :func:`~immunize_ext.ops.extremal_singular_values`.
        cluster_rtol: As in :func:`~immunize_ext.ops.extremal_singular_values`.
        floor: Smallest denominator D allowed, as a fraction of |S|_F^2 / (2k). Below it the value
            is held at 1 / (floor |S|_F^2 / (2k)) with gradient 0; between 0 and 1. Default: a
            matrix where D is rounding raises.

    Returns:
        R_ill (*,) in s's dtype.

    Raises:
        EqualSingularValuesError: If all singular values are equal (D = 0, R_ill infinite) or k is
            too large, and no floor is given. Under ``torch.compile``, where nothing can be read on
            the host, the value is held at a floor of a few max(n, m) eps instead.
        ValueError: As :func:`~immunize_ext.ops.extremal_singular_values`, or if k is not positive.

    Note:
        Deterministic. Gradient (sigma_min u v^T - S / k) / D^2, averaged over a repeated sigma_min.
        Double backward where sigma_min is simple.

    Source:
        Zheng et al., ICML 2025, eq. 12 and 13.

    Example:
        >>> import torch
        >>> from immunize_ext.ops.regularizers import r_ill
        >>> s = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
        >>> value = r_ill(s)
        >>> value.backward()
        >>> round(value.item(), 6), [round(g, 5) for g in s.grad.diagonal().tolist()]
        (0.545455, [-0.29752, -0.19835, 0.19835])
    """
    policy = spectrum_policy("r_ill", "s", s, rank, rank_rtol, cluster_rtol)
    k = _positive("r_ill", "k", k)
    _require_floor("r_ill", floor)
    if _has_fused(s, k):
        return _fused("r_ill", s, policy, k, floor)
    return _compose("r_ill", s, policy, k, floor)[0].to(s.dtype)


def gram_r_well(
    x: Tensor,
    *,
    p: float | Tensor | None = None,
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> Tensor:
    r"""R_well of the Gram matrix K = x^T x, without forming it.

    .. math:: R_{well}(K) = \tfrac12 \lambda_{\max}(K)^2 - \tfrac1{2p} \|K\|_F^2

    Args:
        x: Features (*, n, p), real floating point.
        p: Normaliser, a number or a tensor (*,). Default the number of features.
        rank_rtol: As in :func:`~immunize_ext.ops.gram_extremes`.
        cluster_rtol: As in :func:`~immunize_ext.ops.gram_extremes`.

    Returns:
        R_well(K) (*,) in x's dtype.

    Raises:
        ValueError: As :func:`~immunize_ext.ops.gram_extremes`, or if p is not positive.

    Note:
        Deterministic. Derivatives as in :func:`r_well`.

    Source:
        Zheng et al., ICML 2025, eq. 3 and 9, theorem 4.2.

    Example:
        >>> import torch
        >>> from immunize_ext.ops.regularizers import gram_r_well, r_well
        >>> x = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
        >>> torch.allclose(gram_r_well(x), r_well(x.mT @ x))
        True
    """
    policy = spectrum_policy("gram_r_well", "x", x, "numerical", rank_rtol, cluster_rtol)
    p = _positive("gram_r_well", "p", p)
    if _has_fused(x, p):
        return _fused("gram_r_well", x, policy, p)
    return _compose("gram_r_well", x, policy, p)[0].to(x.dtype)


def gram_r_ill(
    x: Tensor,
    *,
    k: float | Tensor | None = None,
    rank: RankPolicy = "numerical",
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
    floor: float | None = None,
) -> Tensor:
    r"""R_ill of the Gram matrix K = x^T x, without forming it.

    .. math:: R_{ill}(K) = \Bigl(\tfrac1{2k} \|K\|_F^2
              - \tfrac12 \lambda_{\min}(K)^2\Bigr)^{-1}

    Args:
        x: Features (*, n, p), real floating point.
        k: Normaliser, a number or a tensor (*,). Default the numerical rank of x.
        rank: Which lambda_min: the smallest that counts, or with ``"full"`` the p-th.
        rank_rtol: As in :func:`~immunize_ext.ops.gram_extremes`.
        cluster_rtol: As in :func:`~immunize_ext.ops.gram_extremes`.
        floor: As in :func:`r_ill`.

    Returns:
        R_ill(K) (*,) in x's dtype.

    Raises:
        EqualSingularValuesError: As :func:`r_ill`.
        ValueError: As :func:`~immunize_ext.ops.gram_extremes`, or if k is not positive.

    Note:
        Deterministic. Derivatives as in :func:`r_ill`.

    Source:
        Zheng et al., ICML 2025, eq. 9 and 12, theorem 4.2.

    Example:
        >>> import torch
        >>> from immunize_ext.ops.regularizers import gram_r_ill, r_ill
        >>> x = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
        >>> torch.allclose(gram_r_ill(x), r_ill(x.mT @ x))
        True
    """
    policy = spectrum_policy("gram_r_ill", "x", x, rank, rank_rtol, cluster_rtol)
    k = _positive("gram_r_ill", "k", k)
    _require_floor("gram_r_ill", floor)
    if _has_fused(x, k):
        return _fused("gram_r_ill", x, policy, k, floor)
    return _compose("gram_r_ill", x, policy, k, floor)[0].to(x.dtype)


@overload
def with_extremes(
    regularizer: Literal["gram_r_well", "gram_r_ill"], s: Tensor, **settings: Any
) -> tuple[Tensor, GramExtremes]: ...
@overload
def with_extremes(
    regularizer: Literal["r_well", "r_ill"], s: Tensor, **settings: Any
) -> tuple[Tensor, SingularExtremes]: ...
def with_extremes(
    regularizer: _Regularizer, s: Tensor, **settings: Any
) -> tuple[Tensor, SingularExtremes | GramExtremes]:
    r"""A regularizer together with the extremes it is made of: one decomposition for both.

    .. math:: S \mapsto \bigl(R(S),\ (\lambda_{\max}, \lambda_{\min}, \dots)\bigr)

    For a loss and the condition number that is logged beside it. Both are differentiable.

    Args:
        regularizer: Its name.
        s: Matrices (*, n, m) of ``"r_well"`` and ``"r_ill"``, features (*, n, p) of the others.
        **settings: As the function of that name takes them.

    Returns:
        The value as from :func:`r_well`, :func:`r_ill`, :func:`gram_r_well` or :func:`gram_r_ill`,
        and what :func:`~immunize_ext.ops.extremal_singular_values` or
        :func:`~immunize_ext.ops.gram_extremes` gives, under the same ``rank`` and tolerances.

    Raises:
        ValueError: If there is no such regularizer or setting, and as the function does.
        EqualSingularValuesError: As the function does.

    Note:
        Deterministic; always the composition, never the fused operator.

    Source:
        Zheng et al., ICML 2025, eq. 1, 3 and 12.

    Example:
        >>> import torch
        >>> from immunize_ext.ops.regularizers import with_extremes
        >>> x = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> value, extremes = with_extremes("gram_r_ill", x)
        >>> value.item(), (extremes.lambda_max / extremes.lambda_min).item()
        (0.05, 9.0)
    """
    if regularizer not in get_args(_Regularizer):
        raise ValueError(
            f"with_extremes: regularizer must be one of {get_args(_Regularizer)}, "
            f"got {regularizer!r}"
        )
    ill = regularizer.endswith("ill")
    name = "k" if ill else "p"
    known = {name, "rank_rtol", "cluster_rtol"} | ({"rank", "floor"} if ill else set())
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"with_extremes: settings of {regularizer} must be among {sorted(known)}, "
            f"got {unknown[0]}"
        )
    argument = "x" if regularizer.startswith("gram_") else "s"
    tolerances = settings.get("rank_rtol"), settings.get("cluster_rtol")
    rank = settings.get("rank", "numerical")
    policy = spectrum_policy(regularizer, argument, s, rank, *tolerances)
    normaliser = _positive(regularizer, name, settings.get(name))
    floor = settings.get("floor")
    _require_floor(regularizer, floor)
    value, extremes = _compose(regularizer, s, policy, normaliser, floor)
    counts = ("rank", "multiplicity_max", "multiplicity_min")
    cast = {
        field: number.to(s.dtype)
        for field, number in extremes._asdict().items()
        if field not in counts
    }
    return value.to(s.dtype), extremes._replace(**cast)
