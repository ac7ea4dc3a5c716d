"""Hypothesis strategies for matrices with a known spectrum, text embeddings and merge problems.

Every strategy gives a sample of ``samples`` that holds the input together with the truth.  Only
sizes, spectra and a seed are drawn; the numbers come from a numpy generator of that seed, so
examples are cheap and shrink to small seeds and sizes.

Example:
    >>> import torch
    >>> from hypothesis import given, settings
    >>> from immunize_ext.testing import strategies
    >>> @settings(max_examples=20, deadline=None, derandomize=True)
    ... @given(strategies.near_multiple())
    ... def largest_value_is_right(sample):
    ...     found = torch.linalg.matrix_norm(sample.matrix, 2)
    ...     assert (found - sample.sigma_max).abs().max() <= 2 * sample.value_bound.max()
    >>> largest_value_is_right()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch

from immunize_ext.testing._hypothesis import require_hypothesis

require_hypothesis("immunize_ext.testing.strategies")

from hypothesis import strategies as st  # noqa: E402

from immunize_ext.testing.layouts import FREE_LAYOUTS, Layout  # noqa: E402
from immunize_ext.testing.samples import (  # noqa: E402
    FloatArray,
    MergeProblem,
    SpectrumSample,
    TextEmbeddings,
    matrix_from_spectrum,
    merge_problem,
    merge_problem_with_answer,
    text_embeddings,
)

Aspect: TypeAlias = Literal["any", "wide", "tall", "square"]
Extreme: TypeAlias = Literal["max", "min", "both"]
BatchShape: TypeAlias = tuple[int, ...]

# Largest |log10| of a scale whose squares and singular values down to kappa = 1e6 stay normal.
_SCALE_EXPONENT = {torch.float64: 150, torch.float32: 18, torch.bfloat16: 18, torch.float16: 1}


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Seeded numpy generators.

    Returns:
        A strategy of ``numpy.random.Generator``.

    Example:
        >>> from hypothesis import find
        >>> find(generators(), lambda rng: True).random() < 1
        True
    """
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def shapes(
    draw: st.DrawFn, *, aspect: Aspect = "any", min_side: int = 1, max_side: int = 10
) -> tuple[int, int]:
    """Sizes (n, p) of one matrix.

    Args:
        draw: given by hypothesis.
        aspect: "wide" has n < p, "tall" n > p, "square" n = p.
        min_side: smallest side.
        max_side: largest side.

    Returns:
        A strategy of ``(n, p)``.

    Raises:
        ValueError: an unknown aspect, or no such shape within the limits.

    Example:
        >>> from hypothesis import find
        >>> find(shapes(aspect="wide"), lambda shape: True)
        (1, 2)
    """
    if aspect not in ("any", "wide", "tall", "square"):
        raise ValueError(
            f"shapes: aspect must be any, wide, tall or square, got {aspect!r}; choose one"
        )
    if not 1 <= min_side <= max_side or (aspect in ("wide", "tall") and min_side == max_side):
        raise ValueError(
            f"shapes: sides must allow aspect {aspect!r}, got {min_side}..{max_side}; widen them"
        )
    if aspect == "square":
        side = draw(st.integers(min_side, max_side))
        return side, side
    if aspect == "any":
        return draw(st.integers(min_side, max_side)), draw(st.integers(min_side, max_side))
    short = draw(st.integers(min_side, max_side - 1))
    long = draw(st.integers(short + 1, max_side))
    return (short, long) if aspect == "wide" else (long, short)


def batch_shapes(*, empty: bool = True) -> st.SearchStrategy[BatchShape]:
    """Leading dimensions: none, one, several, and empty ones.

    Args:
        empty: whether batches without elements are among them.

    Returns:
        A strategy of tuples.

    Example:
        >>> from hypothesis import find
        >>> find(batch_shapes(empty=False), lambda shape: len(shape) == 2)
        (2, 2)
    """
    choices: list[BatchShape] = [(), (1,), (3,), (2, 2)]
    return st.sampled_from([*choices, (0,), (0, 2), (2, 0)] if empty else choices)


