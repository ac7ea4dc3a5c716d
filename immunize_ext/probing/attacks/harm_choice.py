"""The attacker chooses the harm: of many tasks, the one that an extractor protects least.

A protection is made for the harms that its owner thought of. Whoever sees the extractor takes
another one: so what counts is the least slow-down over tasks that were not trained against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunize_ext.probing.attacks.slowdowns import compare_attack
from immunize_ext.probing.data.gram_equivalent import gram_equivalent
from immunize_ext.probing.data.task import Task
from immunize_ext.quantities import Slowdown
from immunize_ext.seams import Attack, Progress
from immunize_ext.worst_case import conditional_value_at_risk


@dataclass(frozen=True)
class HarmChoice:
    """What an attacker finds who may choose the harm.

    Attributes:
        slowdowns: By name of the task, the least slowed first. Tasks that are hardly learnt even
            without immunization are left out; there may be no other.
    """

    slowdowns: dict[str, Slowdown]

    @property
    def name(self) -> str:
        """The task that is slowed least."""
        return next(iter(self.slowdowns))

    @property
    def slowdown(self) -> Slowdown:
        """How much that is."""
        return next(iter(self.slowdowns.values()))

    def tail(self, share: float) -> float:
        """Geometric mean of the least slowed share of tasks; 1 is that of all. A lower bound."""
        logs = [math.log(max(found.ratio, 1e-300)) for found in self.slowdowns.values()]
        least = conditional_value_at_risk(torch.tensor(logs, dtype=torch.float64), share)
        return math.exp(float(least))

    def to_dict(self) -> dict[str, Any]:
        """What results hold."""
        return {
            "tasks": len(self.slowdowns),
            "least": self.name,
            "slowdown": self.slowdown.ratio,
            "is_lower_bound": self.slowdown.censored,
            "least_fifth": self.tail(0.2),
            "mean": self.tail(1.0),
        }


def choose_harm(
    theta: Tensor,
    pool: Sequence[Task],
    theta0: Tensor | None = None,
    *,
    attacker: Attack[Any, Any] | str = "gradient_descent",
    base_budget: int = 2000,
    limit: float = 128.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> HarmChoice:
    """Attack every task of a pool and rank them by slow-down, as an attacker would.

    Args:
        theta: The immunized extractor, shape ``(p, q)``.
        pool: The tasks to choose from; at least one.
        theta0: The extractor before; the identity when omitted.
        attacker: The attack, or its name.
        base_budget: Steps without immunization.
        limit: Largest slow-down looked for.
        seed: Seed of an attacker that draws.
        progress: Called with what was attacked and the share done so far.

    Returns:
        The choice.

    Raises:
        ValueError: If there is no task, or an argument is out of range.

    Note:
        Deterministic. The choice is made with hindsight, on the test parts: the attacker's best.

    Example:
        >>> from immunize_ext.probing.data import Problem, digits_task
        >>> from immunize_ext.probing.immunizers import ClosedFormImmunizer
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> theta = ClosedFormImmunizer(strength=30.0).fit(None, problem).theta
        >>> found = choose_harm(theta, [*problem.harmful, digits_task((0,), (1,))])
        >>> found.name, found.slowdown == min(found.slowdowns.values())
        ('digit 0 against 1', True)
    """
    if not pool:
        raise ValueError("choose_harm: pool must hold at least one task, got none")
    found = []
    for index, task in enumerate(pool):
        compared = compare_attack(
            gram_equivalent(task),
            theta,
            theta0,
            attacker=attacker,
            base_budget=base_budget,
            limit=limit,
            seed=seed,
        )
        if compared.base_steps:
            found.append((task.name, compared.slowdown))
        if progress is not None:
            progress(f"the attacker may choose: {task.name}", (index + 1) / len(pool))
    return HarmChoice(dict(sorted(found, key=lambda one: one[1])))
