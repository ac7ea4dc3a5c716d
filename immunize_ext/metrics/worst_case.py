"""The worst case over attackers: a protection is as good as the attacker who minds it least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from immunize_ext.metrics.convergence import Slowdown, slowdown


class AttackerSteps(NamedTuple):
    """Steps of one attacker.

    Attributes:
        base_steps: Without immunization.
        steps: With it; ``None`` if the budget ran out.
        budget: Steps that it was given with immunization.
    """

    base_steps: int
    steps: int | None
    budget: int


class WorstCase(NamedTuple):
    """What is left of a protection when the attacker may choose how to attack.

    Attributes:
        least_slowed: The attacker whose own number of steps grows least.
        least_slowdown: By how much it grows.
        fastest_base: The attacker who needs fewest steps without immunization.
        fastest: The attacker who needs fewest steps with it.
        slowdown: Steps of ``fastest`` with immunization over steps of ``fastest_base`` without:
            what a free choice of attacker costs. Never above ``fastest_base``'s own slow-down.
    """

    least_slowed: str
    least_slowdown: Slowdown
    fastest_base: str
    fastest: str
    slowdown: Slowdown


def worst_case(attackers: Mapping[str, AttackerSteps]) -> WorstCase:
    """Find the attackers that a protection does worst against.

    Steps of different attackers are counted alike, although a step of one may cost more time than
    a step of another.

    Args:
        attackers: Steps by name; ``AttackerSteps(c.base_steps, c.steps, c.immunized.steps)`` for an
            :class:`immunize_ext.attacks.AttackComparison` c.

    Returns:
        The worst cases. A slow-down cut off by the budget is a lower bound and counts as such.

    Raises:
        ValueError: If there is no attacker.

    Example:
        >>> case = worst_case(
        ...     {"gd": AttackerSteps(100, 3000, 10000), "cg": AttackerSteps(10, 20, 1000)}
        ... )
        >>> case.least_slowed, str(case.least_slowdown), case.fastest, str(case.slowdown)
        ('cg', '2.0x', 'cg', '2.0x')
    """
    if not attackers:
        raise ValueError("worst_case: attackers must hold at least one attacker, got none")
    ratios = {name: slowdown(a.steps, a.base_steps, a.budget) for name, a in attackers.items()}
    least = min(ratios, key=lambda name: (ratios[name].ratio, ratios[name].censored))
    fastest_base = min(attackers, key=lambda name: attackers[name].base_steps)

    def reach(name: str) -> tuple[int, bool]:
        attacker = attackers[name]
        censored = attacker.steps is None
        return (attacker.budget if attacker.steps is None else attacker.steps), censored

    # One who ran out of budget may have needed any number above it.
    fastest = min(attackers, key=reach)
    with_immunization = attackers[fastest]
    return WorstCase(
        least_slowed=least,
        least_slowdown=ratios[least],
        fastest_base=fastest_base,
        fastest=fastest,
        slowdown=slowdown(
            with_immunization.steps, attackers[fastest_base].base_steps, with_immunization.budget
        ),
    )