@st.composite
def well_conditioned(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    aspect: Aspect = "any",
    min_side: int = 1,
    max_side: int = 10,
    max_kappa: float = 1e3,
    min_gap: float = 1e-2,
    batch: BatchShape | None = (),
    layouts: Sequence[Layout] = ("contiguous",),
) -> SpectrumSample:
    """Full rank, singular values apart, by about ``min_gap`` of their own size at least.

    The extremes are simple and smooth in a radius of ``sample.gap``.

    Args:
        draw: given by hypothesis.
        dtype: of the matrix.
        aspect: see :func:`shapes`.
        min_side: smallest side.
        max_side: largest side.
        max_kappa: largest condition number.
        min_gap: smallest gap of an extreme to its neighbour, relative to its own size.
        batch: leading dimensions; None draws them, also empty ones.
        layouts: memory layouts to draw from.

    Returns:
        A strategy of :class:`SpectrumSample`.

    Example:
        >>> from hypothesis import find
        >>> find(well_conditioned(aspect="tall"), lambda sample: True).matrix.shape
        torch.Size([2, 1])
    """
    rng = draw(generators())
    n, p = draw(shapes(aspect=aspect, min_side=min_side, max_side=max_side))
    lead = draw(batch_shapes()) if batch is None else batch
    kappa = 10.0 ** draw(st.floats(0.0, float(np.log10(max_kappa))))
    sigma = _spread_values(rng, lead, min(n, p), kappa, min_gap)
    return _finished(draw, matrix_from_spectrum(rng, n, p, sigma, dtype=dtype), layouts)


@st.composite
def near_multiple(
    draw: st.DrawFn,
    *,
    which: Extreme = "both",
    multiplicities: Sequence[int] = (2, 3),
    min_exponent: int = -14,
    max_exponent: int = -2,
    exact: bool | None = None,
    dtype: torch.dtype = torch.float64,
    aspect: Aspect = "any",
    max_side: int = 8,
    batch: BatchShape = (),
    layouts: Sequence[Layout] = ("contiguous",),
) -> SpectrumSample:
    """Extremes that occur two or three times, exactly or up to a gap of 1e-2 .. 1e-14.

    Args:
        draw: given by hypothesis.
        which: whether the largest, the smallest or both extremes are multiple.
        multiplicities: how often an extreme occurs.
        min_exponent: log10 of the smallest gap, relative to the largest singular value.
        max_exponent: log10 of the largest gap.
        exact: True: equal values, half the time in a matrix of signed unit vectors, where they are
            equal bit for bit; False: apart by a gap; None draws which.
        dtype: of the matrix.
        aspect: see :func:`shapes`; sides start at 4, or at 7 where both extremes are triple.
        max_side: largest side.
        batch: leading dimensions.
        layouts: memory layouts to draw from.

    Returns:
        A strategy of :class:`SpectrumSample`; ``multiplicity_max`` and ``multiplicity_min`` of the
        sample count exactly equal values, ``gap`` is the smallest gap.

    Raises:
        ValueError: an unknown extreme.

    Example:
        >>> from hypothesis import find
        >>> sample = find(near_multiple(which="max", exact=True), lambda sample: True)
        >>> int(sample.multiplicity_max), int(sample.multiplicity_min)
        (2, 1)
    """
    if which not in ("max", "min", "both"):
        raise ValueError(
            f"near_multiple: which must be max, min or both, got {which!r}; choose one"
        )
    rng = draw(generators())
    top = draw(st.sampled_from(list(multiplicities))) if which != "min" else 1
    bottom = draw(st.sampled_from(list(multiplicities))) if which != "max" else 1
    side = top + bottom + draw(st.integers(0, 1))
    n, p = draw(shapes(aspect=aspect, min_side=side, max_side=max(max_side, side + 1)))
    equal = draw(st.booleans()) if exact is None else exact
    gap = 0.0 if equal else 10.0 ** draw(st.floats(min_exponent, max_exponent))
    unit_vectors = equal and draw(st.booleans())
    k = min(n, p)
    sigma = np.empty((*batch, k))
    sigma[..., :top] = 1.0 - gap * np.arange(top)
    sigma[..., k - bottom :] = 0.25 + gap * np.arange(bottom)[::-1]
    middle = k - top - bottom
    sigma[..., top : k - bottom] = np.linspace(0.8, 0.4, middle) if middle else 0.0
    sigma = sigma * 2.0 ** draw(st.integers(-3, 3))
    sample = matrix_from_spectrum(rng, n, p, sigma, dtype=dtype, exact=unit_vectors)
    return _finished(draw, sample, layouts)


