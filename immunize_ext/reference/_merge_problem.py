"""One merge problem at a time: checks, the loop over a batch, and the matrices of the problem.

Symbols as in ``merge``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import EPS, FloatArray, require_finite
from immunize_ext.reference._policy import count_above, numerical_rank

Contradictions: TypeAlias = Literal["raise", "average"]

# Dependent rows: coincidences of float32 text features are exact, and rounding in a pivoted QR
# of s <= 1000 rows stays below 1e-12 of the largest row.
DEPENDENCE_RTOL = 1e-12
# Targets of dependent rows may differ by this much, relative to |V| + |W0 C^T|, and still count as
# equal: the targets of float32 models carry rounding of 1e-7 of their size.
CONTRADICTION_RTOL = 1e-6


class MergeProblem(NamedTuple):
    """One layer in float64: shapes (out, d), (out, s), (s, d), (m, d), scalar and (s,)."""

    base: FloatArray
    values: FloatArray
    c: FloatArray
    c_reg: FloatArray
    ridge: float  # absolute
    inverse_hardness: FloatArray


def absolute_ridge(c_reg: npt.ArrayLike, ridge: float, *, relative: bool = True) -> float:
    """The ridge in the units of Q: relative to the mean diagonal of C_reg^T C_reg, or as given.

    Args:
        c_reg: ``(m, d)``.
        ridge: not negative.
        relative: whether ridge counts in units of |C_reg|_F^2 / d.

    Returns:
        The number that is added to the diagonal.

    Raises:
        ValueError: ridge is negative or not finite.

    Example:
        >>> absolute_ridge([[1.0, 0.0], [0.0, 3.0]], 0.1)
        0.5
    """
    if not ridge >= 0 or not np.isfinite(ridge):
        raise ValueError(
            f"absolute_ridge: ridge must be finite and not negative, got {ridge}; "
            "use 0 for no ridge"
        )
    if not relative:
        return float(ridge)
    rows = np.asarray(c_reg, dtype=np.float64)
    return float(ridge * np.sum(rows**2) / rows.shape[-1])


def single_problems(
    function: str,
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    ridge: float,
    relative: bool,
    inverse_hardness: npt.ArrayLike,
) -> tuple[tuple[int, ...], list[MergeProblem]]:
    """Checked single problems of a batch, and the batch shape."""
    w0 = np.asarray(base, dtype=np.float64)
    reg = np.eye(w0.shape[-1]) if c_reg is None else np.asarray(c_reg, dtype=np.float64)
    named = {
        "base": w0,
        "values": np.asarray(values, dtype=np.float64),
        "c": np.asarray(c, dtype=np.float64),
        "c_reg": reg,
    }
    for name, array in named.items():
        if array.ndim < 2:
            raise ValueError(
                f"{function}: {name} must be a matrix or a batch of them, got shape "
                f"{array.shape}; add the missing dimensions"
            )
        require_finite(function, name, array)
    s, d, out = named["c"].shape[-2], w0.shape[-1], w0.shape[-2]
    expected = {"values": (out, s), "c": (s, d), "c_reg": (reg.shape[-2], d)}
    for name, shape in expected.items():
        if named[name].shape[-2:] != shape:
            raise ValueError(
                f"{function}: {name} must end in shape {shape} to fit base {w0.shape}, got "
                f"{named[name].shape}; check its orientation"
            )
    nu = np.asarray(inverse_hardness, dtype=np.float64)
    if np.any(nu < 0) or not np.all(np.isfinite(nu)):
        raise ValueError(
            f"{function}: inverse_hardness must be finite and not negative, got {nu}; "
            "0 is a hard constraint"
        )
    lead = np.broadcast_shapes(*(array.shape[:-2] for array in named.values()), nu.shape[:-1])
    flat = {name: list(_spread(array, lead, 2)) for name, array in named.items()}
    hardness = list(_spread(np.broadcast_to(nu, (*nu.shape[:-1], s)), lead, 1))
    return lead, [
        MergeProblem(w, v, rows, r, absolute_ridge(r, ridge, relative=relative), n)
        for w, v, rows, r, n in zip(
            flat["base"], flat["values"], flat["c"], flat["c_reg"], hardness, strict=True
        )
    ]


def _spread(array: FloatArray, lead: tuple[int, ...], trailing: int) -> Iterator[FloatArray]:
    shape = array.shape[array.ndim - trailing :]
    full = np.broadcast_to(array, (*lead, *shape))
    for index in np.ndindex(*lead):
        yield np.array(full[index])


def single_candidates(
    function: str, argument: str, w: npt.ArrayLike, lead: tuple[int, ...], shape: tuple[int, ...]
) -> list[FloatArray]:
    """Single matrices of the shape of base, out of a batch."""
    candidate = np.asarray(w, dtype=np.float64)
    require_finite(function, argument, candidate)
    if candidate.shape[-2:] != shape:
        raise ValueError(
            f"{function}: {argument} must end in shape {shape}, got {candidate.shape}; "
            "it has the shape of base"
        )
    return list(_spread(candidate, lead, 2))


def restore_batch(
    results: list[FloatArray], lead: tuple[int, ...], shape: tuple[int, ...]
) -> FloatArray:
    """Results of single problems, stacked into the batch shape."""
    if not results:
        return np.empty((*lead, *shape))
    return np.stack(results).reshape((*lead, *shape))


def row_and_null_space(rows: FloatArray, rtol: float) -> tuple[FloatArray, FloatArray]:
    """Orthonormal bases of the row space and of the null space, by QR with column pivoting."""
    d = rows.shape[1]
    if rows.shape[0] == 0:
        return np.zeros((d, 0)), np.eye(d)
    factors = scipy.linalg.qr(rows.T, pivoting=True)
    q: FloatArray = np.asarray(factors[0], dtype=np.float64)
    r = np.asarray(factors[1], dtype=np.float64)
    diagonal = np.abs(np.diagonal(r))
    rank = count_above(diagonal, rtol)
    return q[:, :rank], q[:, rank:]


def require_contradictions_choice(contradictions: str) -> None:
    """Refuse anything but "raise" and "average"."""
    if contradictions not in ("raise", "average"):
        raise ValueError(
            "merge_null_space: contradictions must be 'raise' or 'average', got "
            f"{contradictions!r}; choose one of the two"
        )


def regularization_root(problem: MergeProblem, function: str) -> FloatArray:
    """Upper triangular F with F^T F = Q, by QR of [C_reg; sqrt(ridge) I]; Q is not formed.

    Args:
        problem: one layer.
        function: the name for the error.

    Returns:
        ``(d, d)`` float64.

    Raises:
        ValueError: Q is singular; the message gives its rank.

    Example:
        >>> one = MergeProblem(*(np.ones((1, 1)) for _ in range(4)), 3.0, np.zeros(1))
        >>> abs(regularization_root(one, "example")).round(7)
        array([[2.]])
    """
    d = problem.base.shape[1]
    stacked = np.concatenate([problem.c_reg, np.sqrt(problem.ridge) * np.eye(d)], axis=0)
    root: FloatArray = scipy.linalg.qr(stacked, mode="r")[0][:d]
    spectrum = scipy.linalg.svdvals(root)
    rank = numerical_rank(spectrum, stacked.shape)
    if rank < d:
        raise ValueError(
            f"{function}: Q = c_reg^T c_reg + ridge I must be positive definite, got rank {rank} "
            f"of {d} from {problem.c_reg.shape[0]} rows with ridge {problem.ridge:g}; "
            "pass a larger ridge or more rows"
        )
    return root


def kkt_matrix(problem: MergeProblem) -> tuple[FloatArray, float]:
    """The symmetric matrix of the optimality conditions, scaled to entries of order one.

    With q the mean diagonal of Q and g the root mean square of C, the unknowns are D^T and
    -Z^T g / q, the first block row is divided by q and the second by g:

        [ Q / q   C^T / g          ]
        [ C / g  -diag(nu) q / g^2 ].

    Args:
        problem: one layer.

    Returns:
        ``(d + s, d + s)`` float64, and g.

    Example:
        >>> one = MergeProblem(*(np.ones((1, 1)) for _ in range(4)), 0.0, np.zeros(1))
        >>> kkt_matrix(one)[0]
        array([[ 1.,  1.],
               [ 1., -0.]])
    """
    d = problem.base.shape[1]
    q = problem.c_reg.T @ problem.c_reg + problem.ridge * np.eye(d)
    size = float(np.trace(q)) / d
    spread = float(np.sqrt(np.mean(problem.c**2)))
    unit = spread if spread > 0 else 1.0
    matrix = np.block(
        [
            [q / size, problem.c.T / unit],
            [problem.c / unit, -np.diag(problem.inverse_hardness) * (size / unit**2)],
        ]
    )
    return matrix, unit


def pseudo_inverse(t: FloatArray, dependence_rtol: float = DEPENDENCE_RTOL) -> FloatArray:
    """Pseudo-inverse of a symmetric positive semidefinite T by its eigenvalues.

    T is the Gram matrix of rows in the metric Q^-1, so its eigenvalues are squares: those at or
    below max(dependence_rtol^2, s eps) times the largest count as zero.

    Args:
        t: ``(s, s)``.
        dependence_rtol: relative size of a row that counts as zero.

    Returns:
        ``(s, s)`` float64.

    Example:
        >>> pseudo_inverse(np.diag([4.0, 0.0]))
        array([[0.25, 0.  ],
               [0.  , 0.  ]])
    """
    values, vectors = scipy.linalg.eigh(t, driver="ev")
    floor = max(dependence_rtol**2, t.shape[0] * EPS) * values[-1]
    keep = values > floor
    inverse: FloatArray = (vectors[:, keep] / values[keep]) @ vectors[:, keep].T
    return inverse
