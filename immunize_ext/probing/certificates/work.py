r"""How many times slower an attacker can be made, in work, when one factorisation is open to him.

Squared loss, n samples, p features. Forming the Hessian costs n p^2 multiplications and additions,
its Cholesky factor p^3 / 3, one step of gradient descent 4 n p: two products with the features. So
whitening and one step cost as much as

.. math:: \frac{2 n p^2 / 2 + p^3 / 3}{4 n p} + 1 = \frac{p}{4} + \frac{p^2}{12 n} + 1

steps of gradient descent, whatever theta is. Where the attacker needed T_0 steps before, no
invertible theta makes him more than this over T_0 times slower. Below 1, whitening is even faster
than gradient descent was without any immunization.
"""

from __future__ import annotations


def factorisation_steps(samples: int, features: int) -> float:
    """What whitening and one step cost, in steps of gradient descent.

    Args:
        samples: n, at least 1.
        features: p, at least 1.

    Returns:
        p / 4 + p^2 / (12 n) + 1.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> round(factorisation_steps(200, 79), 1)
        23.4
    """
    if samples < 1 or features < 1:
        raise ValueError(
            f"factorisation_steps: samples and features must be at least 1, got {samples} and "
            f"{features}"
        )
    return features / 4 + features**2 / (12 * samples) + 1


def work_cap(samples: int, features: int, steps_before: int) -> float:
    """The largest slow-down, in work, of an attacker who may factorise once.

    Args:
        samples: n.
        features: p.
        steps_before: T_0, steps of gradient descent that the attack took without immunization.

    Returns:
        The cap; below 1 where whitening is faster than gradient descent was before.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> round(work_cap(200, 79, 77), 2)
        0.3
    """
    if steps_before < 1:
        raise ValueError(f"work_cap: steps_before must be at least 1, got {steps_before}")
    return factorisation_steps(samples, features) / steps_before