@st.composite
def rank_deficient(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    aspect: Aspect = "any",
    max_side: int = 8,
    zero: bool = True,
    batch: BatchShape = (),
    layouts: Sequence[Layout] = ("contiguous",),
) -> SpectrumSample:
    """At least one singular value is 0, up to all of them.

    The counted values stay above 1e-2 of the largest, far from any default rank tolerance; the
    others are rounding.

    Args:
        draw: given by hypothesis.
        dtype: of the matrix.
        aspect: see :func:`shapes`; sides start at 2.
        max_side: largest side.
        zero: whether the zero matrix is among them.
        batch: leading dimensions.
        layouts: memory layouts to draw from.

    Returns:
        A strategy of :class:`SpectrumSample` with ``rank`` < min(n, p).

    Example:
        >>> from hypothesis import find
        >>> int(find(rank_deficient(zero=False), lambda sample: True).rank)
        1
    """
    rng = draw(generators())
    n, p = draw(shapes(aspect=aspect, min_side=2, max_side=max_side))
    k = min(n, p)
    rank = draw(st.integers(0 if zero else 1, k - 1))
    sigma = np.zeros((*batch, k))
    if rank:
        sigma[..., :rank] = _spread_values(rng, batch, rank, 50.0, 1e-2)
    exact = draw(st.booleans())
    return _finished(
        draw, matrix_from_spectrum(rng, n, p, sigma, dtype=dtype, exact=exact), layouts
    )


@st.composite
def badly_scaled(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    aspect: Aspect = "any",
    max_side: int = 8,
    max_kappa: float = 1e3,
    max_exponent: int | None = None,
    batch: BatchShape = (),
    layouts: Sequence[Layout] = ("contiguous",),
) -> SpectrumSample:
    """Well-conditioned matrices times 1e-150 .. 1e150 (float64) or what the dtype allows.

    Squares of such entries overflow or vanish, the singular values do not.  Every element of a
    batch has a scale of its own.

    Args:
        draw: given by hypothesis.
        dtype: of the matrix.
        aspect: see :func:`shapes`.
        max_side: largest side.
        max_kappa: largest condition number.
        max_exponent: largest |log10| of the scale; default 150 for float64, 18 for float32.
        batch: leading dimensions.
        layouts: memory layouts to draw from.

    Returns:
        A strategy of :class:`SpectrumSample`.

    Example:
        >>> from hypothesis import find
        >>> sample = find(badly_scaled(), lambda sample: float(sample.sigma_max) > 1e99)
        >>> bool(sample.sigma_max < 1e101)
        True
    """
    rng = draw(generators())
    n, p = draw(shapes(aspect=aspect, max_side=max_side))
    limit = _SCALE_EXPONENT[dtype] if max_exponent is None else max_exponent
    exponent = draw(st.integers(-limit, limit))
    sigma = _spread_values(rng, batch, min(n, p), max_kappa, 1e-2)
    exponents = np.full(batch, exponent)
    if exponents.size > 1:  # the drawn one first, then others
        exponents.reshape(-1)[1:] = rng.integers(-limit, limit + 1, size=exponents.size - 1)
    sigma = sigma * 10.0 ** exponents.astype(np.float64)[..., None]
    return _finished(draw, matrix_from_spectrum(rng, n, p, sigma, dtype=dtype), layouts)


