"""Argument checks shared by the operators: one message form, nothing numerical."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.ops.derivatives import payload

RankPolicy = Literal["numerical", "full"]


class SpectrumPolicy(NamedTuple):
    """Which singular values count, and which of them are one and the same."""

    rank_rtol: float
    cluster_rtol: float
    full_rank: bool


def require_floating_matrix(operator: str, name: str, value: Tensor) -> None:
    """Refuse anything but a real floating-point tensor of shape ``(*, n, p)`` with n, p >= 1."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}; "
            "convert it with torch.as_tensor"
        )
    if value.dtype.is_complex:
        raise ValueError(
            f"{operator}: {name} must have a real floating-point dtype, got {value.dtype}; the "
            "singular values of a + ib are those of the real matrix [[a, -b], [b, a]], each twice"
        )
    if not value.dtype.is_floating_point:
        raise ValueError(
            f"{operator}: {name} must have a real floating-point dtype, got {value.dtype}; "
            "convert it with .to(torch.float64)"
        )
    if value.dim() < 2 or value.shape[-1] == 0 or value.shape[-2] == 0:
        raise ValueError(
            f"{operator}: {name} must have shape (*, n, p) with n >= 1 and p >= 1, "
            f"got {tuple(value.shape)}"
        )
    if isinstance(value, torch.nn.Parameter) and value.dim() in (4, 5):
        # A batch of kernels of 3 x 3 is hardly what anyone means by the spectrum of a layer.
        raise ValueError(
            f"{operator}: {name} must be a matrix or a batch of them, got a parameter of shape "
            f"{tuple(value.shape)}, as a convolution has; pass convolution_matrix({name}), or "
            f"{name}.view_as({name}) if it is a batch"
        )


def _wrong_entries(value: Tensor) -> Tensor:
    """Which entries are NaN or infinite."""
    numbers = value.detach()
    if value.element_size() == 1:  # isfinite knows not all of the 8-bit types
        numbers = numbers.to(torch.float32)
    return ~torch.isfinite(numbers)


def not_finite(value: Tensor) -> bool:
    """Whether any entry is NaN or infinite. Reads the tensor on the host."""
    return any_true(_wrong_entries(value))


def first_true(wrong: Tensor) -> int:
    """Index of the first true entry of a batch, counted as if it had one dimension."""
    return int(wrong.flatten().to(torch.uint8).argmax())


def require_finite(operator: str, name: str, value: Tensor) -> None:
    """Refuse NaN and infinity, in a batch with the place. Reads the tensor on the host."""
    if not_finite(value):
        where = ""
        if value.dim() > 2:
            where = f" at batch index {first_true(_wrong_entries(value).flatten(-2).any(-1))}"
        raise ValueError(
            f"{operator}: {name} must be finite, got NaN or infinity{where}; "
            "look for an overflow upstream, float16 features for instance"
        )


def require_same_device(operator: str, named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse tensors that stand on different devices, naming the first two that differ."""
    first_name, first = named[0]
    for name, value in named[1:]:
        if value.device != first.device:
            raise ValueError(
                f"{operator}: {name} must be on the device of {first_name}, {first.device}, "
                f"got {value.device}; move it with .to({first_name}.device)"
            )


_EPS64 = float(torch.finfo(torch.float64).eps)
_EPS32 = float(torch.finfo(torch.float32).eps)


def resolution(dtype: torch.dtype) -> float:
    """Unit roundoff that default tolerances use; narrower types count as exact float32 numbers.

    ``max(n, p) * eps(bfloat16)`` exceeds 1 from 128 columns on and would leave no singular value;
    so would that of the 8-bit types from 4 on.
    """
    return _EPS64 if dtype == torch.float64 else _EPS32


def cluster_resolution(side: int, dtype: torch.dtype) -> float:
    """Default ``cluster_rtol``: what rounding makes of values that are equal.

    The values of a rotated multiple of an orthogonal matrix spread over up to 7 eps at every side
    from 2 to 64 (the worst of 300 each). But vectors are rotated into each other by eps / gap, so
    between gaps of 16 and 64 eps there is neither a cluster nor a pair of vectors to tell apart:
    what is closer than 64 eps counts as equal.
    """
    return min(max(side, 64) * resolution(dtype), 0.5)


def spectrum_policy(
    operator: str,
    name: str,
    value: Tensor,
    rank: str,
    rank_rtol: float | None,
    cluster_rtol: float | None,
) -> SpectrumPolicy:
    """Check a spectrum operator's arguments and fill in the default tolerances."""
    require_floating_matrix(operator, name, value)
    if rank not in ("numerical", "full"):
        raise ValueError(f"{operator}: rank must be 'numerical' or 'full', got {rank!r}")
    side, dtype = max(value.shape[-2:]), value.dtype
    for tolerance_name, tolerance in (("rank_rtol", rank_rtol), ("cluster_rtol", cluster_rtol)):
        if tolerance is not None and not (math.isfinite(tolerance) and 0.0 <= tolerance < 1.0):
            raise ValueError(
                f"{operator}: {tolerance_name} must be in [0, 1), relative to sigma_max, "
                f"got {tolerance}"
            )
    # A tolerance of 1 or more would drop sigma_max itself; only huge sides in float32 get there.
    return SpectrumPolicy(
        min(side * resolution(dtype), 0.5) if rank_rtol is None else float(rank_rtol),
        cluster_resolution(side, dtype) if cluster_rtol is None else float(cluster_rtol),
        rank == "full",
    )


def any_true(mask: Tensor) -> bool:
    """Whether any entry is true; under vmap, whether any is for any element of the batch.

    False where there are no numbers to read: meta tensors, and tracing for ``torch.compile``.
    """
    numbers = payload(mask)
    return numbers is not None and bool(numbers.any())


def require_positive(function: str, name: str, value: Tensor, expected: str = "positive") -> None:
    """Refuse numbers that are not positive. Reads them on the host, where there are any."""
    numbers = payload(value)
    # NaN fails every comparison, so the test is for what is allowed.
    if numbers is not None and not bool((numbers > 0).all()):
        raise ValueError(f"{function}: {name} must be {expected}, got {numbers.tolist()}")
