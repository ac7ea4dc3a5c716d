"""Argument checks and the loop over a batch, shared by the reference functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

EPS = float(np.finfo(np.float64).eps)
_SINGLE_EPS = float(np.finfo(np.float32).eps)


def eps_of(array: npt.ArrayLike) -> float:
    """Unit of rounding that a default tolerance is built from.

    float64 and integer input: eps of float64.  float32 and half types: eps of float32, since the
    operators treat half precision numbers as exact and compute in a wider type.
    """
    dtype = np.asarray(array).dtype
    if dtype.kind == "f" and dtype.itemsize < 8:
        return _SINGLE_EPS
    return EPS


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


def matrices_and_direction(
    function: str, argument: str, array: npt.ArrayLike, direction: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Both arguments of a Hessian-vector product, in float64 and of one shape."""
    matrices = as_matrices(function, argument, array)
    along = as_matrices(function, "direction", direction)
    require_shape(function, "direction", along, matrices.shape)
    return matrices, along


def map_matrices(function: Callable[..., tuple[Any, ...]], *batches: FloatArray) -> tuple[Any, ...]:
    """Apply a function of single matrices to every element of equally batched arrays.

    All arrays have the same leading shape and the function gets one matrix of each; it returns
    arrays and numbers.  For an empty batch the function is called once on matrices with ones on the
    diagonal, only to learn the shapes and dtypes of its results.
    """
    lead = batches[0].shape[:-2]
    count = int(np.prod(lead, dtype=np.int64))
    flat = [array.reshape((count, *array.shape[-2:])) for array in batches]
    if count == 0:
        probe = map(np.asarray, function(*(np.eye(*array.shape[-2:]) for array in batches)))
        return tuple(np.empty((*lead, *part.shape), dtype=part.dtype) for part in probe)
    columns = zip(*(function(*(array[i] for array in flat)) for i in range(count)), strict=True)
    stacked = (np.stack([np.asarray(part) for part in column]) for column in columns)
    return tuple(part.reshape((*lead, *part.shape[1:])) for part in stacked)


def symmetric_part(matrix: FloatArray) -> FloatArray:
    """``(M + M^T) / 2`` over the last two dimensions."""
    half: FloatArray = 0.5 * (matrix + np.swapaxes(matrix, -1, -2))
    return half


def per_matrix(scalar: FloatArray) -> FloatArray:
    """A scalar per matrix, ``(*,)``, made ready to multiply matrices ``(*, n, p)``."""
    return np.asarray(scalar, dtype=np.float64)[..., None, None]
