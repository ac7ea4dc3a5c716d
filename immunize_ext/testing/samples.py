"""Matrices, text embeddings and merge problems whose truth is known before any solver runs.

Plain functions of a numpy generator, without hypothesis; ``strategies`` draws their arguments.
Everything is built in float64 from chosen factors and rounded once to the dtype that is asked for.

* A matrix is U diag(sigma) V^T with drawn orthonormal U, V and chosen sigma.
* Text embeddings are 1 mu^T + noise with noise orthogonal to the vector of ones, so the column
  means are mu exactly and the singular values are known.  Repeated rows do not change that: a row
  is replaced by r copies of itself divided by sqrt(r), which leaves the Gram matrix alone.
* A merge problem can be built backwards from its answer: with C = B Q and W = W0 + Z B the
  optimality conditions D Q = Z C hold by construction, and V = W C^T + Z diag(1/mu).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from immunize_ext.testing.layouts import GuardedTensor, Layout, guarded

FloatArray: TypeAlias = npt.NDArray[np.float64]

# Rounding of U diag(sigma) V^T: each entry is a sum of min(n, p) products of unit-size numbers, and
# the orthonormal factors carry a few eps of their own.
_PRODUCT_ROUNDINGS = 8.0
# A sample shows its matrix in a failure message up to this size.
_SHOWN_ENTRIES = 16


@dataclass(frozen=True, repr=False)
class SpectrumSample:
    """A batch of matrices and the truth about them.

    Attributes:
        matrix: ``(*, n, p)`` in the dtype and layout that was asked for.
        singular_values: ``(*, min(n, p))`` float64, descending, as chosen.
        u: ``(*, n, min(n, p))`` float64, left singular vectors.
        v: ``(*, p, min(n, p))`` float64, right singular vectors.
        value_bound: ``(*,)`` float64; the singular values of ``matrix`` differ from the chosen ones
            by no more than this, because ``matrix`` is rounded.
        guard: the buffer behind ``matrix`` where it is not a plain tensor.
        note: one line for a failure message.
    """

    matrix: Tensor
    singular_values: Tensor
    u: Tensor
    v: Tensor
    value_bound: Tensor
    guard: GuardedTensor | None
    note: str

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every field of a dataclass

    def __repr__(self) -> str:
        small = self.matrix.numel() <= _SHOWN_ENTRIES
        return f"SpectrumSample({self.note}{f', {self.matrix.tolist()}' if small else ''})"

    @property
    def sigma_max(self) -> Tensor:
        """Largest singular value, ``(*,)``."""
        return self.singular_values[..., 0]

    @property
    def rank(self) -> Tensor:
        """Number of nonzero chosen singular values, ``(*,)`` int64."""
        return (self.singular_values > 0).sum(dim=-1)

    @property
    def sigma_min(self) -> Tensor:
        """Smallest nonzero singular value, ``(*,)``; 0 for the zero matrix."""
        last = (self.rank - 1).clamp(min=0).unsqueeze(-1)
        return self.singular_values.gather(-1, last).squeeze(-1)

    @property
    def kappa(self) -> Tensor:
        """sigma_max / sigma_min over the nonzero values, ``(*,)``; infinite for the zero matrix."""
        return torch.where(
            self.sigma_min > 0, self.sigma_max / self.sigma_min, torch.full((), float("inf"))
        )

    @property
    def multiplicity_max(self) -> Tensor:
        """How many chosen values equal the largest exactly, ``(*,)`` int64."""
        return (self.singular_values == self.singular_values[..., :1]).sum(dim=-1)

    @property
    def multiplicity_min(self) -> Tensor:
        """How many chosen values equal the smallest nonzero one exactly, ``(*,)`` int64."""
        return (self.singular_values == self.sigma_min.unsqueeze(-1)).sum(dim=-1)

    @property
    def gap(self) -> Tensor:
        """Distance of the extremes to their nearest different neighbours over sigma_max, ``(*,)``.

        The radius, relative to the matrix, within which the extremes are smooth: 1 where there is
        no neighbour, and sigma_min / sigma_max at most, since sigma_min has a kink at 0.
        """
        s = self.singular_values
        top = self.sigma_max.unsqueeze(-1)
        bottom = self.sigma_min.unsqueeze(-1)
        far = torch.full_like(s, float("inf"))
        above = torch.where(s < top, top - s, far).amin(dim=-1)
        below = torch.where((s > bottom), s - bottom, far).amin(dim=-1)
        nearest = torch.minimum(torch.minimum(above, below), self.sigma_min)
        scale = torch.where(self.sigma_max > 0, self.sigma_max, torch.ones_like(self.sigma_max))
        return (nearest / scale).clamp(max=1.0)

    def gradient_of(self, which: str) -> Tensor:
        """Closed-form gradient of an extreme: mean of u_i v_i^T over equal values, ``(*, n, p)``.

        Args:
            which: "max" or "min" (the smallest nonzero value).

        Returns:
            float64; 0 for the zero matrix.

        Raises:
            ValueError: another name.

        Example:
            >>> sample = matrix_from_spectrum(np.random.default_rng(0), 2, 2, [[3.0, 3.0]])
            >>> round(float(sample.gradient_of("max").norm() ** 2), 9)
            0.5
        """
        if which not in ("max", "min"):
            raise ValueError(
                f"gradient_of: which must be 'max' or 'min', got {which!r}; choose one"
            )
        target = self.sigma_max if which == "max" else self.sigma_min
        member = (self.singular_values == target.unsqueeze(-1)) & (self.singular_values > 0)
        weight = member.to(torch.float64)
        weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1.0)
        return (self.u * weight.unsqueeze(-2)) @ self.v.mT

    def in_layout(self, layout: Layout) -> SpectrumSample:
        """The same sample with ``matrix`` in a guarded buffer of another layout.

        Args:
            layout: see ``layouts``; "expanded" repeats the first batch element.

        Returns:
            A new sample; with "expanded" the truth is repeated too.

        Raises:
            ValueError: the layout needs more dimensions.

        Example:
            >>> sample = matrix_from_spectrum(np.random.default_rng(0), 2, 3, [2.0, 1.0])
            >>> sample.in_layout("transposed").matrix.stride()
            (1, 2)
        """
        guard = guarded(self.matrix, layout)
        changed = replace(self, matrix=guard.tensor, guard=guard, note=f"{self.note}, {layout}")
        if layout != "expanded" or self.matrix.shape[0] == 0:
            return changed
        size = self.matrix.shape[0]

        def repeat(part: Tensor) -> Tensor:
            return part[:1].expand(size, *part.shape[1:]).clone()

        return replace(
            changed,
            singular_values=repeat(self.singular_values),
            u=repeat(self.u),
            v=repeat(self.v),
            value_bound=repeat(self.value_bound),
        )


@dataclass(frozen=True, repr=False)
class TextEmbeddings:
    """Rows as a text encoder gives them, with a known spectrum.

    Attributes:
        rows: ``(m, d)`` in the dtype that was asked for.
        singular_values: ``(min(m, d),)`` float64, descending; of Q = C^T C they are the square
            roots of the eigenvalues.
        v: ``(d, min(m, d))`` float64, right singular vectors.
        mean: ``(d,)`` float64, the column means before repeats.
        repeats: groups of positions that hold the same row.
        value_bound: the singular values of ``rows`` differ from the chosen ones by no more.
    """

    rows: Tensor
    singular_values: Tensor
    v: Tensor
    mean: Tensor
    repeats: tuple[tuple[int, ...], ...]
    value_bound: float

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every field of a dataclass

    def __repr__(self) -> str:
        m, d = self.rows.shape
        return (
            f"TextEmbeddings({m} x {d} {self.rows.dtype}, kappa(C^T C) {self.gram_condition:.3g}, "
            f"repeats {self.repeats})"
        )

    @property
    def gram_condition(self) -> float:
        """kappa(Q) = (sigma_1 / sigma_m)^2; infinite where rows < dimensions."""
        if self.rows.shape[0] < self.rows.shape[1]:
            return float("inf")
        return float((self.singular_values[0] / self.singular_values[-1]) ** 2)


@dataclass(frozen=True, repr=False)
class MergeProblem:
    """Arguments of a key/value merge, and what is known about its answer.

    Attributes:
        base: per layer ``(out_l, d)`` in the weights' dtype.
        concepts: concept-major, ``concepts[n][l]`` of shape ``(out_l, d)``; None where ``values``
            stand in for them.
        embeddings: per concept ``(s_n, d)`` in the embeddings' dtype.
        c_reg: ``(m, d)`` in the embeddings' dtype.
        ridge: relative to the mean diagonal of C_reg^T C_reg.
        values: per layer ``(out_l, s)`` targets, or None where ``concepts`` define them.
        inverse_hardness: ``(s,)`` float64, 1/mu; 0 is a hard row.
        repeats: groups of equal rows of C, over all concepts.
        contradictory: whether two equal hard rows have different targets.
        answer: per layer ``(out_l, d)`` float64, the exact merge of the float64 problem, where it
            was built from its answer or is the identity edit.
    """

    base: tuple[Tensor, ...]
    concepts: tuple[tuple[Tensor, ...], ...] | None
    embeddings: tuple[Tensor, ...]
    c_reg: Tensor
    ridge: float
    values: tuple[Tensor, ...] | None
    inverse_hardness: Tensor
    repeats: tuple[tuple[int, ...], ...]
    contradictory: bool
    answer: tuple[Tensor, ...] | None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every field of a dataclass

    def __repr__(self) -> str:
        targets = "values" if self.concepts is None else "concepts"
        return (
            f"MergeProblem(out {[w.shape[0] for w in self.base]}, rows "
            f"{[rows.shape[0] for rows in self.embeddings]}, c_reg {tuple(self.c_reg.shape)}, "
            f"ridge {self.ridge:g}, 1/mu {self.inverse_hardness.tolist()}, from {targets}, repeats "
            f"{self.repeats}, contradictory {self.contradictory}, {self.base[0].dtype})"
        )

    @property
    def hardness(self) -> Tensor:
        """Mu = 1 / inverse_hardness, infinite for hard rows, ``(s,)`` float64."""
        return 1.0 / self.inverse_hardness


def orthogonal(rng: np.random.Generator, size: int) -> FloatArray:
    """A random orthogonal matrix, uniform over the group.

    Args:
        rng: source of randomness.
        size: at least 1.

    Returns:
        ``(size, size)`` float64.

    Example:
        >>> q = orthogonal(np.random.default_rng(0), 3)
        >>> bool(np.allclose(q.T @ q, np.eye(3)))
        True
    """
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    signed: FloatArray = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return signed


def signed_permutation(rng: np.random.Generator, size: int) -> FloatArray:
    """A random permutation matrix with random signs: products with it are exact.

    Args:
        rng: source of randomness.
        size: at least 1.

    Returns:
        ``(size, size)`` float64 with entries -1, 0, 1.

    Example:
        >>> bool(np.abs(signed_permutation(np.random.default_rng(0), 4)).sum() == 4)
        True
    """
    signs = rng.choice(np.array([-1.0, 1.0]), size=size)
    permuted: FloatArray = np.diag(signs)[rng.permutation(size)]
    return permuted


def matrix_from_spectrum(
    rng: np.random.Generator,
    n: int,
    p: int,
    singular_values: npt.ArrayLike,
    *,
    dtype: torch.dtype = torch.float64,
    exact: bool = False,
) -> SpectrumSample:
    """Matrices with chosen singular values.

    Args:
        rng: source of randomness.
        n: rows.
        p: columns.
        singular_values: ``(*, min(n, p))``, not negative; sorted here.
        dtype: of the matrix.
        exact: singular vectors are signed unit vectors, so that the matrix is not rounded (in
            float64) and equal values stay equal bit for bit.

    Returns:
        :class:`SpectrumSample` with batch shape ``(*,)``.

    Raises:
        ValueError: the number of values does not fit n and p, or one is negative.

    Example:
        >>> sample = matrix_from_spectrum(np.random.default_rng(0), 4, 3, [3.0, 2.0, 1.0])
        >>> torch.linalg.svdvals(sample.matrix).round(decimals=6).tolist()
        [3.0, 2.0, 1.0]
    """
    k = min(n, p)
    chosen = -np.sort(-np.asarray(singular_values, dtype=np.float64), axis=-1)
    if chosen.ndim == 0 or chosen.shape[-1] != k or k == 0:
        raise ValueError(
            f"matrix_from_spectrum: singular_values must end in min(n, p) = {k} >= 1, got shape "
            f"{chosen.shape}; give one value per singular value"
        )
    if np.any(chosen < 0) or not np.all(np.isfinite(chosen)):
        raise ValueError(
            "matrix_from_spectrum: singular_values must be finite and not negative, got "
            f"{chosen.min()}..{chosen.max()}; signs go into the singular vectors"
        )
    draw = signed_permutation if exact else orthogonal
    lead = chosen.shape[:-1]
    u, v = np.empty((*lead, n, k)), np.empty((*lead, p, k))
    for index in np.ndindex(*lead):
        u[index], v[index] = draw(rng, n)[:, :k], draw(rng, p)[:, :k]
    matrix = (u * chosen[..., None, :]) @ np.swapaxes(v, -1, -2)
    rounding = 0.0 if exact else _PRODUCT_ROUNDINGS * max(n, p) * np.finfo(np.float64).eps
    if dtype != torch.float64:
        # Weyl: a perturbation with entries up to eps |a_ij| moves sigma by its norm at most.
        rounding += 0.5 * torch.finfo(dtype).eps * np.sqrt(k)
    smallest = torch.finfo(dtype).tiny * np.sqrt(n * p)  # where entries become subnormal
    return SpectrumSample(
        matrix=torch.from_numpy(matrix).to(dtype),
        singular_values=torch.from_numpy(chosen.copy()),
        u=torch.from_numpy(u),
        v=torch.from_numpy(v),
        value_bound=torch.from_numpy(np.asarray(rounding * chosen[..., 0] + smallest)),
        guard=None,
        note=f"{n} x {p} {dtype}, sigma {_brief(chosen)}",
    )


def text_embeddings(
    rng: np.random.Generator,
    m: int,
    d: int,
    *,
    gram_condition: float = 1e7,
    outlier: float = -28.0,
    repeat: int = 1,
    dtype: torch.dtype = torch.float32,
) -> TextEmbeddings:
    """Rows with a strong mean direction, one outlier dimension and a chosen kappa(C^T C).

    The column means are mu with mu_j = ``outlier`` in one dimension and of order 0.3 elsewhere, as
    in the text encoder of Stable Diffusion.  The other singular values fall geometrically from a
    tenth of the first to first / sqrt(gram_condition).

    Args:
        rng: source of randomness.
        m: rows, at least 1.
        d: dimensions, at least 1.
        gram_condition: kappa(C^T C) where m >= d; (sigma_1 / sigma_min(m, d))^2 in general.  At
            least 100 where there is more than one singular value.
        outlier: mean of the outlier dimension.
        repeat: the first row stands ``repeat`` times in the result (at most m times), as a
            begin-of-text token does.
        dtype: of the rows.

    Returns:
        :class:`TextEmbeddings`.

    Raises:
        ValueError: a size or the condition number is out of range.

    Example:
        >>> text = text_embeddings(np.random.default_rng(0), 50, 8, gram_condition=1e6)
        >>> float(round(text.gram_condition)), float(text.mean.abs().max())
        (1000000.0, 28.0)
    """
    k = min(m, d)
    if m < 1 or d < 1 or not 1 <= repeat <= m:
        raise ValueError(
            "text_embeddings: m and d must be at least 1 and repeat between 1 and m, got "
            f"m = {m}, d = {d}, repeat = {repeat}; choose other sizes"
        )
    if k > 1 and not 100 <= gram_condition < 1e32:
        raise ValueError(
            f"text_embeddings: gram_condition must be at least 100, got {gram_condition}; "
            "the mean direction alone is ten times the rest"
        )
    base_rows = m - repeat + 1
    k_base = min(base_rows, d)
    mean = 0.3 * rng.standard_normal(d)
    mean[int(rng.integers(d))] = outlier
    # Left vectors: ones / sqrt(m) first, the rest orthogonal to it, so that the mean is mu exactly.
    left = _completed(rng, np.full(base_rows, base_rows**-0.5))[:, :k_base]
    right = _completed(rng, mean / np.linalg.norm(mean))[:, :k_base]
    sigma = np.full(k_base, np.linalg.norm(mean) * np.sqrt(base_rows))
    if k_base > 1:
        last = 1.0 / np.sqrt(gram_condition)
        tail = np.geomspace(0.1, last, k_base - 1) if k_base > 2 else np.array([last])
        sigma[1:] = sigma[0] * tail
    rows = (left * sigma) @ right.T
    if repeat > 1:
        copies = np.repeat(rows[:1] / np.sqrt(repeat), repeat, axis=0)
        rows = np.concatenate([copies, rows[1:]], axis=0)
    values = np.zeros(k)
    values[:k_base] = sigma
    full_right = np.zeros((d, k))
    full_right[:, :k_base] = right
    if k > k_base:
        full_right = _orthonormal_extension(rng, right, k)
    tensor = torch.from_numpy(rows).to(dtype)
    eps = torch.finfo(dtype).eps + _PRODUCT_ROUNDINGS * max(m, d) * np.finfo(np.float64).eps
    return TextEmbeddings(
        rows=tensor,
        singular_values=torch.from_numpy(values),
        v=torch.from_numpy(full_right),
        mean=torch.from_numpy(mean),
        repeats=(tuple(range(repeat)),) if repeat > 1 else (),
        value_bound=float(eps * np.sqrt(k) * sigma[0]),
    )


def merge_problem(
    rng: np.random.Generator,
    *,
    out: Sequence[int] = (4, 3),
    d: int = 8,
    rows_per_concept: Sequence[int] = (2, 1),
    m: int = 24,
    ridge: float = 0.0,
    text_like: bool = False,
    gram_condition: float = 1e4,
    repeats: str = "none",
    soft: bool = False,
    weight_dtype: torch.dtype = torch.float64,
    embedding_dtype: torch.dtype = torch.float64,
) -> MergeProblem:
    """Base weights, adapted weights of several concepts, their embeddings and C_reg.

    Args:
        rng: source of randomness.
        out: rows of each layer.
        d: input dimension.
        rows_per_concept: s_n of each concept.
        m: rows of C_reg.
        ridge: relative.
        text_like: C_reg and the concept rows have a strong mean and an outlier dimension.
        gram_condition: kappa of C_reg^T C_reg, for ``text_like``.
        repeats: "none"; "consistent" or "contradictory": the last row of C equals the first one,
            and the weights of its concept map it to the same target or to another one.
        soft: every second row gets a finite hardness.
        weight_dtype: of base and concept weights.
        embedding_dtype: of C and C_reg.

    Returns:
        :class:`MergeProblem` with ``concepts``, without ``answer``.

    Raises:
        ValueError: repeats of another name, or with less than two rows.

    Example:
        >>> problem = merge_problem(np.random.default_rng(0), repeats="contradictory")
        >>> problem.repeats, problem.contradictory
        (((0, 2),), True)
    """
    s = sum(rows_per_concept)
    if repeats not in ("none", "consistent", "contradictory") or (repeats != "none" and s < 2):
        raise ValueError(
            "merge_problem: repeats must be 'none', 'consistent' or 'contradictory' with at least "
            f"two rows, got {repeats!r} with {s}; choose one of them"
        )
    if text_like:
        text = text_embeddings(rng, m, d, gram_condition=gram_condition, dtype=torch.float64)
        c_reg = text.rows.numpy()
        scale = float(np.sqrt(np.mean((c_reg - c_reg.mean(axis=0)) ** 2)))
        c = text.mean.numpy() + max(scale, 0.1) * rng.standard_normal((s, d))
    else:
        c_reg, c = rng.standard_normal((m, d)), rng.standard_normal((s, d))
    base = [rng.standard_normal((rows, d)) / np.sqrt(d) for rows in out]
    concepts = [
        [w + 0.1 * rng.standard_normal(w.shape) / np.sqrt(d) for w in base]
        for _ in rows_per_concept
    ]
    groups: tuple[tuple[int, ...], ...] = ()
    if repeats != "none":
        c[-1] = c[0]
        groups = ((0, s - 1),)
    c = _rounded(c, embedding_dtype)
    base = [_rounded(w, weight_dtype) for w in base]
    concepts = [[_rounded(w, weight_dtype) for w in layers] for layers in concepts]
    owners = np.repeat(np.arange(len(rows_per_concept)), rows_per_concept)
    contradictory = repeats == "contradictory" and bool(owners[0] != owners[-1])
    if repeats == "consistent" and owners[0] != owners[-1]:
        # The same weights for both owners: exactly the same targets, whatever the dtype.
        concepts[int(owners[-1])] = [w.copy() for w in concepts[int(owners[0])]]
    nu = np.zeros(s)
    if soft:
        nu[1::2] = 10.0 ** rng.uniform(-2, 1, size=nu[1::2].shape)
        if groups and nu[0] != nu[-1]:
            contradictory = False  # a soft row yields to its hard repeat
    cuts = np.cumsum(rows_per_concept)[:-1]
    return MergeProblem(
        base=tuple(torch.from_numpy(w).to(weight_dtype) for w in base),
        concepts=tuple(
            tuple(torch.from_numpy(w).to(weight_dtype) for w in layers) for layers in concepts
        ),
        embeddings=tuple(
            torch.from_numpy(part.copy()).to(embedding_dtype) for part in np.split(c, cuts)
        ),
        c_reg=torch.from_numpy(c_reg).to(embedding_dtype),
        ridge=ridge,
        values=None,
        inverse_hardness=torch.from_numpy(nu),
        repeats=groups,
        contradictory=contradictory,
        answer=None,
    )


def merge_problem_with_answer(
    rng: np.random.Generator,
    *,
    out: Sequence[int] = (4, 3),
    d: int = 8,
    rows_per_concept: Sequence[int] = (2, 1),
    m: int = 24,
    ridge: float = 0.0,
    soft: bool = False,
    identity: bool = False,
) -> MergeProblem:
    """A float64 merge problem built backwards from its answer; no solver is involved.

    With drawn B and Z:  C = B Q,  W = W0 + Z B,  V = W C^T + Z diag(1/mu).

    Args:
        rng: source of randomness.
        out: rows of each layer.
        d: input dimension.
        rows_per_concept: s_n of each concept.
        m: rows of C_reg, at least d unless ridge > 0.
        ridge: relative.
        soft: every second row gets a finite hardness.
        identity: Z = 0; the targets are what the base weights give, and the answer is the base.

    Returns:
        :class:`MergeProblem` with ``values`` and ``answer``.

    Example:
        >>> problem = merge_problem_with_answer(np.random.default_rng(0), identity=True)
        >>> bool(torch.equal(problem.answer[0], problem.base[0]))
        True
    """
    s = sum(rows_per_concept)
    c_reg = rng.standard_normal((m, d))
    q = c_reg.T @ c_reg + ridge * float(np.sum(c_reg**2)) / d * np.eye(d)
    b = rng.standard_normal((s, d)) / max(float(np.trace(q)) / d, 1e-300)
    c = b @ q
    nu = np.zeros(s)
    if soft:
        nu[1::2] = 10.0 ** rng.uniform(-2, 0, size=nu[1::2].shape)
    base, values, answer = [], [], []
    for rows in out:
        w0 = rng.standard_normal((rows, d))
        z = np.zeros((rows, s)) if identity else rng.standard_normal((rows, s))
        w = w0 + z @ b
        base.append(torch.from_numpy(w0))
        answer.append(torch.from_numpy(w))
        values.append(torch.from_numpy(w @ c.T + z * nu))
    cuts = np.cumsum(rows_per_concept)[:-1]
    return MergeProblem(
        base=tuple(base),
        concepts=None,
        embeddings=tuple(torch.from_numpy(part.copy()) for part in np.split(c, cuts)),
        c_reg=torch.from_numpy(c_reg),
        ridge=ridge,
        values=tuple(values),
        inverse_hardness=torch.from_numpy(nu),
        repeats=(),
        contradictory=False,
        answer=tuple(answer),
    )


def _completed(rng: np.random.Generator, first: FloatArray) -> FloatArray:
    """An orthogonal matrix whose first column is the given unit vector."""
    return _orthonormal_extension(rng, first[:, None], first.size)


def _orthonormal_extension(rng: np.random.Generator, columns: FloatArray, count: int) -> FloatArray:
    """Orthonormal columns, continued to ``count`` by random ones."""
    size, given = columns.shape
    filled = np.concatenate([columns, rng.standard_normal((size, count - given))], axis=1)
    q, r = np.linalg.qr(filled)
    extended: FloatArray = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    extended[:, :given] = columns
    return extended


def _rounded(array: FloatArray, dtype: torch.dtype) -> FloatArray:
    """The float64 array of what ``dtype`` can hold."""
    rounded: FloatArray = torch.from_numpy(array).to(dtype).to(torch.float64).numpy()
    return rounded


def _brief(values: FloatArray) -> str:
    flat = values.reshape(-1)
    shown = ", ".join(f"{value:.3g}" for value in flat[:4])
    return f"[{shown}{', ...' if flat.size > 4 else ''}]"