@st.composite
def ill_conditioned(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    aspect: Aspect = "any",
    max_side: int = 8,
    min_kappa: float = 1e6,
    max_kappa: float = 1e12,
    batch: BatchShape = (),
    layouts: Sequence[Layout] = ("contiguous",),
) -> SpectrumSample:
    """Geometric spectra with kappa between the two limits: where a Gram matrix loses sigma_min.

    Args:
        draw: given by hypothesis.
        dtype: of the matrix.
        aspect: see :func:`shapes`; sides start at 2.
        max_side: largest side.
        min_kappa: smallest condition number.
        max_kappa: largest condition number; float32 holds about 1e5.
        batch: leading dimensions.
        layouts: memory layouts to draw from.

    Returns:
        A strategy of :class:`SpectrumSample`.

    Example:
        >>> from hypothesis import find
        >>> bool(find(ill_conditioned(), lambda sample: True).kappa > 9e5)
        True
    """
    rng = draw(generators())
    n, p = draw(shapes(aspect=aspect, min_side=2, max_side=max_side))
    k = min(n, p)
    exponent = draw(st.floats(float(np.log10(min_kappa)), float(np.log10(max_kappa))))
    sigma = np.broadcast_to(np.logspace(0.0, -exponent, k), (*batch, k)).copy()
    return _finished(draw, matrix_from_spectrum(rng, n, p, sigma, dtype=dtype), layouts)


@st.composite
def one_by_one(
    draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, batch: BatchShape = ()
) -> SpectrumSample:
    """Matrices of one entry, also 0: sigma = |a|, gradient sign(a).

    Args:
        draw: given by hypothesis.
        dtype: of the matrix.
        batch: leading dimensions.

    Returns:
        A strategy of :class:`SpectrumSample`.

    Example:
        >>> from hypothesis import find
        >>> find(one_by_one(), lambda sample: True).matrix.shape
        torch.Size([1, 1])
    """
    rng = draw(generators())
    value = draw(st.sampled_from([0.0, 1.0, 0.3, 7.0, 1e-10, 1e4]))
    sigma = np.full((*batch, 1), value)
    return matrix_from_spectrum(rng, 1, 1, sigma, dtype=dtype, exact=True)


