r"""What a served feature loses to the number format it is sent in.

A server that rounds its features adds an error of covariance nu^2 I (after a rotation that mixes
coordinates; nu = u rms(z) / sqrt 3 for a format of unit roundoff u). The best linear predictor,
with any number of samples and any optimizer, keeps of the direction of variance s_i^2 and energy
v_i^2 the share s_i^2 / (s_i^2 + nu^2), since the error is in the test features too: its mean
squared error rises by

.. math:: \sum_i v_i^2 \frac{\nu^2}{s_i^2 + \nu^2}.

Who may send jittered copies of an input averages q answers and brings nu^2 down to nu^2 / q: the
price is q queries. Who holds the weights computes the features in a wider format and loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.probing.certificates.learning_curve import Spectrum

UNIT_ROUNDOFF: Mapping[str, float] = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "int8": 2.0**-7,
}
"""u of each format; that of int8 is half a step over the rms of a feature whose largest value is
twice its rms, as of an evenly spread one."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def served(z: Tensor, number_format: str) -> Tensor:
    """Features as a client gets them.

    Args:
        z: Features, shape ``(n, q)``.
        number_format: ``float32``, ``float16``, ``bfloat16``, or ``int8`` (symmetric, one scale a
            feature from its largest value).

    Returns:
        The rounded features, float64.

    Raises:
        ValueError: If the format is unknown.

    Example:
        >>> served(torch.tensor([[1.0, 0.1], [0.5, 127.0]]), "int8").tolist()
        [[1.0, 0.0], [0.5039370078740157, 127.0]]
    """
    wide = z.detach().to(torch.float64)
    if number_format in _DTYPES:
        return wide.to(_DTYPES[number_format]).to(torch.float64)
    if number_format != "int8":
        raise ValueError(
            f"served: number_format must be one of {', '.join(UNIT_ROUNDOFF)}, got "
            f"{number_format!r}"
        )
    scale = wide.abs().amax(0) / 127.0
    scale = torch.where(scale > 0.0, scale, 1.0)
    return (wide / scale).round() * scale


class FormatFloor(NamedTuple):
    """What a format leaves of a linear probe.

    Attributes:
        explained: Share of the targets' variance that the best linear predictor explains.
        explained_exact: The same from exact features.
        queries: Jittered queries an input that bring back half of what the format took; 1 where it
            takes less than half.
    """

    explained: float
    explained_exact: float
    queries: float


def format_floor(spectrum: Spectrum, mean_square: float, number_format: str) -> FormatFloor:
    """What is left of a task behind a number format, for every optimizer and any data.

    Args:
        spectrum: Of the task's features (:class:`~.learning_curve.Spectrum`).
        mean_square: Mean square of a feature, not centred: rms(z)^2.
        number_format: A name of :data:`UNIT_ROUNDOFF`.

    Returns:
        Shares of variance explained, and the price of averaging the rounding away.

    Raises:
        ValueError: If the format is unknown.

    Example:
        >>> variances, energies = torch.tensor([1.0, 1e-9]), torch.tensor([0.2, 0.8])
        >>> spectrum = Spectrum(variances, energies, noise=torch.tensor(0.0))
        >>> floor = format_floor(spectrum, 1.0, "float16")
        >>> floor.explained_exact, floor.explained < 0.21, floor.queries > 1
        (1.0, True, True)
    """
    if number_format not in UNIT_ROUNDOFF:
        raise ValueError(
            f"format_floor: number_format must be one of {', '.join(UNIT_ROUNDOFF)}, got "
            f"{number_format!r}"
        )
    a, energies, noise = (t.detach().to(torch.float64) for t in spectrum)
    total = float(energies.sum() + noise)
    error = UNIT_ROUNDOFF[number_format] ** 2 / 3.0 * mean_square

    def explained(nu_squared: float) -> float:
        return float((energies * a / (a + nu_squared)).sum()) / total if total > 0.0 else 0.0

    exact, rounded = explained(0.0), explained(error)
    queries = 1.0
    if rounded < exact / 2.0:
        low, high = 0.0, 600.0
        for _ in range(200):  # in log q; the share grows with q
            middle = (low + high) / 2.0
            if explained(error * math.exp(-middle)) < exact / 2.0:
                low = middle
            else:
                high = middle
        queries = math.exp(high)
    return FormatFloor(rounded, exact, queries)
