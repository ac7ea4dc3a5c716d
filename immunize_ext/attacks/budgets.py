"""What an attacker has got after a given number of steps, without and with immunization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from immunize_ext.attacks.linear_probe import AttackCurve, checked_attacker, sweep
from immunize_ext.attacks.losses import LossName
from immunize_ext.data.task import Task


class BudgetOutcome(NamedTuple):
    """One attacker at one budget.

    Attributes:
        steps: The budget.
        loss_without: Test loss without immunization.
        loss_with: Test loss with it.
        accuracy_without: Test accuracy without; ``None`` for a regression task.
        accuracy_with: The same with immunization.
    """

    steps: int
    loss_without: float
    loss_with: float
    accuracy_without: float | None
    accuracy_with: float | None


def _outcome(curves: list[AttackCurve], step: int) -> tuple[float, float | None]:
    losses = torch.stack([curve.test_loss[step] for curve in curves]).nan_to_num(nan=math.inf)
    chosen = curves[int(losses.argmin())]
    accuracy = None if chosen.test_accuracy is None else float(chosen.test_accuracy[step])
    return float(losses.min()), accuracy


def attack_at_budgets(
    task: Task,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    budgets: Sequence[int] = (1, 3, 10, 30, 100, 300, 1000),
    attacker: str = "gradient_descent",
    loss: LossName = "squared",
    learning_rates: Sequence[float] | None = None,
) -> list[BudgetOutcome]:
    """Measure what an attacker gets for a budget of steps, judged on the task's test part.

    A learning rate is tuned anew for every budget, without and with immunization over the same
    grid: the one with the lowest test loss at that step.

    Args:
        task: What the attacker wants to learn.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The extractor before; the identity when omitted.
        budgets: Numbers of steps, each at least 1.
        attacker: Name of an attacker in :data:`immunize_ext.attacks.ATTACKERS`.
        loss: As for :func:`immunize_ext.attacks.attack`.
        learning_rates: As for :func:`immunize_ext.attacks.attack`.

    Returns:
        One outcome per budget, in ascending order.

    Raises:
        ValueError: If a budget is below 1 or none is given, or as
            :func:`immunize_ext.attacks.attack`.

    Note:
        Deterministic; computed in float64.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> y = torch.ones(2, dtype=torch.float64)
        >>> theta = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> outcome = attack_at_budgets(Task("ones", x, y, x, y), theta, budgets=[1])[0]
        >>> outcome.loss_without, outcome.loss_with
        (0.0, 0.28125)
    """
    if not budgets or min(budgets) < 1:
        raise ValueError(
            f"attack_at_budgets: budgets must be numbers of at least 1 step, got {list(budgets)}"
        )
    _, chosen, rates = checked_attacker("attack_at_budgets", attacker, loss, task, learning_rates)
    last = max(budgets)
    without, immunized = (
        sweep(task, extractor, attacker, chosen, rates, last, None) for extractor in (theta0, theta)
    )
    found = []
    for steps in sorted(set(budgets)):
        before, after = _outcome(without, steps), _outcome(immunized, steps)
        found.append(BudgetOutcome(steps, before[0], after[0], before[1], after[1]))
    return found
