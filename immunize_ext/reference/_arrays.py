"""Argument checks and the loop over a batch, shared by the reference functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

_SINGLE_EPS = float(np.finfo(np.float32).eps)
_DOUBLE_EPS = float(np.finfo(np.float64).eps)


def eps_of(array: npt.ArrayLike) -> float:
    """Unit of rounding that a default tolerance is built from.

    float64 and integer input: eps of float64.  float32 and half types: eps of float32, since the
    operators treat half precision numbers as exact and compute in a wider type.
    """
    dtype = np.asarray(array).dtype
    if dtype.kind == "f" and dtype.itemsize < 8:
        return _SINGLE_EPS
    return _DOUBLE_EPS


def as_matrices(function: str, argument: str, array: npt.ArrayLike) -> FloatArray:
    """``array`` in float64, checked to be finite matrices ``(*, n, p)`` with n, p >= 1."""
    matrices = np.asarray(array, dtype=np.float64)
    if matrices.ndim < 2:
        raise ValueError(
            f"{function}: {argument} must have shape (*, n, p), got {matrices.shape}; "
            "add the missing dimensions"
        )
    if matrices.shape[-1] == 0 or matrices.shape[-2] == 0:
        raise ValueError(
            f"{function}: {argument} must have at least one row and one column, "
            f"got shape {matrices.shape}; leave empty matrices out"
        )
    require_finite(function, argument, matrices)
    return matrices


def require_finite(function: str, argument: str, array: FloatArray) -> None:
    """Raise ``ValueError`` that names the argument where an entry is NaN or infinite."""
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(
            f"{function}: {argument} must be finite, got {bad} non-finite entries; "
            "remove NaN and infinity first"
        )


def require_shape(
    function: str, argument: str, array: FloatArray, expected: tuple[int, ...]
) -> None:
    """Raise ``ValueError`` that names the argument where its shape is not ``expected``."""
    if array.shape != expected:
        raise ValueError(
            f"{function}: {argument} must have shape {expected}, got {array.shape}; "
            "check which argument was transposed or left out"
        )


def map_matrices(
    function: Callable[..., tuple[npt.NDArray[np.generic], ...]], *batches: FloatArray
) -> tuple[npt.NDArray[np.generic], ...]:
    """Apply a function of single matrices to every element of equally batched arrays.

    All arrays have the same leading shape and the function gets one matrix of each.  For an empty
    batch the function is called once on matrices with ones on the diagonal, only to learn the
    shapes and dtypes of its results.
    """
    lead = batches[0].shape[:-2]
    count = int(np.prod(lead, dtype=np.int64))
    flat = [array.reshape((count, *array.shape[-2:])) for array in batches]
    if count == 0:
        probe = function(*(np.eye(*array.shape[-2:]) for array in batches))
        return tuple(np.empty((*lead, *part.shape), dtype=part.dtype) for part in probe)
    results = [function(*(array[i] for array in flat)) for i in range(count)]
    return tuple(
        np.stack([result[j] for result in results]).reshape((*lead, *results[0][j].shape))
        for j in range(len(results[0]))
    )


def symmetric_part(matrix: FloatArray) -> FloatArray:
    """``(M + M^T) / 2`` over the last two dimensions."""
    half: FloatArray = 0.5 * (matrix + np.swapaxes(matrix, -1, -2))
    return half


def per_matrix(scalar: FloatArray) -> FloatArray:
    """A scalar per matrix, ``(*,)``, made ready to multiply matrices ``(*, n, p)``."""
    return np.asarray(scalar, dtype=np.float64)[..., None, None]