@st.composite
def mixed_batches(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    max_side: int = 6,
    max_batch: int = 4,
    degenerate: bool = True,
    layouts: Sequence[Layout] = ("contiguous",),
) -> SpectrumSample:
    """One batch of matrices of different kinds: smooth, multiple, deficient, zero, far scales.

    Args:
        draw: given by hypothesis.
        dtype: of the matrix.
        max_side: largest side; sides start at 4.
        max_batch: largest batch size; 0 is among them.
        degenerate: whether elements may be rank deficient or zero.
        layouts: memory layouts to draw from.

    Returns:
        A strategy of :class:`SpectrumSample` with batch shape (b,).

    Example:
        >>> from hypothesis import find
        >>> find(mixed_batches(), lambda sample: len(sample.rank) == 2).matrix.shape
        torch.Size([2, 4, 4])
    """
    rng = draw(generators())
    n, p = draw(shapes(min_side=4, max_side=max(max_side, 4)))
    k = min(n, p)
    size = draw(st.integers(0, max_batch))
    kinds = ["smooth", "multiple", "small"] + (["deficient", "zero"] if degenerate else [])
    sigma = np.zeros((size, k))
    for index in range(size):
        kind = draw(st.sampled_from(kinds))
        values = _spread_values(rng, (), k, 30.0, 1e-2)
        if kind == "multiple":
            values[:2], values[-2:] = 1.0, 0.25
        elif kind == "small":
            values = values * (1e-3 if dtype == torch.float16 else 1e-8)
        elif kind == "deficient":
            values[k // 2 :] = 0.0
        elif kind == "zero":
            values[:] = 0.0
        sigma[index] = values
    return _finished(draw, matrix_from_spectrum(rng, n, p, sigma, dtype=dtype), layouts)


def matrices(
    *,
    dtype: torch.dtype = torch.float64,
    max_side: int = 8,
    batch: BatchShape = (),
    layouts: Sequence[Layout] = FREE_LAYOUTS,
) -> st.SearchStrategy[SpectrumSample]:
    """Any of the kinds of this module, in any memory layout.

    Args:
        dtype: of the matrix.
        max_side: largest side of most of them.
        batch: leading dimensions.
        layouts: memory layouts to draw from.

    Returns:
        A strategy of :class:`SpectrumSample`.

    Example:
        >>> from hypothesis import find
        >>> find(matrices(dtype=torch.float32), lambda sample: True).matrix.dtype
        torch.float32
    """
    kappa = 1e3 if dtype == torch.float64 else 10.0
    return st.one_of(
        well_conditioned(
            dtype=dtype, max_side=max_side, max_kappa=kappa, batch=batch, layouts=layouts
        ),
        near_multiple(dtype=dtype, max_side=max_side, batch=batch, layouts=layouts),
        rank_deficient(dtype=dtype, max_side=max_side, batch=batch, layouts=layouts),
        badly_scaled(dtype=dtype, max_side=max_side, max_kappa=kappa, batch=batch, layouts=layouts),
        one_by_one(dtype=dtype, batch=batch),
    )


@st.composite
def embeddings(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float32,
    max_rows: int = 60,
    max_dim: int = 16,
    min_exponent: float = 2.0,
    max_exponent: float = 10.0,
    full_rank: bool = False,
) -> TextEmbeddings:
    """Text-like rows: strong mean, outlier dimension -28, repeated first row, kappa(Q) to 1e10.

    Args:
        draw: given by hypothesis.
        dtype: of the rows.
        max_rows: most rows.
        max_dim: most dimensions.
        min_exponent: log10 of the smallest kappa(C^T C).
        max_exponent: log10 of the largest kappa(C^T C).
        full_rank: only m >= d, without repeats that would lower the rank.

    Returns:
        A strategy of :class:`TextEmbeddings`.

    Example:
        >>> from hypothesis import find
        >>> text = find(embeddings(full_rank=True), lambda text: True)
        >>> float(text.mean.abs().max())
        28.0
    """
    rng = draw(generators())
    d = draw(st.integers(2, max_dim))
    m = draw(st.integers(d if full_rank else 1, max(max_rows, d)))
    most = m - d + 1 if full_rank else m
    repeat = draw(st.integers(1, min(most, 5)))
    exponent = draw(st.floats(min_exponent, max_exponent))
    return text_embeddings(rng, m, d, gram_condition=10.0**exponent, repeat=repeat, dtype=dtype)


@st.composite
def merge_problems(
    draw: st.DrawFn,
    *,
    weight_dtype: torch.dtype = torch.float64,
    embedding_dtype: torch.dtype = torch.float64,
    max_layers: int = 3,
    max_concepts: int = 3,
    max_dim: int = 12,
    text_like: bool | None = None,
    max_exponent: float = 6.0,
    repeats: Sequence[str] = ("none", "consistent"),
    soft: bool | None = None,
    ridge: float | None = None,
) -> MergeProblem:
    """Merges with solvable C_reg: several layers and concepts, hard and soft rows, repeated rows.

    All concept rows together are fewer than the dimensions, so that hard constraints can be met.

    Args:
        draw: given by hypothesis.
        weight_dtype: of base and concept weights.
        embedding_dtype: of C and C_reg.
        max_layers: most layers, of 1 to 6 rows each.
        max_concepts: most concepts, of 1 to 3 rows each.
        max_dim: most input dimensions, at least 3.
        text_like: whether C_reg and C look like text features; None draws it.
        max_exponent: log10 of the largest kappa(C_reg^T C_reg).
        repeats: kinds of repeated rows, see ``samples.merge_problem``.
        soft: whether every second row is soft; None draws it.
        ridge: relative; None draws 0, 1e-6 or 0.1.

    Returns:
        A strategy of :class:`MergeProblem`.

    Example:
        >>> from hypothesis import find
        >>> len(find(merge_problems(), lambda problem: len(problem.base) > 1).base)
        2
    """
    rng = draw(generators())
    d = draw(st.integers(3, max_dim))
    rows = _row_counts(draw, d, max_concepts)
    kind = draw(st.sampled_from(list(repeats))) if sum(rows) > 1 else "none"
    amount = draw(st.sampled_from([0.0, 1e-6, 0.1])) if ridge is None else ridge
    return merge_problem(
        rng,
        out=draw(st.lists(st.integers(1, 6), min_size=1, max_size=max_layers)),
        d=d,
        rows_per_concept=rows,
        m=draw(st.integers(2 * d, 4 * d)),
        ridge=amount,
        text_like=draw(st.booleans()) if text_like is None else text_like,
        gram_condition=10.0 ** draw(st.floats(2.0, max_exponent)),
        repeats=kind,
        soft=draw(st.booleans()) if soft is None else soft,
        weight_dtype=weight_dtype,
        embedding_dtype=embedding_dtype,
    )


@st.composite
def merge_problems_with_answer(
    draw: st.DrawFn, *, max_layers: int = 3, max_concepts: int = 3, max_dim: int = 12
) -> MergeProblem:
    """Float64 merges whose answer was chosen first, hard and soft, also identity edits.

    Args:
        draw: given by hypothesis.
        max_layers: most layers.
        max_concepts: most concepts.
        max_dim: most input dimensions, at least 3.

    Returns:
        A strategy of :class:`MergeProblem` with ``values`` and ``answer``.

    Example:
        >>> from hypothesis import find
        >>> problem = find(merge_problems_with_answer(), lambda problem: True)
        >>> len(problem.answer) == len(problem.base)
        True
    """
    rng = draw(generators())
    d = draw(st.integers(3, max_dim))
    return merge_problem_with_answer(
        rng,
        out=draw(st.lists(st.integers(1, 6), min_size=1, max_size=max_layers)),
        d=d,
        rows_per_concept=_row_counts(draw, d, max_concepts),
        m=draw(st.integers(2 * d, 4 * d)),
        ridge=draw(st.sampled_from([0.0, 1e-6, 0.1])),
        soft=draw(st.booleans()),
        identity=draw(st.booleans()),
    )


def _row_counts(draw: st.DrawFn, d: int, max_concepts: int) -> list[int]:
    """Rows per concept, in total at most d - 1."""
    rows: list[int] = []
    for _ in range(draw(st.integers(1, max_concepts))):
        left = d - 1 - sum(rows)
        if left < 1:
            break
        rows.append(draw(st.integers(1, min(3, left))))
    return rows


def _spread_values(
    rng: np.random.Generator, lead: BatchShape, count: int, kappa: float, min_gap: float
) -> FloatArray:
    """Descending values from 1 to 1 / kappa in log space, with jitter, gaps kept where possible."""
    if count == 1:
        return np.ones((*lead, 1))
    positions = np.linspace(0.0, 1.0, count)
    jitter = 0.3 / (count - 1) * rng.uniform(-1.0, 1.0, size=(*lead, count))
    jitter[..., 0], jitter[..., -1] = 0.0, 0.0
    # Steps of log sigma are at least 0.4 of the mean step; min_gap bounds the mean step from below.
    width = max(float(np.log(kappa)), (count - 1) * min_gap / 0.4)
    values: FloatArray = np.exp(-width * (positions + jitter))
    return values


def _finished(draw: st.DrawFn, sample: SpectrumSample, layouts: Sequence[Layout]) -> SpectrumSample:
    usable: list[Layout] = [
        name for name in layouts if name != "expanded" or sample.matrix.dim() > 2
    ]
    layout: Layout = draw(st.sampled_from(usable)) if usable else "contiguous"
    return sample if layout == "contiguous" else sample.in_layout(layout)
