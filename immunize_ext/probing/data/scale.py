"""Features of any size: a power of two brings them to where their squares keep all digits.

Condition numbers, slow-downs and learning curves see no scale of the features, but squares of 1e160
leave the range of float64, and those of 1e-170 are 0. Multiplying by a power of two changes no
digit, so what is computed of the scaled features is what exact arithmetic would give of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from immunize_ext.probing.data.task import Task

# Within 2^-200 and 2^200 sums of fourth powers stay in range, and nothing is scaled: what depends
# on the size of the features, as a learning rate does, keeps its meaning there.
_LIMIT = 200


def exponent_of(*parts: Tensor) -> int:
    """The e with 2^(e-1) <= largest entry < 2^e, at least -1000; 0 if all are 0.

    Example:
        >>> import torch
        >>> exponent_of(torch.tensor([3.0, -5.0])), exponent_of(torch.zeros(2))
        (3, 0)
    """
    peak = max(float(part.detach().abs().max()) for part in parts)
    return max(math.frexp(peak)[1], -1000) if 0.0 < peak < math.inf else 0


def unit_scale(*parts: Tensor) -> float:
    """The power of two that brings the largest entry between 1/2 and 1; 1 if all are 0.

    Example:
        >>> import torch
        >>> unit_scale(torch.tensor([3.0, -5.0]))
        0.125
    """
    return 2.0 ** -exponent_of(*parts)


def excess_exponent(tasks: Sequence[Task]) -> int:
    """The exponent of the largest input of several tasks where it is out of range, else 0."""
    exponent = exponent_of(*(x for task in tasks for x in (task.x_train, task.x_test)))
    return exponent if abs(exponent) > _LIMIT else 0


def in_range(tasks: Sequence[Task]) -> list[Task]:
    """Tasks whose inputs have squares that float64 holds.

    Args:
        tasks: Tasks of the same features.

    Returns:
        The tasks themselves, or with inputs multiplied by one power of two.

    Example:
        >>> import torch
        >>> x, y = 1e200 * torch.eye(2).double(), torch.ones(2).double()
        >>> float(in_range([Task("huge", x, y, x, y)])[0].x_train.max()) < 1.0
        True
    """
    exponent = excess_exponent(tasks)
    if exponent == 0:
        return list(tasks)
    scale = 2.0**-exponent
    return [replace(t, x_train=t.x_train * scale, x_test=t.x_test * scale) for t in tasks]
