"""One singular value decomposition, what the tolerances say about it, and its derivatives.

Conventions and derivations: ``spectrum``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import (
    FloatArray,
    eps_of,
)

RankPolicy: TypeAlias = Literal["numerical", "full"]
Extreme: TypeAlias = Literal["max", "min"]


class Tolerances(TypedDict):
    """The two tolerances, to be passed on together."""

    rank_rtol: float | None
    cluster_rtol: float | None


class Spectrum(NamedTuple):
    """One matrix: thin decomposition of A / scale and what the tolerances say about it."""

    u: FloatArray  # (n, m)
    sigma: FloatArray  # (m,), of A / scale, descending
    vt: FloatArray  # (m, p)
    scale: float  # power of two, so that dividing by it is exact
    rank: int
    first: slice  # cluster of sigma_max
    last: slice  # cluster of sigma_min; empty where sigma_min is reported as 0
    multiplicity_min: int


def default_rtol(shape: tuple[int, ...], eps: float) -> float:
    """max(n, p) eps: what rounding in a backward stable decomposition cannot tell apart."""
    return max(shape[-2:]) * eps


def checked_tolerances(
    function: str,
    original: npt.ArrayLike,
    shape: tuple[int, ...],
    rank: str,
    rank_rtol: float | None,
    cluster_rtol: float | None,
) -> tuple[float, float]:
    """The two tolerances with their defaults, after checks of both and of the rank policy."""
    if rank not in ("numerical", "full"):
        raise ValueError(
            f"{function}: rank must be 'numerical' or 'full', got {rank!r}; choose one of the two"
        )
    for name, value in (("rank_rtol", rank_rtol), ("cluster_rtol", cluster_rtol)):
        if value is not None and not 0 <= value < 1:
            raise ValueError(
                f"{function}: {name} must lie in [0, 1), got {value}; "
                "it is relative to the largest singular value"
            )
    default = default_rtol(shape, eps_of(original))
    return (
        default if rank_rtol is None else rank_rtol,
        default if cluster_rtol is None else cluster_rtol,
    )


def require_extreme(function: str, which: str) -> None:
    """Refuse anything but "max" and "min"."""
    if which not in ("max", "min"):
        raise ValueError(f"{function}: which must be 'max' or 'min', got {which!r}; choose one")


def power_of_two(matrix: FloatArray) -> float:
    """Largest power of two not above max|entry|, 1 for a zero matrix."""
    largest = float(np.max(np.abs(matrix)))
    if largest == 0.0:
        return 1.0
    _, exponent = np.frexp(largest)
    return float(np.ldexp(1.0, int(exponent) - 1))


def scaled_svd(matrix: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """U, sigma and V^T of matrix / scale, and the scale, a power of two."""
    scale = power_of_two(matrix)
    u, sigma, vt = scipy.linalg.svd(matrix / scale, full_matrices=False, lapack_driver="gesvd")
    return u, sigma, vt, scale


def decompose(
    matrix: FloatArray, rank: RankPolicy, rank_rtol: float, cluster_rtol: float
) -> Spectrum:
    """Decomposition of one matrix with rank and clusters by the given tolerances."""
    u, sigma, vt, scale = scaled_svd(matrix)
    largest = sigma[0]
    # Not >=, or every value of a zero matrix would count.
    counted = int(np.count_nonzero(sigma > rank_rtol * largest))
    if counted == 0:
        nothing = slice(0, 0)
        return Spectrum(u, sigma, vt, scale, 0, nothing, nothing, sigma.size)
    live = sigma[:counted]
    width = cluster_rtol * largest
    first = slice(0, int(np.count_nonzero(largest - live <= width)))
    last = slice(counted - int(np.count_nonzero(live - live[-1] <= width)), counted)
    multiplicity_min = last.stop - last.start
    if rank == "full" and counted < sigma.size:
        last, multiplicity_min = slice(0, 0), sigma.size - counted
    return Spectrum(u, sigma, vt, scale, counted, first, last, multiplicity_min)


def reported_max(spectrum: Spectrum) -> float:
    """sigma_max of the matrix itself; 0 for the zero matrix."""
    return float(spectrum.sigma[0] * spectrum.scale) if spectrum.rank else 0.0


def reported_min(spectrum: Spectrum) -> float:
    """sigma_min of the matrix itself; 0 where the policy says so."""
    if spectrum.last.stop == 0:
        return 0.0
    return float(spectrum.sigma[spectrum.last.stop - 1] * spectrum.scale)


def multiplicity_max_of(spectrum: Spectrum) -> int:
    """Size of the cluster of sigma_max; all values for the zero matrix."""
    return int(spectrum.first.stop) if spectrum.rank else int(spectrum.multiplicity_min)


def cluster_mean(spectrum: Spectrum, cluster: slice) -> FloatArray:
    """Mean of u_i v_i^T over a cluster; zeros for an empty one."""
    size = max(cluster.stop - cluster.start, 1)  # an empty cluster gives the zero matrix
    mean: FloatArray = spectrum.u[:, cluster] @ spectrum.vt[cluster] / size
    return mean


def simple_index(function: str, spectrum: Spectrum, which: Extreme) -> int:
    """Position of a simple, positive extreme; anything else has no second derivative."""
    cluster = spectrum.first if which == "max" else spectrum.last
    size = cluster.stop - cluster.start
    if size != 1:
        found = "0" if size == 0 else f"a cluster of {size} equal values"
        raise ValueError(
            f"{function}: sigma_{which} must be simple and positive, got {found}; "
            "no second derivative exists there"
        )
    return int(cluster.start)


def sigma_hvp(spectrum: Spectrum, k: int, direction: FloatArray) -> FloatArray:
    """Product du v^T + u dv^T of the k-th singular value along a direction (see ``spectrum``)."""
    u, sigma, v = spectrum.u, spectrum.sigma, spectrum.vt.T
    left, right = u.T @ direction @ v[:, k], v.T @ direction.T @ u[:, k]
    others = np.arange(sigma.size) != k
    gap = np.where(others, (sigma[k] - sigma) * (sigma[k] + sigma), 1.0)
    along_u = np.where(others, (sigma[k] * left + sigma * right) / gap, 0.0)
    along_v = np.where(others, (sigma[k] * right + sigma * left) / gap, 0.0)
    du, dv = u @ along_u, v @ along_v
    # Only where there is an outside: for a square U the difference is rounding, times 1 / sigma_k.
    if u.shape[0] > u.shape[1]:
        du = du + (direction @ v[:, k] - u @ left) / sigma[k]
    if v.shape[0] > v.shape[1]:
        dv = dv + (direction.T @ u[:, k] - v @ right) / sigma[k]
    return np.outer(du, v[:, k]) + np.outer(u[:, k], dv)
